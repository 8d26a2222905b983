"""Devices that torch was told of: a default that is not the model's, and "meta", which is none."""

from typing import Any

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization
from torch.optim import SGD
from torchjd.scalarization import FAMO

import mtlopt
from all_methods import METHODS, make, make_for
from problems import TASKS, assert_equal, batches, make_losses, snapshot, twins

RULES: dict[str, Any] = {
    "scalarized": lambda base: mtlopt.Scalarized(base, TASKS, FAMO(3)),
    "random": lambda base: mtlopt.Scalarized(base, TASKS, torchjd.scalarization.Random()),
    "gradvac": lambda base: mtlopt.Aggregated(base, TASKS, torchjd.aggregation.GradVac()),
    "pcd": lambda base: mtlopt.Aggregated(base, TASKS, torchjd.aggregation.PCD()),
    "graddrop": lambda base: mtlopt.Aggregated(base, TASKS, torchjd.aggregation.GradDrop()),
    "shuffled": lambda base: mtlopt.AlternatingOptimizer(
        base, TASKS, order="shuffled", record="updates"
    ),
    "per step": lambda base: mtlopt.IndependentOptimizer(base, TASKS, per_step=2),
}


@pytest.mark.parametrize("method", [*METHODS, *RULES])
def test_the_default_device_is_not_for_the_optimizers_own_tensors(method: str) -> None:
    """A default of "meta" stands for a GPU: a tensor made there does not go with one made here."""
    networks = twins()
    found = []
    for model, device in zip(networks, ("cpu", "meta"), strict=True):
        torch.manual_seed(0)
        data = batches(3)
        own = SGD(model.parameters(), lr=0.05, momentum=0.9)
        rule = RULES[method](own) if method in RULES else None
        torch.set_default_device(device)
        try:
            optimizer = rule or make_for(model, method, lr=0.05, momentum=0.9)
            # Made under the default device too, where the rule has no tensors of its own.
            if method in ("shuffled", "per step"):
                optimizer = RULES[method](SGD(model.parameters(), lr=0.05, momentum=0.9))
            optimizer.diagnostics()
            for x, y in data:
                optimizer.step(make_losses(model), x, y)
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step(make_losses(model), *data[0])
            found.append(optimizer.diagnostics())
            report = mtlopt.conflicts(make_losses(model), model.parameters(), TASKS, *data[0])
            assert report.norms.device.type == "cpu"
            assert len(mtlopt.random_groups(TASKS, 2)) == 2
        finally:
            torch.set_default_device(None)
    assert_equal(snapshot(networks[0]), snapshot(networks[1]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", [*METHODS, "scalarized"])
def test_the_first_parameter_may_be_on_meta(method: str) -> None:
    """A part of the model that is not loaded, in the first place; the others train."""
    model, expected = twins()
    absent = torch.nn.Parameter(torch.empty(2, device="meta"))
    for network, more in ((model, [absent]), (expected, [])):
        parameters = [*more, *network.parameters()]
        if method in RULES:
            optimizer = RULES[method](SGD(parameters, lr=0.05))
        else:
            optimizer = make(method, parameters, shared=network.trunk[2].weight, lr=0.05)
        optimizer.diagnostics()
        for x, y in batches(2):
            optimizer.step(make_losses(network), x, y)
        assert all(value.device.type == "cpu" for value in optimizer.diagnostics().values())
    assert_equal(snapshot(model), snapshot(expected))
