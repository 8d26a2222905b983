"""The protocol: what `step` accepts, and what it says about everything else."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import mtlopt
import reference
from all_methods import INDEPENDENT, make, make_for
from problems import (
    TASKS,
    Network,
    assert_close,
    assert_equal,
    batches,
    halves,
    leaf,
    make_losses,
    no_warnings,
    snapshot,
    twins,
)


def sgd(model: Network) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


MAKERS: dict[str, Callable[..., Any]] = {
    "joint": lambda m, t=TASKS, **k: mtlopt.JointOptimizer(sgd(m), t, **k),
    "joint-per-task": lambda m, t=TASKS, **k: mtlopt.JointOptimizer(
        sgd(m), t, forwards="per-task", **k
    ),
    "alternating": lambda m, t=TASKS, **k: mtlopt.AlternatingOptimizer(sgd(m), t, **k),
    "independent": lambda m, t=TASKS, **k: mtlopt.IndependentOptimizer(
        torch.optim.SGD, m.parameters(), t, lr=0.1, momentum=0.9, **k
    ),
    "simultaneous": lambda m, t=TASKS, **k: mtlopt.IndependentOptimizer(
        torch.optim.SGD, m.parameters(), t, schedule="simultaneous", lr=0.1, momentum=0.9, **k
    ),
}
JOINT = ("joint", "joint-per-task", "simultaneous")
methods = pytest.mark.parametrize("method", MAKERS)


@methods
@pytest.mark.parametrize("tasks", ["abc", [], [()], [1], [("a", 2)], ["a", "a"], ["a", ("b", "a")]])
def test_tasks_must_be_names_each_once(method: str, tasks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"`tasks` must .*got"):
        MAKERS[method](Network(), tasks)


@methods
def test_a_name_that_is_no_task_is_named_beside_those_that_are(method: str) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    start = snapshot(model)
    losses = make_losses(model)
    (x, y), *_ = batches(1)

    def misspelt(tasks: Any) -> dict[str, Tensor]:
        return {"a": losses("a", x, y)["a"], "fovae": losses("a", x, y)["a"]}

    with pytest.raises(ValueError, match=r"'b', 'c'\], got \['fovae'\] among \['a', 'fovae'\]"):
        optimizer.step(misspelt)
    assert_equal(snapshot(model), start)


def bad_losses() -> dict[str, tuple[Any, str]]:
    w = torch.ones(3, requires_grad=True)
    return {
        "vector": (w * 1, r"'b' must be a scalar, got shape \(3,\)"),
        "graphless": (torch.tensor(1.0), "'b' must have a graph"),
        "number": (0.5, r"'b' must be a tensor, .* got 0\.5"),
        "nan": (w.sum() * float("nan"), "'b' must be finite, got nan"),
        "count": ((w.sum(), 1.5), r"count of task 'b' must be a whole number .*got 1\.5"),
        "negative": ((w.sum(), -1), "count of task 'b' must not be negative, got -1"),
    }


@methods
@pytest.mark.parametrize("case", bad_losses())
def test_a_bad_loss_is_refused_with_its_task_and_value(method: str, case: str) -> None:
    """Joint kind: nothing has moved. Sequential: the earlier task has stepped, this one not."""
    value, message = bad_losses()[case]
    model = Network()
    optimizer = MAKERS[method](model, check_finite=True)
    start = snapshot(model)
    losses = make_losses(model)
    (x, y), *_ = batches(1)

    def spoilt(tasks: Any) -> dict[str, Any]:
        return losses(tasks, x, y) | ({"b": value} if "b" in tasks else {})

    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step(spoilt)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    if method in JOINT:
        assert moved == set()
    else:
        assert "heads.a.weight" in moved
        assert not {"heads.b.weight", "heads.c.weight"} & moved


@methods
def test_a_loss_that_is_not_finite_passes_when_nobody_asked_for_the_check(method: str) -> None:
    """The check would synchronise with the device at every loss."""
    model: Any = Network()
    values = MAKERS[method](model).step(
        lambda tasks: {t: model.trunk[0].weight.sum() * float("nan") for t in tasks}
    )
    assert all(value.isnan() for value in values.values())


@methods
@pytest.mark.parametrize(
    ("losses", "batch", "message"),
    [
        (lambda: None, (), r"losses\(tasks, \*batch\), here with 0 batch arguments.*takes \(\)"),
        (lambda tasks: {}, (1, 2), r"here with 2 batch arguments.*takes \(tasks\)"),
        (lambda tasks: None, (), "must return a mapping from task to loss, got NoneType"),
        (torch.zeros(()), (), "got Tensor"),
    ],
)
def test_a_function_of_another_shape_is_told_the_right_one(
    method: str, losses: Any, batch: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        MAKERS[method](Network()).step(losses, *batch)


@methods
def test_an_error_inside_losses_is_not_dressed_up(method: str) -> None:
    def broken(tasks: Any) -> Any:
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match=r"^my own mistake$"):
        MAKERS[method](Network()).step(broken)


@methods
def test_counts_may_come_as_numpy_and_tensor_integers(method: str) -> None:
    model = Network()
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    counts: dict[str, Any] = {"a": np.int64(0), "b": torch.tensor(0), "c": 3}
    values = MAKERS[method](model).step(
        lambda tasks: {t: (loss, counts[t]) for t, loss in losses(tasks, x, y).items()}
    )
    assert list(values) == ["c"]


@methods
def test_gradients_are_taken_even_where_the_caller_has_switched_them_off(method: str) -> None:
    """As torch's closures are."""
    model = Network()
    start = snapshot(model)
    with torch.no_grad():
        MAKERS[method](model).step(make_losses(model), *batches(1)[0])
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())


@methods
def test_step_clears_old_gradients_and_leaves_the_last_one(method: str) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    optimizer.step(make_losses(model), *batches(1)[0])
    left = {name for name, p in model.named_parameters() if p.grad is not None}
    trunk = {"trunk.0.weight", "trunk.2.weight"}
    heads = {f"heads.{t}.weight" for t in (TASKS if method.startswith("joint") else "c")}
    assert left == trunk | heads
    assert all(p.grad.abs().max() < 1e3 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["joint", "simultaneous"])
def test_one_forward_serves_all_tasks_and_ready_losses_say_the_same(method: str) -> None:
    model, twin = twins()
    optimizer, ready = MAKERS[method](model), MAKERS[method](twin)
    asked = []

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        asked.append(tasks)
        return make_losses(model)(tasks, x, y)

    for x, y in batches(3):
        optimizer.step(losses, x, y)
        ready.step(make_losses(twin)(TASKS, x, y))
    assert asked == [TASKS] * 3
    assert_equal(snapshot(model), snapshot(twin))
    with pytest.raises(TypeError, match="batch"):
        ready.step(make_losses(twin)(TASKS, x, y), x, y)


@pytest.mark.parametrize("method", ["alternating", "independent"])
def test_sequential_methods_ask_for_one_task_after_the_other_and_refuse_ready_losses(
    method: str,
) -> None:
    model = Network()
    optimizer = MAKERS[method](model, ["c", ("a", "b")])
    asked = []

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        asked.append(tasks)
        return make_losses(model)(tasks, x, y)

    values = optimizer.step(losses, *batches(1)[0])
    assert asked == [("c",), ("a", "b")]
    assert list(values) == ["c", "a", "b"]
    with pytest.raises(TypeError, match=r"ready losses .*stale"):
        optimizer.step(make_losses(model)(TASKS, *batches(1)[0]))


@pytest.mark.parametrize("method", ["alternating", "independent", "simultaneous"])
@pytest.mark.parametrize("arguments", [(), (None,)])
def test_a_step_without_losses_is_refused_with_the_way_to_do_it(
    method: str, arguments: Any
) -> None:
    with pytest.raises(TypeError, match=r"needs `losses`.*loss.backward\(\)"):
        MAKERS[method](Network()).step(*arguments)


@methods
def test_an_empty_mean_counts_for_nothing(method: str) -> None:
    """The mean over no samples is NaN, and its count says that it is absent."""
    model = Network()
    losses = make_losses(model)
    (x, y), *_ = batches(1)

    def masked(tasks: Any) -> dict[str, Any]:
        return {t: (v * float("nan"), 0) if t == "b" else v for t, v in losses(tasks, x, y).items()}

    values = MAKERS[method](model, check_finite=True).step(masked)
    assert list(values) == ["a", "c"]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_has_one_gradient() -> None:
    w = torch.tensor([1.0], requires_grad=True)
    results = []
    for schedule in ("sequential", "simultaneous"):
        with torch.no_grad():
            w.fill_(1.0)
        options: Any = {"schedule": schedule, "lr": 0.1}
        optimizer = mtlopt.IndependentOptimizer(
            torch.optim.SGD, [{"params": [w, w]}], ["a"], **options
        )
        optimizer.step(lambda tasks: {"a": w.sum()})
        results.append(w.item())
    assert results[0] == results[1] == pytest.approx(0.8)


@pytest.mark.parametrize("method", ["joint", "pcgrad", "alternating", *INDEPENDENT])
def test_a_hundred_steps_without_labels_warn_once(method: str) -> None:
    """A misspelt task name looks like a missing label."""
    w = leaf(1.0)
    optimizer = make(method, [w], ["disc", "cup"])

    def nothing(tasks: Any) -> dict[str, Tensor]:
        return {}

    with no_warnings():
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
    with no_warnings():
        for _ in range(150):
            optimizer.step(nothing)


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("method", ["joint", "pcgrad", "aggregated", "alternating", *INDEPENDENT])
def test_a_loss_that_depends_on_no_parameter_warns_once(method: str, micro: bool) -> None:
    """The trunk is detached, or no optimizer has the head: the task trains nothing."""
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
    with no_warnings():
        step()
    if method == "joint" and not micro:
        return  # The sum has one backward pass; only its first graph is searched.
    reached.remove("c")
    with pytest.warns(UserWarning, match="'c'") as caught:
        step()
    assert len(caught) == 1
    with no_warnings():
        step()


@pytest.mark.parametrize("method", ["alternating", "independent", "per task"])
def test_a_task_that_was_not_asked_for_is_ignored(method: str) -> None:
    """So a model that computes every task works: the other losses are not even looked at."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    if method == "per task":
        optimizer: Any = mtlopt.JointOptimizer(
            Adam(model.parameters(), lr=0.01), TASKS, forwards="per-task"
        )
    else:
        optimizer = make_for(model, method, optimizer_class=Adam, lr=0.01)
    plain = {task: Adam(expected.parameters(), lr=0.01) for task in TASKS}
    by_hand = {
        "per task": partial(reference.joint, plain["a"]),
        "alternating": partial(reference.alternating, plain["a"]),
        "independent": partial(reference.independent, plain),
    }[method]
    losses = make_losses(model)

    def everything(tasks: Sequence[str], x: Tensor, y: Any) -> dict[str, Any]:
        found = losses(TASKS, x, y)
        return {t: v if t in tasks else (v.detach() * float("nan"), 7) for t, v in found.items()}

    for x, y in batches(3):
        values = optimizer.step(everything, x, y)
        assert list(values) == list(TASKS)
        by_hand(make_losses(expected), TASKS, x, y)
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, snapshot(expected)[name], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own
def test_a_reentrant_checkpoint_that_hides_the_parameters_is_named() -> None:
    """Its output's graph ends where the checkpoint's inputs need no gradient."""
    model = Network()
    x, y = batches(1)[0]
    optimizer = mtlopt.PCGrad(SGD(model.trunk.parameters(), lr=0.1), TASKS)

    def losses(tasks: Any) -> dict[str, Tensor]:
        z = checkpoint(model.trunk, x, use_reentrant=True)
        return {t: (model.heads[t](z) - y[t]).square().mean() for t in tasks}

    with pytest.warns(UserWarning, match="must have `use_reentrant=False`"):
        optimizer.step(losses)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("how", ["per task", "scalarized", "features"])
def test_losses_may_clear_the_gradients(how: str, to_none: bool) -> None:
    """An earlier call has put a part of the step's gradient there."""
    from torchjd import aggregation, scalarization

    model, expected = twins()
    optimizer: Any
    if how == "features":
        rule = aggregation.Constant(torch.ones(3, dtype=torch.float64))
        optimizer = mtlopt.Aggregated(sgd(model), TASKS, rule, features=model.trunk)
    elif how == "per task":
        optimizer = mtlopt.JointOptimizer(sgd(model), TASKS, forwards="per-task")
    else:
        mean = scalarization.Sum()
        optimizer = mtlopt.Scalarized(sgd(model), TASKS, mean, forwards="per-task")
    plain = sgd(expected)

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=to_none)
        return make_losses(model)(tasks, x, y)

    for x, y in batches(3):
        if how == "features":
            optimizer.step(losses, micro_batches=halves(x, y, 3))
        else:
            optimizer.step(losses, x, y)
        reference.joint(plain, make_losses(expected), TASKS, x, y)
    assert_close(model, expected)


@pytest.mark.parametrize("method", ["joint", "alternating", "independent", "simultaneous"])
@pytest.mark.parametrize("part", ["itself", "an element", "reshaped"])
def test_a_returned_loss_stays_as_it_was_where_it_is_a_parameter(method: str, part: str) -> None:
    """Its memory would be the parameter's, which the step moves."""
    w, v = leaf(3.0), torch.tensor([5.0, 7.0], requires_grad=True)
    takes: dict[str, Callable[[], Tensor]] = {
        "itself": lambda: w,
        "an element": lambda: v[0],
        "reshaped": lambda: w.view(1),
    }
    optimizer = make(method, [w, v], ["a"], lr=1.0)
    values = optimizer.step(lambda tasks: {"a": takes[part]()})
    assert values["a"].item() == {"itself": 3.0, "an element": 5.0, "reshaped": 3.0}[part]
    assert (w.item(), v[0].item()) == ((3.0, 4.0) if part == "an element" else (2.0, 5.0))
