"""The protocol: which runs are wanted, as a function of those that are finished."""

from collections.abc import Mapping, Sequence

from study_methods import SUM, TUNED
from study_runs import Config

GRID = range(-7, -2)  # learning rates 10^(k/2): 3.2e-4 to 3.2e-2
LIMITS = (-14, 2)
WEIGHTINGS = range(1, 7)


def rate(k: int) -> float:
    """The k-th learning rate of the grid."""
    return float(f"{10 ** (k / 2):.2g}")


def neighbours(k: int) -> tuple[int, ...]:
    """The learning rates that must have been tried before the k-th may be called best."""
    return tuple(i for i in (k - 1, k + 1) if LIMITS[0] <= i <= LIMITS[1])


def plan(
    method: str, scores: Mapping[Config, float], seeds: int, chosen_sum: int | None
) -> tuple[list[Config], Config | None]:
    """Says which runs a method lacks, as a function of those that are finished.

    Args:
        method: Its name.
        scores: On validation, of all finished runs; minus infinity where one failed.
        seeds: How many each choice shall train with.
        chosen_sum: The plain sum's chosen learning rate, where the search over weights begins.

    Returns:
        The runs, and the choice once the learning rates are settled.
    """
    wanted = {(k, 0) for k in GRID}
    if method == TUNED:
        if chosen_sum is None:
            return [], None
        wanted = {(chosen_sum, w) for w in (0, *WEIGHTINGS)}
    configs = {
        (k, w): Config(method, rate(k), w, 0)
        for k in range(LIMITS[0], LIMITS[1] + 1)
        for w in (0, *WEIGHTINGS)
    }
    while True:
        lacking = [configs[each] for each in sorted(wanted) if configs[each] not in scores]
        if lacking:
            return lacking, None
        k, w = max(sorted(wanted), key=lambda each: scores[configs[each]])
        beside = {(i, w) for i in neighbours(k)} - wanted
        if not beside or scores[configs[k, w]] == float("-inf"):
            break
        wanted |= beside
    best = configs[k, w]
    seeded = [best._replace(seed=seed) for seed in range(seeds)]
    return [config for config in seeded if config not in scores], best


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
    """Lists the runs that can be started now, and each settled method's choice."""
    scores = finished(rows)
    _, chosen = plan(SUM, scores, seeds, None)
    at = None if chosen is None else next(k for k in range(-14, 3) if rate(k) == chosen.lr)
    plans = {method: plan(method, scores, seeds, at) for method in methods}
    lacking = [config for runs, _ in plans.values() for config in runs]
    # What chooses goes before what repeats a choice.
    lacking.sort(key=lambda config: config.seed)
    return lacking, {method: choice for method, (_, choice) in plans.items() if choice}
