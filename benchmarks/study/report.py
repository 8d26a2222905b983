"""Tables and pictures of what was run, with intervals by bootstrap over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, SymmetricalLogLocator
from scipy.stats import rankdata

from benchmarks.study.methods import REFERENCE, SUM, TUNED, names
from benchmarks.study.plan import plan_all
from benchmarks.study.problem import load
from benchmarks.study.results import load_rows, read_metrics
from benchmarks.timing import write_table

Values = dict[str, dict[int, dict[str, float]]]
"""Of each method, of each seed, the metrics on the test split."""


@dataclass
class Results:
    """What is known of one problem."""

    name: str
    tests: Values
    at_time: Values = field(default_factory=dict)
    lower_is_better: Sequence[str] = ()
    costs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rates: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Single-task networks, or the plain sum where a task makes no sense alone."""
        return REFERENCE if REFERENCE in self.tests else SUM

    @property
    def rival(self) -> str:
        """What a method must beat."""
        return TUNED if TUNED in self.tests else SUM

    @property
    def best_first(self) -> list[str]:
        """The methods by their delta m."""
        return sorted(self.tests, key=lambda method: -mean(self.delta(method).values()))

    def delta(self, method: str, values: Values | None = None) -> dict[int, float]:
        """Delta m %: the mean relative change of the metrics against the reference's seed means."""
        reference = list(self.tests[self.reference].values())
        base = {metric: np.mean([each[metric] for each in reference]) for metric in reference[0]}
        signs = {metric: -1 if metric in self.lower_is_better else 1 for metric in base}
        return {
            seed: float(100 * np.mean([signs[m] * (row[m] - base[m]) / abs(base[m]) for m in base]))
            for seed, row in (values or self.tests)[method].items()
        }

    def against(self, method: str) -> list[float]:
        """The difference in delta m to the rival's, seed by seed."""
        own, other = self.delta(method), self.delta(self.rival)
        return [own[seed] - other[seed] for seed in sorted(set(own) & set(other))]

    def ranks(self) -> dict[str, list[float]]:
        """Of each method that has every seed, its rank in each: the mean over the metrics."""
        methods = [method for method in self.tests if method != REFERENCE]
        count = max(len(self.tests[method]) for method in methods)
        methods = [method for method in methods if len(self.tests[method]) == count]
        table = np.array([list(self.delta_by_metric(method).values()) for method in methods])
        # (methods, seeds, metrics) -> the first is the best
        ranks = rankdata(-table, axis=0).mean(2)
        return dict(zip(methods, ranks.tolist(), strict=True))

    def delta_by_metric(self, method: str) -> dict[int, list[float]]:
        """The metrics, the larger the better."""
        return {
            seed: [-v if m in self.lower_is_better else v for m, v in row.items()]
            for seed, row in sorted(self.tests[method].items())
        }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95 % interval by bootstrap over the seeds."""
    draws = np.random.default_rng(0).integers(len(values), size=(10000, len(values)))
    low, high = np.percentile(np.asarray(values)[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def verdict(differences: Sequence[float]) -> str:
    """Better or worse only where the whole interval is."""
    if len(differences) < 3:
        return "too few seeds"
    low, high = interval(differences)
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def collect(folder: Path, problems: Mapping[str, str]) -> list[Results]:
    """Reads the results of every problem that has some."""
    runs, costs = load_rows(folder / "runs.csv"), load_rows(folder / "costs.csv")
    found = []
    for label in dict.fromkeys(row["problem"] for row in runs):
        problem = load(problems.get(label, label))
        rows = [row for row in runs if row["problem"] == label]
        methods = names(problem)
        _, choices = plan_all(methods, rows, 1 + max(int(row["seed"]) for row in rows))
        results = Results(label, {}, {}, problem.lower_is_better)
        results.costs = {row["method"]: row for row in costs if row["problem"] == label}
        failed: dict[str, str] = {}
        rates: dict[str, str] = {}
        for method in methods:
            own = [row for row in rows if row["method"] == method]
            good = [row for row in own if not row["error"]]
            if method in choices and good:
                choice = choices[method]
                wanted = (choice.lr, choice.weighting)
                rates[method] = f"{choice.lr:g}"
                for name, values in (("test", results.tests), ("test_at_time", results.at_time)):
                    values[method] = {
                        int(row["seed"]): read_metrics(row[name])
                        for row in good
                        if (float(row["lr"]), int(row["weighting"])) == wanted
                    }
            else:
                failed[method] = own[0]["error"] if own and not good else "not run to the end"
        results.rates, results.failed = rates, failed
        compared = join_single(results, problem.tasks) or not problem.single
        if compared and SUM in results.tests:
            found.append(results)
    return found


def join_single(results: Results, tasks: Sequence[str]) -> bool:
    """Makes one method of the single-task networks; false if one is missing."""
    parts = [f"{REFERENCE}:{task}" for task in tasks]
    if not all(part in results.tests for part in parts):
        return False
    for values in (results.tests, results.at_time):
        columns = [values.pop(part) for part in parts]
        seeds = set.intersection(*map(set, columns))
        joined = {s: {k: v for c in columns for k, v in c[s].items()} for s in sorted(seeds)}
        values.update({REFERENCE: joined, **{k: values.pop(k) for k in list(values)}})
    rates = dict(results.rates)
    own = [float(rates.pop(part)) for part in parts]
    span = sorted({min(own), max(own)})
    results.rates = {REFERENCE: " to ".join(f"{rate:g}" for rate in span), **rates}
    total = [results.costs[part] for part in parts]
    summed = {c: str(sum(float(r[c]) for r in total)) for c in ("seconds", "forward", "backward")}
    results.costs = {**results.costs, REFERENCE: summed}
    return True


def table(results: Results) -> str:
    """Returns one problem's table: the best first."""
    metrics = list(next(iter(next(iter(results.tests.values())).values())))
    shown = metrics if len(metrics) <= 4 else []
    columns = ["method", "delta m %", f"to {results.rival}", "verdict", "mean rank"]
    columns += ["delta m % at equal time", "passes", "ms a step", "lr", "seeds"]
    columns += shown or ["median", "worst"]
    ranks = results.ranks()
    rows = []
    for method in results.best_first:
        own, differences = list(results.delta(method).values()), results.against(method)
        cost = results.costs.get(method, {})
        row: list[Any] = [method, with_interval(own)]
        if method == results.rival:
            row += ["", ""]
        else:
            row += [with_interval(differences), verdict(differences)]
        row.append(f"{mean(ranks[method]):.1f}" if method in ranks else "")
        timed = method in results.at_time
        row.append(
            with_interval(list(results.delta(method, results.at_time).values())) if timed else ""
        )
        row.append(
            f"{cost['forward']} + {cost['backward']}".replace(".0", "") if "forward" in cost else ""
        )
        row.append(f"{1e3 * float(cost['seconds']):.3g}" if cost else "")
        row += [results.rates.get(method, ""), len(own)]
        per_metric = [mean(v[m] for v in results.tests[method].values()) for m in metrics]
        if shown:
            row += [f"{value:.4g}" for value in per_metric]
        else:
            row += [f"{np.median(per_metric):.3f}", f"{min(per_metric):.3f}"]
        rows.append(row)
    for reason in dict.fromkeys(results.failed.values()):
        without = "; ".join(method for method, why in results.failed.items() if why == reason)
        rows.append([without, reason.replace("|", "/"), *[""] * (len(columns) - 2)])
    return write_table(columns, rows)


def sentence(results: Results) -> str:
    """Returns what may be written of the results."""
    rival, seeds = results.rival, max(map(len, results.tests.values()))
    others = [m for m in results.tests if m not in (results.reference, SUM, rival)]
    verdicts = {method: verdict(results.against(method)) for method in others}
    counts = [list(verdicts.values()).count(word) for word in ("better", "worse")]
    text = f"Over {seeds} seeds, {counts[0]} of {len(others)} methods were better than the {rival} "
    text += f"and {counts[1]} worse, by the 95 % bootstrap interval of the paired difference."
    best = max(others, key=lambda method: mean(results.against(method)), default=None)
    if best is None:
        return text + "\n"
    costs = results.costs
    ratio = float(costs[best]["seconds"]) / float(costs[rival]["seconds"])
    text += f" The largest difference is that of {best}: {with_interval(results.against(best))} "
    return text + f"points of delta m, at {ratio:.1f} times the time of a step.\n"


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def with_interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = interval(values)
    return f"{mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def picture(results: Results, path: Path) -> None:
    """Draws quality against price: filled at equal epochs, hollow at equal time."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for number, method in enumerate(results.best_first):
        price = 1e3 * float(results.costs[method]["seconds"])
        color, marker = f"C{number % 10}", "osD"[number // 10]
        own = list(results.delta(method).values())
        low, high = interval(own)
        bars = [[mean(own) - low], [high - mean(own)]]
        axes.errorbar(
            price,
            mean(own),
            bars,
            color=color,
            marker=marker,
            linestyle="",
            capsize=2,
            label=method,
        )
        if results.at_time:
            timed = mean(results.delta(method, results.at_time).values())
            axes.plot(price, timed, marker, color=color, markerfacecolor="none", alpha=0.7)
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xscale="log", xlabel="ms a step", ylabel="delta m %", title=results.name)
    spread = [value for m in results.tests for value in results.delta(m).values()]
    bound = float(f"{max(np.percentile(np.abs(spread), 50), 1e-3):.0e}")
    axes.set_yscale("symlog", linthresh=bound)
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), minor_locator=NullLocator())
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=bound, subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=90)


def summary(found: Sequence[Results]) -> str:
    """Returns delta m and verdict of every method on every problem, and the mean rank."""
    methods = dict.fromkeys(method for results in found for method in results.tests)
    ranks = {results.name: results.ranks() for results in found}
    rows = []
    for method in methods:
        row, own = [], []
        for results in found:
            if method not in results.tests:
                row.append("")
                continue
            mark = ""
            if method != results.rival:
                found_verdict = verdict(results.against(method))
                mark = {"better": " **+**", "worse": " **-**"}.get(found_verdict, "")
            own_delta = mean(results.delta(method).values())
            row.append(f"{own_delta:+.{1 if abs(own_delta) >= 10 else 2}f}{mark}")
            if method in ranks[results.name]:
                every = ranks[results.name]
                own.append((mean(every[method]) - 1) / max(1, len(every) - 1))
        rows.append([method, *row, f"{mean(own):.2f} ({len(own)})" if own else ""])
    rows.sort(key=lambda row: row[-1] or "9")
    return write_table(["method", *(results.name for results in found), "mean rank, 0 to 1"], rows)


def write_report(folder: Path, problems: Sequence[str]) -> None:
    """Writes a table and a picture of each problem, and the summary of all."""
    found = collect(folder, {Path(name).stem: name for name in problems})
    for results in found:
        text = f"{table(results)}\n{sentence(results)}"
        (folder / f"{results.name}.md").write_text(text, encoding="utf-8")
        picture(results, folder / f"{results.name}.png")
        print(f"\n{results.name}\n\n{text}")
    if len(found) > 1:
        (folder / "summary.md").write_text(summary(found), encoding="utf-8")
        print(f"\n{summary(found)}")
