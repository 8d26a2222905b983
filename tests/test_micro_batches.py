"""Micro-batches: one step on gradients averaged over several forward passes."""

from typing import Any

import pytest
import torch
from torch.optim import SGD

import mtlopt
from all_methods import METHODS, every_method, make, with_weights
from problems import TASKS, Network, batches, halves, make_losses, no_warnings, twins, with_counts

methods = pytest.mark.parametrize(
    "method", ["joint", "joint-per-task", "alternating", "independent", "simultaneous"]
)


def build(method: str, model: Any, tasks: Any = TASKS) -> Any:
    keywords = {"forwards": "per-task"} if method.endswith("-per-task") else {}
    name = method.removesuffix("-per-task")
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    return make(name, model.parameters(), tasks, keywords=keywords, **options)


@methods
def test_micro_batches_must_not_be_empty_or_come_with_a_batch(method: str) -> None:
    optimizer = build(method, Network())
    with pytest.raises(ValueError, match="`micro_batches` must hold at least one batch, got none"):
        optimizer.step(lambda tasks: {}, micro_batches=iter(()))
    with pytest.raises(TypeError, match="`micro_batches` replaces"):
        optimizer.step(lambda tasks, x: {}, 1, micro_batches=[(1,)])


@methods
def test_micro_batches_average_each_task_by_its_own_count(method: str) -> None:
    """A task labelled on 6, 0 and 2 samples is not diluted by the micro-batch without labels."""
    model, expected = twins()
    (x, y), *_ = batches(1, size=12)
    parts = [slice(0, 6), slice(6, 10), slice(10, 12)]
    labelled = {"a": [6, 0, 2], "b": [6, 4, 2], "c": [0, 4, 0]}
    everywhere = {
        task: torch.cat([torch.arange(12)[p][:n] for p, n in zip(parts, counts, strict=True)])
        for task, counts in labelled.items()
    }

    def square(m: Any, task: str, rows: Any) -> Any:
        return ((m(x[rows], (task,))[task] - y[task][rows]) ** 2).mean()

    def losses(tasks: Any, index: int) -> dict[str, Any]:
        rows = torch.arange(12)[parts[index]]
        counts = {t: labelled[t][index] for t in tasks}
        return {t: (square(model, t, rows[:n]), n) if n else None for t, n in counts.items()}

    optimizer, plain = build(method, model), build(method, expected)
    for _ in range(3):
        values = optimizer.step(losses, micro_batches=(i for i in range(3)))
        whole = plain.step(lambda tasks: {t: square(expected, t, everywhere[t]) for t in tasks})
        for task in TASKS:
            torch.testing.assert_close(values[task], whole[task], rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@methods
def test_a_group_is_one_objective_under_micro_batches_too(method: str) -> None:
    """Each of its tasks is averaged by its own counts: 4 and 2 for one, 0 and 2 for the other."""
    groups = ["c", ("a", "b")]
    model, expected = twins()
    (x, y), *_ = batches(1, size=6)
    rows: dict[str, Any] = {
        "a": [slice(0, 4), slice(4, 6)],
        "b": [None, slice(4, 6)],
        "c": [slice(0, 4), None],
    }
    everywhere = {"a": slice(0, 6), "b": slice(4, 6), "c": slice(0, 4)}

    def square(m: Any, task: str, part: slice) -> Any:
        return ((m(x[part], (task,))[task] - y[task][part]) ** 2).mean()

    def losses(tasks: Any, index: int) -> dict[str, Any]:
        chosen = {t: rows[t][index] for t in tasks}
        return {t: (square(model, t, r), r.stop - r.start) for t, r in chosen.items() if r}

    optimizer, plain = build(method, model, groups), build(method, expected, groups)
    for _ in range(3):
        optimizer.step(losses, micro_batches=[0, 1])
        plain.step(lambda tasks: {t: square(expected, t, everywhere[t]) for t in tasks})
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@methods
def test_large_counts_do_not_overflow_half_precision(method: str) -> None:
    """Such as counts of pixels: float16 ends at 65504."""
    w = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float16))
    model: Any = torch.nn.ParameterList([w])
    optimizer = build(method, model, ["a"])
    optimizer.step(lambda tasks, n: {"a": ((w * w).sum(), n)}, micro_batches=[260_000, 130_000])
    assert w.item() == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("method", [*METHODS, "weighted", "weighted, per task", "grouped"])
def test_parameters_of_a_second_optimizer_get_the_full_batchs_gradient(
    method: str, counted: bool
) -> None:
    """A second optimizer may have the heads: it needs the mean over all samples."""
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
def test_unequal_counts_warn_once_where_a_second_optimizer_has_parameters(method: str) -> None:
    """The gradients of parameters it does not own are added up before mtlopt knows the counts."""
    model = Network()
    optimizer = make(method, model.trunk.parameters(), shared=model.trunk[2].weight)
    losses = with_counts(make_losses(model))
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="micro_batches"):
        optimizer.step(losses, micro_batches=halves(x, y, 2))
    with no_warnings():
        optimizer.step(losses, micro_batches=halves(x, y, 2))
