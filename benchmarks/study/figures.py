"""A dot plot of one problem: a row per method, sorted, against the tuned sum."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.study.findings import View
from benchmarks.study.methods import ALONE, COMBINING, PER_TASK, SUMS, TUNED, WEIGHTING, family

# Okabe and Ito's colours, which differ for the colour-blind; the shape says the same.
STYLES = {
    SUMS: ("#000000", "s"),
    WEIGHTING: ("#0072B2", "o"),
    COMBINING: ("#D55E00", "D"),
    PER_TASK: ("#009E73", "^"),
    ALONE: ("#888888", "X"),
}
WIDTH, DOTS = 5.2, 150
"""Inches, and dots per inch: on a screen of 390 pixels a letter is nine pixels high."""


def draw(view: View) -> Figure:
    """Returns a figure of the methods' differences to the tuned sum, with 95 % intervals.

    Filled marks are better or worse by the corrected test. Methods far below the rest stand at the
    left edge, with their number.
    """
    order = view.best_first[::-1]
    low, high = limits(view)
    figure = Figure(
        figsize=(WIDTH, 1.5 + 0.2 * len(order)), layout="constrained", facecolor="white"
    )
    axes = figure.subplots()
    axes.axvspan(*view.band, color="0.9", zorder=0)
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    for row, method in enumerate(order):
        colour, marker = STYLES[family(method)]
        if method == TUNED:
            axes.plot(0, row, marker, color=colour, markersize=6)
            continue
        found = view.comparisons[method]
        if found.mean < low:
            text = f"◂ −{-found.mean:.{0 if found.mean <= -10 else 1}f}"
            axes.text(low, row, text, color=colour, va="center", fontsize=9)
            continue
        fill = "white" if found.word == "undecided" else colour
        axes.plot([max(found.low, low), min(found.high, high)], [row, row], color=colour, lw=1.2)
        axes.plot(found.mean, row, marker, color=colour, markerfacecolor=fill, markersize=6)
    axes.set_yticks(range(len(order)), order, fontsize=9)
    axes.set(xlim=(low, high), ylim=(-0.7, len(order) - 0.3))
    axes.set_xlabel("% better than the tuned sum (95 % interval)", fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    shown = {family(method) for method in order}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in STYLES.items()
        if name in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def limits(view: View) -> tuple[float, float]:
    """Returns an interval that holds two thirds of the methods, and all that are ahead."""
    means = np.array([each.mean for each in view.comparisons.values()] + [0.0])
    ends = [view.band[1], *(each.high for each in view.comparisons.values() if each.mean > 0)]
    wide = 2 * float(np.percentile(np.abs(means), 67))
    low = 1.15 * min(view.band[0], max(1.1 * float(means.min()), -max(wide, 1.1 * max(ends))))
    return low, max(ends) + 0.02 * (max(ends) - low)  # The edge cuts no mark.
