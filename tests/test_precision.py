"""Mixed precision: autocast, gradient scalers, and the precision of inner products."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import mtlopt
from all_methods import INDEPENDENT, every_method, make, make_for
from problems import TASKS, Network, assert_equal, batches, leaf, make_losses, snapshot, twins
from round_trips import flat


def aggregated(base: torch.optim.Optimizer, _: nn.Module) -> Any:
    from torchjd.aggregation import ConFIG

    return mtlopt.Aggregated(base, TASKS, ConFIG())


def scalarized(base: torch.optim.Optimizer, _: nn.Module) -> Any:
    """Wraps a rule that evaluates the losses twice a step."""
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
    """Casts of weights are not reused after a step; gradients are multiplied outside autocast."""
    around, inside, without = (train(method, where) for where in ("around", "inside", ""))
    assert_equal(around, inside)
    difference = max((inside[n] - without[n]).abs().max().item() for n in without)
    assert 1e-6 < difference < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_float16_works_on_a_processor(method: str) -> None:
    weights, without = train(method, "inside", torch.float16), train(method, "")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, without[name], rtol=0, atol=2e-3)


scaled = pytest.mark.parametrize("method", ["joint", "alternating", *INDEPENDENT])


def build(method: str, model: Network, optimizer_class: Any = Adam, **keywords: Any) -> Any:
    return make_for(model, method, optimizer_class=optimizer_class, lr=0.1, keywords=keywords)


def run(optimizer: Any, model: Network, steps: int = 1) -> None:
    for x, y in batches(steps):
        optimizer.step(make_losses(model), x, y)


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@scaled
@pytest.mark.parametrize("optimizer_class", [Adam, SGD])
def test_a_scaler_changes_nothing_without_an_overflow(method: str, optimizer_class: Any) -> None:
    """The scale is a power of two, so even the rounding is the same."""
    model, twin = twins()
    run(build(method, model, optimizer_class, scaler=scaler()), model, 5)
    run(build(method, twin, optimizer_class), twin, 5)
    assert_equal(snapshot(model), snapshot(twin))


@scaled
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_tasks_own_step_or_the_joint_one(method: str, fused: bool) -> None:
    """The scale shrinks once a step; a step on no task leaves it alone."""
    model: Any = Network()
    amp = scaler()
    optimizer = build(method, model, partial(AdamW, fused=fused), scaler=amp)
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    optimizer.step(losses, x, y)
    start = snapshot(model)
    state = flat(optimizer.state_dict()["state"] if method == "joint" else {})

    def overflowing(tasks: Any) -> Any:
        return {t: v * (1e308 if t == "b" else 1) for t, v in losses(tasks, x, y).items()}

    optimizer.step(overflowing)
    assert amp.get_scale() == 512
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    if method == "joint":
        assert moved == set()
        assert flat(optimizer.state_dict()["state"]) == state
    else:
        assert moved == set(start) - {"heads.b.weight"}
        assert optimizer.diagnostics()["skipped"].tolist() == [False, True, False]
    assert optimizer.step(lambda tasks: {}) == {}
    assert amp.get_scale() == 512
    optimizer.step(losses, x, y)
    assert amp.get_scale() == 512
    assert not torch.equal(model.heads["b"].weight, start["heads.b.weight"])


@scaled
def test_a_step_works_after_one_that_an_error_interrupted(method: str) -> None:
    """The scaler must not be left in the middle of an iteration."""
    model = Network()
    optimizer = build(method, model, scaler=scaler())
    losses = make_losses(model)

    def broken(tasks: Any, *batch: Any) -> Any:
        if "b" in tasks:
            raise RuntimeError("broken")
        return losses(tasks, *batch)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step(broken, *batches(1)[0])
        run(optimizer, model)


def test_the_imperative_form_works_with_the_users_own_scaler() -> None:
    model, twin = twins()
    amp, (x, y) = scaler(), batches(1)[0]
    optimizer = build("independent", model)
    for task in TASKS:
        optimizer.zero_grad()
        amp.scale(make_losses(model)((task,), x, y)[task]).backward()
        amp.step(optimizer[task])
    amp.update()
    run(build("independent", twin), twin)
    assert_equal(snapshot(model), snapshot(twin))

    optimizer = build("joint", model)
    optimizer.zero_grad()
    optimizer.backward({t: amp.scale(v) for t, v in make_losses(model)(TASKS, x, y).items()})
    amp.unscale_(optimizer)
    amp.step(optimizer)
    amp.update()
    run(build("joint", twin), twin)
    assert_equal(snapshot(model), snapshot(twin))


@scaled
def test_the_scale_grows_once_a_step(method: str) -> None:
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    model = Network()
    optimizer = build(method, model, scaler=amp)
    scales = []
    for x, y in batches(8):
        optimizer.step(make_losses(model), x, y)
        scales.append(amp.get_scale())
    assert scales == [1024.0] * 3 + [2048.0] * 4 + [4096.0]


@scaled
def test_step_hooks_see_unscaled_gradients(method: str) -> None:
    """Fused classes would unscale them inside the step, after the hooks."""
    norms: list[list[float]] = []
    for amp in (None, scaler()):
        torch.manual_seed(0)
        model: Any = Network()
        optimizer = build(method, model, partial(AdamW, fused=True), scaler=amp)
        seen: list[float] = []
        optimizer.register_step_pre_hook(
            lambda *_, s=seen, m=model: s.append(m.trunk[0].weight.grad.norm().item())
        )
        run(optimizer, model)
        norms.append(seen)
    assert norms[0] == norms[1] != []


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
    # Other threads multiply under the same setting, so it is not changed meanwhile either.
    assert {how for _, _, how in operations.seen} == {"medium"}
    assert {result.dtype for result, _ in operations.products} == {torch.float64}


def test_inner_products_do_not_follow_the_precision_of_one_backend() -> None:
    """A clean process: once it is set for a backend, torch refuses to tell the precision of all."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.8 and older have no such setting")
    program = """if True:
        import torch, mtlopt
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        w = torch.zeros(2, requires_grad=True)
        optimizer = mtlopt.PCGrad(torch.optim.SGD([w], lr=1.0), ["a", "b"])
        optimizer.step({"a": w[0], "b": w[1] - w[0]})
        print(w.tolist(), torch.backends.cuda.matmul.fp32_precision)
    """
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[-0.5, -1.5] tf32"


def test_inner_products_do_not_need_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS, for one, has none. "meta" stands in for it, until its values have to be read."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # "meta" has no autocast.
    monkeypatch.setattr("mtlopt._gradients.arithmetic.NO_FLOAT64", ("meta",))
    w = torch.zeros(5, device="meta", requires_grad=True)
    direction = torch.ones(5, device="meta")
    optimizer = mtlopt.PCGrad(SGD([w], lr=0.1), ["a", "b"])
    losses = {"a": (w * direction).sum(), "b": (w * direction).sum()}
    with Operations() as operations, suppress(NotImplementedError, RuntimeError):
        optimizer.step(losses)
    assert operations.products
    results = [r for _, r, _ in operations.seen if isinstance(r, Tensor) and r.is_meta]
    assert torch.float64 not in {result.dtype for result in results}


@every_method
def test_half_precision_parameters_under_a_scaler_are_torchs_error(method: str) -> None:
    """A gradient in float16 cannot be unscaled; nothing hides the message that says so."""
    w = leaf(1.0, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = make(method, [w], ["a", "b"], shared=w, keywords={"scaler": scaler})
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        optimizer.step(lambda tasks: {task: w.float().square().sum() for task in tasks})
    assert w.item() == 1
