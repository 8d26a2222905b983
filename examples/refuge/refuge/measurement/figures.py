"""Figures of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from refuge.files import write_whole
from refuge.measurement.evaluation import Predictions
from refuge.photographs.data import Photographs

TRUE, PREDICTED = "white", "deepskyblue"
History = Sequence[Mapping[str, Any]]


def draw_pictures(file: Path, photographs: Photographs, count: int = 12) -> None:
    """Draws the first photographs at the network's input size, with their labels."""
    names = {1: "glaucoma", 0: "no glaucoma", -1: "not labelled"}
    figure, axes = grid(min(count, len(photographs)), columns=4)
    for row, ax in enumerate(axes):
        show(ax, photographs, row)
        ax.set_title(names[int(photographs.labels[row])], fontsize=8)
    save(figure, file)


def draw_overlays(
    file: Path, photographs: Photographs, predictions: Predictions, source: str, count: int = 8
) -> None:
    """Draws outlines of disc and cup and the fovea, true and predicted, over photographs.

    Args:
        file: The file to write.
        photographs: The split.
        predictions: Predictions for it.
        source: Name of the photographs, for the title.
        count: Number of photographs to draw, spread over the split.
    """
    count = min(count, len(photographs))
    figure, axes = grid(count, columns=4)
    masks = photographs.masks.numpy()
    true = {"disc": masks < 255, "cup": masks == 0}
    points = photographs.input_points().numpy()
    chosen = np.linspace(0, len(photographs) - 1, count).astype(int)
    for row, ax in zip(chosen, axes, strict=True):
        show_original(ax, photographs, int(row))
        for task, style in (("disc", "solid"), ("cup", "dashed")):
            if photographs.known[task][row]:
                outline(ax, true[task][row], TRUE, style)
            if task in predictions.masks:
                outline(ax, predictions.masks[task][row], PREDICTED, style)
        ax.plot(*points[row], "+", color=TRUE, markersize=9)
        if predictions.points is not None:
            ax.plot(*predictions.points[row], "x", color=PREDICTED, markersize=7)
    figure.suptitle(
        f"{source}: truth white, prediction blue; disc solid, cup dashed, fovea crosses", fontsize=9
    )
    save(figure, file)


def draw_learning_curves(file: Path, history: History, source: str) -> None:
    """Draws training losses and validation metrics over the epochs."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for column in dict.fromkeys(column for row in history for column in row):
        rows = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
        if column.startswith("loss_") and rows:
            top.plot(*zip(*rows, strict=True), label=column.removeprefix("loss_"))
        elif column in ("val_disc_dice", "val_cup_dice", "val_glaucoma_auc", "score") and rows:
            label = column.removeprefix("val_").replace("_", " ")
            bottom.plot(*zip(*rows, strict=True), marker=".", label=label)
    top.set(yscale="log", ylabel="training loss", title=source)
    bottom.set(xlabel="epoch", ylabel="validation")
    for ax in (top, bottom):
        if ax.lines:
            ax.legend(fontsize=8)
    save(figure, file)


def draw_roc(
    file: Path,
    labels: NDArray[np.integer],
    diagnoses: Mapping[str, NDArray[np.float64]],
    areas: Mapping[str, float | None],
    source: str,
) -> None:
    """Draws the ROC curve of each classifier with a known area under it."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, area in areas.items():
        if area is not None:
            usable = (labels >= 0) & ~np.isnan(diagnoses[name])
            false, true, _ = roc_curve(labels[usable], diagnoses[name][usable])
            ax.plot(false, true, label=f"{name} {area:.3f}")
    ax.plot((0, 1), (0, 1), ":", color="grey")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", title=source, aspect="equal")
    ax.legend()
    save(figure, file)


def draw_reliability(
    file: Path,
    labels: NDArray[np.integer],
    said: Mapping[str, NDArray[np.float64]],
    source: str,
    bins: int = 5,
) -> None:
    """Draws the share of glaucoma against the predicted probability, in bins of equal count.

    Args:
        file: The file to write.
        labels: 1 for glaucoma, by photograph.
        said: Predicted probabilities by name.
        source: Name of the photographs, for the title.
        bins: Number of points.
    """
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, probabilities in said.items():
        parts = np.array_split(np.argsort(probabilities, kind="stable"), min(bins, len(labels)))
        points = [(probabilities[part].mean(), labels[part].mean()) for part in parts]
        ax.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    ax.plot((0, 1), (0, 1), ":", color="grey")
    ax.set(xlabel="predicted", ylabel="share with glaucoma", title=source, aspect="equal")
    ax.legend()
    save(figure, file)


def grid(count: int, columns: int, side: float = 2.2) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` empty axes of `side` inches each."""
    rows = -(-count // columns)
    figure = Figure(figsize=(side * columns, (side + 0.1) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.axis("off")
    return figure, axes[:count]


def show(ax: Axes, photographs: Photographs, row: int) -> None:
    """Draws a photograph at the network's input size."""
    ax.imshow(photographs.pictures[row].permute(1, 2, 0).cpu().numpy(), interpolation="bicubic")


def show_original(ax: Axes, photographs: Photographs, row: int) -> None:
    """Draws a photograph at its own size, in coordinates of the network's input."""
    edge = photographs.size - 0.5
    picture = photographs.frame(row).cut(photographs.records[row].read()[0])
    ax.imshow(np.asarray(picture), extent=(-0.5, edge, edge, -0.5))


def outline(ax: Axes, mask: NDArray[np.bool_], colour: str, style: str) -> None:
    """Draws the outline of a mask."""
    if mask.any():
        ax.contour(mask, levels=[0.5], colors=colour, linestyles=style, linewidths=0.9)


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as PNG atomically."""
    write_whole(file, lambda opened: figure.savefig(opened, format="png", dpi=130))
