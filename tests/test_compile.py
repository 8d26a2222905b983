"""With torch.compile a method does what it does without."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Adam
from torchjd.aggregation import UPGrad
from torchjd.scalarization import GeometricMean

import mtlopt
import reference
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot

METHODS: dict[str, Callable[..., Any]] = {
    "joint": lambda base, model: mtlopt.JointOptimizer(base(model), TASKS),
    "balanced": lambda base, model: mtlopt.Balanced(base(model), TASKS, every=2),
    "balanced-per-task": lambda base, model: mtlopt.Balanced(
        base(model), TASKS, every=2, forwards="per-task"
    ),
    "alternating": lambda base, model: mtlopt.AlternatingOptimizer(base(model), TASKS),
    "pcgrad": lambda base, model: mtlopt.PCGrad(base(model), TASKS),
    "pcgrad-per-task": lambda base, model: mtlopt.PCGrad(base(model), TASKS, forwards="per-task"),
    "gradnorm": lambda base, model: mtlopt.GradNorm(
        base(model), TASKS, shared=[model.trunk[2].weight]
    ),
    "gradnorm-per-task": lambda base, model: mtlopt.GradNorm(
        base(model), TASKS, shared=[model.trunk[2].weight], forwards="per-task"
    ),
    "aggregated": lambda base, model: mtlopt.Aggregated(base(model), TASKS, UPGrad()),
    "scalarized": lambda base, model: mtlopt.Scalarized(base(model), TASKS, GeometricMean()),
    "independent": lambda _, model: mtlopt.IndependentOptimizer(
        torch.optim.AdamW, model.parameters(), TASKS, lr=0.01, weight_decay=0.1
    ),
    "simultaneous": lambda _, model: mtlopt.IndependentOptimizer(
        torch.optim.AdamW,
        model.parameters(),
        TASKS,
        schedule="simultaneous",
        lr=0.01,
        weight_decay=0.1,
    ),
}
# Several backward passes through one forward pass.
ONE_GRAPH = ("balanced", "pcgrad", "gradnorm", "aggregated", "simultaneous")
# Of steps of 0.01: torch's compiled AdamW corrects its moments' bias in float32.
ROUNDING = 1e-5


class AllHeads(Network):
    """Computes every task, whichever is asked."""

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        return super().forward(x, TASKS)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(method: str, model: Any, lacking: str = "") -> tuple[dict[str, Tensor], Any]:
    """Trains five steps, the second and third without one task's labels."""
    optimizer = METHODS[method](adamw, model)
    losses = make_losses(model)
    for step, (x, y) in enumerate(batches(5)):
        optimizer.step(
            lambda tasks, x, y, step=step: {
                task: None if task == lacking and step in (1, 2) else loss
                for task, loss in losses(tasks, x, y).items()
            },
            x,
            y,
        )
    return snapshot(model), optimizer


@pytest.mark.parametrize("network", [Network, AllHeads])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_trains_as_the_model(method: str, network: Any) -> None:
    """Bit for bit; a compiled graph's zeros for the heads of other tasks must move nothing."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = network()
        if compiled:
            model.compile(backend="aot_eager")
        weights, optimizer = train(method, model, lacking="b")
        held = [len(o.state) for o in optimizer._updater.inner]
        results.append((weights, held))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # torch 2.6's own, of its settings
@pytest.mark.parametrize("method", METHODS)
def test_the_default_backend_trains_as_the_model(method: str) -> None:
    torch.manual_seed(0)
    expected, _ = train(method, Network())
    torch.manual_seed(0)
    model = Network()
    keeps = functorch_config.patch(donated_buffer=False)
    with keeps if method in ONE_GRAPH else nullcontext():
        model.compile()
        weights, _ = train(method, model)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.7", reason="lets a backward pass keep its buffers")
@pytest.mark.parametrize("method", ONE_GRAPH)
def test_a_second_pass_through_buffers_that_are_used_up_says_what_to_do(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch compiles a backward pass for one use or for several, whichever comes first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # an empty one
    model = Network()
    model.compile()
    (x, y), *_ = batches(1)
    losses = make_losses(model)
    METHODS["joint"](adamw, model).step(losses, x, y)
    with pytest.raises(RuntimeError, match="forwards='per-task'"):
        METHODS[method](adamw, model).step(losses, x, y)


@pytest.mark.parametrize("method", ["joint", "alternating", "pcgrad", "independent"])
def test_a_compiled_update_is_the_update(method: str) -> None:
    torch.manual_seed(0)
    expected, _ = train(method, Network())
    torch.manual_seed(0)
    model = Network()
    optimizer = METHODS[method](adamw, model)
    for inner in optimizer._updater.inner:
        inner.step = torch.compile(inner.step, backend="aot_eager")
    losses = make_losses(model)
    for x, y in batches(5):
        optimizer.step(losses, x, y)
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's tracing looks at every tensor
@pytest.mark.parametrize("method", ["joint", "pcgrad", "gradnorm", "independent", "simultaneous"])
def test_a_compiled_loop_is_the_loop(method: str) -> None:
    """Torch breaks its graph at the backward passes, and goes on."""
    torch.manual_seed(0)
    expected, _ = train(method, Network())
    torch.manual_seed(0)
    model = Network()
    optimizer = METHODS[method](adamw, model)
    losses = make_losses(model)
    step = torch.compile(lambda x, y: optimizer.step(losses, x, y), backend="aot_eager")
    for x, y in batches(5):
        step(x, y)
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=ROUNDING)


def test_zeros_that_torch_steps_on_make_states_in_a_compiled_process_too() -> None:
    """Into those a distributed checkpoint is loaded; without them it would load nothing."""
    torch.compile(nn.Linear(2, 2), backend="aot_eager")(torch.ones(1, 2)).sum().backward()
    model = Network()
    optimizer = mtlopt.IndependentOptimizer(torch.optim.Adam, model.parameters(), TASKS, lr=0.01)
    get_optimizer_state_dict(model, optimizer["a"])
    assert optimizer["a"].state.keys() == set(model.parameters())


@pytest.mark.slow
def test_an_imperative_step_does_not_move_the_other_heads_of_a_compiled_model() -> None:
    """Its graph fills their gradients with zeros; weight decay and moments would move them."""
    torch.manual_seed(1)
    model = Network(torch.float32)
    expected = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}
    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS, **options)
    plain = {task: Adam(expected.parameters(), **options) for task in TASKS}
    for x, y in batches(2):
        x, y = x.float(), {t: v.float() for t, v in y.items()}  # noqa: PLW2901  # cast once
        reference.independent(plain, make_losses(expected), TASKS, x, y)
        for task in TASKS:
            optimizer.zero_grad()
            ((compiled(x, TASKS)[task] - y[task]) ** 2).mean().mul(
                {"a": 1.0, "b": 3.0, "c": 0.2}[task]
            ).backward()
            optimizer[task].step()
    for name, weight in snapshot(model).items():
        torch.testing.assert_close(weight, snapshot(expected)[name], rtol=1e-4, atol=1e-6)
