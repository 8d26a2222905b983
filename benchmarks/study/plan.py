"""The protocol: which runs are still needed, as a function of those that have finished.

Search and judgement use different seeds. The search looks at validation scores alone, on three
seeds; what it chooses for each method then trains with fresh seeds, and only those are reported.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

GRID = range(-7, -2)
"""Learning rates 10^(k/2) that every method tries: 3.2e-4 to 3.2e-2."""
LIMITS = (-14, 2)
SEARCH_SEEDS = (0, 1, 2)
FINALISTS = 3
"""How many of the best candidates on the first seed train with the other search seeds."""
FIRST_FINAL_SEED = 100
PLATEAU_RATES = (-5, -4, -3)
PLATEAU_VARIANTS = ("equal", "1 / norms")
"""Weights of the sum whose plateau is sought: the plain sum may be stuck in one unit."""
PLATEAU_GAIN = 0.002
"""In score, a mean of logarithms: a fifth of a percent."""
SAME_COST = 0.05
"""Methods whose step costs the sum's up to this fraction train for as many steps."""


class Config(NamedTuple):
    """One run of a problem."""

    method: str
    lr: float
    variant: str
    seed: int
    steps: int


class Choice(NamedTuple):
    """What the search chose for a method."""

    method: str
    lr: float
    variant: str

    def runs(self, seeds: Iterable[int], steps: int) -> list[Config]:
        """Returns this choice's runs."""
        return [Config(*self, seed, steps) for seed in seeds]


class Candidate(NamedTuple):
    """A learning rate, as its place in the grid, and a variant."""

    k: int
    variant: str

    def neighbours(self) -> set["Candidate"]:
        """Returns what must have been tried before this may be called best."""
        return {
            Candidate(k, self.variant)
            for k in (self.k - 1, self.k + 1)
            if LIMITS[0] <= k <= LIMITS[1]
        }


Scores = Mapping[Config, float]
"""Of the finished runs, on validation; minus infinity where a run failed."""


@dataclass(frozen=True)
class Entry:
    """A method as the plan sees it."""

    method: str
    """Under which name its runs are stored; the tuned sum's are the sum's."""
    variants: Sequence[str]
    """The default first."""
    ratio: float
    """The cost of a step, in the sum's."""


@dataclass
class Plan:
    """Where a problem's study stands."""

    steps: int | None = None
    """The sum's steps to its plateau."""
    still_gaining: float = 0.0
    """What the last doubling gained, where the longest run allowed is no plateau yet."""
    missing: list[Config] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    at_equal_compute: dict[str, list[Config]] = field(default_factory=dict)
    at_plateau: dict[str, list[Config]] = field(default_factory=dict)
    again: dict[str, list[Config]] = field(default_factory=dict)
    """At equal compute with as many further seeds; run on request, so never missing."""
    searched: dict[str, int] = field(default_factory=dict)
    """How many runs each method's search took."""


def rate(k: int) -> float:
    """Returns the k-th learning rate of the grid."""
    return float(f"{10 ** (k / 2):.2g}")


def search(entry: Entry, scores: Scores, steps: int) -> tuple[list[Config], Choice | None, int]:
    """Searches a method's learning rate and variant on validation.

    Every learning rate of the grid runs with the default variant and the first seed, then every
    variant at the best rate; the three best then run with the other search seeds. The best mean
    of all that have run with three seeds is chosen, also for the plateau or under another name. A
    choice must have been tried at a lower and a higher rate: else the grid grows.

    Returns:
        The runs that are missing; the choice once none is, or None if every run failed; and how
        many runs the search has asked for.
    """

    def config(candidate: Candidate, seed: int = SEARCH_SEEDS[0]) -> Config:
        return Config(entry.method, rate(candidate.k), candidate.variant, seed, steps)

    def first_score(candidate: Candidate) -> float:
        return scores[config(candidate)]

    def means() -> dict[Candidate, float]:
        found: dict[Candidate, float] = {}
        for variant in entry.variants:
            for k in range(LIMITS[0], LIMITS[1] + 1):
                runs = [config(Candidate(k, variant), seed) for seed in SEARCH_SEEDS]
                if all(run in scores for run in runs):
                    asked.update(dict.fromkeys(runs))
                    found[Candidate(k, variant)] = statistics.fmean(scores[run] for run in runs)
        return found

    asked: dict[Config, None] = {}

    def missing(candidates: Iterable[Candidate], seeds: Sequence[int]) -> list[Config]:
        wanted = [config(candidate, seed) for candidate in candidates for seed in seeds]
        asked.update(dict.fromkeys(wanted))
        return [each for each in wanted if each not in scores]

    default = entry.variants[0]
    tried = {Candidate(k, default) for k in GRID}
    while True:
        if runs := missing(sorted(tried), SEARCH_SEEDS[:1]):
            return runs, None, len(asked)
        best = max(sorted(c for c in tried if c.variant == default), key=first_score)
        if first_score(best) > -math.inf and (more := best.neighbours() - tried):
            tried |= more
            continue
        if more := {Candidate(best.k, variant) for variant in entry.variants} - tried:
            tried |= more
            continue
        ranked = sorted(sorted(tried), key=first_score, reverse=True)
        finalists = [c for c in ranked[:FINALISTS] if first_score(c) > -math.inf]
        if runs := missing(finalists, SEARCH_SEEDS[1:]):
            return runs, None, len(asked)
        found = {each: mean for each, mean in means().items() if mean > -math.inf}
        if not found:
            return [], None, len(asked)
        best = max(sorted(found), key=found.__getitem__)
        if more := best.neighbours() - tried:
            tried |= more
            continue
        return [], Choice(entry.method, rate(best.k), best.variant), len(asked)


def find_plateau(
    tuned: Entry, scores: Scores, first: int, doublings: int
) -> tuple[list[Config], int | None, float]:
    """Finds how many steps the weighted sum gains from.

    The number of steps doubles until that gains less than a fifth of a percent on validation, or
    less than the standard error over the search seeds. Each length has its own learning rate, and
    the better of two sets of weights.

    Returns:
        The runs that are missing, the number of steps once it is known, and what the last doubling
        gained if the limit ended the search.
    """

    def of(steps: int) -> list[list[Config]]:
        return [
            [Config(tuned.method, rate(k), variant, seed, steps) for seed in SEARCH_SEEDS]
            for variant in PLATEAU_VARIANTS
            if variant in tuned.variants
            for k in PLATEAU_RATES
        ]

    previous: list[float] | None = None
    gain = 0.0
    for doubling in range(doublings + 1):
        runs = of(first * 2**doubling)
        if missing := [run for row in runs for run in row if run not in scores]:
            return missing, None, 0.0
        best = max(([scores[run] for run in row] for row in runs), key=statistics.fmean)
        if previous is not None:
            gains = [new - old for new, old in zip(best, previous, strict=True)]
            gain = statistics.fmean(gains)
            error = statistics.stdev(gains) / len(gains) ** 0.5
            if gain < max(PLATEAU_GAIN, error):
                return [], first * 2 ** (doubling - 1), 0.0
        previous = best
    return [], first * 2**doublings, gain


def equal_steps(steps: int, ratio: float) -> int:
    """Returns the steps that cost what `steps` of the sum cost."""
    return steps if abs(ratio - 1) <= SAME_COST else max(1, round(steps / ratio))


def plan(
    entries: Mapping[str, Entry],
    scores: Scores,
    *,
    tuned: str,
    first: int,
    doublings: int,
    seeds: int,
) -> Plan:
    """Plans a problem.

    Args:
        entries: The methods by name.
        scores: Of the finished runs.
        tuned: Name of the tuned sum.
        first: The fewest steps that may be the plateau.
        doublings: How often they may be doubled.
        seeds: How many fresh seeds the chosen candidates train with.

    Returns:
        Where the problem stands; its missing runs in the order in which to do them.
    """
    missing, steps, gain = find_plateau(entries[tuned], scores, first, doublings)
    if steps is None:
        return Plan(missing=missing)
    found = Plan(steps, gain)
    fresh = range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + seeds)
    further = range(fresh.stop, fresh.stop + seeds)
    searches: list[Config] = []
    for name, entry in entries.items():
        equal = equal_steps(steps, entry.ratio)
        runs, choice, count = search(entry, scores, equal)
        searches += runs
        found.searched[name] = count
        if choice is not None:
            found.choices[name] = choice
            found.at_equal_compute[name] = choice.runs(fresh, equal)
            found.at_plateau[name] = choice.runs(fresh, steps)
            found.again[name] = choice.runs(further, equal)
    if tuned in found.choices:
        dearest = max(entry.ratio for entry in entries.values())
        longer = found.choices[tuned].runs(fresh, round(steps * dearest))
        found.at_plateau[longer_sum(tuned, dearest)] = longer
    judged = [*found.at_equal_compute.values(), *found.at_plateau.values()]
    wanted = dict.fromkeys([*searches, *(run for runs in judged for run in runs)])
    found.missing = [run for run in wanted if run not in scores]
    return found


def longer_sum(tuned: str, ratio: float) -> str:
    """Names the tuned sum that is given the dearest method's compute."""
    return f"{tuned}, {ratio:.1f} × the steps"
