"""The protocol: which runs are wanted, as a function of those that are finished."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.study.methods import SUM, TUNED

GRID = range(-7, -2)  # learning rates 10^(k/2): 3.2e-4 to 3.2e-2
LIMITS = (-14, 2)
WEIGHTINGS = range(1, 7)
FINALISTS = 2
"""How many of the best with the first seed train with all: one seed chooses by chance."""


class Config(NamedTuple):
    """What a run is a function of, beside its problem."""

    method: str
    lr: float
    weighting: int
    seed: int


def rate(k: int) -> float:
    """The k-th learning rate of the grid."""
    return float(f"{10 ** (k / 2):.2g}")


def neighbours(each: tuple[int, int]) -> set[tuple[int, int]]:
    """What must have been tried before a learning rate and a weighting may be called best."""
    k, weighting = each
    return {(i, weighting) for i in (k - 1, k + 1) if LIMITS[0] <= i <= LIMITS[1]}


def plan(
    method: str, scores: Mapping[Config, float], seeds: int, chosen_sum: int | None
) -> tuple[list[Config], Config | None]:
    """Says which runs a method lacks, as a function of those that are finished.

    Args:
        method: Its name.
        scores: On validation, of all finished runs; minus infinity where one failed.
        seeds: How many the finalists shall train with.
        chosen_sum: The plain sum's chosen learning rate, where the search over weights begins.

    Returns:
        The runs, and the choice once none is lacking.
    """
    wanted = {(k, 0) for k in GRID}
    if method == TUNED:
        if chosen_sum is None:
            return [], None
        wanted = {(chosen_sum, w) for w in (0, *WEIGHTINGS)}

    def of(each: tuple[int, int], seed: int = 0) -> Config:
        return Config(method, rate(each[0]), each[1], seed)

    def mean(each: tuple[int, int]) -> float:
        return statistics.fmean(scores[of(each, seed)] for seed in range(seeds))

    while True:
        lacking = [of(each) for each in sorted(wanted) if of(each) not in scores]
        if lacking:
            return lacking, None
        order = sorted(sorted(wanted), key=lambda each: -scores[of(each)])
        finalists = [each for each in order[:FINALISTS] if scores[of(each)] > -math.inf]
        if not finalists:
            return [], of(order[0])
        if not (beside := neighbours(order[0]) - wanted):
            runs = [of(each, seed) for each in finalists for seed in range(seeds)]
            if lacking := [run for run in runs if run not in scores]:
                return lacking, None
            best = max(finalists, key=mean)
            if not (beside := neighbours(best) - wanted):
                return [], of(best)
        wanted |= beside


def finished(rows: Sequence[Mapping[str, str]]) -> dict[Config, float]:
    """Reads the scores of finished runs; selection knows nothing else of them."""
    return {
        Config(row["method"], float(row["lr"]), int(row["weighting"]), int(row["seed"])): float(
            row["score"] or "-inf"
        )
        for row in rows
    }


def plan_all(
    methods: Sequence[str], rows: Sequence[Mapping[str, str]], seeds: int
) -> tuple[list[Config], dict[str, Config]]:
    """Lists the runs that can be started now, and the choice of each method that lacks none."""
    scores = finished(rows)
    _, chosen = plan(SUM, scores, seeds, None)
    at = None if chosen is None else next(k for k in range(-14, 3) if rate(k) == chosen.lr)
    plans = {method: plan(method, scores, seeds, at) for method in methods}
    lacking = [config for runs, _ in plans.values() for config in runs]
    lacking.sort(key=lambda config: config.seed)
    return lacking, {method: choice for method, (_, choice) in plans.items() if choice}
