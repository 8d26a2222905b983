"""Every scalarizer that TorchJD exports, against loops with the rules' formulas written here."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchjd.scalarization
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torchjd.scalarization import DWA, FAMO, UW, Scalarizer

import mtlopt
import reference
from problems import (
    TASKS,
    Network,
    assert_equal,
    batches,
    make_losses,
    snapshot,
    step_overflowing,
    twins,
)
from spawned import start

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
IDEAL = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Constant": (WEIGHTS,),
    "COSMOS": (2.0, WEIGHTS),
    "FAMO": (3, IDEAL / 10),
    "IMTLL": (3,),
    "PBI": (5.0, WEIGHTS, IDEAL),
    "STCH": (0.1, WEIGHTS, IDEAL),
    "UW": (3,),
}
NAMES = [
    name
    for name in torchjd.scalarization.__all__
    if inspect.isclass(kind := getattr(torchjd.scalarization, name))
    and issubclass(kind, Scalarizer)
    and kind is not Scalarizer
]
STATEFUL = ("DWA", "FAMO", "IMTLL", "UW")
EPOCH = 2


def make_rule(name: str) -> Any:
    rule = getattr(torchjd.scalarization, name)(*ARGUMENTS.get(name, ()))
    return rule.double()


class ByHand:
    """The rules' formulas from their papers, with what they learn and remember."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.learned = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.epochs: list[Tensor] = []
        self.of_this_epoch: list[Tensor] = []
        self.adam = Adam([self.learned], lr=0.025, weight_decay=1e-3)
        self.before = torch.zeros(())
        self.parameters = [self.learned] if name in ("IMTLL", "UW") else []

    def __call__(self, x: Tensor) -> Tensor:
        if self.name == "DWA":
            self.of_this_epoch.append(x.detach())
        if self.name == "FAMO":
            self.before = x.detach() - IDEAL / 10 + 1e-8
        loss: Tensor = getattr(self, self.name)(x)
        return loss

    def Sum(self, x: Tensor) -> Tensor:
        return x[0] + x[1] + x[2]

    def Mean(self, x: Tensor) -> Tensor:
        return (x[0] + x[1] + x[2]) / 3

    def Constant(self, x: Tensor) -> Any:
        return WEIGHTS @ x

    def COSMOS(self, x: Tensor) -> Any:
        return WEIGHTS @ x - 2 * (WEIGHTS @ x) / (WEIGHTS.norm() * x.norm())

    def GeometricMean(self, x: Tensor) -> Any:
        return (x[0] * x[1] * x[2]) ** (1 / 3)

    def Random(self, x: Tensor) -> Any:
        return torch.randn(3, dtype=torch.float64).softmax(0) @ x

    def PBI(self, x: Tensor) -> Any:
        along = WEIGHTS / WEIGHTS.norm()
        distance = (x - IDEAL) @ along
        return distance + 5 * (x - IDEAL - distance * along).norm()

    def STCH(self, x: Tensor) -> Tensor:
        return 0.1 * (WEIGHTS * (x - IDEAL) / 0.1).exp().sum().log()

    def UW(self, x: Tensor) -> Tensor:
        return (x / (2 * self.learned.exp()) + self.learned / 2).sum()

    def IMTLL(self, x: Tensor) -> Tensor:
        return (self.learned.exp() * x - self.learned).sum()

    def DWA(self, x: Tensor) -> Tensor:
        weights = torch.ones(3, dtype=torch.float64)
        if len(self.epochs) > 1:
            rates = (self.epochs[-1] / self.epochs[-2] / 2.0).exp()
            weights = 3 * rates / rates.sum()
        return weights @ x

    def FAMO(self, x: Tensor) -> Tensor:
        z, d = self.learned.detach().softmax(0), x - IDEAL / 10 + 1e-8
        return (z * d.log()).sum() / (z / d).sum().detach()

    def after(self, x: Tensor) -> None:
        """FAMO: w moves against the loss whose decrease in the logarithm was the largest."""
        delta = self.before.log() - (x - IDEAL / 10 + 1e-8).log()
        z = self.learned.detach().softmax(0)
        self.learned.grad = (z.diag() - z.outer(z)) @ delta
        self.adam.step()

    def end_epoch(self) -> None:
        self.epochs.append(torch.stack(self.of_this_epoch).mean(0))
        self.of_this_epoch = []


def make(model: Network, rule: Any, base: Any = SGD, **options: Any) -> mtlopt.Scalarized:
    return mtlopt.Scalarized(base(model.parameters(), lr=0.05), TASKS, rule, **options)


def end_epoch(rule: Any, step: int) -> None:
    if isinstance(rule, DWA) and step % EPOCH == EPOCH - 1:
        rule.step()


def train(
    optimizer: mtlopt.Scalarized, model: Any, data: Sequence[Any], first: int = 0
) -> dict[str, Tensor]:
    for step, (x, y) in enumerate(data, first):
        torch.manual_seed(step)  # Random draws.
        optimizer.step(make_losses(model), x, y)
        end_epoch(optimizer.scalarizer, step)
    return weights_of(optimizer, model)


def weights_of(optimizer: mtlopt.Scalarized, model: Network) -> dict[str, Tensor]:
    own = {f"rule {n}": p for n, p in optimizer.scalarizer.named_parameters()}
    return snapshot(model) | {n: p.detach().clone() for n, p in own.items()}


def train_by_hand(name: str, model: Network, data: Sequence[Any]) -> ByHand:
    rule = ByHand(name)
    plain = SGD([*model.parameters(), *rule.parameters], lr=0.05)
    for step, (x, y) in enumerate(data):
        torch.manual_seed(step)
        losses = make_losses(model)
        reference.scalarized(plain, losses, TASKS, x, y, scalarize=rule)
        if name == "FAMO":
            with torch.no_grad():
                rule.after(torch.stack(list(losses(TASKS, x, y).values())))
        if name == "DWA" and step % EPOCH == EPOCH - 1:
            rule.end_epoch()
    return rule


def test_the_package_exports_what_is_tested_here() -> None:
    assert len(NAMES) >= 12
    assert all(hasattr(ByHand, name) for name in NAMES)


@pytest.mark.parametrize("forwards", ["joint", "per-task"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_its_loop_by_hand(name: str, forwards: Any) -> None:
    """Eight steps, and so four of DWA's epochs."""
    expected, model = twins()
    data = batches(8)
    by_hand = train_by_hand(name, expected, data)
    optimizer = make(model, make_rule(name), forwards=forwards)
    train(optimizer, model, data)
    # PBI adds 1e-12 below a root.
    rtol, atol = (1e-7, 1e-9) if name == "PBI" else (1e-12, 1e-13)
    torch.testing.assert_close(snapshot(model), snapshot(expected), rtol=rtol, atol=atol)
    own = [*optimizer.scalarizer.parameters()]
    assert len(own) == (name in ("FAMO", "IMTLL", "UW"))
    for parameter in own:
        expected_own = by_hand.learned.detach()
        torch.testing.assert_close(parameter.detach(), expected_own, rtol=rtol, atol=atol)
        assert parameter.detach().any()


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_is_called_once_a_step(name: str) -> None:
    """Twice would count twice in an average of DWA's, and hide the losses before FAMO's step."""
    model, rule, calls = Network(), make_rule(name), []
    rule.register_forward_hook(lambda *_: calls.append(1))
    optimizer = make(model, rule)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    optimizer.step(make_losses(model), micro_batches=[(x, y), (x, y)])
    assert len(calls) == 2


def counted(model: Network, *lacking: str) -> Callable[..., Any]:
    """Losses with the number of rows."""
    plain = make_losses(model)

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Any]:
        found = plain(tasks, x, y)
        return {t: (v, len(x)) for t, v in found.items() if t not in lacking}

    return losses


def rows(x: Tensor, y: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, Any]:
    return x[start:stop], {task: target[start:stop] for task, target in y.items()}


@pytest.mark.parametrize("name", NAMES)
def test_over_micro_batches_the_rule_sees_the_averages(name: str) -> None:
    """Of unequal counts; the step is the one on the whole batch."""
    whole, model = twins()
    optimizers = make(whole, make_rule(name)), make(model, make_rule(name))
    for step, (x, y) in enumerate(batches(6)):
        parts = [rows(x, y, 0, 1), rows(x, y, 1, 4), rows(x, y, 4, 6)]
        torch.manual_seed(step)
        values = optimizers[0].step(make_losses(whole), x, y)
        torch.manual_seed(step)
        averages = optimizers[1].step(counted(model), micro_batches=parts)
        torch.testing.assert_close(averages, values)
        for optimizer in optimizers:
            end_epoch(optimizer.scalarizer, step)
    torch.testing.assert_close(
        weights_of(optimizers[0], whole), weights_of(optimizers[1], model), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "FAMO"])
def test_ready_losses_and_backward_make_the_same_step(name: str) -> None:
    models = Network(), Network(), Network()
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizers = [make(model, make_rule(name)) for model in models]
    for step, (x, y) in enumerate(batches(6)):
        losses = [make_losses(model)(TASKS, x, y) for model in models]
        torch.manual_seed(step)
        optimizers[0].step(make_losses(models[0]), x, y)
        torch.manual_seed(step)
        optimizers[1].step(losses[1])
        torch.manual_seed(step)
        optimizers[2].zero_grad()
        optimizers[2].backward(losses[2])
        optimizers[2].step()
        for optimizer in optimizers:
            end_epoch(optimizer.scalarizer, step)
    for optimizer, model in zip(optimizers[1:], models[1:], strict=True):
        assert_equal(weights_of(optimizer, model), weights_of(optimizers[0], models[0]))


def test_a_rule_that_learns_after_the_step_wants_a_function() -> None:
    model = Network()
    optimizer, start_of = make(model, FAMO(3).double()), snapshot(model)
    ready = make_losses(model)(TASKS, *batches(1)[0])
    for call in (optimizer.step, optimizer.backward):
        with pytest.raises(TypeError, match=r"FAMO, which learns from the losses after the step"):
            call(ready)
    assert_equal(snapshot(model), start_of)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("base", [SGD, Adam, AdamW])
def test_the_rules_parameters_become_a_group_without_decay(base: Any, named: bool) -> None:
    model, rule = Network(), make_rule("UW")
    given = model.named_parameters() if named else model.parameters()
    own = base(given, lr=0.1, weight_decay=0.5)
    optimizer = mtlopt.Scalarized(own, TASKS, rule)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0.0)
    assert [id(p) for p in second["params"]] == [id(rule.log_var)]
    assert second.get("param_names", ["scalarizer.log_var"]) == ["scalarizer.log_var"]
    assert ("param_names" in second) is named
    mtlopt.Scalarized(own, TASKS, rule)  # A second time they are held already.
    assert len(own.param_groups) == 2


def test_parameters_that_the_optimizer_holds_stay_where_they_are() -> None:
    model, rule = Network(), make_rule("UW")
    base = SGD([*model.parameters(), *rule.parameters()], lr=0.1, weight_decay=0.5)
    optimizer = mtlopt.Scalarized(base, TASKS, rule)
    assert len(optimizer.param_groups) == 1
    optimizer.step(make_losses(model), *batches(1)[0])
    assert rule.log_var.detach().any()


def test_a_rule_that_keeps_its_parameters_gives_none_away() -> None:
    assert len(make(Network(), FAMO(3)).param_groups) == 1


def by_file(optimizer: mtlopt.Scalarized, model: Network) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    later = make(twin, make_rule(type(optimizer.scalarizer).__name__), Adam)
    later.load_state_dict(torch.load(file, weights_only=True))
    return later, twin


def by_copy(optimizer: mtlopt.Scalarized, model: Network) -> Any:
    return copy.deepcopy((optimizer, model))


def by_pickle(optimizer: mtlopt.Scalarized, model: Network) -> Any:
    return pickle.loads(pickle.dumps((optimizer, model)))


@pytest.mark.parametrize("transport", [by_file, by_copy, by_pickle])
@pytest.mark.parametrize("name", NAMES)
def test_it_resumes_bit_for_bit(name: str, transport: Any) -> None:
    """In the middle of one of DWA's epochs; FAMO's own Adam too."""
    model = Network()
    optimizer = make(model, make_rule(name), Adam)
    data = batches(9)
    train(optimizer, model, data[:5])
    later, twin = transport(optimizer, model)
    assert later.scalarizer is not optimizer.scalarizer
    expected = train(optimizer, model, data[5:], first=5)
    assert_equal(train(later, twin, data[5:], first=5), expected)


def test_the_state_of_another_scalarizer_is_refused_and_changes_nothing() -> None:
    model = Network()
    optimizer = make(model, make_rule("UW"))
    state = copy.deepcopy(optimizer.state_dict())
    state["mtlopt"]["scalarizer"]["parameters"] = [torch.ones(2)]
    with pytest.raises(ValueError, match="of the same scalarizer"):
        optimizer.load_state_dict(state)
    assert not optimizer.scalarizer.log_var.detach().any()  # type: ignore[operator]  # a tensor


@pytest.mark.parametrize("form", ["function", "per-task", "imperative", "micro-batches"])
@pytest.mark.parametrize("name", ["UW", "IMTLL"])
def test_rules_with_a_parameter_for_each_task_may_miss_one(name: str, form: str) -> None:
    """By hand with a parameter for each task, which momentum and decay do not move meanwhile."""
    model, expected = twins()
    rule = make_rule(name)
    base = SGD([*model.parameters(), *rule.parameters()], lr=0.05, momentum=0.9, weight_decay=0.1)
    forwards: Any = "per-task" if form == "per-task" else "joint"
    optimizer = mtlopt.Scalarized(base, TASKS, rule, forwards=forwards)
    own = {t: torch.zeros((), dtype=torch.float64, requires_grad=True) for t in TASKS}
    parameters = [*expected.parameters(), *own.values()]
    plain = SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
    for i, (x, y) in enumerate(batches(6)):
        lacking = {1: ("b",), 3: ("a", "c"), 4: ("b",)}.get(i, ())
        present = [task for task in TASKS if task not in lacking]
        plain.zero_grad()
        terms = [
            v / (2 * own[t].exp()) + own[t] / 2 if name == "UW" else own[t].exp() * v - own[t]
            for t, v in make_losses(expected)(present, x, y).items()
        ]
        torch.stack(terms).sum().backward()
        plain.step()
        if form == "imperative":
            optimizer.zero_grad()
            optimizer.backward(counted(model, *lacking)(TASKS, x, y))
            optimizer.step()
        elif form == "micro-batches":
            parts = [rows(x, y, 0, 2), rows(x, y, 2, 6)]
            optimizer.step(counted(model, *lacking), micro_batches=parts)
        else:
            optimizer.step(counted(model, *lacking), x, y)
        torch.testing.assert_close(snapshot(model), snapshot(expected), rtol=1e-10, atol=1e-12)
        (learned,) = rule.parameters()
        by_hand = torch.stack([*own.values()]).detach()
        torch.testing.assert_close(learned.detach(), by_hand, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["UW", "IMTLL"])
def test_an_absent_tasks_parameter_and_moments_stay_to_the_bit(name: str) -> None:
    """Under a class whose moments decay; nor after a backward pass that was not followed by one."""
    model = Network()
    optimizer = make(model, make_rule(name), Adam)
    data = batches(3)
    optimizer.step(make_losses(model), *data[0])
    (learned,) = optimizer.scalarizer.parameters()
    state = optimizer.state[learned]
    before = [t.detach().clone() for t in (learned, state["exp_avg"], state["exp_avg_sq"])]
    optimizer.backward(counted(model, "b")(TASKS, *data[1]))
    optimizer.backward(counted(model, "a", "b")(TASKS, *data[1]))
    optimizer.step()
    after = [t.detach().clone() for t in (learned, state["exp_avg"], state["exp_avg_sq"])]
    for old, new in zip(before, after, strict=True):
        assert (old == new).tolist() == [False, True, False]
    optimizer.zero_grad()
    optimizer.backward(counted(model, "c")(TASKS, *data[2]))
    optimizer.zero_grad()
    optimizer.step(make_losses(model), *data[2])
    assert not (learned == after[0]).any()


@pytest.mark.parametrize("name", ["UW", "DWA", "FAMO"])
def test_a_load_that_fails_late_changes_nothing(name: str) -> None:
    """The rule's parameters and state are loaded in place, before the generator fails."""
    model = Network()
    optimizer = make(model, make_rule(name))
    train(optimizer, model, batches(2))
    before = copy.deepcopy(optimizer.state_dict())
    other = Network()
    trained = make(other, make_rule(name))
    train(trained, other, batches(5))
    state = copy.deepcopy(trained.state_dict())
    state["mtlopt"]["generator"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert repr(after["mtlopt"]) == repr(before["mtlopt"]) != repr(trained.state_dict()["mtlopt"])
    assert repr(after["state"]) == repr(before["state"])


@pytest.mark.parametrize("name", ["DWA", "FAMO", "Constant", "STCH"])
def test_what_knows_the_tasks_by_their_places_refuses_to_miss_one(name: str) -> None:
    model = Network()
    optimizer = make(model, make_rule(name))
    before = weights_of(optimizer, model)
    with pytest.raises(ValueError, match=r"must see every task.*Absent from this batch: \['b'\]"):
        optimizer.step(counted(model, "b"), *batches(1)[0])
    assert_equal(weights_of(optimizer, model), before)


@pytest.mark.parametrize("name", ["Mean", "GeometricMean"])
def test_others_are_applied_to_the_present_losses(name: str) -> None:
    model = Network()
    optimizer = make(model, make_rule(name))
    x, y = batches(1)[0]
    a, _, c = make_losses(model)(TASKS, x, y).values()
    loss = (a + c) / 2 if name == "Mean" else (a * c).sqrt()
    expected = torch.autograd.grad(loss, list(model.trunk.parameters()))
    head = snapshot(model)["heads.b.weight"]
    assert list(optimizer.step(counted(model, "b"), x, y)) == ["a", "c"]
    torch.testing.assert_close([p.grad for p in model.trunk.parameters()], [*expected])
    assert torch.equal(snapshot(model)["heads.b.weight"], head)
    assert optimizer.diagnostics()["coefficients"].isnan().tolist() == [False, True, False]


def test_with_no_task_present_nothing_moves() -> None:
    model = Network()
    optimizer = make(model, make_rule("DWA"))
    before = copy.deepcopy(optimizer.state_dict())
    assert optimizer.step(counted(model, *TASKS), *batches(1)[0]) == {}
    assert optimizer.state_dict()["mtlopt"]["scalarizer"] == before["mtlopt"]["scalarizer"]


def test_a_group_is_one_value() -> None:
    """The sum of its tasks' losses."""
    model = Network()
    optimizer = mtlopt.Scalarized(
        SGD(model.parameters(), lr=0.05), [("a", "b"), "c"], make_rule("GeometricMean")
    )
    x, y = batches(1)[0]
    a, b, c = make_losses(model)(TASKS, x, y).values()
    expected = torch.autograd.grad(((a + b) * c).sqrt(), list(model.parameters()))
    optimizer.step(make_losses(model), x, y)
    torch.testing.assert_close([p.grad for p in model.parameters()], [*expected])


def test_the_coefficients_are_the_slopes() -> None:
    model = Network()
    optimizer = make(model, make_rule("Constant"))
    assert optimizer.diagnostics() == {}
    optimizer.step(make_losses(model), *batches(1)[0])
    assert torch.equal(optimizer.diagnostics()["coefficients"], WEIGHTS)


@pytest.mark.parametrize("imperative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_scaler_changes_nothing_but_the_steps_that_overflow(name: str, imperative: bool) -> None:
    """The rule sees losses without the scale, which is a power of two; and keeps its state."""
    if imperative and name == "FAMO":
        pytest.skip("takes no ready losses")
    plain, model = twins()
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reference, optimizer = make(plain, make_rule(name)), make(model, make_rule(name), scaler=amp)
    for step, (x, y) in enumerate(batches(5)):
        before = weights_of(optimizer, model), str(optimizer.state_dict()["mtlopt"]["scalarizer"])
        ready = make_losses(model)(TASKS, x, y)
        # FAMO divides by the loss, so a large one alone makes no large gradient.
        large = math.inf if name == "FAMO" else 1e308
        bad = {t: v * (large if t == "b" else 1) for t, v in ready.items()}
        if imperative:
            optimizer.zero_grad()
            step_overflowing(optimizer, ready, amp, imperative)
            optimizer.zero_grad()
        else:
            optimizer.step((lambda names, found=bad: found) if name == "FAMO" else bad)
        assert_equal(weights_of(optimizer, model), before[0])
        if not imperative:
            assert str(optimizer.state_dict()["mtlopt"]["scalarizer"]) == before[1]
        torch.manual_seed(step)
        reference.step(make_losses(plain), x, y)
        torch.manual_seed(step)
        if imperative:
            scaled = make_losses(model)(TASKS, x, y)
            optimizer.backward({t: amp.scale(v) for t, v in scaled.items()})
            amp.step(optimizer)
            amp.update()
        else:
            optimizer.step(make_losses(model), x, y)
        for own in (reference, optimizer):
            end_epoch(own.scalarizer, step)
    assert amp.get_scale() == 1024.0 / 2**5
    expected = weights_of(reference, plain)
    torch.testing.assert_close(weights_of(optimizer, model), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_rule_that_is_not_finite_says_so_before_anything_moves(when: str) -> None:
    """A negative loss, of a policy for one, has no logarithm: every weight would become NaN."""
    w = torch.ones(2, requires_grad=True)
    optimizer = mtlopt.Scalarized(SGD([w], lr=0.01), ["a", "b"], FAMO(2))

    def losses(names: Sequence[str], sign: float) -> dict[str, Tensor]:
        return {"a": w.square().sum(), "b": sign * w.sum()}

    if when != "at first":
        optimizer.step(losses, 1.0)
    before, values = w.tolist(), [(w**2).sum().item(), -w.sum().item()]
    with pytest.raises(ValueError, match=r"the domain of FAMO.*'b': -[12]\.") as raised:
        optimizer.step(losses, -1.0)
    assert all(str(value)[:5] in str(raised.value) for value in values)
    assert w.tolist() == before
    optimizer.step(losses, 1.0)
    assert w.isfinite().all()
    assert w.tolist() != before


def test_losses_that_differentiate_by_their_inputs_are_seen_after_the_step() -> None:
    """A physics-informed network's residual needs a graph where the losses are asked once more."""
    model = torch.nn.Linear(1, 1).double()
    rule = FAMO(2).double()
    optimizer = mtlopt.Scalarized(SGD(model.parameters(), lr=0.1), ["slope", "value"], rule)
    x = torch.tensor([[0.5], [2.0]], dtype=torch.float64)

    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        inputs = x.clone().requires_grad_()
        u = model(inputs)
        (slope,) = torch.autograd.grad(u.sum(), inputs, create_graph=True)
        both = {"slope": (slope - 3).square().mean(), "value": u.square().mean() + 0.1}
        return {task: both[task] for task in tasks}

    for _ in range(2):
        seen: list[Tensor] = []
        with mock.patch.object(rule, "update", side_effect=seen.append):
            optimizer.step(losses)
        weight, bias = model.weight.item(), model.bias.item()
        mean = sum((weight * each + bias) ** 2 for each in (0.5, 2.0)) / 2
        expected = torch.tensor([(weight - 3) ** 2, mean + 0.1], dtype=torch.float64)
        torch.testing.assert_close(seen, [expected])
        assert not seen[0].requires_grad


def test_half_precision_losses_meet_the_rule_in_single() -> None:
    w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    seen = []
    rule = torchjd.scalarization.Mean()
    rule.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    optimizer = mtlopt.Scalarized(SGD([w], lr=0.1), ["a", "b"], rule)
    optimizer.step({"a": w.sum(), "b": (w**2).sum().float()})
    assert seen == [torch.float32]


def test_other_objects_and_closures_are_refused() -> None:
    model = Network()
    with pytest.raises(TypeError, match="`scalarizer` must be an instance of torchjd"):
        make(model, torchjd.aggregation.UPGrad())
    with pytest.raises(ValueError, match="does not support optimizers that require a closure"):
        make(model, UW(3), torch.optim.LBFGS)


def work(rank: int, folder: str) -> None:
    """Two ranks with unequal parts of a batch, and with other weights to begin with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name in NAMES:
        torch.manual_seed(rank)
        model = Network()
        optimizer = make(model, make_rule(name), process_group=dist.group.WORLD)
        for step, (x, y) in enumerate(batches(5)):
            own = (0, 2) if rank == 0 else (2, 6)
            middle = sum(own) // 2
            parts = [rows(x, y, own[0], middle), rows(x, y, middle, own[1])]
            if step % 2:
                optimizer.step(counted(model), micro_batches=parts)
            else:
                optimizer.step(counted(model), *rows(x, y, *own))
            end_epoch(optimizer.scalarizer, step)
        found[name] = weights_of(optimizer, model)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_take_the_step_of_the_joined_batch(tmp_path: Path) -> None:
    """The rule sees losses averaged over the ranks; random weights are the same on both."""
    start(work, str(tmp_path), ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in NAMES:
        assert_equal(first[name], second[name])
        if name == "Random":
            continue  # One process draws from torch's own generator.
        torch.manual_seed(0)
        model = Network()
        optimizer = make(model, make_rule(name))
        expected = train(optimizer, model, batches(5))
        torch.testing.assert_close(first[name], expected, rtol=1e-10, atol=1e-12)


class Residual(torch.nn.Module):
    """Losses that draw random numbers, one of which differentiates by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1).double()

    def losses(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        x = torch.rand(4, 1, dtype=torch.float64).requires_grad_()
        u = self.line(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        both = {"slope": (slope - 3).square().mean(), "value": u.square().mean() + 0.1}
        return {task: both[task] for task in tasks}


@pytest.mark.parametrize("resumed", [False, True])
def test_looking_for_the_need_of_a_graph_draws_no_random_numbers(resumed: bool) -> None:
    """By hand: losses, step, losses again at the new weights, each with its own draws."""
    model, rule = Residual(), FAMO(2).double()
    expected, plain = copy.deepcopy(model), FAMO(2).double()
    optimizer = mtlopt.Scalarized(SGD(model.parameters(), lr=0.1), ["slope", "value"], rule)
    base = SGD(expected.parameters(), lr=0.1)

    def by_hand() -> None:
        for _ in range(2):
            base.zero_grad()
            plain(torch.stack([*expected.losses(("slope", "value")).values()])).backward()
            base.step()
            plain.update(torch.stack([*expected.losses(("slope", "value")).values()]))

    for run in range(2):
        torch.manual_seed(run)
        by_hand()
        torch.manual_seed(run)
        if resumed and run:
            state = optimizer.state_dict()
            optimizer = mtlopt.Scalarized(
                SGD(model.parameters(), lr=0.1), ["slope", "value"], FAMO(2).double()
            )
            optimizer.load_state_dict(copy.deepcopy(state))
        calls = 0

        def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
            nonlocal calls
            calls += 1
            return model.losses(tasks)

        for _ in range(2):
            optimizer.step(losses)
        assert calls == (4 if run else 5)
    torch.testing.assert_close(snapshot(model), snapshot(expected), rtol=1e-12, atol=1e-14)


def test_a_scheduler_made_too_early_is_refused_where_the_rule_adds_a_group() -> None:
    """It has no learning rate for the group, and its next step would fail."""
    model = Network()
    base = SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(base, 0.5)
    with pytest.raises(ValueError, match=r"must have no scheduler yet, since UW adds a group"):
        mtlopt.Scalarized(base, TASKS, make_rule("UW"))
    assert len(base.param_groups) == 1
    mtlopt.Scalarized(base, TASKS, make_rule("DWA"))
    rule = make_rule("UW")
    base = SGD([*model.parameters(), *rule.parameters()], lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(base, 0.5)
    mtlopt.Scalarized(base, TASKS, rule)
