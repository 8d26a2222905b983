"""On a GPU the methods do what they do on a processor, and wait for it no more than they must.

`benchmarks/gpu.sh` runs these; without CUDA they are skipped, and what can be seen without one is
seen by test_synchronisation.py.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mtlopt
from problems import TASKS, Network, batches, make_losses, snapshot
from test_synchronisation import METHODS, TO_HOST, Levels

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),  # of several cycles
]
SEQUENTIAL = ("alternating", "independent")
AT_FEATURES = ("pcgrad", "gradnorm", "upgrad", "mean")
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD-foreach": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "foreach": True}),
    "SGD-fused": (torch.optim.SGD, {"lr": 0.05, "fused": True}),  # Its momentum wants all heads.
    "Adam-loop": (torch.optim.Adam, {"lr": 0.01, "foreach": False}),
    "Adam-foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "Adam-fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "Adam-capturable": (torch.optim.Adam, {"lr": 0.01, "capturable": True}),
    "AdamW-fused": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "RMSprop-foreach": (torch.optim.RMSprop, {"lr": 0.01, "foreach": True}),
    "Adagrad-foreach": (torch.optim.Adagrad, {"lr": 0.05, "foreach": True}),
    "Adagrad-fused": (torch.optim.Adagrad, {"lr": 0.05, "fused": True}),
}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """The same products in every pass: no TF32, which has three digits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_cuda(model: nn.Module) -> Any:
    return model.to("cuda")


def data(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [
        (x.to("cuda", dtype), {task: target.to("cuda", dtype) for task, target in y.items()})
        for x, y in batches(steps)
    ]


def twins(model: nn.Module) -> tuple[Any, Any]:
    twin = copy.deepcopy(model)
    return on_cuda(model), on_cuda(twin)


def assert_close(first: nn.Module, second: nn.Module, atol: float = 0.0) -> None:
    other = snapshot(second)
    for name, weight in snapshot(first).items():
        torch.testing.assert_close(weight.cpu(), other[name].cpu(), rtol=0, atol=atol, msg=name)


# The contract.


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("method", ["joint", "alternating", "independent"])
def test_a_method_is_its_plain_loop_bit_for_bit(method: str, name: str) -> None:
    """Eqs. 1, 2 and 3 by hand, with kernels for all tensors at once and with one for each."""
    make, options = CLASSES[name]
    model, plain = twins(Network())
    count = len(TASKS) if method == "independent" else 1
    by_hand = [make(plain.parameters(), **options) for _ in range(count)]
    optimizer: mtlopt.MultiTaskOptimizer
    if method == "joint":
        optimizer = mtlopt.JointOptimizer(make(model.parameters(), **options), TASKS)
    elif method == "alternating":
        optimizer = mtlopt.AlternatingOptimizer(make(model.parameters(), **options), TASKS)
    else:
        optimizer = mtlopt.IndependentOptimizer(make, model.parameters(), TASKS, **options)
    losses, expected = make_losses(model), make_losses(plain)
    for x, y in data(20):
        for k, asked in enumerate([TASKS] if method == "joint" else [(task,) for task in TASKS]):
            plain.zero_grad()
            torch.stack(list(expected(asked, x, y).values())).sum().backward()
            by_hand[k % count].step()
        values = optimizer.step(losses, x, y)
        assert all(value.is_cuda and not value.requires_grad for value in values.values())
    assert_close(model, plain)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_on_the_device_what_it_does_on_the_host(method: str, features: bool) -> None:
    """Float64, so that nothing but the order of the sums differs."""
    if features and method not in AT_FEATURES:
        pytest.skip("takes no features")
    model, twin = Levels().double(), Levels().double()
    twin.load_state_dict(model.state_dict())
    on_cuda(model)
    for own, drawn in ((model, data(10)), (twin, batches(10))):
        common = {"features": own.trunk} if features else {}
        optimizer = METHODS[method](own, common, foreach=True)
        for x, y in drawn:
            optimizer.step(make_losses(own), x, y)
    assert_close(model, twin, atol=1e-6)  # Adam divides by small numbers.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_bit_for_bit(method: str, fused: bool, tmp_path: Path) -> None:
    """Also through a file that is read into the host's memory."""
    model, twin = twins(Levels())
    optimizer = METHODS[method](model, {}, fused=fused)
    drawn = data(6, torch.float32)
    for x, y in drawn[:3]:
        optimizer.step(make_losses(model), x, y)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run")
    weights, state = torch.load(tmp_path / "run", map_location="cpu", weights_only=True)
    twin.load_state_dict(weights)
    resumed = METHODS[method](twin, {}, fused=fused)
    resumed.load_state_dict(state)
    for x, y in drawn[3:]:
        optimizer.step(make_losses(model), x, y)
        resumed.step(make_losses(twin), x, y)
    assert_close(model, twin)


# Mixed precision.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_changes_nothing_without_an_overflow(method: str, fused: bool) -> None:
    """The scale is a power of two, so even the rounding is the same."""
    model, twin = twins(Levels())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for own, common in ((model, {"scaler": scaler}), (twin, {})):
        optimizer = METHODS[method](own, dict(common), fused=fused)
        for x, y in data(5, torch.float32):
            optimizer.step(make_losses(own), x, y)
    # Aggregators have thresholds of their own, and see gradients that are 1024 times as large.
    assert_close(model, twin, atol=0.0 if method not in ("upgrad", "mgda", "config") else 1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_in_float16_skips_the_tasks_step_or_the_joint_one(
    method: str, fused: bool
) -> None:
    model = on_cuda(Levels())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    optimizer = METHODS[method](model, {"scaler": scaler}, fused=fused)
    plain = make_losses(model)
    factor = 1.0

    def losses(tasks: Sequence[str], x: Tensor, y: Any) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.float16):
            found = plain(tasks, x, y)
        return {t: v.float() * (factor if t == "b" else 1.0) for t, v in found.items()}

    (x, y), *_ = data(1, torch.float32)
    start = snapshot(model)
    optimizer.step(losses, x, y)
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters())
    start, factor = snapshot(model), 1e38
    optimizer.step(losses, x, y)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    own = {"heads.b.weight", "heads.b.bias"}
    assert moved == (set(start) - own if method in SEQUENTIAL else set())
    assert scaler.get_scale() == 512.0


# Compiled.


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # a hint of inductor's
@pytest.mark.parametrize("method", ["joint", "independent", "pcgrad", "gradnorm"])
def test_a_compiled_model_trains_as_the_model(method: str) -> None:
    """Rules of several backward passes take a forward pass for each, as the error says."""
    torch.compiler.reset()
    model, plain = twins(Levels())
    common = {"forwards": "per-task"} if method in ("pcgrad", "gradnorm") else {}
    losses = {plain: make_losses(plain)}
    model.compile()
    losses[model] = make_losses(model)
    for own in (model, plain):
        optimizer = METHODS[method](own, dict(common), fused=True)
        for x, y in data(5, torch.float32):
            optimizer.step(losses[own], x, y)
    assert_close(model, plain, atol=1e-4)
    torch.compiler.reset()


# How often the host waits.


def passed(step: Any) -> tuple[int, int]:
    """Counts a step's copies to the host, and its copies to the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in found.events() or []]
    return sum("DtoH" in name for name in names), sum("HtoD" in name for name in names)


def test_the_profiler_sees_copies() -> None:
    tensor = torch.ones(3, device="cuda")
    assert passed(tensor.tolist)[0] == 1
    assert passed(lambda: tensor.sum().item())[0] == 1
    assert passed(lambda: torch.tensor([1.0], device="cuda"))[1] == 1


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("kernel", ["foreach", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_copies_to_the_host_once_or_never(method: str, kernel: str, features: bool) -> None:
    """As on the stand-in for a device, by the profiler's account."""
    if features and method not in AT_FEATURES:
        pytest.skip("takes no features")
    model = on_cuda(Levels())
    common = {"features": model.trunk} if features else {}
    optimizer = METHODS[method](model, common, **{kernel: True})
    losses = make_losses(model)
    (x, y), *_ = data(1, torch.float32)
    for _ in range(3):  # States are made, and the ranks' gradients compared.
        optimizer.step(losses, x, y)
    to_host, _ = passed(lambda: optimizer.step(losses, x, y))
    # ConFIG solves on the device, where torch looks whether it could.
    assert to_host == TO_HOST.get(method, 0) or method == "config"


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
@pytest.mark.parametrize("method", ["joint", *SEQUENTIAL])
def test_a_step_waits_for_nothing(method: str, kernel: str) -> None:
    """Torch raises at every call that makes the host wait, copies to the device among them."""
    model = on_cuda(Levels())
    optimizer = METHODS[method](model, {}, **{kernel: True})
    optimizer.diagnostics()
    losses = make_losses(model)
    (x, y), *_ = data(1, torch.float32)
    for _ in range(3):
        optimizer.step(losses, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(losses, x, y)
        optimizer.diagnostics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Ranks.


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[Any]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # of devices and barriers
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_rank_of_nccl_trains_as_no_ranks(method: str, features: bool, nccl: Any) -> None:
    """Every collective of the package takes tensors that NCCL takes."""
    if features and method not in ("pcgrad", "gradnorm", "upgrad"):
        pytest.skip("takes no features, or none in parts")
    model, twin = twins(Levels().double())
    for own, group in ((model, {"process_group": nccl}), (twin, {})):
        common = {"features": own.trunk} if features else {}
        optimizer = METHODS[method](own, {**common, **group})
        for step, (x, y) in enumerate(data(5)):
            losses = make_losses(own)
            # DWA remembers the losses of all tasks, and says so where one is absent.
            absent = {"b": None} if step == 1 and method != "dwa" else {}
            optimizer.step(lambda tasks, x, y: losses(tasks, x, y) | absent, x, y)
    assert_close(model, twin, atol=1e-10)
