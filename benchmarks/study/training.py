"""One run of the study: train, choose a step on validation, evaluate the test split once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.methods import make_optimizer
from benchmarks.study.plan import Config
from benchmarks.study.problem import Defaults, load, make


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
    torch.set_num_threads(1)
    row: dict[str, Any] = {**config._asdict()}
    try:
        problem = make(load(name), config.seed)
        optimizer = make_optimizer(problem, config.method, config.lr, config.weighting)
        return row | train(problem, optimizer, until, config.method)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
