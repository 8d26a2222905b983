"""Balanced: the weighted sum whose weights follow the norms of the tasks' gradients."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

import mtlopt
import reference
from problems import (
    TASKS,
    Network,
    assert_close,
    assert_equal,
    batches,
    halves,
    leaf,
    make_losses,
    snapshot,
    twins,
    with_counts,
)
from round_trips import COPIERS, by_file

PLACES = ("parameters", "shared", "features")
every_place = pytest.mark.parametrize("place", PLACES)


def where(place: str, model: Any) -> dict[str, Any]:
    if place == "shared":
        return {"shared": [model.trunk[2].weight]}
    return {"features": model.trunk} if place == "features" else {}


def make(model: Network, place: str = "parameters", **options: Any) -> mtlopt.Balanced:
    return mtlopt.Balanced(
        SGD(model.parameters(), lr=0.05), TASKS, **where(place, model), **options
    )


class ByHand:
    """The method as a loop: squares of norms, by a function of a task's averaged loss.

    Unlike `reference.balanced` it knows absent tasks, groups, counts and micro-batches.
    """

    def __init__(
        self, model: Any, place: str, every: int = 10, tasks: Sequence[Any] = TASKS
    ) -> None:
        self.model, self.place, self.every, self.tasks = model, place, every, tasks
        self.base = SGD(model.parameters(), lr=0.05)
        self.squares: dict[Any, float] = {}
        self.due: set[Any] = set()
        self.steps = 0

    def measured(self, outputs: list[Tensor]) -> list[Tensor]:
        if self.place == "features":
            return outputs
        # The trunk is what at least two tasks share.
        trunk = list(self.model.trunk.parameters())
        return trunk if self.place == "parameters" else [self.model.trunk[2].weight]

    def weights(self) -> dict[Any, float]:
        sizes = {task: square**0.5 for task, square in self.squares.items()}
        mean = sum(sizes.values()) / max(len(sizes), 1)
        return {task: mean / sizes[task] if task in sizes else 1.0 for task in self.tasks}

    def step(self, losses: Callable[..., Mapping[str, Any]], parts: Sequence[Any]) -> None:
        """Takes a step; `losses` returns pairs of a loss and a count, or None."""
        outputs: list[Tensor] = []
        handle = self.model.trunk.register_forward_hook(lambda *_: outputs.append(_[2]))
        found = [losses(TASKS, *part) for part in parts]
        handle.remove()
        pairs = {t: [own[t] for own in found if own.get(t) is not None] for t in TASKS}
        means = {
            t: sum(loss * (n / sum(m for _, m in own)) for loss, n in own)
            for t, own in pairs.items()
            if own
        }
        objectives: dict[Any, Tensor] = {}
        for task in self.tasks:
            present = [means[n] for n in ((task,) if isinstance(task, str) else task) if n in means]
            if present:
                objectives[task] = sum(present[1:], present[0])
        if self.steps % self.every == 0:
            self.due.update(self.tasks)
        else:
            self.due -= self.squares.keys()
        for task, objective in objectives.items():
            if task in self.due:
                vector = reference.gradient_vector(objective, self.measured(outputs))
                new = float(vector.square().sum())
                self.squares[task] = 0.9 * self.squares.get(task, new) + 0.1 * new
                self.due.remove(task)
        weights = self.weights()
        self.base.zero_grad()
        terms = [weights[task] * objective for task, objective in objectives.items()]
        if terms:
            sum(terms[1:], terms[0]).backward()
            self.base.step()
            self.steps += 1

    def compare(self, optimizer: mtlopt.Balanced, model: Network) -> None:
        for task, weight in self.weights().items():
            assert optimizer.weights[task] == pytest.approx(weight, rel=1e-10)
        assert_close(model, self.model, atol=1e-10)


def lacking(losses: Callable[..., Any], absent: str) -> Callable[..., Any]:
    return lambda tasks, x, y: {
        t: None if t in absent else loss for t, loss in losses(tasks, x, y).items()
    }


# The rule.


@every_place
def test_a_run_is_the_loop_by_hand(place: str) -> None:
    model, twin = twins()
    optimizer = make(model, place, shares={"a": 3.0})
    squares: dict[str, Tensor] = {}
    base = SGD(twin.parameters(), lr=0.05)
    outputs: list[Tensor] = []
    twin.trunk.register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    for step, (x, y) in enumerate(batches(25)):
        optimizer.step(make_losses(model), x, y)
        shared: dict[str, list[Tensor]] = {
            "parameters": list(twin.trunk.parameters()),
            "shared": list(twin.trunk[2].parameters()),
            "features": outputs,
        }
        outputs.clear()
        reference.balanced(
            base,
            make_losses(twin),
            TASKS,
            x,
            y,
            shared=shared[place],
            squares=squares,
            shares={"a": 3.0, "b": 1.0, "c": 1.0},
            measure=step % 10 == 0,
        )
        assert_close(model, twin, atol=1e-10)


@every_place
@pytest.mark.parametrize("tasks", [TASKS, ("a", ("b", "c"))])
@pytest.mark.parametrize("micro", [False, True])
def test_absent_tasks_groups_counts_and_micro_batches_are_the_loop_by_hand(
    place: str, tasks: Any, micro: bool
) -> None:
    """Absent where it is due, absent between, first seen late; halves of 2 and 4 samples."""
    model, twin = twins()
    absent = ["c", "c", "", "b", "", "a", "ab", "", "bc", "abc", "", ""]
    hand = ByHand(twin, place, every=3, tasks=tasks)
    base = SGD(model.parameters(), lr=0.05)
    optimizer = mtlopt.Balanced(base, tasks, every=3, **where(place, model))
    for (x, y), missing in zip(batches(12), absent, strict=True):
        parts = halves(x, y, 2) if micro else [(x, y)]
        losses = lacking(with_counts(make_losses(model)), missing)
        if micro:
            optimizer.step(losses, micro_batches=parts)
        else:
            optimizer.step(losses, x, y)
        hand.step(lacking(with_counts(make_losses(twin)), missing), parts)
        hand.compare(optimizer, model)


def test_one_task_a_batch_is_measured_too() -> None:
    """What tasks share is known from earlier batches; always the same task comes at a tenth."""
    model = Network()
    optimizer = make(model)
    squares: dict[str, float] = {}
    for step, (x, y) in enumerate(batches(14)):
        own = TASKS[step % 2]
        values = {own: make_losses(model)((own,), x, y)[own]}
        vector = reference.gradient_vector(values[own], list(model.trunk.parameters()))
        optimizer.step(values)
        if step in (1, 10):  # At the first step nothing was known to be shared.
            new = float(vector.square().sum())
            squares[own] = 0.9 * squares.get(own, new) + 0.1 * new
    norms = optimizer.diagnostics()["norms"]
    assert norms[0].item() == pytest.approx(squares["a"] ** 0.5, rel=1e-10)
    assert norms[1].item() == pytest.approx(squares["b"] ** 0.5, rel=1e-10)
    assert norms[2].isnan()


@every_place
@pytest.mark.parametrize("groups", [TASKS, ("a", ("b", "c"))])
def test_every_step_is_that_of_the_joint_optimizer_bit_for_bit(place: str, groups: Any) -> None:
    """With the weights in force, where it measures and between."""
    model, twin = twins()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    base = torch.optim.AdamW(model.parameters(), **options)
    optimizer = mtlopt.Balanced(base, groups, every=3, **where(place, model))
    plain = torch.optim.AdamW(twin.parameters(), **options)
    for x, y in batches(8):
        values = optimizer.step(make_losses(model), x, y)
        joint = mtlopt.JointOptimizer(plain, groups, weights=optimizer.weights)  # type: ignore[arg-type]
        joint.warn_of_repeated_step = False
        expected = joint.step(make_losses(twin), x, y)
        assert_equal(values, expected)
        assert_equal(snapshot(model), snapshot(twin))


@every_place
def test_the_unit_of_a_loss_does_not_matter_to_adam(place: str) -> None:
    """To rounding, until the next measurement; by then the common factor has changed."""
    model, twin = twins()
    for network, unit in ((model, 1.0), (twin, 1e4)):
        base = Adam(network.parameters(), lr=0.01, eps=0)
        optimizer = mtlopt.Balanced(base, TASKS, **where(place, network))
        for x, y in batches(10):
            optimizer.step(in_unit(network, unit), x, y)
    assert_close(model, twin, atol=1e-9)


@pytest.mark.parametrize("by", ["gradients", "losses"])
def test_in_another_unit_all_gradients_have_one_factor_more(by: Any) -> None:
    """At all times: here nothing moves, so that both see the same gradients."""
    model = Network()
    options: dict[str, Any] = {"by": by} if by == "losses" else {"every": 2}
    one, other = (mtlopt.Balanced(SGD(model.parameters(), lr=0), TASKS, **options) for _ in "12")
    for x, y in batches(5):
        one.step(in_unit(model, 1.0), x, y)
        other.step(in_unit(model, 1e4), x, y)
        factors = [
            other.weights[t] * u / one.weights[t] for t, u in zip(TASKS, (1, 1e4, 1), strict=True)
        ]
        assert factors == pytest.approx([factors[0]] * 3, rel=1e-10)


def in_unit(model: Network, unit: float) -> Callable[..., dict[str, Tensor]]:
    losses = make_losses(model)
    return lambda tasks, x, y: {
        t: v * (unit if t == "b" else 1.0) for t, v in losses(tasks, x, y).items()
    }


def test_shares_are_what_each_gradient_has_of_the_sum_of_norms() -> None:
    model = Network()
    optimizer = make(model, shares={"a": 2.0, "c": 0.0})
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    seen = optimizer.diagnostics()
    torch.testing.assert_close(seen["shares"], torch.tensor([2.0, 1.0, 0.0]).double() / 3)
    norms = seen["norms"]
    assert optimizer.weights["a"] == pytest.approx(2 * (norms.mean() / norms[0]).item())
    assert optimizer.weights["c"] == 0


def test_gradnorm_without_alpha_moves_towards_these_weights() -> None:
    """They are its fixed point, up to their sum: frozen parameters, so that norms stay."""
    model, twin = twins()
    balanced = mtlopt.Balanced(SGD(model.parameters(), lr=0.0), TASKS, **where("shared", model))
    gradnorm = mtlopt.GradNorm(
        SGD(twin.parameters(), lr=0.0), TASKS, alpha=0.0, weight_lr=0.01, **where("shared", twin)
    )
    x, y = batches(1)[0]
    balanced.step(make_losses(model), x, y)
    target = balanced.diagnostics()["weights"]
    target *= len(TASKS) / target.sum()
    distances = []
    for _ in range(300):
        gradnorm.step(make_losses(twin), x, y)
        weights = gradnorm.diagnostics()["weights"].double()
        distances.append((weights - target).norm().item())
    assert distances[0] > 0.5
    assert distances[-1] < 0.05


def test_at_the_features_it_is_encodecs_balancer() -> None:
    """Its gradient at the cut: sum over k of R a_k / sum(a) g_k / N_k, here with R the sum of N."""
    model = Network()
    optimizer = make(model, "features", shares={"a": 1.0, "b": 4.0, "c": 2.0})
    cut: list[Tensor] = []
    model.trunk.register_forward_hook(
        lambda *call: call[2].register_hook(lambda grad: cut.append(grad.clone())) and None
    )
    x, y = batches(1)[0]
    z = model.trunk(x).detach().requires_grad_()
    cut.clear()
    losses = {
        t: s * ((model.heads[t](z) - y[t]) ** 2).mean()
        for t, s in zip(TASKS, (1.0, 3.0, 0.2), strict=True)
    }
    gradients = {t: torch.autograd.grad(losses[t], z)[0] for t in TASKS}
    total = sum(g.norm() for g in gradients.values())
    expected = sum(
        total * a / 7 * gradients[t] / gradients[t].norm()
        for t, a in zip(TASKS, (1.0, 4.0, 2.0), strict=True)
    )
    optimizer.step(make_losses(model), x, y)
    torch.testing.assert_close(cut[-1], expected)


@pytest.mark.parametrize("micro", [False, True])
def test_by_losses_the_weights_follow_averages_of_the_losses(micro: bool) -> None:
    model, twin = twins()
    optimizer = make(model, by="losses", decay=0.5)
    base = SGD(twin.parameters(), lr=0.05)
    averages: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(batches(6)):
        missing = "c" if step < 2 else ""
        losses = lacking(with_counts(make_losses(model)), missing)
        if micro:
            optimizer.step(losses, micro_batches=halves(x, y, 2))
        else:
            optimizer.step(losses, x, y)
        values = {t: v for t, v in make_losses(twin)(TASKS, x, y).items() if t not in missing}
        for t, value in values.items():
            averages[t] = 0.5 * averages.get(t, value.detach()) + 0.5 * value.detach()
        mean = sum(averages.values()) / len(averages)
        base.zero_grad()
        torch.stack([mean / averages[t] * value for t, value in values.items()]).sum().backward()
        base.step()
        assert_close(model, twin, atol=1e-10)


# What it costs.


@pytest.mark.parametrize(("place", "extra"), [("parameters", 3), ("shared", 3), ("features", 0)])
def test_a_measurement_is_a_pass_for_each_task_and_others_are_free(place: str, extra: int) -> None:
    """Counted at the trunk's first weight, and at its output."""
    model = Network()
    first, passes = model.trunk[0], []
    first.register_forward_hook(
        lambda *call: call[2].register_hook(lambda _: passes.append("trunk")) and None
    )
    model.trunk.register_forward_hook(
        lambda *call: call[2].register_hook(lambda _: passes.append("heads")) and None
    )
    if place == "shared":
        extra = 0  # The trunk's second weight is where they end.
    optimizer = make(model, place, every=4)
    for step, (x, y) in enumerate(batches(9)):
        passes.clear()
        optimizer.step(make_losses(model), x, y)
        measured = step % 4 == 0
        assert passes.count("trunk") == 1 + (extra if measured else 0)
        assert passes.count("heads") == 1 + (3 if measured else 0)


def test_by_losses_a_step_is_one_pass() -> None:
    model, passes = Network(), []
    model.trunk.register_forward_hook(
        lambda *call: call[2].register_hook(lambda _: passes.append(1)) and None
    )
    optimizer = make(model, by="losses")
    for x, y in batches(3):
        optimizer.step(make_losses(model), x, y)
    assert len(passes) == 3


# Forms.


@every_place
@pytest.mark.parametrize("form", ["ready", "backward"])
def test_other_forms_are_the_functions(place: str, form: str) -> None:
    model, twin = twins()
    if place == "features":
        with pytest.raises(TypeError, match="must be a function"):
            make(model, place).step(make_losses(model)(TASKS, *batches(1)[0]))
        return
    one, other = make(model, place, every=2), make(twin, place, every=2)
    for x, y in batches(5):
        one.step(make_losses(model), x, y)
        values = make_losses(twin)(TASKS, x, y)
        if form == "ready":
            other.step(values)
        else:
            other.zero_grad()
            other.backward(values)
            other.step()
        assert_equal(snapshot(model), snapshot(twin))
    assert one.weights == other.weights


@pytest.mark.parametrize("by", ["gradients", "losses"])
def test_several_calls_of_backward_measure_each_task_once(by: Any) -> None:
    model, twin = twins()
    optimizer, other = make(model, by=by), make(twin, by=by)
    x, y = batches(1)[0]
    values = make_losses(model)(TASKS, x, y)
    optimizer.backward({"a": values["a"], "b": values["b"]}, retain_graph=True)
    first = optimizer.weights
    optimizer.backward({"c": values["c"]}, retain_graph=True)
    second = optimizer.weights
    optimizer.backward({"a": values["a"] * 5})
    assert first["c"] == 1
    assert first != second == optimizer.weights
    optimizer.step()
    other.step(make_losses(twin), x, y)
    assert optimizer.weights == other.weights
    norms = optimizer.diagnostics()["norms"]
    optimizer.zero_grad()
    optimizer.backward(make_losses(model)(TASKS, x, y))
    if by == "gradients":  # Not due.
        assert torch.equal(norms, optimizer.diagnostics()["norms"])


@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros"])
def test_gradients_that_were_cleared_without_a_step_are_forgotten(clear: str) -> None:
    model, twin = twins()
    optimizer, other = make(model), make(twin)
    (x, y), (x2, y2) = batches(2)
    optimizer.backward(make_losses(model)(TASKS, x, y))
    if clear == "model":
        model.zero_grad()
    else:
        optimizer.zero_grad(set_to_none=clear == "optimizer")
    optimizer.backward(make_losses(model)(TASKS, x2, y2))
    optimizer.step()
    other.step(make_losses(twin), x2, y2)
    assert optimizer.weights == other.weights
    assert_equal(snapshot(model), snapshot(twin))


@every_place
@pytest.mark.parametrize("form", ["function", "backward", "backward, the user's scaler alone"])
def test_an_overflow_is_not_noted_and_the_next_step_measures(place: str, form: str) -> None:
    if place == "features" and form != "function":
        return
    model, twin = twins()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1)
    alone = form.endswith("alone")
    optimizer = make(model, place, every=2, scaler=None if alone else scaler)
    plain = make(twin, place, every=2)
    for step, (x, y) in enumerate(batches(6)):
        before = optimizer.weights
        lost = step in (0, 3)
        size = 1e308 if lost else 1.0

        def losses(tasks: Any, x: Tensor, y: Any, size: float = size) -> dict[str, Tensor]:
            return {
                t: v * (size if t == "b" else 1) for t, v in make_losses(model)(tasks, x, y).items()
            }

        if form == "function":
            optimizer.step(losses, x, y)
        else:
            optimizer.zero_grad()
            values = losses(TASKS, x, y)
            optimizer.backward({t: scaler.scale(v) for t, v in values.items()})
            scaler.step(optimizer)
            scaler.update()
        if lost:
            # In the imperative form it is forgotten when the gradient has been cleared.
            assert form != "function" or optimizer.weights == before
        else:
            plain.step(make_losses(twin), x, y)
            # Without `scaler=` norms are in its scale, which has changed in between.
            if not alone:
                assert optimizer.weights == pytest.approx(plain.weights, rel=1e-12)
                assert_close(model, twin)
    assert len(optimizer._averages.by_task) == 3


@pytest.mark.parametrize("cleared", [False, True])
def test_a_measurement_whose_gradient_was_not_applied_is_not_saved(cleared: bool) -> None:
    """As after an overflow in the imperative form: gradients are not saved either."""
    model = Network()
    optimizer = make(model, every=1)
    (x, y), (x2, y2) = batches(2)
    optimizer.step(make_losses(model), x, y)
    weights = optimizer.weights
    optimizer.backward(make_losses(model)(TASKS, x2, y2))
    if cleared:
        optimizer.zero_grad()
    again = make(Network(), every=1)
    again.load_state_dict(by_file(optimizer.state_dict()))
    assert again.weights == weights != optimizer.weights


def test_a_step_without_tasks_does_not_count() -> None:
    model = Network()
    optimizer = make(model, every=2)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    optimizer.step({})
    optimizer.zero_grad()
    optimizer.backward({})
    optimizer.step()
    weights = optimizer.weights
    optimizer.step(make_losses(model), x, y)
    assert optimizer.weights == weights
    optimizer.step(make_losses(model), x, y)
    assert optimizer.weights != weights


@pytest.mark.parametrize("lost", ["overflow", "cleared", "cleared between measurements"])
def test_a_step_without_tasks_does_not_count_for_one_that_was_not_taken(lost: str) -> None:
    model = Network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if lost == "overflow" else None
    optimizer = make(model, every=2, scaler=scaler)
    x, y = batches(1)[0]
    losses = make_losses(model)
    if lost == "cleared between measurements":
        optimizer.step(losses, x, y)
    if lost == "overflow":
        optimizer.step({task: loss * math.inf for task, loss in losses(TASKS, x, y).items()})
    else:
        optimizer.backward(losses(TASKS, x, y))
    optimizer.zero_grad()
    optimizer.backward({})
    optimizer.step()
    if lost != "cleared between measurements":
        optimizer.step(losses, x, y)
    weights = optimizer.weights
    optimizer.step(losses, x, y)
    assert optimizer.weights == weights
    optimizer.step(losses, x, y)
    assert optimizer.weights != weights


def test_a_zero_or_infinite_norm_is_not_noted() -> None:
    w = leaf(1.0, 1.0, dtype=torch.float64)
    optimizer = mtlopt.Balanced(SGD([w], lr=0.0), ["a", "b"], every=1)
    optimizer.step({"a": 3 * w[0], "b": 0 * w[1]})
    assert optimizer.weights == {"a": 1.0, "b": 1.0}
    optimizer.step({"a": 3 * w[0], "b": w[1]})
    assert optimizer.weights == pytest.approx({"a": 2 / 3, "b": 2.0})
    optimizer.step({"a": math.inf * w[0], "b": w[1]})
    assert optimizer.weights == pytest.approx({"a": 2 / 3, "b": 2.0})


def test_the_weights_stay_through_a_line_search() -> None:
    """LBFGS evaluates several times a step, of one objective."""
    model, twin = twins()
    options: dict[str, Any] = {"lr": 0.5, "max_iter": 4}
    optimizer = mtlopt.Balanced(LBFGS(model.parameters(), **options), TASKS, decay=0.0, every=1)
    plain = LBFGS(twin.parameters(), **options)
    for x, y in batches(3):
        values, trunk = make_losses(twin)(TASKS, x, y), list(twin.trunk.parameters())
        norms = {t: reference.gradient_vector(v, trunk).norm() for t, v in values.items()}
        weights = {t: sum(norms.values()) / 3 / own for t, own in norms.items()}
        reference.joint(plain, make_losses(twin), TASKS, x, y, weights=weights)
        optimizer.step(make_losses(model), x, y)
        assert_close(model, twin, atol=1e-10)


def test_a_closure_of_ready_losses_keeps_its_weights_too() -> None:
    model, twin = twins()
    options: dict[str, Any] = {"lr": 0.5, "max_iter": 4}
    one = mtlopt.Balanced(LBFGS(model.parameters(), **options), TASKS)
    other = mtlopt.Balanced(LBFGS(twin.parameters(), **options), TASKS)
    for x, y in batches(2):

        def closure(x: Tensor = x, y: Any = y) -> Tensor:
            other.zero_grad()
            values = make_losses(twin)(TASKS, x, y)
            other.backward(values)
            weights = other.weights
            return sum((values[t] * weights[t] for t in TASKS[1:]), values["a"] * weights["a"])

        one.step(make_losses(model), x, y)
        other.step(closure=closure)
    assert_equal(snapshot(model), snapshot(twin))


@every_place
@pytest.mark.parametrize("option", [{"forwards": "per-task"}, {"check_finite": True}])
def test_options_change_nothing_but_the_order_of_sums(place: str, option: dict[str, Any]) -> None:
    if place == "features" and "forwards" in option:
        return
    model, twin = twins()
    one, other = make(model, place, every=2), make(twin, place, every=2, **option)
    for x, y in batches(5):
        one.step(make_losses(model), x, y)
        other.step(make_losses(twin), x, y)
    assert_close(model, twin)


def test_autocast_measures_half_precision_in_float32() -> None:
    model, twin = twins(torch.float32)
    one, other = make(model, "features"), make(twin, "features")
    x, y = batches(1)[0]
    data = x.float(), {t: v.float() for t, v in y.items()}

    def halved(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {t: v.float() for t, v in make_losses(model)(tasks, x, y).items()}

    one.step(halved, *data)
    other.step(make_losses(twin), *data)
    assert one.weights == pytest.approx(other.weights, rel=0.05)


def test_heads_of_another_optimizer_get_the_weighted_gradient_at_every_step() -> None:
    model = Network()
    optimizer = mtlopt.Balanced(SGD(model.trunk.parameters(), lr=0.05), TASKS, every=2)
    for x, y in batches(4):
        model.heads.zero_grad()
        plain = make_losses(model)(TASKS, x, y)
        own = {t: torch.autograd.grad(plain[t], [*model.heads[t].parameters()])[0] for t in TASKS}
        optimizer.step(make_losses(model), x, y)
        weights: dict[Any, float] = optimizer.weights
        for task, weight in weights.items():
            torch.testing.assert_close(model.heads[task].weight.grad, weight * own[task])


@pytest.mark.parametrize("how", ["file", *COPIERS])
@pytest.mark.parametrize("place", ["parameters", "losses"])
def test_a_run_resumes_bit_for_bit_anywhere(how: str, place: str) -> None:
    """After an absent task that is due, between measurements, and at one."""
    options: dict[str, Any] = {"by": "losses"} if place == "losses" else {"every": 3}
    model, whole = twins()
    optimizer = make(model, **options)
    data = batches(9)
    for step, (x, y) in enumerate(data):
        if step in (1, 3, 5):
            if how == "file":
                model2 = copy.deepcopy(model)
                again = make(model2, **options)
                again.load_state_dict(by_file(optimizer.state_dict()))
                model, optimizer = model2, again
            else:
                twin = COPIERS[how]((model, optimizer))
                assert twin[1].weights == optimizer.weights
                model, optimizer = twin
        optimizer.step(lacking(make_losses(model), "c" if step < 2 else ""), x, y)
    plain = make(whole, **options)
    for step, (x, y) in enumerate(data):
        plain.step(lacking(make_losses(whole), "c" if step < 2 else ""), x, y)
    assert plain.weights == optimizer.weights
    assert_equal(snapshot(whole), snapshot(model))


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be a whole number of steps, at least 1, got 0"),
        ({"every": 2.5}, "got 2.5"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"`decay` must be in \[0, 1\), got -0.1"),
        ({"decay": math.nan}, "got nan"),
        ({"shares": {"a": -1.0}}, "`shares` must be finite, not negative, and not all zero"),
        ({"shares": {"a": math.nan}}, "must be finite"),
        ({"shares": {"d": 1.0}}, r"`shares` must name tasks among \['a', 'b', 'c'\], got \['d'\]"),
        ({"shares": dict.fromkeys(TASKS, 0.0)}, "not all zero"),
        ({"by": "norms"}, "`by` must be 'gradients' or 'losses', got 'norms'"),
        ({"by": "losses", "every": 5}, "must be left out with by='losses'"),
        ({"features": nn.Identity(), "shared": []}, "must not go together"),
        ({"shared": []}, "`shared` must hold at least one parameter"),
        ({"features": nn.Identity(), "forwards": "per-task"}, "`forwards` must be 'joint'"),
    ],
)
def test_bad_options_are_clear_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mtlopt.Balanced(SGD(Network().parameters(), lr=0.1), TASKS, **options)


def test_shares_that_are_no_mapping_are_an_error() -> None:
    with pytest.raises(TypeError, match="`shares` must be a mapping"):
        mtlopt.Balanced(SGD([leaf(1.0)], lr=0.1), TASKS, shares=[1, 2, 3])  # type: ignore[arg-type]


@pytest.mark.parametrize("micro", [False, True])
def test_by_losses_a_loss_that_is_not_positive_is_an_error_before_anything_moves(
    micro: bool,
) -> None:
    model = Network()
    optimizer, start = make(model, by="losses"), snapshot(model)
    x, y = batches(1)[0]

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        return {t: v * (-1 if t == "b" else 1) for t, v in make_losses(model)(tasks, x, y).items()}

    batch: Any = {"micro_batches": [(x, y)] * (1 + micro)}
    with pytest.raises(ValueError, match="loss of task 'b' must be positive with by='losses', got"):
        optimizer.step(losses, **batch)
    assert_equal(snapshot(model), start)
    assert optimizer.weights == dict.fromkeys(TASKS, 1.0)


def test_shared_parameters_that_a_task_does_not_use_are_an_error() -> None:
    model = Network()
    base = SGD(model.parameters(), lr=0.1)
    optimizer = mtlopt.Balanced(base, TASKS, shared=model.heads["a"].parameters())
    with pytest.raises(ValueError, match=r"`shared` must be used by every task, got .* 'b'"):
        optimizer.step(make_losses(model), *batches(1)[0])


@pytest.mark.parametrize("micro", [False, True])
def test_features_that_are_frozen_are_measured_once_they_are_not(micro: bool) -> None:
    model = Network()
    optimizer = make(model, "features")
    model.trunk.requires_grad_(False)
    for step, batch in enumerate(batches(3)):
        if step == 2:
            model.trunk.requires_grad_(True)
        optimizer.step(make_losses(model), micro_batches=[batch] * (1 + micro))
        assert (optimizer.weights == dict.fromkeys(TASKS, 1.0)) == (step < 2)


def test_features_that_no_loss_depends_on_are_a_warning() -> None:
    model = Network()
    optimizer = mtlopt.Balanced(SGD(model.parameters(), lr=0.1), TASKS, features=model.trunk)

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        model.trunk(x)
        return {t: (next(model.heads[t].parameters()).sum() - 1) ** 2 for t in tasks}

    with pytest.warns(UserWarning, match="No loss depends on the outputs of `features`"):
        optimizer.step(losses, *batches(1)[0])


def test_one_task_is_the_class_itself() -> None:
    model, twin = twins()
    optimizer = mtlopt.Balanced(SGD(model.parameters(), lr=0.1), ["b"])
    plain = SGD(twin.parameters(), lr=0.1)
    for x, y in batches(3):
        optimizer.step(make_losses(model), x, y)
        reference.joint(plain, make_losses(twin), ["b"], x, y)
    assert_equal(snapshot(model), snapshot(twin))
    assert optimizer.weights == {"b": 1.0}
