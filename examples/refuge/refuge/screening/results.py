"""Turns findings into rows of the table and cards of the page, and describes the decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refuge.measurement.intervals import show_rates
from refuge.measurement.quality import Quality, describe_differences
from refuge.screening.examining import Decision, Finding
from refuge.screening.inputs import Photograph
from refuge.screening.page import Card
from refuge.screening.table import Row

NUMBERS = {"vcdr": "vCDR", "probability_fc": "network's head", "probability_vcdr": "from vCDR"}


def make_row(photograph: Photograph, finding: Finding, decision: Decision, eye: str) -> Row:
    """Returns a photograph's row of the table.

    Args:
        photograph: The photograph.
        finding: What the network found.
        decision: How the call decides.
        eye: Which eye a list or the DICOM file states; "" if none does.
    """
    risk, found = finding.risk, finding.probabilities
    if decision.point and decision.point.calibration and not math.isnan(risk):
        # Beyond these the calibration has no photographs to go by.
        risk = float(np.clip(risk, *decision.point.calibration.limits))
    x, y = (None, None) if finding.fovea is None else finding.fovea
    numbers = {
        "probability": found["both"],
        "probability_fc": found["fc"],
        "probability_vcdr": found["vcdr"],
        "vcdr": finding.ratio,
        "fovea_x": x,
        "fovea_y": y,
        "risk": risk,
    }
    return {
        "photograph": photograph.name,
        **{name: format_number(value) for name, value in numbers.items()},
        "verdict": finding.verdict,
        "reason": finding.reason,
        "eye": finding.eye,
        "stated_eye": eye,
        "output": photograph.output,
    }


def make_card(row: Row, decision: Decision) -> Card:
    """Returns a photograph's card from its row."""
    risk = float(row["risk"] or "nan")
    average = float(row["probability"] or "nan")
    calibration = decision.point.calibration if decision.point else None
    shown = {"eye": row["stated_eye"] or row["eye"] or "-"}
    if _contradicts(row):
        shown["eye"] += f" as stated, but it looks like a {row['eye']} eye: is it mirrored?"
    if calibration:
        low, high = calibration.limits
        # The table's risks stop at the limits.
        beyond = f"> {high:.2f}" if risk >= high - 1e-6 else f"< {low:.2f}"
        inside = low + 1e-6 < risk < high - 1e-6 or math.isnan(risk)
        shown["calibrated risk"] = calibration.show(risk) if inside else beyond
    for name, label in NUMBERS.items():
        shown[label] = f"{float(row[name]):.2f}" if row[name] else "-"
    shown["average"] = "-" if math.isnan(average) else f"{average:.2f}"
    return Card(
        name=row["photograph"],
        picture=f"overlays/{row['output']}.jpg",
        verdict=row["verdict"],
        numbers=shown,
        reason=row["reason"],
        risk=average if math.isnan(risk) else risk,
    )


def describe_decision(decision: Decision, source: str) -> str:
    """Says when a photograph is referred, and how accurate that was and where, in one line.

    Args:
        decision: How the call decides.
        source: Name of the photographs that the run was trained and tested on.
    """
    point, rule = decision.point, decision.rule
    if point is None:
        return (
            f"{decision.reason} Risks are not calibrated; photographs are ordered by probability."
        )
    found, split = point.test.get(rule), f"on the test split of {source}"
    if not found or None in (found["sensitivity"], found["specificity"]):
        found, split = point.validation[rule], f"on the {point.where} photographs of {source}"
    if point.where != "validation":
        split = f"on the same {point.where} photographs"
    intervals: dict[str, Any] = {
        name: found.get(f"{name}_interval") for name in ("sensitivity", "specificity")
    }
    kind = "a calibrated risk" if point.calibration else "an average probability"
    return (
        f"refer at {kind} of at least {point.thresholds[rule]:.3f} ({point.rule(rule)}); "
        f"{split} {show_rates(found, '', intervals)}."
    )


def warn_of_differences(qualities: Sequence[Quality], decision: Decision) -> list[str]:
    """Returns the warnings for all photographs of a call together."""
    warnings = []
    if decision.point and decision.point.where != "validation":
        warnings.append(f"threshold and calibration are {decision.point.where}, not the run's own.")
    if qualities:
        names = qualities[0].features
        whole = Quality(
            {name: np.concatenate([each.features[name] for each in qualities]) for name in names},
            [fault for each in qualities for fault in each.faults],
        )
        if line := describe_differences(whole, decision.limits):
            warnings.append(f"{line}.")
    return warnings


def warn_of_eyes(rows: Sequence[Row]) -> list[str]:
    """Returns a warning if stated eyes contradict what disc and fovea look like."""
    wrong = [row["photograph"] for row in rows if _contradicts(row)]
    if not wrong:
        return []
    return [
        f"the stated eye of {len(wrong)} photographs ({wrong[0]}) contradicts disc and fovea: "
        "are they mirrored?"
    ]


def _contradicts(row: Row) -> bool:
    return "" not in (row["eye"], row["stated_eye"]) and row["eye"] != row["stated_eye"]


def format_number(value: float | None) -> str:
    """Formats a number for a table; unknown ones are empty."""
    return "" if value is None or np.isnan(value) else f"{value:.6f}"
