"""Mixed precision: autocast, gradient scalers, and the precision of inner products."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

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


class Operations(TorchDispatchMode):
    """Records torch's operations, their results, and the precision of matrix products."""

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
    """TF32 has three digits: enough for a network's layers, not for the angle of two gradients."""
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


def test_inner_products_do_not_need_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS, for one, has none. "meta" stands in for it, until its values have to be read."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # "meta" has no autocast.
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
