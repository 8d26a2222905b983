"""What a problem's finished runs say: every method against the tuned sum, at two budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.study.comparison import Comparison, Metrics, compare, differences, interval
from benchmarks.study.methods import REFERENCE, TUNED, names
from benchmarks.study.plan import Choice, Config, Plan
from benchmarks.study.results import read_config, read_metrics
from benchmarks.study.study import Study

Tests = Mapping[int, Metrics]
"""Metrics on the test split by seed."""


@dataclass
class View:
    """The methods at one budget."""

    tests: dict[str, Tests]
    comparisons: dict[str, Comparison]
    band: tuple[float, float]
    """The tuned sum's own 95 % interval around its mean, in percent."""
    steps: dict[str, int]
    failed: dict[str, int]
    """How many of a method's runs failed, of those methods where any did."""
    running: list[str]
    """Methods whose runs have not all finished."""

    @property
    def best_first(self) -> list[str]:
        """The methods by their difference to the tuned sum, which stands at zero."""
        means = {name: each.mean for name, each in self.comparisons.items()} | {TUNED: 0.0}
        return sorted(means, key=lambda name: -means[name])

    def count(self, word: str) -> int:
        """Counts the methods with a verdict."""
        return sum(each.word == word for each in self.comparisons.values())


@dataclass
class Findings:
    """All that is known of one problem."""

    name: str
    tasks: Sequence[str]
    lower_is_better: Sequence[str]
    plan: Plan
    costs: Mapping[str, Mapping[str, str]]
    ratios: Mapping[str, float]
    equal: View | None
    plateau: View | None
    again: View | None
    """With further seeds, of those methods that have run with them."""
    known: int
    """How many methods the problem is for."""

    @property
    def complete(self) -> bool:
        """Whether every method that takes part has been judged at both budgets."""
        return self.equal is not None and not self.plan.missing

    @property
    def judged(self) -> bool:
        """Whether every method that takes part has been judged at equal compute."""
        return self.equal is not None and not self.equal.running


def find(study: Study) -> Findings:
    """Reads a problem's results; needs none of its data."""
    problem, plan, costs = study.problem, study.plan(), study.costs()
    entries = study.entries()
    tests: dict[Config, Metrics | None] = {}
    for row in study.rows():
        config = read_config(row)
        tests[config] = read_metrics(row["test"]) if row["test"] else None
    chosen = list(entries)

    def view(runs: Mapping[str, list[Config]]) -> View | None:
        return compare_all(runs, chosen, tests, problem.lower_is_better)

    ratios = {name: entry.ratio for name, entry in entries.items()}
    return Findings(
        name=study.label,
        tasks=problem.tasks,
        lower_is_better=problem.lower_is_better,
        plan=plan,
        costs=costs,
        ratios=ratios,
        equal=view(plan.at_equal_compute),
        plateau=view(plan.at_plateau),
        again=view(plan.again),
        known=len(names(problem)) - sum(bool(row["error"]) for row in costs.values()),
    )


def compare_all(
    runs: Mapping[str, list[Config]],
    methods: Sequence[str],
    tests: Mapping[Config, Metrics | None],
    lower_is_better: Sequence[str],
) -> View | None:
    """Compares the methods whose runs have all finished; None before the tuned sum's have."""
    running = [name for name in methods if name not in runs]
    finished: dict[str, Tests] = {}
    failed: dict[str, int] = {}
    for name, own in runs.items():
        found = {run.seed: tests[run] for run in own if run in tests}
        if len(found) < len(own):
            running.append(name)
            continue
        good = {seed: metrics for seed, metrics in found.items() if metrics is not None}
        if len(good) < len(own):
            failed[name] = len(own) - len(good)
        else:
            finished[name] = good
    if TUNED not in finished:
        return None
    steps = {name: own[0].steps for name, own in runs.items()}
    join_single(finished, running, failed, steps)
    rival = finished[TUNED]
    others = {
        name: differences(own, rival, lower_is_better)
        for name, own in finished.items()
        if name != TUNED
    }
    around = differences(rival, dict.fromkeys(rival, mean_of(rival)), lower_is_better)
    return View(finished, compare(others), interval(around), steps, failed, running)


def mean_of(tests: Tests) -> dict[str, float]:
    """Returns the mean of every metric over the seeds."""
    names = next(iter(tests.values()))
    return {name: math.fsum(each[name] for each in tests.values()) / len(tests) for name in names}


def join_single(
    finished: dict[str, Tests], running: list[str], failed: dict[str, int], steps: dict[str, int]
) -> None:
    """Makes one method of the single-task networks, if all of them have finished."""
    parts = [name for name in steps if name.startswith(f"{REFERENCE}:")]
    absent = [name for name in running if name.startswith(f"{REFERENCE}:")]
    own = [finished.pop(part) for part in parts if part in finished]
    if own and len(own) == len(parts) and not absent:
        joined = {s: {k: v for each in own for k, v in each[s].items()} for s in own[0]}
        finished[REFERENCE] = joined
        steps[REFERENCE] = steps[parts[0]]
    if broken := [failed.pop(part) for part in parts if part in failed]:
        failed[REFERENCE] = sum(broken)
    if absent:
        running[:] = [REFERENCE, *(name for name in running if name not in absent)]


def choice_of(plan: Plan, method: str) -> Choice | None:
    """Returns what the search chose; of single-task networks, of the first."""
    for name, choice in plan.choices.items():
        if name == method or (method == REFERENCE and name.startswith(f"{REFERENCE}:")):
            return choice
    return plan.choices.get(TUNED) if method.startswith(TUNED) else None
