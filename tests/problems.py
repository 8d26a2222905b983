"""Small networks, their losses and batches, and the optimizer classes the tests run with."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("a", "b", "c")
SHARDS = torch.__version__ >= "2.7"
"""Whether FSDP2 works on a processor: in torch 2.6 it wants a device's streams."""


class Network(nn.Module):
    """A trunk of matrices that all tasks share, and a head of one matrix per task."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()

        def make(n: int, m: int) -> nn.Linear:
            return nn.Linear(n, m, bias=False, dtype=dtype)

        self.trunk = nn.Sequential(make(4, 6), nn.Tanh(), make(6, 5), nn.Tanh())
        self.heads = nn.ModuleDict({task: make(5, 2) for task in TASKS})

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {task: self.heads[task](features) for task in tasks}


class Embedded(nn.Module):
    """A sparse embedding that all tasks share, and a sparse embedding per task."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Embedding(8, 3, sparse=True, dtype=dtype)
        self.heads = nn.ModuleDict({t: nn.Embedding(8, 3, sparse=True, dtype=dtype) for t in TASKS})

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        rows = (x[:, 0].abs() * 8).long() % 8
        return {task: self.trunk(rows) * self.heads[task](rows) for task in tasks}


def batches(steps: int, size: int = 6) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Draws inputs and each task's targets."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(size, 4), {task: draw(size, 1) for task in TASKS}) for _ in range(steps)]


def make_losses(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """Returns the protocol's function for a model: scales differ, so that tasks conflict."""
    scales = dict(zip(TASKS, (1.0, 3.0, 0.2), strict=True))

    def losses(tasks: Sequence[str], x: Tensor, y: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = model(x, tasks)
        return {t: scales[t] * ((outputs[t] - y[t]) ** 2).mean() for t in tasks}

    return losses


def step_overflowing(
    optimizer: Any, losses: Mapping[str, Tensor], scaler: torch.amp.GradScaler, imperative: bool
) -> None:
    """Steps on losses of which task b's is too large once it is scaled."""
    bad = {task: value * (1e308 if task == "b" else 1) for task, value in losses.items()}
    if imperative:
        optimizer.backward({task: scaler.scale(value) for task, value in bad.items()})
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step(bad)


def twins(dtype: torch.dtype = torch.float64) -> tuple[Network, Network]:
    """Returns two networks with the same weights."""
    model, twin = Network(dtype), Network(dtype)
    twin.load_state_dict(model.state_dict())
    return model, twin


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def halves(x: Tensor, y: Mapping[str, Tensor], at: int) -> list[tuple[Any, ...]]:
    """Cuts a batch into two micro-batches."""
    return [
        (x[:at], {t: v[:at] for t, v in y.items()}),
        (x[at:], {t: v[at:] for t, v in y.items()}),
    ]


def with_counts(losses: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same losses, each with the number of samples it is the mean of."""
    return lambda tasks, x, y: {t: (v, len(x)) for t, v in losses(tasks, x, y).items()}


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_close(model: nn.Module, expected: nn.Module, atol: float = 1e-12) -> None:
    """Compares the weights of two networks."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=name)


O = torch.optim  # noqa: E741  # short in the table
DENSE: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (O.SGD, {"lr": 0.05}),
    "SGD-momentum": (O.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD-nesterov": (O.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "SGD-loop": (O.SGD, {"lr": 0.02, "momentum": 0.9, "foreach": False}),
    "Adam": (O.Adam, {"lr": 0.01}),
    "Adam-loop": (O.Adam, {"lr": 0.01, "foreach": False}),
    "Adam-foreach": (O.Adam, {"lr": 0.01, "foreach": True}),
    "Adam-fused": (O.Adam, {"lr": 0.01, "fused": True}),
    "Adam-amsgrad": (O.Adam, {"lr": 0.01, "amsgrad": True}),
    "Adam-tensor-lr": (O.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
    "AdamW": (O.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW-fused": (O.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "Adamax": (O.Adamax, {"lr": 0.01}),
    "NAdam": (O.NAdam, {"lr": 0.01}),
    "RAdam": (O.RAdam, {"lr": 0.01}),
    "RMSprop": (O.RMSprop, {"lr": 0.01}),
    "RMSprop-centered": (O.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Adagrad": (O.Adagrad, {"lr": 0.05}),
    "Adadelta": (O.Adadelta, {"lr": 0.5}),
    "ASGD": (O.ASGD, {"lr": 0.05}),
    "Rprop": (O.Rprop, {"lr": 0.01}),
    "Adafactor": (O.Adafactor, {"lr": 0.05}),
    "LBFGS": (O.LBFGS, {"lr": 0.2, "max_iter": 3}),
}
if hasattr(O, "Muon"):  # since torch 2.9; matrices alone
    DENSE["Muon"] = (O.Muon, {"lr": 0.01})
SPARSE: dict[str, tuple[Any, dict[str, Any]]] = {"SparseAdam": (O.SparseAdam, {"lr": 0.01})}
CLASSES = DENSE | SPARSE


def make_network(name: str) -> Any:
    """Returns the network that a class of the table can train."""
    torch.manual_seed(3)
    if name in SPARSE:
        return Embedded()
    return Network()
