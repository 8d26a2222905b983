"""One run of the study: train, choose a step on validation, evaluate the test split once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.study.methods import REFERENCE, make_optimizer
from benchmarks.study.plan import FIRST_FINAL_SEED, Config
from benchmarks.study.problem import Defaults, load, make


def score(metrics: Mapping[str, float], lower_is_better: Sequence[str]) -> float:
    """Returns what validation chooses by: the mean of log(metric), negated for errors.

    Differences are mean relative changes, whatever the metrics are measured in.
    """
    return statistics.fmean(
        -math.log(max(value, 1e-12)) if name in lower_is_better else math.log(max(value, 1e-2))
        for name, value in metrics.items()
    )


def evaluate(problem: Defaults, split: str, method: str) -> dict[str, float]:
    """Returns the metrics on a split; of a network for one task, that task's alone."""
    problem.model.eval()
    with torch.no_grad():
        metrics = problem.metrics(split)
    problem.model.train()
    kind, _, task = method.partition(":")
    return {task: metrics[task]} if kind == REFERENCE else metrics


def train(problem: Defaults, optimizer: Any, config: Config) -> dict[str, Any]:
    """Trains with a cosine schedule, and keeps the weights that are best on validation.

    The test split is evaluated once, with the seeds of the final judgement only.

    Returns:
        The columns of a row that say how it went.
    """
    marks = {round(config.steps * k / problem.evaluations) for k in range(problem.evaluations + 1)}
    scheduler = CosineAnnealingLR(optimizer, config.steps)
    best: tuple[float, int, dict[str, float], dict[str, Tensor]] | None = None
    start = time.process_time()
    batches = problem.batches()
    for step in range(1, config.steps + 1):
        values = optimizer.step(problem.losses, *next(batches))
        scheduler.step()
        if not all(map(math.isfinite, (float(value) for value in values.values()))):
            raise FloatingPointError(f"a loss is not finite at step {step}")
        if step in marks:
            end_epoch(optimizer)
            metrics = evaluate(problem, "validation", config.method)
            reached = score(metrics, problem.lower_is_better)
            if best is None or reached > best[0]:
                weights = {name: v.clone() for name, v in problem.model.state_dict().items()}
                best = reached, step, metrics, weights
    assert best is not None
    row = {"score": best[0], "step": best[1], "validation": best[2]}
    row["seconds"] = time.process_time() - start
    if config.seed >= FIRST_FINAL_SEED:
        problem.model.load_state_dict(best[3])
        row["test"] = evaluate(problem, "test", config.method)
    return row


def end_epoch(optimizer: Any) -> None:
    """Tells a rule that counts in epochs (DWA, STCH) that one is over: here, an evaluation."""
    end = getattr(getattr(optimizer, "scalarizer", None), "step", None)
    if end is not None:
        end()


def run(name: str, config: Config) -> dict[str, Any]:
    """Trains once; a run that fails is a row with its error.

    Args:
        name: The problem.
        config: Of the run.
    """
    torch.set_num_threads(1)
    row: dict[str, Any] = {**config._asdict()}
    try:
        problem = make(load(name), config.seed)
        optimizer = make_optimizer(problem, config.method, config.lr, config.variant)
        return row | train(problem, optimizer, config)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
