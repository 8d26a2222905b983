"""Mixed precision by autocast, wherever the caller enters it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlopt
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot


def aggregated(base: torch.optim.Optimizer, _: nn.Module) -> Any:
    from torchjd.aggregation import ConFIG

    return mtlopt.Aggregated(base, TASKS, ConFIG())


def scalarized(base: torch.optim.Optimizer, _: nn.Module) -> Any:
    """By a rule that looks twice."""
    from torchjd.scalarization import FAMO

    return mtlopt.Scalarized(base, TASKS, FAMO(3))


METHODS: dict[str, Callable[..., Any]] = {
    "joint": lambda base, _: mtlopt.JointOptimizer(base, TASKS),
    "alternating": lambda base, _: mtlopt.AlternatingOptimizer(base, TASKS),
    "pcgrad": lambda base, _: mtlopt.PCGrad(base, TASKS),
    "gradnorm": lambda base, m: mtlopt.GradNorm(base, TASKS, shared=[m.trunk[2].weight]),
    "aggregated": aggregated,
    "scalarized": scalarized,
    "independent": lambda _, m: mtlopt.IndependentOptimizer(
        torch.optim.SGD, m.parameters(), TASKS, lr=0.05
    ),
    "simultaneous": lambda _, m: mtlopt.IndependentOptimizer(
        torch.optim.SGD, m.parameters(), TASKS, schedule="simultaneous", lr=0.05
    ),
}


def train(method: str, where: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Network(torch.float32)
    optimizer = METHODS[method](torch.optim.SGD(model.parameters(), lr=0.05), model)
    plain = make_losses(model)

    def losses(*arguments: Any) -> dict[str, Tensor]:
        with inside:
            return plain(*arguments)

    autocast = torch.autocast("cpu", dtype)
    inside = autocast if where == "inside" else nullcontext()
    with autocast if where == "around" else nullcontext():
        for x, y in batches(5):
            optimizer.step(losses, x.float(), {task: t.float() for task, t in y.items()})
    return snapshot(model)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_the_step_is_autocast_in_the_losses(method: str) -> None:
    """No cast of weights that have moved is used again; no gradients are multiplied in it."""
    around, inside, without = (train(method, where) for where in ("around", "inside", ""))
    assert_equal(around, inside)
    difference = max((inside[n] - without[n]).abs().max().item() for n in without)
    assert 1e-6 < difference < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_float16_on_a_processor_too(method: str) -> None:
    weights, without = train(method, "inside", torch.float16), train(method, "")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, without[name], rtol=0, atol=2e-3)
