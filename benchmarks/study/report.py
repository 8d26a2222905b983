"""Tables of what was run, as Markdown; every sentence on the results is made from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.comparison import Comparison
from benchmarks.study.figures import DOTS, draw
from benchmarks.study.findings import Findings, View, choice_of, find, mean_of
from benchmarks.study.methods import METHODS, REFERENCE, SUM, TUNED
from benchmarks.study.study import Study
from benchmarks.timing import write_table

ARROWS = {"better": "▲", "worse": "▼", "undecided": ""}
MANY = 4
"""Of more metrics than these, the table has the median and the worst."""


def number(value: float) -> str:
    """Writes a difference in percent."""
    rounded = f"{value:+.{0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2}f}"
    return rounded.replace("-", "−") if float(rounded) else "0.00"


def marked(found: Comparison) -> str:
    """Writes a difference and its arrow."""
    return f"{number(found.mean)} {ARROWS[found.word]}".strip()


def bounds(found: Comparison) -> str:
    """Writes the interval of a difference."""
    return f"[{number(found.low)}, {number(found.high)}]"


def verdict(found: Comparison) -> str:
    """Writes a difference, its interval and the word for it."""
    return f"{number(found.mean)} % {bounds(found)}, {found.word}"


def ratio_of(findings: Findings, method: str) -> float:
    """Returns the cost of a method's step in the sum's."""
    if method == REFERENCE:
        return next(r for name, r in findings.ratios.items() if name.startswith(REFERENCE))
    return findings.ratios.get(method, 1.0)


def table(findings: Findings, view: View) -> str:
    """Returns a problem's table at one budget, the best first."""
    metrics = list(next(iter(view.tests[TUNED].values())))
    shown = metrics if len(metrics) <= MANY else []
    columns = ["method", "% against the tuned sum", "95 % interval", "p (Holm)", ""]
    columns += [*(shown or ["median", "worst"]), "steps", "cost of a step"]
    rows = []
    for method in view.best_first:
        row: list[Any] = [method]
        if method == TUNED:
            row += ["0", f"{number(view.band[0])} to {number(view.band[1])}", "", ""]
        else:
            found = view.comparisons[method]
            row += [number(found.mean), f"{number(found.low)} to {number(found.high)}"]
            row += [f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"]
            row += [f"{ARROWS[found.word]} {found.word}".strip()]
        means = mean_of(view.tests[method])
        values = [means[name] for name in shown] or [np.median(list(means.values()))]
        if not shown:
            values.append(worst(means, findings))
        row += [f"{value:.4g}" for value in values]
        row += [view.steps[method], f"{ratio_of(findings, method):.2f}"]
        rows.append(row)
    text = write_table(columns, rows)
    for method, count in view.failed.items():
        text += f"\n{method}: {count} runs ended in an error or a loss that is not finite.\n"
    if view.running:
        text += f"\nNot finished yet: {', '.join(view.running)}.\n"
    return text


def by_task(view: View) -> str:
    """Returns the means of all metrics, the best method first."""
    names = list(next(iter(view.tests[TUNED].values())))
    rows = []
    for method in view.best_first:
        means = mean_of(view.tests[method])
        rows.append([method, *(f"{means[name]:.3g}" for name in names)])
    return write_table(["method", *names], rows)


def worst(means: dict[str, float], findings: Findings) -> float:
    """Returns the worst of many metrics that are measured alike."""
    return max(means.values()) if findings.lower_is_better else min(means.values())


def searched(findings: Findings) -> str:
    """Returns what each method's search was, and what it chose."""
    rows = []
    for method in findings.plan.choices:
        choice = choice_of(findings.plan, method)
        assert choice is not None
        count = findings.plan.searched[method]
        rows.append([method, count, f"{choice.lr:g}", choice.variant or "no constant"])
    return write_table(["method", "runs of the search", "learning rate", "chosen"], rows)


def sentence(findings: Findings) -> str:
    """Returns what may be written of the results."""
    view = findings.equal
    assert view is not None
    seeds, count = len(view.tests[TUNED]), len(view.comparisons)
    text = f"At equal compute, over {seeds} fresh seeds, {view.count('better')} of {count} rivals "
    text += f"were better than the tuned sum, {view.count('worse')} worse and "
    text += f"{view.count('undecided')} undecided (paired t tests, Holm's correction, 5 %)."
    if SUM in view.comparisons and view.comparisons[SUM][:3] == (0, 0, 0):
        text += " The search kept equal weights: the tuned sum is the plain sum."
    longer = findings.plateau.comparisons if findings.plateau is not None else {}
    for method, found in longer.items():
        if method.startswith(f"{TUNED},"):
            text += f" The {method}, gains {number(found.mean)} % on itself {bounds(found)}."
    ahead = [m for m in view.best_first if m != TUNED and view.comparisons[m].mean > 0]
    if ahead:
        best = verdict(view.comparisons[ahead[0]])
        text += f" At equal compute the best mean is that of {ahead[0]}, {best}."
    else:
        text += " At equal compute no mean is ahead of it."
    again = findings.again.comparisons if findings.again is not None else {}
    if again:
        text += f" With {seeds} further seeds: "
        text += "; ".join(f"{method}, {verdict(found)}" for method, found in again.items()) + "."
    return text + "\n"


def headline(found: Sequence[Findings]) -> str:
    """Returns every method on every problem, at equal compute; empty where it did not run."""
    views = [each.equal for each in found if each.equal is not None]
    methods = [REFERENCE, *METHODS]
    rows = []
    for method in methods:
        own = [view.comparisons.get(method) for view in views]
        words = [each.word for each in own if each is not None]
        if words:
            cells = [marked(each) if each is not None else "" for each in own]
            count = f"{words.count('better')}, {words.count('worse')} of {len(words)}"
            rows.append([method, *cells, count])
    names = [each.name.replace("_", " ") for each in found]  # A narrow column breaks at a space.
    return write_table(["method", *names, "▲, ▼"], rows)


def state(found: Sequence[Findings]) -> str:
    """Returns which problems are complete, and how much is left."""
    rows = []
    for each in found:
        plan = each.plan
        steps = f"{plan.steps or '?'}"
        if plan.still_gaining:
            steps += f", still gaining {100 * plan.still_gaining:.1f} %"
        words = "complete"
        if not each.complete:
            words = "judged at equal compute" if each.judged else "begun"
            words += f", {len(plan.missing)} runs or more left"
        rows.append([each.name, f"{len(each.ratios)} of {each.known}", steps, words])
    return write_table(["problem", "methods begun", "steps of the sum", "state of those"], rows)


def write_state(studies: Sequence[Study]) -> str:
    """Returns the state of the studies."""
    return state([find(study) for study in studies])


def write_report(folder: Path, studies: Sequence[Study]) -> None:
    """Writes a problem's tables and figure, and the summary of those that have been judged."""
    every = [find(study) for study in studies]
    for study, found in zip(studies, every, strict=True):
        if not found.judged or found.equal is None:
            continue  # Tests among the first few methods would be others among all.
        longer = table(found, found.plateau) if found.complete and found.plateau else ""
        texts = {
            "equal-compute": table(found, found.equal),
            "plateau": longer or "These runs have not finished yet.\n",
            "searched": searched(found),
            "sentence": sentence(found),
        }
        if len(found.tasks) > MANY:
            texts["metrics"] = by_task(found.equal)
        for name, text in texts.items():
            (study.folder / f"{name}.md").write_text(text, encoding="utf-8")
        draw(found.equal).savefig(study.folder / "equal-compute.png", dpi=DOTS)
        print(f"\n{found.name}\n\n{texts['equal-compute']}\n{texts['sentence']}")
    (folder / "state.md").write_text(state(every), encoding="utf-8")
    if judged := [found for found in every if found.judged]:
        (folder / "headline.md").write_text(headline(judged), encoding="utf-8")
    print(state(every))
