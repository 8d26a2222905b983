"""What a review found silently wrong, or ending in an error that helps nobody: never again."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

import mtlopt
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot

WRAPPERS = ("joint", "pcgrad", "gradnorm", "aggregated", "alternating")
ONE_STEP = ("joint", "pcgrad", "gradnorm", "aggregated")
INDEPENDENT = ("independent", "simultaneous")
METHODS = (*WRAPPERS, *INDEPENDENT)
every_method = pytest.mark.parametrize("method", METHODS)
one_step = pytest.mark.parametrize("method", ONE_STEP)


def wrapper(method: str, shared: Any = None) -> Callable[..., Any]:
    from torchjd.aggregation import Sum

    wrappers: dict[str, Callable[..., Any]] = {
        "joint": mtlopt.JointOptimizer,
        "pcgrad": mtlopt.PCGrad,
        "gradnorm": lambda base, tasks, **k: mtlopt.GradNorm(base, tasks, shared=[shared], **k),
        "aggregated": lambda base, tasks, **k: mtlopt.Aggregated(base, tasks, Sum(), **k),
        "alternating": mtlopt.AlternatingOptimizer,
    }
    return wrappers[method]


def make(
    method: str,
    params: Any,
    tasks: Sequence[Any] = TASKS,
    optimizer_class: Any = SGD,
    shared: Any = None,
    keywords: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    options = options or {"lr": 0.1}
    if method in INDEPENDENT:
        schedule: Any = "simultaneous" if method == "simultaneous" else "sequential"
        return mtlopt.IndependentOptimizer(
            optimizer_class, params, tasks, schedule=schedule, **(keywords or {}), **options
        )
    base = optimizer_class(params, **options)
    return wrapper(method, shared)(base, tasks, **(keywords or {}))


def of(model: Network, method: str, **options: Any) -> Any:
    return make(method, model.parameters(), shared=model.trunk[2].weight, **options)


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIERS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": by_pickle}


def by_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# 1. GradNorm and what is not finite.


def balance_of(optimizer: Any) -> dict[str, Tensor]:
    """Everything that GradNorm has learned, as numbers that can be compared bit for bit."""
    state = copy.deepcopy(optimizer.state_dict()["mtlopt"])
    found = {"weights": state["weights"], "initial": torch.as_tensor(state["initial_losses"])}
    for k, own in state["weights_adam"]["state"].items():
        found |= {f"{k} {name}": value for name, value in own.items()}
    return found


def assert_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True, msg=name)


def with_weights(optimizer: Any, *weights: float) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    state["mtlopt"]["weights"] = torch.tensor(weights)
    optimizer.load_state_dict(state)
    return optimizer


FORMS = ("function", "per-task", "micro-batches", "ready", "imperative")


def take(
    optimizer: Any, losses: Callable[..., Any], form: str, scaler: torch.amp.GradScaler | None
) -> None:
    if form == "imperative":
        optimizer.zero_grad()
        values = losses(optimizer.tasks)
        scaled = {t: v if scaler is None else scaler.scale(v) for t, v in values.items()}
        optimizer.backward(scaled)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    elif form == "ready":
        optimizer.step(losses(optimizer.tasks))
    elif form == "micro-batches":
        optimizer.step(losses, micro_batches=[(), ()])
    else:
        optimizer.step(losses)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_fits_only_when_weighed_teaches_the_weights(form: str) -> None:
    """Weighed down to a half, a task fits float16; its own gradient, 65536, does not.

    By hand: w = 1 - 0.1 (0.5 * 1 + 1.5 * 2) = 0.65, and G = (0.5, 3) around their mean, so that
    Adam's first step is 0.025 up for a and as much down for b.
    """
    w = leaf(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    forwards = {"forwards": "per-task"} if form == "per-task" else {}
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w], scaler=scaler, **forwards)  # type: ignore[arg-type]  # a literal
    with_weights(optimizer, 0.5, 1.5)

    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        own = {"a": w.half().float().sum(), "b": (w**2).sum()}
        return {task: own[task] for task in tasks}

    take(optimizer, losses, form, scaler)
    assert w.item() == pytest.approx(0.65)
    seen = optimizer.diagnostics()
    assert not seen["skipped"]
    torch.testing.assert_close(seen["norms"], torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(seen["weights"], torch.tensor([0.525, 1.475]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["infinite loss", "nan loss", "infinite norm"])
def test_what_is_not_finite_never_reaches_gradnorms_weights(what: str, form: str) -> None:
    """The weights, their moments and L(0) stay; the network steps, and the next step teaches.

    By hand: w = 1 - 0.1 (0.5 * 1 + 1.5 * 2) = 0.65; then G = (0.25, 1.95) of the gradients 0.5 and
    1.3, so that Adam's first step is 0.025 up for a and as much down for b.
    """
    w, far = leaf(1.0), leaf(1.0)
    forwards = {"forwards": "per-task"} if form == "per-task" else {}
    groups: list[dict[str, Any]] = [{"params": [w]}, {"params": [far], "lr": 0.0}]
    base = SGD(groups, lr=0.1)
    optimizer = mtlopt.GradNorm(base, ["a", "b"], [w, far], **forwards)  # type: ignore[arg-type]  # a literal
    with_weights(optimizer, 0.5, 1.5)
    scaler = None
    poison = {"infinite norm": 0.0, "infinite loss": float("inf"), "nan loss": float("nan")}[what]
    steep = 1e30 if what == "infinite norm" else 0.0  # its square leaves float32
    slope = 1.0

    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        own = {
            "a": slope * w.sum() + steep * far.sum() + poison,
            "b": (w**2).sum() + 0 * far.sum(),
        }
        return {task: own[task] for task in tasks}

    before = balance_of(optimizer)
    take(optimizer, losses, form, scaler)
    assert_bits(balance_of(optimizer), before)
    skipped = optimizer.diagnostics()["skipped"]
    assert skipped.shape == ()
    assert skipped.dtype == torch.bool
    assert skipped
    assert w.item() == pytest.approx(0.65)

    poison, slope, steep = 0.0, 0.5, 0.0
    take(optimizer, losses, form, scaler)
    assert not optimizer.diagnostics()["skipped"]
    torch.testing.assert_close(optimizer.diagnostics()["weights"], torch.tensor([0.525, 1.475]))


# 2. GradNorm and a step that was left out.


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["scaler", "the user"])
def test_what_gradnorm_saw_in_a_step_left_out_is_gone_with_the_gradients(
    by: str, set_to_none: bool
) -> None:
    """In the batch left out a's gradient is the larger, in the next b's: a's weight must grow."""
    w = nn.Parameter(torch.ones(1))
    model = nn.ParameterList([w])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=by == "scaler")
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w], scaler=scaler)

    def losses(a: float, b: float) -> dict[str, Tensor]:
        return {"a": scaler.scale(a * w.sum()), "b": scaler.scale(b * w.sum())}

    optimizer.backward(losses(3e38 if by == "scaler" else 100.0, 1.0))
    if by == "scaler":
        scaler.step(optimizer)
        scaler.update()
        assert w.item() == 1
    model.zero_grad(set_to_none=set_to_none)
    optimizer.backward(losses(1.0, 2.0))
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))
    seen = optimizer.diagnostics()
    torch.testing.assert_close(seen["norms"], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(seen["weights"], torch.tensor([1.025, 0.975]))
    first = torch.as_tensor(optimizer.state_dict()["mtlopt"]["initial_losses"])
    torch.testing.assert_close(first, torch.tensor([1.0, 2.0]))


def test_a_plain_sum_in_the_place_of_a_step_left_out_teaches_no_weights() -> None:
    """What was combined has gone with the gradients: what lies there now is nobody's."""
    w = nn.Parameter(torch.ones(1))
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w])
    optimizer.backward({"a": 100 * w.sum(), "b": w.sum()})
    nn.ParameterList([w]).zero_grad()
    (w.sum() + 2 * w.sum()).backward()
    with pytest.warns(UserWarning, match="did not make"):
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))
    assert optimizer.diagnostics()["weights"].tolist() == [1.0, 1.0]


# 3. Parameters that something replaces.


def replace(model: Network, optimizers: Sequence[Any], how: str) -> None:
    """Puts new parameters in the place of the old, in the model and in the groups of optimizers."""
    names = [name for name, _ in model.named_parameters()]
    for name in names[:1] if how == "one" else names:
        module, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        new = nn.Parameter(old.detach() * 0.5)
        setattr(model.get_submodule(module), attribute, new)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                params = [new if p is old else p for p in group["params"]]
                if how == "list":
                    group["params"] = params
                else:
                    group["params"][:] = params


@pytest.mark.parametrize("how", ["list", "in place", "one"])
@pytest.mark.parametrize("form", ["sequential", "simultaneous", "imperative"])
def test_every_task_trains_the_parameters_that_replaced_its_own(how: str, form: str) -> None:
    """As Accelerate's `prepare` does for FSDP2; the new ones have no state, others keep theirs."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    schedule: Any = "simultaneous" if form == "simultaneous" else "sequential"

    def build(model: Network) -> mtlopt.IndependentOptimizer:
        return mtlopt.IndependentOptimizer(
            Adam, model.parameters(), TASKS, schedule=schedule, lr=0.01
        )

    def go_on(steps: Sequence[Any]) -> None:
        losses, plain_losses = make_losses(model), make_losses(expected)
        for x, y in steps:
            gradients = []
            for k, task in enumerate(TASKS):
                expected.zero_grad()
                plain_losses((task,), x, y)[task].backward()
                if form == "simultaneous":
                    gradients.append([p.grad for p in expected.parameters()])
                else:
                    plain[k].step()
                if form == "imperative":
                    optimizer.zero_grad()
                    losses((task,), x, y)[task].backward()
                    optimizer[task].step()
            for own, gradient in zip(plain, gradients, strict=False):
                for parameter, part in zip(expected.parameters(), gradient, strict=True):
                    parameter.grad = part
                own.step()
            if form != "imperative":
                optimizer.step(losses, x, y)
        assert_equal(snapshot(model), snapshot(expected))

    optimizer = build(model)
    plain = [Adam(expected.parameters(), lr=0.01) for _ in TASKS]
    data = batches(6)
    go_on(data[:2])
    replace(model, [optimizer], how)
    replace(expected, plain, how)
    optimizer.state_dict()
    go_on(data[2:4])
    state = by_file(optimizer.state_dict())
    optimizer = build(model)
    optimizer.load_state_dict(state)
    go_on(data[4:])


def test_parameters_in_another_order_keep_their_states() -> None:
    """As in torch, where a state belongs to its parameter, not to a place in a list."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS, lr=0.01)
    plain = [Adam(expected.parameters(), lr=0.01) for _ in TASKS]
    for i, (x, y) in enumerate(batches(4)):
        if i == 2:
            for each in (optimizer, *plain):
                each.param_groups[0]["params"].reverse()
        for own, task in zip(plain, TASKS, strict=True):
            expected.zero_grad()
            make_losses(expected)((task,), x, y)[task].backward()
            own.step()
        optimizer.step(make_losses(model), x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_parameters_that_are_more_or_fewer_than_before_are_an_error() -> None:
    """There is no saying which replaced which."""
    for change in (lambda params: params[1:], lambda params: [*params, leaf(1.0)]):
        model = Network()
        optimizer = mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)
        optimizer.step(make_losses(model), *batches(1)[0])
        group = optimizer.param_groups[0]
        group["params"] = change(group["params"])
        with pytest.raises(ValueError, match=r"(?i)param"):
            optimizer.step(make_losses(model), *batches(1)[0])


# 6. Micro-batches and parameters that another optimizer owns.


def halves(x: Tensor, y: Mapping[str, Tensor], at: int) -> list[tuple[Any, ...]]:
    return [
        (x[:at], {t: v[:at] for t, v in y.items()}),
        (x[at:], {t: v[at:] for t, v in y.items()}),
    ]


def with_counts(losses: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tasks, x, y: {t: (v, len(x)) for t, v in losses(tasks, x, y).items()}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("method", [*METHODS, "weighted", "weighted, per task", "grouped"])
def test_foreign_parameters_get_the_full_batchs_gradient(method: str, counted: bool) -> None:
    """Heads may have an optimizer of their own: its gradients are the means over all samples."""
    model = Network()
    weights = dict.fromkeys(TASKS, 1.0)
    trunk, shared = model.trunk.parameters(), model.trunk[2].weight
    if method.startswith("weighted"):
        weights["a"] = 2.0
        forwards: Any = "per-task" if method.endswith("task") else "joint"
        optimizer: Any = mtlopt.JointOptimizer(
            SGD(trunk, lr=0.0), TASKS, weights, forwards=forwards
        )
    elif method == "grouped":
        optimizer = make("independent", trunk, (("a", "b"), "c"), lr=0.0)
    else:
        optimizer = make(method, trunk, shared=shared, lr=0.0)
    if method == "gradnorm":
        weights = {"a": 0.5, "b": 1.5, "c": 1.0}
        with_weights(optimizer, *weights.values())
    losses = make_losses(model)
    x, y = batches(1)[0]
    weighted = [weights[t] * v for t, v in losses(TASKS, x, y).items()]
    torch.stack(weighted).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.heads.named_parameters() if p.grad is not None}

    model.zero_grad()
    optimizer.step(with_counts(losses) if counted else losses, micro_batches=halves(x, y, 3))
    for name, parameter in model.heads.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-15)


@every_method
def test_a_gradient_that_foreign_parameters_cannot_get_right_is_warned_of_once(method: str) -> None:
    """Counts that differ are known too late for those whom nobody asks."""
    model = Network()
    optimizer = make(method, model.trunk.parameters(), shared=model.trunk[2].weight)
    losses = with_counts(make_losses(model))
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="micro_batches"):
        optimizer.step(losses, micro_batches=halves(x, y, 2))
    with silence():
        optimizer.step(losses, micro_batches=halves(x, y, 2))


# 7. Parameters that `losses` freezes and thaws.


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("method", ["alternating", "independent"])
def test_a_task_may_freeze_the_trunk_for_itself(method: str, micro: bool) -> None:
    """Then its gradient is None there, and nothing of an earlier task is left."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    optimizer = of(model, method, optimizer_class=Adam, lr=0.01)
    count = len(TASKS) if method == "independent" else 1
    plain = [Adam(expected.parameters(), lr=0.01) for _ in range(count)]

    def freezing(model: Network) -> Callable[..., Any]:
        losses = make_losses(model)

        def call(tasks: Sequence[str], x: Tensor, y: Any) -> Any:
            model.trunk.requires_grad_("b" not in tasks)
            return losses(tasks, x, y)

        return call

    losses, plain_losses = freezing(model), freezing(expected)
    for x, y in batches(3):
        parts = halves(x, y, 3) if micro else [(x, y)]
        for k, task in enumerate(TASKS):
            for parameter in expected.parameters():
                parameter.grad = None
            for part in parts:
                (plain_losses((task,), *part)[task] / len(parts)).backward()
            plain[k % count].step()
        optimizer.step(losses, micro_batches=parts)
    tolerance = 1e-12 if micro else 0.0
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, snapshot(expected)[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", ["steps", "micro-batches"])
@pytest.mark.parametrize("method", ["joint", "gradnorm", "aggregated", "simultaneous"])
def test_losses_may_freeze_and_thaw_for_a_method_with_one_step(method: str, pattern: str) -> None:
    """The plain loop's gradient, whatever was frozen before `losses` ran."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    optimizer = of(model, method)
    for each in (model, expected):
        each.trunk[0].weight.requires_grad_(False)

    def freezing(model: Network) -> Callable[..., Any]:
        losses = make_losses(model)

        def call(tasks: Sequence[str], frozen: bool, x: Tensor, y: Any) -> Any:
            model.trunk[0].weight.requires_grad_(not frozen)
            return losses(tasks, x, y)

        return call

    losses, plain_losses = freezing(model), freezing(expected)
    (x, y), (x2, y2) = batches(2)
    steps = {
        "steps": [[(False, x, y)], [(True, x2, y2)]],
        "micro-batches": [[(True, x, y), (False, x2, y2)]],
    }[pattern]
    for parts in steps:
        for parameter in expected.parameters():
            parameter.grad = None
        for part in parts:
            total = torch.stack(list(plain_losses(TASKS, *part).values())).sum()
            (total / len(parts)).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
        optimizer.step(losses, micro_batches=parts)
        for name, weight in snapshot(model).items():
            torch.testing.assert_close(weight, snapshot(expected)[name], rtol=1e-12, atol=1e-12)
        if method == "gradnorm":
            break  # Afterwards its weights differ from one.


def test_pcgrad_projects_over_what_losses_left_thawed() -> None:
    """By hand: on the first parameter a and b agree, on both together they conflict."""
    first, second = leaf(0.0, dtype=torch.float64), leaf(0.0, dtype=torch.float64)
    optimizer = mtlopt.PCGrad(SGD([first, second], lr=1.0), ["a", "b"])

    def losses(tasks: Any, frozen: bool) -> dict[str, Tensor]:
        second.requires_grad_(not frozen)
        return {"a": first.sum() + 2 * second.sum(), "b": first.sum() - second.sum()}

    optimizer.step(losses, True)
    assert (first.item(), second.item()) == (-2.0, 0.0)
    optimizer.step(losses, False)  # (1, 2) + (1, -1), each less a part: by -1/2 of b, -1/5 of a.
    torch.testing.assert_close(first.item(), -2 - (1 + 0.5) - (1 + 0.2))
    torch.testing.assert_close(second.item(), -(2 - 0.5) - (-1 + 0.4))


# 8. Hooks on the panel.


@pytest.mark.parametrize("form", ["sequential", "simultaneous", "imperative"])
def test_a_rate_that_a_hook_sets_in_the_panel_is_that_of_this_very_update(form: str) -> None:
    """Warm-up by step hooks: 1 - 0.25 - 0.125, not 1 - 0.5 - 0.25."""
    w = leaf(1.0)
    schedule: Any = "simultaneous" if form == "simultaneous" else "sequential"
    optimizer = mtlopt.IndependentOptimizer(SGD, [w], ["a", "b"], schedule=schedule, lr=0.5)
    rates = iter([0.25, 0.125])
    optimizer.register_step_pre_hook(
        lambda *_: optimizer.param_groups[0].update({"lr": next(rates)})
    )
    if form == "imperative":
        for task in ("a", "b"):
            optimizer.zero_grad()
            w.sum().backward()
            optimizer[task].step()
    else:
        optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    assert w.item() == 0.625


# 9. Hyper-parameters that stay.


def rates_of(optimizer: Any, task: str, group: int = 0) -> tuple[float, float]:
    """What the task's update works with, known by what it does to its optimizer's groups."""
    optimizer[task].step()
    own = optimizer[task].param_groups[group]
    return own["lr"], own["weight_decay"]


def pinned(w: Tensor, *names: str) -> Any:
    optimizer: Any = mtlopt.IndependentOptimizer(
        SGD, [{"params": [w]}, {"params": [leaf(1.0)]}], ["a", "b"], lr=0.5, weight_decay=0.1
    )
    optimizer.pin("a", *names)
    return optimizer


def set_panel(optimizer: Any, rate: float, decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay


def test_what_is_pinned_stays_though_the_panel_had_the_same_value() -> None:
    optimizer = pinned(leaf(1.0), "lr")
    for rate in (0.25, 0.5, 0.125):  # Also when the panel comes by the pinned value.
        set_panel(optimizer, rate, 0.2)
        for group in (0, 1):
            assert rates_of(optimizer, "a", group) == (0.5, 0.2)
            assert rates_of(optimizer, "b", group) == (rate, 0.2)
    for group in optimizer["a"].param_groups:
        group["lr"] = 0.125  # The task's own, though it is the panel's too.
    assert rates_of(optimizer, "a") == (0.125, 0.2)
    set_panel(optimizer, 0.25, 0.2)
    assert rates_of(optimizer, "a") == (0.125, 0.2)
    optimizer.reset_overrides("a")
    assert rates_of(optimizer, "a") == (0.25, 0.2)
    set_panel(optimizer, 0.5, 0.3)
    assert rates_of(optimizer, "a") == (0.5, 0.3)


def test_no_names_pin_every_hyper_parameter() -> None:
    optimizer = pinned(leaf(1.0))
    set_panel(optimizer, 0.25, 0.2)
    assert rates_of(optimizer, "a") == (0.5, 0.1)
    assert rates_of(optimizer, "b") == (0.25, 0.2)


def test_a_pin_takes_in_what_the_panel_has_changed_before_it() -> None:
    optimizer = pinned(leaf(1.0), "weight_decay")
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.pin("a", "lr")
    optimizer.param_groups[0]["lr"] = 0.125
    assert rates_of(optimizer, "a")[0] == 0.25


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_a_pin_is_saved_and_copied(how: str) -> None:
    w = leaf(1.0)
    optimizer = pinned(w, "lr")
    if how == "file":
        state = by_file(optimizer.state_dict())
        optimizer = mtlopt.IndependentOptimizer(
            SGD, [{"params": [w]}, {"params": [leaf(1.0)]}], ["a", "b"], lr=0.9
        )
        optimizer.load_state_dict(state)
    else:
        optimizer = COPIERS[how](optimizer)
    set_panel(optimizer, 0.25, 0.2)
    assert rates_of(optimizer, "a") == (0.5, 0.2)
    assert rates_of(optimizer, "b") == (0.25, 0.2)


def test_a_pin_of_something_unknown_is_an_error() -> None:
    optimizer = pinned(leaf(1.0), "lr")
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer.pin("a", "learning_rate")
    with pytest.raises(ValueError, match="params"):
        optimizer.pin("a", "params")
    with pytest.raises(KeyError, match="'z'"):
        optimizer.pin("z", "lr")


# 10. A compiled model and a loop that owns the backward pass.


@pytest.mark.slow
def test_a_compiled_models_other_heads_stay_in_the_imperative_form_too() -> None:
    """Its graph gives them zeros, by which weight decay and moments would move them."""
    torch.manual_seed(1)
    model = Network(torch.float32)
    expected = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}
    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS, **options)
    plain = [Adam(expected.parameters(), **options) for _ in TASKS]
    for x, y in batches(2):
        x, y = x.float(), {t: v.float() for t, v in y.items()}  # noqa: PLW2901  # cast once
        for own, task in zip(plain, TASKS, strict=True):
            expected.zero_grad()
            make_losses(expected)((task,), x, y)[task].backward()
            own.step()
            optimizer.zero_grad()
            ((compiled(x, TASKS)[task] - y[task]) ** 2).mean().mul(
                {"a": 1.0, "b": 3.0, "c": 0.2}[task]
            ).backward()
            optimizer[task].step()
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, snapshot(expected)[name], rtol=1e-4, atol=1e-6)


# 11. Weights that would have to be learned.


def test_weights_that_require_a_gradient_are_refused() -> None:
    """They would be learned in one form and not in another."""
    model = Network()
    learned = nn.Parameter(torch.ones((), dtype=torch.float64))
    before = snapshot(model)
    for weight in (learned, learned.exp()):
        with pytest.raises(TypeError, match=r"`weights`.*gradient"):
            mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS, {"a": weight})  # type: ignore[dict-item]  # on purpose
    x, y = batches(1)[0]
    steps: list[Callable[[Any], Any]] = [
        lambda optimizer: optimizer.step(make_losses(model), x, y),
        lambda optimizer: optimizer.step(make_losses(model), micro_batches=[(x, y), (x, y)]),
        lambda optimizer: optimizer.backward(make_losses(model)(TASKS, x, y)),
    ]
    for step in steps:
        optimizer: Any = mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS)
        with pytest.raises(TypeError, match=r"`weights`.*gradient"):  # noqa: PT012  # either line
            optimizer.weights["a"] = learned
            step(optimizer)
        assert_equal(snapshot(model), before)
    assert learned.grad is None


# 12. A step that was left over from before.


REPEATED = r"step\(losses"


@pytest.mark.parametrize("scheduled", [False, True])
@every_method
def test_a_step_left_over_after_a_step_on_losses_does_nothing(method: str, scheduled: bool) -> None:
    """Nor do its hooks fire; once it is said which line to delete."""
    torch.manual_seed(1)
    model = Network()
    twin = copy.deepcopy(model)
    optimizer, other = (of(m, method, optimizer_class=Adam, lr=0.01) for m in (model, twin))
    if scheduled:
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(each, gamma=0.9) for each in (optimizer, other)
        ]
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    left_over: list[Callable[[], Any]] = [
        optimizer.step,
        partial(optimizer.step, None),
        partial(optimizer.step, closure=None),
    ]
    for i, (x, y) in enumerate(batches(3)):
        optimizer.step(make_losses(model), x, y)
        other.step(make_losses(twin), x, y)
        assert_equal(snapshot(model), snapshot(twin))
        times = len(fired)
        if i == 0:
            with pytest.warns(UserWarning, match=REPEATED) as caught:
                left_over[i]()
            assert len(caught) == 1
            assert re.search(r"`?optimizer\.step\(\)", str(caught[0].message))
            assert scheduled or caught[0].filename == __file__
        with silence():
            left_over[i]()
        assert len(fired) == times
        assert_equal(snapshot(model), snapshot(twin))
        if scheduled:
            for scheduler in schedulers:
                scheduler.step()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("passed", [True, False])
@every_method
def test_a_scalers_step_left_over_does_nothing_either(
    method: str, passed: bool, enabled: bool, scheduled: bool
) -> None:
    """It unscales what lies in `.grad` before it calls `step`: that makes no new gradient of it."""
    model = Network()
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    scaler.scale(torch.ones(()))
    optimizer = of(model, method, keywords={"scaler": scaler} if passed else {})
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    x, y = batches(1)[0]
    for first in (True, False):
        optimizer.step(make_losses(model), x, y)
        after = snapshot(model)
        if first:
            with pytest.warns(UserWarning, match=REPEATED):
                scaler.step(optimizer)
        else:
            with silence():
                scaler.step(optimizer)
        scaler.update()
        assert_equal(snapshot(model), after)


@every_method
def test_a_step_left_over_after_a_batch_without_labels_does_nothing(method: str) -> None:
    model = Network()
    optimizer = of(model, method)
    before = snapshot(model)
    assert optimizer.step(lambda tasks: {}) == {}
    with pytest.warns(UserWarning, match=REPEATED):
        optimizer.step()
    with silence():
        optimizer.step(lambda tasks: {})
        optimizer.step()
    assert_equal(snapshot(model), before)


@every_method
def test_the_warning_of_a_repeated_step_may_be_silenced(method: str) -> None:
    """For loops that are not the user's own."""
    model = Network()
    optimizer = of(model, method)
    assert optimizer.warn_of_repeated_step is True
    optimizer.warn_of_repeated_step = False
    optimizer.step(make_losses(model), *batches(1)[0])
    after = snapshot(model)
    with silence():
        optimizer.step()
    assert_equal(snapshot(model), after)


def plain_sum(model: Network) -> None:
    x, y = batches(1)[0]
    torch.stack(list(make_losses(model)(TASKS, x, y).values())).sum().backward()


ORDINARY = (
    "zero_grad, backward",
    "the model's zero_grad, backward",
    "the model's zero_grad, the sum",
    "set by hand",
)


def new_gradient(what: str, optimizer: Any, model: Network) -> None:
    if what == "set by hand":
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return
    (model if what.startswith("the model") else optimizer).zero_grad()
    if what.endswith("sum"):
        plain_sum(model)
    else:
        optimizer.backward(make_losses(model)(TASKS, *batches(1)[0]))


@pytest.mark.parametrize("what", ORDINARY)
@one_step
def test_a_new_gradient_makes_an_ordinary_step(method: str, what: str) -> None:
    """Bit for bit what SGD does with what lies in `.grad`."""
    model = Network()
    optimizer = of(model, method)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    with pytest.warns(UserWarning, match=REPEATED):
        optimizer.step()
    # That PCGrad and the like did not make it is said as before.
    foreign = what in ("the model's zero_grad, the sum", "set by hand") and method != "joint"
    for _ in range(2):
        before = snapshot(model)
        new_gradient(what, optimizer, model)
        expected = {
            n: torch.add(before[n], p.grad, alpha=-0.1)
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        if foreign:
            with pytest.warns(UserWarning, match="did not make"):
                optimizer.step()
        else:
            with silence():
                optimizer.step()
        assert_equal(snapshot(model), expected)
        foreign = False


@one_step
def test_a_closure_brings_a_new_gradient(method: str) -> None:
    model = Network()
    optimizer = of(model, method)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    before = snapshot(model)

    def closure() -> None:
        optimizer.zero_grad()
        optimizer.backward(make_losses(model)(TASKS, x, y))

    with silence():
        optimizer.step(closure=closure)
    assert not torch.equal(snapshot(model)["trunk.0.weight"], before["trunk.0.weight"])


def test_a_gradient_added_on_top_is_applied_with_a_word() -> None:
    """Torch's way to accumulate; who forgot `zero_grad` is told so, once."""
    model = Network()
    optimizer = mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS)
    for first in (True, False):
        optimizer.step(make_losses(model), *batches(1)[0])
        plain_sum(model)
        expected = {
            n: torch.add(p.detach(), p.grad, alpha=-0.1)
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        if first:
            with pytest.warns(UserWarning, match=r"already.*appl|appl.*again"):
                optimizer.step()
        else:
            with silence():
                optimizer.step()
        assert_equal(snapshot(model), expected)


@pytest.mark.parametrize("method", ["alternating", *INDEPENDENT])
def test_a_step_without_losses_is_an_error_where_none_went_before(method: str) -> None:
    """Or was cleared away since: then nothing has been applied that could be repeated."""
    model = Network()
    optimizer = of(model, method)
    with pytest.raises(TypeError, match="needs `losses`"):
        optimizer.step()
    optimizer.step(make_losses(model), *batches(1)[0])
    with pytest.warns(UserWarning, match=REPEATED):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="needs `losses`"):
        optimizer.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
@every_method
def test_a_copy_and_a_resumed_run_know_a_repeated_step(method: str, how: str) -> None:
    model = Network()
    optimizer = of(model, method)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    if how == "file":
        state = by_file(optimizer.state_dict())
        optimizer = of(model, method)
        optimizer.load_state_dict(state)
    else:
        model, optimizer = COPIERS[how]((model, optimizer))
    optimizer.step(make_losses(model), x, y)
    after = snapshot(model)
    with pytest.warns(UserWarning, match=REPEATED):
        optimizer.step()
    assert_equal(snapshot(model), after)


@pytest.mark.parametrize("method", ["joint", "independent"])
def test_a_copy_does_not_apply_again_what_the_original_applied(method: str) -> None:
    """A deep copy of a tensor, though not of a parameter, has a copy of its gradient."""
    w = leaf(1.0)
    optimizer = make(method, [w], ["a", "b"])
    optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    w, optimizer = copy.deepcopy((w, optimizer))
    assert w.grad is not None
    before = w.item()
    with pytest.warns(UserWarning, match=REPEATED):
        optimizer.step()
    assert w.item() == before


# 13. Labels that never come, and losses that reach nothing.


@pytest.mark.parametrize("method", ["joint", "pcgrad", "alternating", *INDEPENDENT])
def test_a_hundred_steps_without_labels_are_asked_about_once(method: str) -> None:
    """A misspelt name looks like a label that is missing."""
    w = leaf(1.0)
    optimizer = make(method, [w], ["disc", "cup"])

    def nothing(tasks: Any) -> dict[str, Tensor]:
        return {}

    with silence():
        for _ in range(60):
            optimizer.step(nothing)
        optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
        for _ in range(99):
            optimizer.step(nothing)
    with pytest.warns(UserWarning, match="100") as caught:
        optimizer.step(nothing)
    assert len(caught) == 1
    for word in ("'disc'", "'cup'", "label"):
        assert word in str(caught[0].message)
    with silence():
        for _ in range(150):
            optimizer.step(nothing)


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("method", ["joint", "pcgrad", "aggregated", "alternating", *INDEPENDENT])
def test_a_loss_that_reaches_none_of_the_parameters_is_warned_of_once(
    method: str, micro: bool
) -> None:
    """A detached trunk, or a head that no optimizer owns: the task trains nothing here."""
    w, foreign = leaf(1.0), leaf(1.0)
    optimizer = make(method, [w], TASKS)
    reached = {"a", "c"}

    def losses(tasks: Any) -> dict[str, Tensor]:
        return {task: (w if task in reached else foreign).square().sum() for task in tasks}

    def step() -> None:
        optimizer.step(losses, micro_batches=[(), ()] if micro else None)

    with pytest.warns(UserWarning, match="'b'") as caught:
        step()
    assert len(caught) == 1
    with silence():
        step()
    if method == "joint" and not micro:
        return  # One pass of the sum tells no task from another; only its first graph is searched.
    reached.remove("c")
    with pytest.warns(UserWarning, match="'c'") as caught:
        step()
    assert len(caught) == 1
    with silence():
        step()


# 14. PCGrad from the smallest to the largest gradients.


def project(gradients: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> Tensor:
    """Algorithm 1 of PCGrad in float64, on vectors of length one where a vector is divided by."""
    total = torch.zeros_like(gradients[0])
    units = [g / g.norm() if g.any() else g for g in gradients]
    for i, gradient in enumerate(gradients):
        own = gradient.clone()
        for j in orders[i]:
            inner = own @ units[j]
            if j != i and inner < 0:
                own = own - inner * units[j]
        total += own
    return total


def drawn_orders(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(count)]


def pcgrad_of(gradients: Sequence[Tensor]) -> Tensor:
    """What PCGrad makes of these float32 gradients of losses that are linear."""
    names = [str(k) for k in range(len(gradients))]
    w = torch.zeros(len(gradients[0]), requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=0.0), names)
    optimizer.step({name: (w * g).sum() for name, g in zip(names, gradients, strict=True)})
    assert w.grad is not None
    return w.grad.double()


@pytest.mark.parametrize(
    "exponents",
    [
        (0, 0, 0),
        (-22, -22, -22),
        (-30, -30, -30),
        (30, 30, 30),
        (-30, 30, 0),
        (0, -26, 1),
        (30, -30, -29),
        (20, -20, 10, -10),
    ],
)
@pytest.mark.parametrize("size", [8, 5000])
def test_pcgrad_is_exact_whatever_the_size_of_the_gradients(
    exponents: tuple[int, ...], size: int
) -> None:
    """Their squares leave float32 beyond 1e-22 and 1e19, their quotients beyond 1e38."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    gradients = []
    for k, exponent in enumerate(exponents):
        own = torch.randn(size, generator=generator, dtype=torch.float64)
        vector = own + (-0.6) ** k * common  # Every second one conflicts with the others.
        gradients.append((vector / vector.norm() * 10.0**exponent).float())
    found = pcgrad_of(gradients)
    expected = project([g.double() for g in gradients], drawn_orders(len(gradients)))
    plain = torch.stack([g.double() for g in gradients]).sum(0)
    assert (plain - expected).norm() > 1e-3 * expected.norm()  # There is something to project.
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("saturated", ["zero", "denormal", "logit -58"])
def test_a_saturated_task_leaves_the_others_as_they_are_by_hand(saturated: str) -> None:
    """By hand: (1, 0) and (-1, 1) give (1/2, 1/2) and (0, 1); the third adds next to nothing."""
    w = torch.zeros(3, requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=1.0), ["a", "b", "c"])

    def third() -> Tensor:
        if saturated == "logit -58":  # An all-negative batch; conflicts with neither.
            logit = (w * torch.tensor([0.0, 0.0, 1.0])).sum() - 58
            return nn.functional.binary_cross_entropy_with_logits(logit, torch.zeros(()))
        return (w * (0.0 if saturated == "zero" else 1e-42)).sum()

    losses = {"a": w[0] * 1.0, "b": w[1] - w[0], "c": third()}
    optimizer.step(losses)
    torch.testing.assert_close(w.detach(), torch.tensor([-0.5, -1.5, 0.0]))


def test_a_denormal_gradient_in_conflict_is_no_error() -> None:
    """It has few digits of a direction: (-1, 1) less its part along (1, 0), or as it is."""
    w = torch.zeros(2, requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=1.0), ["a", "b"])
    optimizer.step({"a": w[0] * 1e-42, "b": w[1] - w[0]})
    assert w.tolist() in ([0.0, -1.0], [1.0, -1.0])


def test_a_saturated_task_that_conflicts_is_projected_on() -> None:
    """Sigmoid(-58) is 6e-26, whose square is 0 in float32; its direction is as good as any."""
    x = torch.tensor([1.0, 2.0])
    w = torch.zeros(2, requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=1.0), ["a", "b"])
    logit = (w * x).sum() - 58
    negatives = nn.functional.binary_cross_entropy_with_logits(logit, torch.zeros(()))
    optimizer.step({"a": negatives, "b": -w[0]})
    # b's (-1, 0) less its part along (1, 2), which is (-1/5, -2/5).
    torch.testing.assert_close(w.detach(), torch.tensor([0.8, -0.4]), rtol=1e-5, atol=1e-7)


class Operations(TorchDispatchMode):
    """Notes the operations of torch, what they return, and how matrices are multiplied then."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.seen: list[tuple[str, Any, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        precision = torch.get_float32_matmul_precision()
        self.seen.append((func.overloadpacket.__name__, result, precision))
        return result

    @property
    def products(self) -> list[tuple[Tensor, str]]:
        names = ("mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "dot", "vdot", "addbmm")
        return [(result, precision) for name, result, precision in self.seen if name in names]


@pytest.mark.parametrize("size", [5, 2**13])  # One product, and several at once.
@pytest.mark.parametrize("what", ["pcgrad", "conflicts", "aggregated"])
def test_inner_products_do_not_follow_the_global_precision(what: str, size: int) -> None:
    """TF32 has three digits: enough for a network's products, not for the angle of two tasks."""
    w = torch.zeros(size, requires_grad=True)
    directions = {"a": torch.linspace(-1, 1, size), "b": torch.linspace(1, -0.5, size)}
    if what == "aggregated":
        from torchjd.aggregation import MGDA

        optimizer: Any = mtlopt.Aggregated(SGD([w], lr=0.1), ["a", "b"], MGDA())
    else:
        optimizer = mtlopt.PCGrad(SGD([w], lr=0.1), ["a", "b"])
    losses = {task: (w * direction).sum() for task, direction in directions.items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Operations() as operations:
            if what == "conflicts":
                mtlopt.conflicts(losses, [w], ["a", "b"])
            else:
                optimizer.step(losses)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert operations.products
    single = {how for result, how in operations.products if result.dtype is torch.float32}
    assert single <= {"highest"}


def test_inner_products_need_no_float64_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have none (MPS); "meta" stands for them, and goes no further than to be read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # It has none.
    monkeypatch.setattr("mtlopt._gradients.NO_FLOAT64", ("meta",), raising=False)
    w = torch.zeros(5, device="meta", requires_grad=True)
    direction = torch.ones(5, device="meta")
    optimizer = mtlopt.PCGrad(SGD([w], lr=0.1), ["a", "b"])
    losses = {"a": (w * direction).sum(), "b": (w * direction).sum()}
    with Operations() as operations, suppress(NotImplementedError, RuntimeError):
        optimizer.step(losses)
    assert operations.products
    results = [r for _, r, _ in operations.seen if isinstance(r, Tensor) and r.is_meta]
    assert torch.float64 not in {result.dtype for result in results}


# 15. Classes that keep something for all parameters in their state.


class Counting(SGD):
    """Its rate falls with a count that it keeps beside the parameters' own state."""

    kind: Any = staticmethod(torch.tensor)
    state: Any

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.state["count"] = self.kind(1.0)

    def step(self, closure: Any = None) -> Any:
        count = self.state["count"]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= float(count)
        if isinstance(count, Tensor):
            count += 1
        else:
            self.state["count"] = count + 1
        return super().step(closure)


class CountingNumbers(Counting):
    kind: Any = float


def global_states() -> dict[str, tuple[Any, dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "a tensor": (Counting, {"lr": 0.1}),
        "a number": (CountingNumbers, {"lr": 0.1}),
    }
    try:
        from pytorch_optimizer import MADGRAD, SPAM
    except ImportError:
        return found
    return found | {
        "MADGRAD": (MADGRAD, {"lr": 1e-3, "momentum": 0.0}),
        "SPAM": (SPAM, {"lr": 1e-3}),
    }


GLOBAL = global_states()


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("method", ["joint", "alternating", *INDEPENDENT])
def test_what_a_class_keeps_beside_the_parameters_is_saved_and_resumed(
    method: str, name: str, how: str
) -> None:
    """Bit for bit the plain loop, which nobody interrupts."""
    torch.manual_seed(1)
    model = Network(torch.float32)
    expected = copy.deepcopy(model)
    optimizer_class, options = GLOBAL[name]
    optimizer = of(model, method, optimizer_class=optimizer_class, **options)
    count = len(TASKS) if method in INDEPENDENT else 1
    plain = [optimizer_class(expected.parameters(), **options) for _ in range(count)]
    data = [(x.float(), {t: v.float() for t, v in y.items()}) for x, y in batches(5)]
    for i, (x, y) in enumerate(data):
        if i == 3 and how == "file":
            state = by_file(optimizer.state_dict())
            optimizer = of(model, method, optimizer_class=optimizer_class, **options)
            optimizer.load_state_dict(state)
        elif i == 3:
            model, optimizer = COPIERS[how]((model, optimizer))
        random = torch.get_rng_state()  # SPAM draws.
        optimizer.step(make_losses(model), x, y)
        torch.set_rng_state(random)
        losses = make_losses(expected)
        gradients = []
        if method == "joint":
            expected.zero_grad()
            values = list(losses(TASKS, x, y).values())
            sum(values[1:], values[0]).backward()
            plain[0].step()
            continue
        for k, task in enumerate(TASKS):
            expected.zero_grad()
            losses((task,), x, y)[task].backward()
            if method == "simultaneous":
                gradients.append([p.grad for p in expected.parameters()])
            else:
                plain[k % count].step()
        for own, gradient in zip(plain, gradients, strict=False):
            for parameter, part in zip(expected.parameters(), gradient, strict=True):
                parameter.grad = part
            own.step()
    assert_equal(snapshot(model), snapshot(expected))


def test_a_plain_state_with_something_global_is_copied_for_every_task() -> None:
    """A count that three optimizers share would run three times as fast."""
    w = leaf(1.0)
    optimizer = mtlopt.IndependentOptimizer(Counting, [w], ["a", "b"], lr=0.1)
    optimizer.load_state_dict(Counting([leaf(1.0)], lr=0.1).state_dict())
    optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    counts = [optimizer[task].state["count"] for task in ("a", "b")]  # type: ignore[index]  # a name, not a parameter
    assert [count.item() for count in counts] == [2.0, 2.0]
    assert counts[0] is not counts[1]


# 16. Groups without a parameter.


@every_method
def test_the_first_group_may_be_empty(method: str) -> None:
    """1 - 0.1 (1 + 2), in every method."""
    w = leaf(1.0)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [w]}]
    optimizer = make(method, groups, ["a", "b"], shared=w)
    optimizer.diagnostics()
    optimizer.step(
        lambda tasks: {t: v for t, v in {"a": w[0], "b": 2 * w[0]}.items() if t in tasks}
    )
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))
    for value in optimizer.diagnostics().values():
        assert not value.is_floating_point() or value.isfinite().all()
    optimizer.load_state_dict(by_file(optimizer.state_dict()))


# What reading alone has found.


def test_gradnorms_first_loss_of_a_group_is_the_sum_of_its_tasks_own_first_losses() -> None:
    """Or a group whose first batch lacked a label seems to have got worse ever since."""
    w = leaf(1.0, dtype=torch.float64)
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.0), [("a", "b"), "c"], [w])
    values = {"a": 0.0, "b": 0.0, "c": 0.0}

    def step(**given: float) -> list[float]:
        values.update(given)
        optimizer.step(lambda tasks: {t: values[t] * w.sum() for t in tasks if t in given})
        rates: list[float] = optimizer.diagnostics()["rates"].tolist()
        return rates

    def by_hand(group: float, c: float) -> Any:
        mean = (group + c) / 2
        return pytest.approx([group / mean, c / mean], rel=1e-5)

    assert step(a=4.0, c=2.0) == by_hand(1.0, 1.0)
    assert step(a=2.0, b=6.0, c=1.0) == by_hand((2 + 6) / (4 + 6), 1 / 2)
    optimizer.load_state_dict(by_file(optimizer.state_dict()))
    assert step(b=3.0, c=1.0) == by_hand(3 / 6, 1 / 2)
    assert step(a=2.0, b=3.0, c=1.0) == by_hand((2 + 3) / (4 + 6), 1 / 2)


@pytest.mark.parametrize("micro", [False, True])
def test_tensor_weights_wait_for_no_device(micro: bool) -> None:
    w = leaf(1.0)
    weights: Any = {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}
    optimizer = mtlopt.JointOptimizer(SGD([w], lr=0.1), ["a", "b"], weights)
    with Operations() as operations:
        optimizer.step(
            lambda tasks: {task: w.sum() for task in tasks},
            micro_batches=[(), ()] if micro else None,
        )
    names = [name for name, *_ in operations.seen]
    assert "_local_scalar_dense" not in names
    assert "is_nonzero" not in names
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))


# Bad input, and what is said about it.


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}])
@pytest.mark.parametrize("method", WRAPPERS)
def test_a_class_for_an_instance_is_told_to_pass_an_instance(
    method: str, options: dict[str, Any]
) -> None:
    """IndependentOptimizer takes a class; who changes methods by one line comes with one."""
    model = Network()
    classes: dict[str, Any] = {"gradnorm": mtlopt.GradNorm, "aggregated": mtlopt.Aggregated}
    call = classes.get(method) or wrapper(method)
    with pytest.raises(TypeError, match=r"(?i)pass an instance") as caught:
        call(Adam, model.parameters(), TASKS, **options)
    assert "Adam" in str(caught.value)


def test_weights_of_independent_optimizers_are_refused_with_the_reason() -> None:
    """A class that divides by the gradient's size would not notice them."""
    with pytest.raises(TypeError, match="`weights`"):
        mtlopt.IndependentOptimizer(Adam, [leaf(1.0)], ["a", "b"], lr=0.1, weights={"a": 2.0})


@pytest.mark.parametrize("kind", [list, tuple])
@every_method
def test_losses_in_a_list_are_told_to_be_a_mapping(method: str, kind: Any) -> None:
    model = Network()
    optimizer = of(model, method)
    losses, (x, y) = make_losses(model), batches(1)[0]
    before = snapshot(model)
    told = pytest.raises(TypeError, match=re.escape("dict(zip(tasks, losses))"))
    with told:
        optimizer.step(lambda tasks: kind(losses(tasks, x, y).values()))
    if method in (*ONE_STEP, "simultaneous"):
        with pytest.raises(TypeError, match=re.escape("dict(zip(tasks, losses))")):
            optimizer.step(kind(losses(TASKS, x, y).values()))
    if method in ONE_STEP:
        with pytest.raises(TypeError, match=re.escape("dict(zip(tasks, losses))")):
            optimizer.backward(kind(losses(TASKS, x, y).values()))
    assert_equal(snapshot(model), before)


@every_method
def test_a_batch_by_keyword_is_told_to_come_by_position(method: str) -> None:
    model = Network()
    optimizer = of(model, method)
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match=r"position|losses\(tasks, \*batch\)"):
        optimizer.step(make_losses(model), x=x, y=y)


@every_method
def test_a_wrapper_in_a_wrapper_is_an_error_that_fits_a_screen(method: str) -> None:
    """An optimizer's repr lists all its groups."""
    model = Network()
    inner = of(model, method)
    for outer in WRAPPERS:
        call = wrapper(outer, model.trunk[2].weight)
        with pytest.raises(TypeError, match=type(inner).__name__) as caught:
            call(inner, TASKS)
        assert len(str(caught.value)) < 300
        assert "Parameter Group" not in str(caught.value)


@every_method
def test_a_name_that_is_no_task_is_an_error_that_lists_both_sets(method: str) -> None:
    model = Network()
    optimizer = of(model, method)
    losses, (x, y) = make_losses(model), batches(1)[0]
    before = snapshot(model)

    def misspelt(tasks: Sequence[str]) -> dict[str, Tensor]:
        return {{"a": "disk"}.get(t, t): v for t, v in losses(TASKS, x, y).items()}

    with pytest.raises(ValueError, match="'disk'") as caught:
        optimizer.step(misspelt)
    for name in TASKS:
        assert repr(name) in str(caught.value)
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("method", ["alternating", "independent", "per task"])
def test_a_task_that_was_not_asked_for_now_is_ignored(method: str) -> None:
    """A model that computes everything works: nothing of the others is used, not even looked at."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    if method == "per task":
        optimizer: Any = mtlopt.JointOptimizer(
            Adam(model.parameters(), lr=0.01), TASKS, forwards="per-task"
        )
    else:
        optimizer = of(model, method, optimizer_class=Adam, lr=0.01)
    plain = [Adam(expected.parameters(), lr=0.01) for _ in TASKS]
    losses, plain_losses = make_losses(model), make_losses(expected)

    def everything(tasks: Sequence[str], x: Tensor, y: Any) -> dict[str, Any]:
        found = losses(TASKS, x, y)
        return {t: v if t in tasks else (v.detach() * float("nan"), 7) for t, v in found.items()}

    for x, y in batches(3):
        values = optimizer.step(everything, x, y)
        assert list(values) == list(TASKS)
        if method == "per task":
            gradients = []
            for task in TASKS:
                expected.zero_grad()
                plain_losses((task,), x, y)[task].backward()
                gradients.append([p.grad for p in expected.parameters()])
            for parameter, column in zip(
                expected.parameters(), zip(*gradients, strict=True), strict=True
            ):
                parameter.grad = torch.stack([g for g in column if g is not None]).sum(0)
            plain[0].step()
            continue
        for k, task in enumerate(TASKS):
            expected.zero_grad()
            plain_losses((task,), x, y)[task].backward()
            plain[0 if method == "alternating" else k].step()
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, snapshot(expected)[name], rtol=1e-12, atol=1e-12)


def test_ready_losses_name_the_schedule_that_takes_them() -> None:
    w = leaf(1.0)
    optimizer = mtlopt.IndependentOptimizer(SGD, [w], ["a", "b"], lr=0.1)
    with pytest.raises(TypeError, match=r"schedule=.simultaneous"):
        optimizer.step({"a": w.sum(), "b": w.sum()})
