"""One run of the study: train, choose a step on validation, touch the test split once."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import measured

PROBLEMS = Path(__file__).parent / "study_problems"


class Defaults:
    """What a problem's class `Problem` need not say itself, and what it must (without a value)."""

    tasks: tuple[str, ...]
    model: nn.Module
    lower_is_better: Sequence[str] = ()
    """Metrics that are errors."""
    single = True
    """Whether each task has a metric of its own name, so that it can be learned alone."""
    steps = 300
    evaluations = 10
    features: nn.Module | Sequence[nn.Module] | None = None
    """The modules whose outputs the tasks share."""
    shared: Sequence[nn.Parameter] | None = None
    """The last parameters that all tasks share, for GradNorm."""

    def __init__(self, seed: int) -> None:
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """Yields training batches for ever."""
        raise NotImplementedError

    def losses(self, tasks: Sequence[str], *batch: Any) -> dict[str, Any]:
        """Returns the losses of the tasks that are asked for."""
        raise NotImplementedError

    def metrics(self, split: str) -> dict[str, float]:
        """Returns the metrics on "validation" or "test", at the present weights."""
        raise NotImplementedError

    seed: int

    def weightings(self) -> list[dict[str, float]]:
        """The weighted sums that are searched: equal, by the first losses' inverse, around that.

        The first losses are those of seed 0 in every run.
        """
        with torch.random.fork_rng(devices=[]):
            first = make(type(self), 0)
        values = first.losses(self.tasks, *next(first.batches()))
        sizes = np.array([abs(float(value_of(values[task]))) for task in self.tasks])
        inverse = -np.log10(np.maximum(sizes, 1e-12))
        around = np.random.default_rng(0).uniform(-1, 1, (2, len(sizes)))
        around -= around.mean(1, keepdims=True)
        around *= np.array([[0.5], [0.25]]) / np.abs(around).max(1, keepdims=True)
        a, b = around
        exponents = [0 * inverse, inverse, inverse / 2]
        exponents += [inverse + shift for shift in (a, -a, b, -b)]
        powers = [10.0**exponent for exponent in exponents]
        return [
            dict(zip(self.tasks, map(float, power / power.mean()), strict=True)) for power in powers
        ]


class Config(NamedTuple):
    """What a run is a function of, beside its problem."""

    method: str
    lr: float
    weighting: int
    seed: int


def value_of(loss: Any) -> Tensor:
    """The loss alone, of a loss that comes with its count."""
    value: Tensor = (loss[0] if isinstance(loss, tuple) else loss).detach()
    return value


@lru_cache  # and so what the file keeps of its data, from run to run
def load(name: str) -> type[Defaults]:
    """Returns the class of a problem.

    Args:
        name: Of a file in `study_problems`, or a path.
    """
    path = Path(name) if name.endswith(".py") else PROBLEMS / f"{name}.py"
    module_name = f"study_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"--problem: {path} does not exist.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return type("Problem", (module.Problem, Defaults), {})


def make(problem: type[Defaults], seed: int) -> Defaults:
    """Makes the data and the network of a seed."""
    torch.manual_seed(seed)
    made = problem(seed)
    made.seed = seed
    return made


def score(metrics: Mapping[str, float], lower_is_better: Sequence[str]) -> float:
    """What validation chooses by: the mean of log(metric), minus it where lower is better.

    Its differences are mean relative changes, whatever the metrics are measured in.
    """
    return statistics.fmean(
        -math.log(max(value, 1e-12)) if name in lower_is_better else math.log(max(value, 1e-2))
        for name, value in metrics.items()
    )


def train(problem: Defaults, optimizer: Any, until: int, method: str) -> dict[str, Any]:
    """Trains, and keeps the best weights on validation: of the whole run, and of `until` steps.

    Returns:
        The columns of a row that say how it went.
    """
    marks = {round(problem.steps * k / problem.evaluations) for k in range(problem.evaluations + 1)}
    marks = (marks | {until}) - {0}
    best: dict[str, tuple[float, int, dict[str, float], dict[str, Tensor]]] = {}
    own = method.partition(":")[2]

    def measure(split: str) -> dict[str, float]:
        problem.model.eval()
        with torch.no_grad():
            metrics = problem.metrics(split)
        problem.model.train()
        return {own: metrics[own]} if own else metrics

    seconds = 0.0
    batches = problem.batches()
    for step in range(1, problem.steps + 1):
        batch = next(batches)
        start = time.process_time()
        values = optimizer.step(problem.losses, *batch)
        seconds += time.process_time() - start
        if not all(map(math.isfinite, (float(value) for value in values.values()))):
            raise FloatingPointError(f"a loss is not finite at step {step}")
        if step not in marks:
            continue
        end_epoch(optimizer)
        validation = measure("validation")
        reached = score(validation, problem.lower_is_better)
        for name, last in (("", problem.steps), ("_at_time", until)):
            if step <= last and (name not in best or reached > best[name][0]):
                weights = {k: v.clone() for k, v in problem.model.state_dict().items()}
                best[name] = (reached, step, validation, weights)
    row: dict[str, Any] = {"seconds": seconds}
    for name, (reached, step, validation, weights) in best.items():
        problem.model.load_state_dict(weights)
        row |= {f"score{name}": reached, f"step{name}": step}
        row |= {f"validation{name}": validation, f"test{name}": measure("test")}
    return row


def end_epoch(optimizer: Any) -> None:
    """Tells a rule that counts in epochs (DWA) that one is over: here, an evaluation."""
    end = getattr(getattr(optimizer, "scalarizer", None), "step", None)
    if end is not None:
        end()


def run(name: str, config: Config, until: int) -> dict[str, Any]:
    """Trains once; a run that fails is a row with its error.

    Args:
        name: The problem.
        config: Of the run.
        until: How many steps take as long as the plain sum's whole run.
    """
    from study_methods import make_optimizer

    torch.set_num_threads(1)
    row: dict[str, Any] = {**config._asdict()}
    try:
        problem = make(load(name), config.seed)
        optimizer = make_optimizer(problem, config.method, config.lr, config.weighting)
        return row | train(problem, optimizer, until, config.method)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def measure_costs(name: str, methods: Sequence[str], repetitions: int) -> list[dict[str, Any]]:
    """Measures what a step of each method costs.

    Seconds are of the process's own processor time, which other programs on the machine do not
    count in; the methods take turns, so that what slows the machine slows them alike; the number
    is the median.
    """
    from study_methods import make_optimizer

    torch.set_num_threads(1)
    problem_class = load(name)
    started: dict[str, tuple[Defaults, Any, Iterator[Any]]] = {}
    for method in methods:
        problem = make(problem_class, 0)
        try:
            optimizer = make_optimizer(problem, method, 1e-3, 0)
            batches = problem.batches()
            optimizer.step(problem.losses, *next(batches))
        except Exception:  # its runs will say so, a row each
            continue
        started[method] = (problem, optimizer, batches)
    cases = {
        method: lambda parts=parts: partial(parts[1].step, parts[0].losses, *next(parts[2]))
        for method, parts in started.items()
    }
    times = measured.seconds(cases, repetitions, "cpu", 0, time.process_time)
    return [
        {"method": method, "seconds": statistics.median(times[method])} | count_passes(*parts)
        for method, parts in started.items()
    ]


def count_passes(problem: Defaults, optimizer: Any, batches: Iterator[Any]) -> dict[str, int]:
    """Counts the forward and backward passes of one step."""
    forward = mock.Mock(side_effect=problem.losses)
    backward = mock.Mock(side_effect=torch.autograd.backward)
    grad = mock.Mock(side_effect=torch.autograd.grad)
    with (
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(torch.autograd, "grad", grad),
    ):
        # What a loss differentiates itself (a residual of a differential equation) is no pass.
        inside: list[int] = []

        def losses(*arguments: Any) -> Any:
            before = grad.call_count
            values = forward(*arguments)
            inside.append(grad.call_count - before)
            return values

        optimizer.step(losses, *next(batches))
    passes = backward.call_count + grad.call_count - sum(inside)
    return {"forward": forward.call_count, "backward": passes}
