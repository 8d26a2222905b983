"""The reference itself, in numbers worked by hand: an oracle that is wrong finds nothing."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

import reference

TASKS = ("a", "b")


def start(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def squares_of(w: Tensor) -> reference.Losses:
    """Both tasks' gradient is 2 w."""
    return lambda tasks: {t: (w**2).sum() for t in tasks}


def slopes_of(w: Tensor, **slopes: Sequence[float]) -> reference.Losses:
    """Linear losses, whose gradients are the slopes."""
    return lambda tasks: {t: w @ w.new_tensor(slopes[t]) for t in tasks}


def optimizers(w: Tensor) -> dict[str, Any]:
    return {t: SGD([w], lr=0.1, momentum=0.5) for t in TASKS}


def test_it_is_written_without_the_package() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {str(name).split(".")[0] for name in modules} == {"collections", "torch", "typing"}


def test_joint_steps_on_the_weighted_sum() -> None:
    """1 - 0.1 (2 + 3 * 2)."""
    w = start(1.0)
    values = reference.joint(SGD([w], lr=0.1), squares_of(w), TASKS, weights={"b": 3.0})
    assert w.tolist() == pytest.approx([0.2])
    assert [v.item() for v in values.values()] == [1.0, 1.0]


def test_alternating_takes_the_second_gradient_at_the_new_weights() -> None:
    """1 - 0.1 * 2 = 0.8, then 0.8 - 0.1 * 1.6."""
    w = start(1.0)
    values = reference.alternating(SGD([w], lr=0.1), squares_of(w), TASKS)
    assert w.tolist() == pytest.approx([0.64])
    assert [v.item() for v in values.values()] == pytest.approx([1.0, 0.64])


def test_independent_keeps_a_momentum_for_each_task() -> None:
    """Slopes 1 and 2: 0.1 (1 + 2) at first, then 0.1 (1.5 + 3). One buffer would hold both."""
    w = start(1.0)
    own = optimizers(w)
    for _ in range(2):
        reference.independent(own, slopes_of(w, a=[1.0], b=[2.0]), TASKS)
    assert w.tolist() == pytest.approx([1 - 0.3 - 0.45])


def test_simultaneous_takes_both_gradients_at_the_same_weights() -> None:
    """1 - 0.1 * (2 + 2); then gradients of 1.2, and half of the old 2 in each buffer."""
    w = start(1.0)
    own = optimizers(w)
    reference.simultaneous(own, squares_of(w), TASKS)
    assert w.tolist() == pytest.approx([0.6])
    reference.simultaneous(own, squares_of(w), TASKS)
    assert w.tolist() == pytest.approx([0.6 - 0.1 * 2 * (0.5 * 2 + 1.2)])


def test_aggregated_replaces_the_gradient_of_the_shared_parameters_alone() -> None:
    """Rows (1, 0) and (3, 2), whose smallest entries are (1, 0); the head has its slope, 5."""
    w, head = start(0.0, 0.0), start(0.0)
    linear = slopes_of(w, a=[1.0, 0.0], b=[3.0, 2.0])
    reference.aggregated(
        SGD([w, head], lr=1.0),
        lambda tasks: {t: v + 5 * head.sum() * (t == "b") for t, v in linear(tasks).items()},
        TASKS,
        shared=[w],
        aggregate=lambda jacobian: jacobian.min(0).values,
    )
    assert w.tolist() == [-1.0, 0.0]
    assert head.tolist() == [-5.0]


def test_pcgrad_projects_each_gradient_off_the_other() -> None:
    """(2, 0) and (-1, 1) become (1, 1) and (0, 1)."""
    w = start(0.0, 0.0)
    reference.pcgrad(
        SGD([w], lr=1.0),
        slopes_of(w, a=[2.0, 0.0], b=[-1.0, 1.0]),
        TASKS,
        shared=[w],
        generator=torch.Generator().manual_seed(0),
    )
    assert w.tolist() == [-1.0, -2.0]


def test_gradnorm_moves_the_weights_towards_equal_rates() -> None:
    """L = (w², 4w²) at 1, initially 2 and 4: G = (2, 8), targets 5 * (2/3, 4/3) at alpha 1.

    The first weight is too small, the second too large; Adam's first step is 0.025 either way.
    """
    w = start(1.0)
    weights = {t: torch.ones((), requires_grad=True) for t in TASKS}
    reference.gradnorm(
        SGD([w], lr=0.05),
        lambda tasks: {"a": w.square().sum(), "b": 4 * w.square().sum()},
        TASKS,
        shared=[w],
        weights=weights,
        weight_optimizer=Adam(weights.values(), lr=0.025),
        initial={"a": torch.tensor(2.0), "b": torch.tensor(4.0)},
        alpha=1.0,
    )
    assert w.tolist() == pytest.approx([0.5])
    assert [v.item() for v in weights.values()] == pytest.approx([1.025, 0.975])


@pytest.mark.parametrize(
    ("shares", "expected"), [(None, (5.5, 5.5)), ({"a": 3.0, "b": 1.0}, (8.25, 2.75))]
)
def test_balanced_gives_each_task_its_share(shares: Any, expected: tuple[float, float]) -> None:
    """Norms 1 and 10, mean 5.5: gradients (1, 0) and (0, 10) become of that length each."""
    w = start(0.0, 0.0)
    linear = slopes_of(w, a=[1.0, 0.0], b=[0.0, 10.0])
    reference.balanced(SGD([w], lr=1.0), linear, TASKS, shared=[w], squares={}, shares=shares)
    assert w.tolist() == pytest.approx([-x for x in expected])


def test_balanced_averages_squared_norms_where_it_measures() -> None:
    """The slope of a grows from 1 to 3: its average from 1 to 0.75 + 0.25 * 9 = 3."""
    w = start(0.0)
    found: dict[str, Tensor] = {}
    for slope, measure, average in ((1.0, True, 1.0), (3.0, False, 1.0), (3.0, True, 3.0)):
        linear = slopes_of(w, a=[slope], b=[2.0])
        base = SGD([w], lr=0.1)
        options: dict[str, Any] = {"squares": found, "measure": measure, "decay": 0.75}
        reference.balanced(base, linear, TASKS, shared=[w], **options)
        assert found["a"].item() == pytest.approx(average)
        assert found["b"].item() == pytest.approx(4.0)


def test_scalarized_steps_on_a_function_of_the_losses() -> None:
    """The slope of log(w²) + log(w²) at 1 is 4."""
    w = start(1.0)
    reference.scalarized(
        SGD([w], lr=0.1), squares_of(w), TASKS, scalarize=lambda losses: losses.log().sum()
    )
    assert w.tolist() == pytest.approx([0.6])
