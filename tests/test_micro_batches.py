"""Micro-batches: one step on gradients averaged over several forward passes."""

from typing import Any

import pytest
import torch
from torch.optim import SGD

import mtlopt
from all_methods import METHODS, every_method, make, with_weights
from problems import TASKS, Network, batches, halves, make_losses, no_warnings, with_counts


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
    """The counts are known only when gradients that mtlopt does not hold have been added up."""
    model = Network()
    optimizer = make(method, model.trunk.parameters(), shared=model.trunk[2].weight)
    losses = with_counts(make_losses(model))
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="micro_batches"):
        optimizer.step(losses, micro_batches=halves(x, y, 2))
    with no_warnings():
        optimizer.step(losses, micro_batches=halves(x, y, 2))
