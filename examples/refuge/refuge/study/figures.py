"""Figures of a study, numbered as in the paper."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve

from refuge.losses import saliency_maps
from refuge.measurement.evaluation import Trained, summarise
from refuge.measurement.figures import TRUE, grid, outline, save, show, show_original
from refuge.photographs.data import Photographs
from refuge.study.tables import COLUMNS, NAMES, FinishedRun

COLOURS = {"independent": "deepskyblue", "single": "gold"}


def draw_roc_curves(file: Path, runs: Sequence[FinishedRun], title: str) -> None:
    """Draws Figure 1: ROC of the averaged classifiers, a curve for each run."""
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    ax = figure.subplots()
    for run in runs:
        with (run.folder / "predictions-test.csv").open(encoding="utf-8", newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if row["label"] and row["probability"]]
        labels = [int(row["label"]) for row in rows]
        probabilities = [float(row["probability"]) for row in rows]
        if len(set(labels)) == 2:
            false, true, _ = roc_curve(labels, probabilities)
            area = roc_auc_score(labels, probabilities)
            ax.plot(false, true, label=f"{_name(run)} {100 * area:.1f}")
    ax.plot((0, 1), (0, 1), ":", color="grey")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
    ax.set_title(f"{title}, seed {runs[0].settings.seed}", fontsize=8)
    if len(ax.lines) > 1:
        ax.legend(fontsize=8, title="AUC (%)", title_fontsize=8)
    save(figure, file)


def draw_by_rate(out: Path, runs: Sequence[FinishedRun], title: str) -> None:
    """Draws Figures 2 and 3: each task's metric and final training loss by learning rate."""
    methods = list(dict.fromkeys(run.settings.method for run in runs))
    metrics = Figure(figsize=(8, 6), layout="constrained")
    losses = Figure(figsize=(8, 6), layout="constrained")
    metrics.suptitle(title, fontsize=9)
    losses.suptitle(title, fontsize=9)
    tasks = ("glaucoma", "disc", "cup", "fovea")
    upper, lower = metrics.subplots(2, 2).flat, losses.subplots(2, 2).flat
    for column, task, above, below in zip(COLUMNS, tasks, upper, lower, strict=True):
        for method in methods:
            own = sorted(
                (run for run in runs if run.settings.method == method),
                key=lambda run: run.settings.lr,
            )
            rates = [run.settings.lr for run in own]
            label = _name(own[0])
            values = [np.nan if (v := run.value(column)) is None else v for run in own]
            above.plot(rates, values, marker="o", markersize=4, label=label)
            last = [_final_loss(run, task) for run in own]
            below.plot(rates, last, marker="o", markersize=4, label=label)
        above.set(xscale="log", ylabel=COLUMNS[column])
        below.set(xscale="log", yscale="log", ylabel=f"{task} loss after training")
    for figure, file in ((metrics, "figure2_metrics.png"), (losses, "figure3_loss.png")):
        lines = figure.axes[0].lines
        figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=8)
        for ax in figure.axes:
            ax.set_xlabel("learning rate")
        save(figure, out / file)


def draw_comparison(
    file: Path, photographs: Photographs, trained: Mapping[str, Trained], title: str
) -> None:
    """Draws Figure 4: fovea and outlines of disc and cup, true and predicted."""
    labels = photographs.labels.tolist()
    rows = [labels.index(label) for label in (1, 0) if label in labels] or [0]
    figure, axes = grid(len(rows), columns=len(rows), side=4.2)
    points = photographs.input_points().numpy()
    for row, ax in zip(rows, axes, strict=True):
        batch = photographs[row]
        show_original(ax, photographs, row)
        ax.set_title({1: "glaucoma", 0: "no glaucoma"}.get(labels[row], ""), fontsize=9)
        true = {t: batch.targets[t][0].cpu().numpy() for t in ("disc", "cup") if batch.known[t]}
        for mask in true.values():
            outline(ax, mask, TRUE, "solid")
        ax.plot(*points[row], "+", color=TRUE, markersize=12, label="truth")
        for method, network in trained.items():
            colour = COLOURS.get(method, "violet")
            said = summarise([network.ask(batch.images)])
            for mask in said.masks.values():
                outline(ax, mask[0], colour, "solid")
            if said.points is not None:
                name = NAMES.get(method, method)
                ax.plot(
                    *said.points[0],
                    "x",
                    color=colour,
                    markersize=9,
                    label=name,
                )
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(title, fontsize=9)
    save(figure, file)


def draw_saliency(file: Path, photographs: Photographs, trained: Trained, title: str) -> None:
    """Draws Figure 6: a photograph, its saliency map, and a network's prediction of it."""
    row = int(photographs.known["fovea"].int().argmax())
    figure, axes = grid(3, columns=3, side=3)
    show(axes[0], photographs, row)
    axes[0].set_title("photograph", fontsize=9)
    true = saliency_maps(photographs.input_points()[row : row + 1], photographs.size)[0]
    axes[1].imshow(true.numpy(), cmap="magma", vmin=0, vmax=1)
    axes[1].set_title("saliency map", fontsize=9)
    answer = trained.ask(photographs[row].images)
    if "fovea" in answer:
        axes[2].imshow(answer["fovea"], cmap="magma", vmin=0, vmax=1)
        axes[2].set_title("as predicted", fontsize=9)
    figure.suptitle(title, fontsize=9)
    save(figure, file)


def _final_loss(run: FinishedRun, task: str) -> float:
    with (run.folder / "history.csv").open(encoding="utf-8", newline="") as opened:
        value = list(csv.DictReader(opened))[-1][f"loss_{task}"]
    return float(value) if value else float("nan")


def _name(run: FinishedRun) -> str:
    return NAMES.get(run.settings.method, run.settings.method)
