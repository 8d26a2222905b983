"""A problem's study: its folder of results, what is missing in it, and the runs that fill it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.study.costs import measure_costs
from benchmarks.study.methods import ALIASES, REFERENCE, SUM, TUNED, names, stored_as, variants
from benchmarks.study.plan import Config, Entry, Plan, plan
from benchmarks.study.problem import Defaults, load
from benchmarks.study.results import COSTS, RUNS, append_rows, load_rows, read_scores
from benchmarks.study.training import run

FINAL_SEEDS = 15


@dataclass
class Study:
    """One problem and the folder of its results.

    Args:
        name: Of the problem, or the path of its file.
        out: Folder of all results.
        seeds: How many fresh seeds judge a method.
    """

    name: str
    out: Path
    seeds: int = FINAL_SEEDS

    def __post_init__(self) -> None:
        self.label = Path(self.name).stem
        self.folder = self.out / self.label

    @property
    def problem(self) -> type[Defaults]:
        """The class of the problem."""
        return load(self.name)

    def rows(self) -> list[dict[str, str]]:
        """Reads the finished runs."""
        return load_rows(self.folder / "runs.csv")

    def costs(self) -> dict[str, dict[str, str]]:
        """Reads what a step of each method costs; of single-task networks, of all together."""
        found = {row["method"]: row for row in load_rows(self.folder / "costs.csv")}
        alone = [row for name, row in found.items() if name.startswith(f"{REFERENCE}:")]
        if alone:
            columns = ("seconds", "forward", "backward")
            total = {c: str(sum(float(row[c]) for row in alone)) for c in columns}
            found[REFERENCE] = {"method": REFERENCE, "error": "", **total}
        return found | {name: found[own] for name, own in ALIASES.items() if own in found}

    def entries(self) -> dict[str, Entry]:
        """Returns the methods that take part: those whose first step has been timed."""
        costs = self.costs()
        found = {}
        for name in names(self.problem):
            shown = REFERENCE if name.startswith(f"{REFERENCE}:") else name
            if shown in costs and not costs[shown]["error"]:
                ratio = float(costs[shown]["seconds"]) / float(costs[SUM]["seconds"])
                found[name] = Entry(stored_as(name), variants(self.problem, name), ratio)
        return found

    def plan(self) -> Plan:
        """Returns where the problem stands."""
        entries = self.entries()
        if SUM not in entries:
            return Plan()
        problem = self.problem
        limits = {"first": problem.steps, "doublings": problem.doublings, "seeds": self.seeds}
        return plan(entries, read_scores(self.rows()), tuned=TUNED, **limits)

    def measure(self, methods: Sequence[str], repetitions: int) -> None:
        """Times the steps of methods that have not been timed, next to the plain sum's."""
        path = self.folder / "costs.csv"
        known = {row["method"]: row for row in load_rows(path)}
        wanted = dict.fromkeys([SUM, *map(stored_as, methods)])
        missing = [method for method in wanted if method not in known]
        if not missing:
            return
        measured = measure_costs(self.name, list(dict.fromkeys([SUM, *missing])), repetitions)
        if SUM in known:
            # Only the ratio to the sum's time counts, which is measured again for it.
            ratio = float(known[SUM]["seconds"]) / measured[0]["seconds"]
            measured = [m | {"seconds": m.get("seconds", 0.0) * ratio} for m in measured[1:]]
        append_rows(path, COSTS, measured)

    def missing(self, methods: Sequence[str], again: bool) -> list[Config]:
        """Returns what these methods and the tuned sum lack; `again`, with further seeds."""
        found = self.plan()
        if not again:
            stored = {stored_as(name) for name in methods} | {SUM}
            return [config for config in found.missing if config.method in stored]
        done = read_scores(self.rows())
        runs = [run for name in (TUNED, *methods) for run in found.again.get(name, [])]
        return [run for run in dict.fromkeys(runs) if run not in done]

    def run(
        self,
        methods: Sequence[str] | None,
        processes: int,
        repetitions: int,
        again: bool = False,
    ) -> None:
        """Runs what is missing, of all methods or of some; `again`, with further seeds."""
        every = names(self.problem)
        # "single" stands for the networks of all tasks.
        wanted = [m for m in every if not methods or {m, m.partition(":")[0]} & set(methods)]
        self.measure(wanted, repetitions)
        context = multiprocessing.get_context("spawn")  # A fork of a process with threads may hang.
        with ProcessPoolExecutor(processes, context) as pool, tqdm(desc=self.label) as bar:
            going: dict[Future[dict[str, Any]], Config] = {}
            while True:
                rows = self.rows()
                todo = self.missing(wanted, again)
                bar.total, bar.n = len(rows) + len(todo), len(rows)
                bar.refresh()
                # A few at a time: a finished search changes what comes first.
                for config in todo[: 2 * processes]:
                    if config not in going.values():
                        going[pool.submit(run, self.name, config)] = config
                if not going:
                    return
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    del going[future]
                    append_rows(self.folder / "runs.csv", RUNS, [future.result()])
