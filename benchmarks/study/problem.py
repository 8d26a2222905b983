"""What a problem of the study is, and how one is loaded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PROBLEMS = Path(__file__).parent / "problems"


class Defaults:
    """What a problem's class `Problem` must define (no value here), and what it may."""

    tasks: tuple[str, ...]
    model: nn.Module
    lower_is_better: Sequence[str] = ()
    """Metrics that are errors."""
    single = True
    """Whether each task is also trained alone; its metric then has its name."""
    steps = 300
    """The first number of steps that may be the plateau; doubled while that helps."""
    doublings = 3
    evaluations = 10
    features: nn.Module | Sequence[nn.Module] | None = None
    """The modules whose outputs the tasks share."""
    shared: Sequence[nn.Parameter] | None = None
    """The last parameters that all tasks share, for GradNorm."""
    weightings: Mapping[str, Mapping[str, float]] | None = None
    """Weights for the tuned sum, by name, instead of those that are searched by default."""
    left_out: Sequence[str] = ()
    """Methods that take too long."""
    seed: int

    def __init__(self, seed: int) -> None:
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """Yields training batches without end."""
        raise NotImplementedError

    def losses(self, tasks: Sequence[str], *batch: Any) -> dict[str, Any]:
        """Returns the losses of the tasks that are asked for."""
        raise NotImplementedError

    def metrics(self, split: str) -> dict[str, float]:
        """Returns the metrics on "validation" or "test", at the present weights."""
        raise NotImplementedError


def value_of(loss: Any) -> Tensor:
    """Returns the loss without its count."""
    value: Tensor = loss[0] if isinstance(loss, tuple) else loss
    return value


@lru_cache  # The data that a problem's module loads are loaded once per process.
def load(name: str) -> type[Defaults]:
    """Returns the class of a problem.

    Args:
        name: The name of a module in `problems`, or the path of a file that ends in .py.

    Raises:
        SystemExit: If there is no such problem.
    """
    if name.endswith(".py"):
        module = import_file(Path(name))
    elif importlib.util.find_spec(f"{__package__}.problems.{name}"):
        module = importlib.import_module(f"{__package__}.problems.{name}")
    else:
        known = sorted(path.stem for path in PROBLEMS.glob("[a-z]*.py"))
        raise SystemExit(f"--problem must be a file or one of {', '.join(known)}; got {name}.")
    return type("Problem", (module.Problem, Defaults), {})


def import_file(path: Path) -> ModuleType:
    """Imports a module from any folder."""
    name = f"study_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"--problem: {path} does not exist.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make(problem: type[Defaults], seed: int) -> Defaults:
    """Returns the data and the network for a seed."""
    torch.manual_seed(seed)
    made = problem(seed)
    made.seed = seed
    return made
