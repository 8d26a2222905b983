"""What a run folder says at its end: metrics, figures, and a table for the eye."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import write_csv, write_json
from measurement.evaluation import Evaluation, Metrics
from measurement.figures import History, draw_learning_curves, draw_overlays, draw_roc
from photographs.data import Photographs


def write_report(
    out: Path,
    source: str,
    photographs: Photographs,
    evaluation: Evaluation,
    history: History,
    facts: Mapping[str, Any],
) -> None:
    """Writes `metrics.json` and the figures, and prints a table.

    Args:
        out: The run folder.
        source: Where the photographs come from.
        photographs: The test split.
        evaluation: What the network's best weights make of it.
        history: A row per epoch.
        facts: What else `metrics.json` shall hold; `notes` among them is printed too.
    """
    metrics = evaluation.metrics
    figures = out / "figures"
    draw_learning_curves(figures / "learning_curves.png", history, source)
    draw_overlays(figures / "overlays.png", photographs, evaluation.predictions, source)
    names = {"fc": "glaucoma_auc_fc", "vcdr": "glaucoma_auc_vcdr", "both": "glaucoma_auc"}
    areas = {name: metrics[key] for name, key in names.items()}
    if any(area is not None for area in areas.values()):
        labels = photographs.labels.numpy()
        draw_roc(figures / "roc.png", labels, evaluation.diagnoses, areas, source)
    write_predictions(out / "predictions-test.csv", photographs, evaluation)
    write_json(out / "metrics.json", {"data": source, **metrics, **facts})
    print(f"{out}: {len(photographs)} test pictures, {source}")
    print(format_table(metrics, photographs.size))
    for note in facts["notes"]:
        print(f"note: {note}")


def write_predictions(file: Path, photographs: Photographs, evaluation: Evaluation) -> None:
    """Writes a row per photograph as CSV; a cell is empty where there is no number."""
    predictions, diagnoses = evaluation.predictions, evaluation.diagnoses
    columns: dict[str, Any] = {
        "label": np.where(photographs.labels < 0, np.nan, photographs.labels),
        "probability": diagnoses["both"],
        "probability_fc": diagnoses["fc"],
        "probability_vcdr": diagnoses["vcdr"],
        "vcdr": predictions.ratios,
        "true_vcdr": photographs.ratios.numpy(),
    }
    if predictions.points is not None:
        columns["fovea_x"], columns["fovea_y"] = predictions.points.T
        columns["true_fovea_x"], columns["true_fovea_y"] = photographs.input_points().numpy().T
    rows = [
        [name, *("" if np.isnan(value) else f"{value:.6g}" for value in values)]
        for name, *values in zip(photographs.names, *columns.values(), strict=True)
    ]
    write_csv(file, ["photograph", *columns], rows)


def missing_ratios(evaluation: Evaluation) -> list[str]:
    """Says how many photographs got no vCDR though the network looks for disc and cup."""
    lost = int(np.isnan(evaluation.predictions.ratios).sum())
    if lost == 0 or len(evaluation.predictions.masks) < 2:
        return []
    count = len(evaluation.predictions.ratios)
    return [f"no disc, so no vCDR, was found on {lost} of {count} pictures."]


def format_table(metrics: Metrics, size: int) -> str:
    """Lays the metrics out in lines; a dash where nothing could be measured."""

    def show(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    error = metrics["fovea_error"]
    share = "" if error is None else f"  ({error / size:.1%} of the side)"
    fc, vcdr = show(metrics["glaucoma_auc_fc"]), show(metrics["glaucoma_auc_vcdr"])
    lines = (
        ("glaucoma AUC", f"{show(metrics['glaucoma_auc'])}  (FC {fc}, vCDR {vcdr})"),
        ("sensitivity", f"{show(metrics['glaucoma_sensitivity'])}"),
        ("specificity", f"{show(metrics['glaucoma_specificity'])}"),
        ("disc Dice", show(metrics["disc_dice"])),
        ("cup Dice", show(metrics["cup_dice"])),
        ("fovea error", f"{show(error, '.2f')} px{share}"),
        ("vCDR error", show(metrics["vcdr_error"])),
    )
    return "\n".join(f"  {label:<13} {text}" for label, text in lines)
