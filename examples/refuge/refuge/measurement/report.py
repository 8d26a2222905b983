"""Writes and prints the results of a run: metrics, figures and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refuge.files import write_csv, write_json
from refuge.measurement.evaluation import DIAGNOSES, Evaluation, Metrics, measure_intervals
from refuge.measurement.figures import (
    History,
    draw_learning_curves,
    draw_overlays,
    draw_reliability,
    draw_roc,
)
from refuge.measurement.intervals import Interval, show_interval, show_rates
from refuge.measurement.operating import SPECIFICITY, OperatingPoint, measure_point
from refuge.photographs.data import Photographs


def write_report(
    out: Path,
    source: str,
    photographs: Photographs,
    evaluation: Evaluation,
    history: History,
    point: OperatingPoint | None,
    facts: Mapping[str, Any],
) -> None:
    """Writes `metrics.json` and the figures, and prints a table.

    Args:
        out: The run folder.
        source: Name of the photographs.
        photographs: The test split.
        evaluation: Its evaluation by the network's best weights.
        history: A row per epoch.
        point: The run's operating point, if it has one.
        facts: Further entries of `metrics.json`; `notes` among them is printed too.
    """
    figures = out / "figures"
    draw_learning_curves(figures / "learning_curves.png", history, source)
    draw_overlays(figures / "overlays.png", photographs, evaluation.predictions, source)
    draw_diagnosis(figures, photographs, evaluation, point, source)
    write_measured(out, "test", source, photographs, evaluation, point, facts)


def write_measured(
    out: Path,
    split: str,
    source: str,
    photographs: Photographs,
    evaluation: Evaluation,
    point: OperatingPoint | None,
    facts: Mapping[str, Any],
) -> None:
    """Writes the metrics of a split and a row per photograph; prints a table.

    `metrics.json` is written for the test split of a run's own photographs, whose `facts` include
    "parameters".
    """
    metrics, intervals = evaluation.metrics, measure_intervals(evaluation, photographs)
    decisions = decide(point, photographs, evaluation)
    reasons = count_reasons(evaluation.reasons)
    facts = {"intervals": intervals, "decisions": decisions, "ungradable": reasons, **facts}
    name = "metrics.json" if "parameters" in facts else f"metrics-{split}.json"
    write_predictions(out / f"predictions-{split}.csv", photographs, evaluation, point)
    write_json(out / name, {"data": source, **metrics, **facts})
    print(f"{out}: {len(photographs)} {split} pictures, {source}")
    print(format_table(metrics, photographs.size, intervals, decisions, point))
    if calibration := facts.get("calibration"):
        print("  calibration   " + ", ".join(f"{k} {v:.3f}" for k, v in calibration.items()))
    if reasons:
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        print(f"  ungradable    {evaluation.ungradable.sum()} of {len(photographs)}: {listed}")
    for note in facts["notes"]:
        print(f"note: {note}")


def draw_diagnosis(
    figures: Path,
    photographs: Photographs,
    evaluation: Evaluation,
    point: OperatingPoint | None,
    source: str,
) -> None:
    """Draws the ROC curves and, if there is a calibration, its reliability diagram."""
    labels, diagnoses = photographs.labels.numpy(), evaluation.diagnoses
    areas = {name: evaluation.metrics[f"glaucoma_auc{key}"] for name, key in DIAGNOSES.items()}
    if all(area is None for area in areas.values()):
        return
    draw_roc(figures / "roc.png", labels, diagnoses, areas, source)
    if point:
        usable = (labels >= 0) & ~np.isnan(diagnoses["both"])
        average = diagnoses["both"][usable]
        said = {"average": average}
        if point.calibration:
            said["calibrated"] = point.risks(average)
        draw_reliability(figures / "reliability.png", labels[usable], said, source)


def decide(
    point: OperatingPoint | None, photographs: Photographs, evaluation: Evaluation
) -> dict[str, dict[str, Any]]:
    """Measures the decisions at a run's thresholds, by rule."""
    if point is None:
        return {}
    labels, average = photographs.labels.numpy(), evaluation.diagnoses["both"]
    return measure_point(point, labels, average, evaluation.ungradable)


def count_reasons(reasons: Sequence[str]) -> dict[str, int]:
    """Counts the first reason of each photograph that cannot be graded, the most frequent first."""
    return dict(Counter(reason.split("; ")[0] for reason in reasons if reason).most_common())


def write_predictions(
    file: Path, photographs: Photographs, evaluation: Evaluation, point: OperatingPoint | None
) -> None:
    """Writes a row per photograph as CSV; unknown values are empty cells."""
    predictions, diagnoses = evaluation.predictions, evaluation.diagnoses
    silent = np.full(len(photographs), np.nan)
    calibrated = point.risks(diagnoses["both"]) if point else silent
    columns: dict[str, Any] = {
        "label": np.where(photographs.labels < 0, np.nan, photographs.labels),
        "probability": diagnoses["both"],
        "probability_fc": diagnoses["fc"],
        "probability_vcdr": diagnoses["vcdr"],
        "risk": calibrated,
        "vcdr": predictions.ratios,
        "true_vcdr": photographs.ratios.numpy(),
    }
    if predictions.points is not None:
        columns["fovea_x"], columns["fovea_y"] = predictions.points.T
        columns["true_fovea_x"], columns["true_fovea_y"] = photographs.input_points().numpy().T
    reasons = evaluation.reasons or [""] * len(photographs)
    rows = [
        [name, *("" if np.isnan(value) else f"{value:.6g}" for value in values), reason]
        for name, *values, reason in zip(photographs.names, *columns.values(), reasons, strict=True)
    ]
    write_csv(file, ["photograph", *columns, "ungradable"], rows)


def missing_ratios(evaluation: Evaluation) -> list[str]:
    """Returns a note on how many photographs have no vCDR for want of a disc, if any."""
    lost = int(np.isnan(evaluation.predictions.ratios).sum())
    if lost == 0 or len(evaluation.predictions.masks) < 2:
        return []
    count = len(evaluation.predictions.ratios)
    return [f"no disc, so no vCDR, was found on {lost} of {count} pictures."]


def format_table(
    metrics: Metrics,
    size: int,
    intervals: Mapping[str, Interval | None] | None = None,
    decisions: Mapping[str, Mapping[str, Any]] | None = None,
    point: OperatingPoint | None = None,
) -> str:
    """Formats the metrics as a table; a dash stands for a metric that is undefined.

    Args:
        metrics: The metrics.
        size: Side of the network's input.
        intervals: Their 95 % intervals.
        decisions: Sensitivity and specificity at the run's thresholds, by rule.
        point: The operating point with those thresholds.
    """
    between = intervals or {}

    def show(name: str, form: str = ".3f") -> str:
        value = metrics[name]
        return "-" if value is None else f"{value:{form}}{show_interval(between.get(name), form)}"

    error = metrics["fovea_error"]
    share = "" if error is None else f"  ({error / size:.1%} of the side)"
    lines = [
        ("glaucoma AUC", show("glaucoma_auc")),
        ("  head, vCDR", f"{show('glaucoma_auc_fc')}, {show('glaucoma_auc_vcdr')}"),
        ("at 0.5", show_rates(metrics, "glaucoma_", between) + " (the published rule)"),
    ]
    for rule, found in (decisions or {}).items():
        if point:
            chosen = f"at {point.thresholds[rule]:.3f}"
            rates = {name: found[name] for name in ("sensitivity", "specificity")}
            own = {name: found[f"{name}_interval"] for name in rates}
            lines.append((chosen, f"{show_rates(rates, '', own)} ({point.rule(rule)})"))
            if found["ungradable"]:
                everyone = {name: found[f"{name}_all"] for name in rates}
                lines.append(("  all", f"{show_rates(everyone, '', {})} with ungradable referred"))
    lines += [
        (
            "reference",
            f"sensitivity {show('glaucoma_reference_sensitivity')} "
            f"at specificity {SPECIFICITY} (the challenge's)",
        ),
        ("disc Dice", show("disc_dice")),
        ("cup Dice", show("cup_dice")),
        ("fovea error", f"{show('fovea_error', '.2f')} px{share}"),
        ("vCDR error", show("vcdr_error")),
    ]
    return "\n".join(f"  {label:<13} {text}" for label, text in lines)
