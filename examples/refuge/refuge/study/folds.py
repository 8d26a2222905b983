"""Cross-validated decisions: each fold is judged by a threshold of the others' test photographs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refuge.files import write_text
from refuge.measurement.intervals import Bootstrap, show_interval, show_rates
from refuge.measurement.operating import SPECIFICITY, OperatingPoint, choose_point, measure_point
from refuge.metrics import auc
from refuge.study.tables import NAMES, FinishedRun, write_markdown

Array = NDArray[np.float64]
Labels = NDArray[np.integer]


def write_decisions(file: Path, title: str, runs: Sequence[FinishedRun]) -> None:
    """Writes a row per method: AUC and decisions over the photographs of all folds, as Markdown.

    A small set has no validation split that could choose a threshold. Here every photograph was
    tested once by a network that never saw it, so the threshold for a fold is chosen on the tests
    of the other folds. Averages of different networks are compared as they are.

    Args:
        file: The file to write.
        title: Description of the runs.
        runs: The runs of one seed, one for each fold and method.
    """
    rows = []
    for method in dict.fromkeys(run.settings.method for run in runs):
        folds = [_read(run.folder) for run in runs if run.settings.method == method]
        labels, average, _ = (np.concatenate(column) for column in zip(*folds, strict=True))
        usable = (labels >= 0) & ~np.isnan(average)
        area = auc(labels[usable], average[usable])
        interval = Bootstrap(int(usable.sum())).auc(labels[usable], average[usable])
        shown = "-" if area is None else f"{area:.3f}{show_interval(interval, '.3f')}"
        rows.append([NAMES.get(method, method), shown, cross_validate(folds), str(len(labels))])
    header = ["model", "AUC", f"decisions at specificity {SPECIFICITY}", "photographs"]
    write_text(file, f"{title}\n\n{write_markdown(header, rows)}\n")


def cross_validate(folds: Sequence[tuple[Labels, Array, NDArray[np.bool_]]]) -> str:
    """Returns sensitivity and specificity of decisions by the other folds' thresholds.

    Args:
        folds: Of each fold (labels, averages, which cannot be graded).
    """
    labels, scores, lost = [], [], []
    for number, (own_labels, own_average, own_lost) in enumerate(folds):
        others = [fold for n, fold in enumerate(folds) if n != number]
        known = np.concatenate([np.where(fold[2], -1, fold[0]) for fold in others])
        average = np.concatenate([fold[1] for fold in others])
        point, reason = choose_point(known, average, "the other folds")
        if point is None:
            return reason
        # How far beyond the threshold, so that the folds can be pooled.
        scores.append(point.scores(own_average) - point.thresholds["specificity"])
        labels.append(own_labels)
        lost.append(own_lost)
    whole = OperatingPoint(None, {"specificity": 0.0}, {}, {})
    found = measure_point(
        whole, np.concatenate(labels), np.concatenate(scores), np.concatenate(lost)
    )["specificity"]
    intervals = {name: found[f"{name}_interval"] for name in ("sensitivity", "specificity")}
    text = show_rates(found, "", intervals)
    return f"{text}; {found['ungradable']} ungradable" if found["ungradable"] else text


def _read(folder: Path) -> tuple[Labels, Array, NDArray[np.bool_]]:
    with (folder / "predictions-test.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    labels = np.array([int(row["label"] or -1) for row in rows])
    average = np.array([float(row["probability"] or "nan") for row in rows])
    return labels, average, np.array([bool(row["ungradable"]) for row in rows])
