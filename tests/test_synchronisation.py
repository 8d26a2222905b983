"""No step synchronises with the device more often than its method requires."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchjd import aggregation, scalarization

import mtlopt
from fake_device import DeviceTensor, send, traffic
from problems import TASKS, batches, make_losses, snapshot


class Levels(nn.Module):
    """A trunk that all tasks share, a layer that two of them share, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.pair = nn.Linear(6, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in TASKS})

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {t: self.heads[t](z if t == "c" else self.pair(z).tanh()) for t in tasks}


Make = Callable[..., mtlopt.MultiTaskOptimizer]


def adam(model: nn.Module, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.01, **options)


def independent(model: nn.Module, common: dict[str, Any], **options: Any) -> Any:
    return mtlopt.IndependentOptimizer(adam(model, **options), TASKS, **common)


def gradnorm(model: Any, common: dict[str, Any], **options: Any) -> Any:
    where = {} if "features" in common else {"shared": model.trunk[0].parameters()}
    return mtlopt.GradNorm(adam(model, **options), TASKS, **where, **common)


def aggregated(aggregator: Callable[[], Any]) -> Make:
    return lambda model, common, **options: mtlopt.Aggregated(
        adam(model, **options), TASKS, aggregator(), **common
    )


def scalarized(scalarizer: Callable[[], Any]) -> Make:
    return lambda model, common, **options: mtlopt.Scalarized(
        adam(model, **options), TASKS, scalarizer(), **common
    )


def wrapping(method: Any) -> Make:
    return lambda model, common, **options: method(adam(model, **options), TASKS, **common)


METHODS: dict[str, Make] = {
    "joint": wrapping(mtlopt.JointOptimizer),
    "balanced": wrapping(partial(mtlopt.Balanced, every=2)),
    "alternating": wrapping(mtlopt.AlternatingOptimizer),
    "independent": independent,
    "pcgrad": wrapping(mtlopt.PCGrad),
    "gradnorm": gradnorm,
    "upgrad": aggregated(aggregation.UPGrad),
    "mgda": aggregated(aggregation.MGDA),
    "mean": aggregated(aggregation.Mean),
    "config": aggregated(aggregation.ConFIG),
    "dwa": scalarized(scalarization.DWA),
    "stch": scalarized(lambda: scalarization.STCH(0.1)),
}
TO_HOST = {"balanced": 1, "pcgrad": 1, "gradnorm": 1, "upgrad": 1, "mgda": 1}
"""Copies per step, where there are any. ConFIG works on the whole matrix, on the device."""
NOT_EVERY_STEP = {"balanced"}
"""Measures at the first of three steps and the last, and copies nothing between."""

SCALARIZED = ("dwa", "stch")

Count = Callable[[], tuple[int, int]]


def train(
    method: str, move: Any, model: Any, common: dict[str, Any], count: Count, **options: Any
) -> list[tuple[int, int]]:
    """Takes three steps, asking for the diagnosis after each; returns what passed in each."""
    optimizer = METHODS[method](model, common, **options)
    losses = make_losses(model)
    optimizer.diagnostics()
    passed = []
    for x, y in batches(3):
        batch = move(x.float()), {task: move(target.float()) for task, target in y.items()}
        before = count()
        optimizer.step(losses, *batch)
        optimizer.diagnostics()
        passed.append((count()[0] - before[0], count()[1] - before[1]))
    return passed


def run(
    method: str, features: bool = False, make: dict[str, Any] | None = None, **options: Any
) -> list[tuple[int, int]]:
    """Trains on the device, and compares with training on the host."""
    model, twin = Levels(), Levels()
    twin.load_state_dict(model.state_dict())
    common, own = make or {}, {"features": twin.trunk} if features else {}
    train(method, lambda t: t, twin, common | own, lambda: (0, 0), **options)
    with traffic() as seen:
        send(model)
        own = {"features": model.trunk} if features else {}
        passed = train(
            method,
            DeviceTensor,
            model,
            common | own,
            lambda: (len(seen.to_host), len(seen.to_device)),
            **options,
        )
        weights: dict[str, Any] = dict(snapshot(model))
    for name, weight in snapshot(twin).items():
        torch.testing.assert_close(weights[name].host, weight, rtol=0, atol=1e-5)
    return passed


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_copies_to_the_host_once_or_never(method: str, foreach: bool) -> None:
    """Once for the coefficients that a rule computes on the host; nothing waits on the way back.

    At the first step the value of a scalarizer is checked to be finite.
    """
    usual = (TO_HOST.get(method, 0), 0)
    first = (1, 0) if method in SCALARIZED else usual
    second = (0, 0) if method in NOT_EVERY_STEP else usual
    assert run(method, foreach=foreach) == [first, second, usual]


@pytest.mark.parametrize("method", ["balanced", "pcgrad", "gradnorm", "upgrad", "mean"])
def test_a_step_at_the_features_copies_to_the_host_once_or_never(method: str) -> None:
    usual = (TO_HOST.get(method, 0), 0)
    second = (0, 0) if method in NOT_EVERY_STEP else usual
    assert run(method, features=True) == [usual, second, usual]


def test_balanced_by_losses_copies_them_once_a_step() -> None:
    assert run("balanced", make={"by": "losses", "every": 10}) == [(1, 0)] * 3


@pytest.mark.parametrize("method", METHODS)
def test_check_finite_copies_once_per_task(method: str) -> None:
    """As documented; and the count does see a step that synchronises."""
    expected = TO_HOST.get(method, 0) + len(TASKS) + (method in SCALARIZED)
    fewer = method in NOT_EVERY_STEP
    found = [host for host, _ in run(method, make={"check_finite": True})]
    assert found == [expected, expected - fewer, expected]


@pytest.mark.parametrize("method", ["alternating", "independent"])
def test_orders_and_schedules_copy_nothing(method: str) -> None:
    assert run(method, make={"per_step": 2}) == [(0, 0)] * 3
    assert run(method, make={"order": "shuffled"}) == [(0, 0)] * 3
    if method == "independent":
        assert run(method, make={"schedule": "simultaneous"}) == [(0, 0)] * 3


@pytest.mark.parametrize("method", ["alternating", "independent"])
def test_recording_updates_copies_their_products_once(method: str) -> None:
    assert run(method, make={"record": "updates"}) == [(1, 0)] * 3


def test_the_simulated_device_refuses_tensors_of_the_host() -> None:
    with traffic() as seen:
        tensor = DeviceTensor(torch.ones(2))
        with pytest.raises(RuntimeError, match="same device"):
            tensor + torch.ones(2)
        assert (tensor * 2 + torch.tensor(1.0)).tolist() == [3.0, 3.0]
        assert (len(seen.to_host), len(seen.to_device)) == (1, 0)
        assert torch.tensor([1.0], device=tensor.device).item() == 1.0
    assert (len(seen.to_host), len(seen.to_device)) == (2, 1)


@pytest.mark.parametrize("micro", [False, True])
def test_tensor_weights_are_not_read_by_the_host(micro: bool) -> None:
    with traffic() as seen:
        w = nn.Parameter(DeviceTensor(torch.ones(1)))
        weights: Any = {"a": DeviceTensor(torch.tensor(2.0)), "b": DeviceTensor(torch.tensor(1.0))}
        optimizer = mtlopt.JointOptimizer(SGD([w], lr=0.1), ["a", "b"], weights)
        optimizer.step(
            lambda tasks: {task: w.sum() for task in tasks},
            micro_batches=[(), ()] if micro else None,
        )
        assert seen.to_host == []
        assert w.tolist() == pytest.approx([0.7])
