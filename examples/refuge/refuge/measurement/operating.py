"""The operating point: calibration and decision thresholds, chosen on validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

from refuge.errors import InputError
from refuge.files import read_json, write_json
from refuge.measurement.intervals import Bootstrap
from refuge.metrics import rates

Array = NDArray[np.float64]
Labels = NDArray[np.integer]
FILE = "operating_point.json"
MINIMUM_PER_CLASS = 10  # with fewer, a sensitivity is known to 30 points at best
SPECIFICITY = 0.85  # the challenge's reference
RULES = {
    "specificity": f"specificity at least {SPECIFICITY} on validation",
    "youden": "sensitivity + specificity highest on validation",
}


class Calibration(NamedTuple):
    """Platt scaling: a logistic regression on the logit of a probability."""

    slope: float
    intercept: float

    def probabilities(self, probabilities: Array) -> Array:
        """Returns calibrated probabilities; NaN stays NaN."""
        return np.asarray(expit(self.slope * _logit(probabilities) + self.intercept))


@dataclass(frozen=True)
class OperatingPoint:
    """A run's decision rule: calibrated probabilities at or above a threshold are referred.

    Attributes:
        calibration: Calibration of the average of both classifiers.
        thresholds: Thresholds on the calibrated probability, by rule.
        validation: Sensitivity and specificity on validation, by rule.
        test: The same on the test split, with 95 % intervals.
    """

    calibration: Calibration
    thresholds: dict[str, float]
    validation: dict[str, dict[str, float | None]]
    test: dict[str, dict[str, Any]]


def choose_point(labels: Labels, average: Array) -> tuple[OperatingPoint | None, str]:
    """Calibrates on the validation split, and chooses a threshold by each rule.

    Args:
        labels: 1 for glaucoma, 0 for none, -1 where unknown.
        average: Both classifiers' average; NaN where neither has an opinion.

    Returns:
        The point and "", or None and one line that says why there is none.
    """
    usable = (labels >= 0) & ~np.isnan(average)
    labels, average = labels[usable], average[usable]
    sick, well = int((labels == 1).sum()), int((labels == 0).sum())
    if min(sick, well) < MINIMUM_PER_CLASS:
        return None, (
            f"no decision threshold: validation has {sick} pictures with glaucoma and {well} "
            f"without, and needs {MINIMUM_PER_CLASS} of each."
        )
    model = LogisticRegression(C=100).fit(_logit(average)[:, None], labels)
    calibration = Calibration(float(model.coef_[0, 0]), float(model.intercept_[0]))
    if calibration.slope <= 0:
        return None, "no decision threshold: on validation the diagnosis is no better than chance."
    risks = calibration.probabilities(average)
    false, true, thresholds = roc_curve(labels, risks, drop_intermediate=False)
    false, true, thresholds = false[1:], true[1:], thresholds[1:]  # The first refers nobody.
    # Of equal thresholds the one that alarms less: a curve rises before it goes right.
    best = {"youden": int((true - false).argmax())}
    if (kept := 1 - false >= SPECIFICITY).any():
        best["specificity"] = int(np.where(kept, true - false * 1e-6, -1).argmax())
    chosen = {rule: float(thresholds[best[rule]]) for rule in RULES if rule in best}
    validation = {rule: _rates(labels, risks, threshold) for rule, threshold in chosen.items()}
    return OperatingPoint(calibration, chosen, validation, {}), ""


def measure_point(
    point: OperatingPoint, labels: Labels, average: Array
) -> dict[str, dict[str, Any]]:
    """Measures the decisions on other photographs than those that chose the thresholds."""
    risks = point.calibration.probabilities(average)
    labels = np.where(np.isnan(average), -1, labels)
    measured: dict[str, dict[str, Any]] = {}
    for rule, threshold in point.thresholds.items():
        right = (risks >= threshold) == (labels == 1)
        measured[rule] = _rates(labels, risks, threshold)
        for name, label in (("sensitivity", 1), ("specificity", 0)):
            interval = Bootstrap(len(labels)).mean(np.where(labels == label, right, np.nan))
            measured[rule][f"{name}_interval"] = interval
    return measured


def write_point(folder: Path, point: OperatingPoint | None, reason: str) -> None:
    """Writes a run's operating point, or the reason why there is none."""
    content: Mapping[str, Any] = {"missing": reason}
    if point:
        content = asdict(point) | {"calibration": point.calibration._asdict(), "rules": RULES}
    write_json(folder / FILE, content)


def read_point(folder: Path) -> tuple[OperatingPoint | None, str]:
    """Reads a run's operating point; None and the reason if there is none.

    Raises:
        InputError: The file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None, f"no decision threshold: {folder} has no {FILE}; its training has not ended."
    content = read_json(file)
    if "missing" in content:
        return None, str(content["missing"])
    try:
        calibration = Calibration(**{k: float(v) for k, v in content["calibration"].items()})
        thresholds = {rule: float(content["thresholds"][rule]) for rule in content["thresholds"]}
        point = OperatingPoint(calibration, thresholds, content["validation"], content["test"])
        for rule in thresholds:
            RULES[rule], point.validation[rule]["specificity"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: not an operating point ({error}).") from error
    return point, ""


def _rates(labels: Labels, risks: Array, threshold: float) -> dict[str, float | None]:
    sensitivity, specificity = rates(labels, risks, threshold)
    return {"sensitivity": sensitivity, "specificity": specificity}


def _logit(probabilities: Array) -> Array:
    return np.asarray(logit(np.clip(probabilities, 1e-6, 1 - 1e-6)))
