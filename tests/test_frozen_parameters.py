"""Frozen parameters, also those that `losses` freezes and unfreezes."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

import mtlopt
import reference
from all_methods import make_for
from problems import TASKS, Network, batches, halves, leaf, make_losses, snapshot


def mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("method", ["alternating", "independent"])
def test_a_task_may_freeze_the_trunk_for_itself(method: str, micro: bool) -> None:
    """Its gradient there is None, without remains of an earlier task's."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    optimizer = make_for(model, method, optimizer_class=Adam, lr=0.01)
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
            reference.step(
                plain[k % count], lambda: mean(plain_losses((task,), *p)[task] for p in parts)
            )
        optimizer.step(losses, micro_batches=parts)
    tolerance = 1e-12 if micro else 0.0
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, snapshot(expected)[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", ["steps", "micro-batches"])
@pytest.mark.parametrize("method", ["joint", "gradnorm", "aggregated", "simultaneous"])
def test_losses_may_freeze_and_unfreeze_parameters(method: str, pattern: str) -> None:
    """What was frozen before `losses` ran does not matter."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    optimizer = make_for(model, method)
    for each in (model, expected):
        each.trunk[0].weight.requires_grad_(False)

    def freezing(model: Network) -> Callable[..., Any]:
        losses = make_losses(model)

        def call(tasks: Sequence[str], frozen: bool, x: Tensor, y: Any) -> Any:
            model.trunk[0].weight.requires_grad_(not frozen)
            return losses(tasks, x, y)

        return call

    losses, plain_losses = freezing(model), freezing(expected)
    plain = SGD(expected.parameters(), lr=0.1)
    (x, y), (x2, y2) = batches(2)
    steps = {
        "steps": [[(False, x, y)], [(True, x2, y2)]],
        "micro-batches": [[(True, x, y), (False, x2, y2)]],
    }[pattern]
    for parts in steps:
        reference.step(
            plain, lambda: mean(reference.weighted_sum(plain_losses(TASKS, *p)) for p in parts)
        )
        optimizer.step(losses, micro_batches=parts)
        for name, weight in snapshot(model).items():
            torch.testing.assert_close(weight, snapshot(expected)[name], rtol=1e-12, atol=1e-12)
        if method == "gradnorm":
            break  # From here on its weights differ from 1.


def test_pcgrad_projects_over_the_parameters_that_losses_left_unfrozen() -> None:
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


def test_frozen_parameters_are_left_alone() -> None:
    model = Network()
    model.trunk[0].weight.requires_grad_(False)
    start = snapshot(model)
    for method in ("independent", "simultaneous"):
        optimizer = make_for(model, method, optimizer_class=Adam, lr=0.1, weight_decay=0.1)
        optimizer.step(make_losses(model), *batches(1)[0])
        assert model.trunk[0].weight not in optimizer["a"].state
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start[name])]
    assert moved == [name for name in start if name != "trunk.0.weight"]
