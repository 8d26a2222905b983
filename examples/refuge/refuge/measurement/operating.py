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
from refuge.measurement.intervals import Bootstrap, show_interval
from refuge.metrics import rates

Array = NDArray[np.float64]
Labels = NDArray[np.integer]
FILE = "operating_point.json"
MINIMUM_PER_CLASS = 10  # with fewer, a rate is known to 30 points at best
SPECIFICITY = 0.85  # the challenge's reference
RULES = {
    "specificity": f"the {SPECIFICITY:.0%} quantile of the healthy {{where}} pictures",
    "youden": "sensitivity + specificity highest on {where}",
}


class Calibration(NamedTuple):
    """Platt scaling: a logistic regression on the logit of a probability.

    Attributes:
        slope: Of the logit.
        intercept: Of the logit.
        positives: Number of photographs with glaucoma that it was fitted to.
        negatives: Number of those without.
    """

    slope: float
    intercept: float
    positives: int = 0
    negatives: int = 0

    def probabilities(self, probabilities: Array) -> Array:
        """Returns calibrated probabilities; NaN stays NaN."""
        return np.asarray(expit(self.slope * _logit(probabilities) + self.intercept))

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and highest risk that so few photographs can vouch for (Platt's targets)."""
        low = 1 / (self.negatives + 2) if self.negatives else 0.0
        return low, (self.positives + 1) / (self.positives + 2) if self.positives else 1.0

    def show(self, risk: float) -> str:
        """Formats a calibrated risk; one beyond the limits as "> 0.95"."""
        low, high = self.limits
        if np.isnan(risk):
            return "-"
        if not low <= risk <= high:
            return f"> {high:.2f}" if risk > high else f"< {low:.2f}"
        return f"{risk:.2f}"


@dataclass(frozen=True)
class OperatingPoint:
    """A run's decision rule: photographs with a score at or above a threshold are referred.

    The score is the average of both classifiers, calibrated if there is a calibration.

    Attributes:
        calibration: Calibration of the average; None if there were too few photographs.
        thresholds: Thresholds on the score, by rule.
        validation: Sensitivity and specificity where the thresholds were chosen, by rule.
        test: The same on the test split, with 95 % intervals.
        where: The photographs that it was chosen on.
    """

    calibration: Calibration | None
    thresholds: dict[str, float]
    validation: dict[str, dict[str, float | None]]
    test: dict[str, dict[str, Any]]
    where: str = "validation"

    def scores(self, average: Array) -> Array:
        """Returns what the thresholds are compared with."""
        return self.calibration.probabilities(average) if self.calibration else average

    def risks(self, average: Array) -> Array:
        """Returns calibrated risks; NaN without a calibration."""
        silent = np.full(np.shape(average), np.nan)
        return self.calibration.probabilities(average) if self.calibration else silent

    def rule(self, name: str) -> str:
        """Describes one of the rules."""
        return RULES[name].format(where=self.where)


def choose_point(
    labels: Labels, average: Array, where: str = "validation"
) -> tuple[OperatingPoint | None, str]:
    """Calibrates the average of both classifiers, and chooses a threshold by each rule.

    The threshold for a specificity needs healthy photographs alone; calibration and Youden's
    threshold need `MINIMUM_PER_CLASS` of each class.

    Args:
        labels: 1 for glaucoma, 0 for none, -1 where unknown or not to be used.
        average: Both classifiers' average; NaN where neither has one.
        where: Name of the photographs.

    Returns:
        The point and "", or None and one line that says why there is none.
    """
    usable = (labels >= 0) & ~np.isnan(average)
    labels, average = labels[usable], average[usable]
    sick, well = int((labels == 1).sum()), int((labels == 0).sum())
    if well < MINIMUM_PER_CLASS:
        return None, (
            f"no decision threshold: {where} has {well} pictures without glaucoma, and needs "
            f"{MINIMUM_PER_CLASS}."
        )
    calibration = calibrate(labels, average) if sick >= MINIMUM_PER_CLASS else None
    if calibration and calibration.slope <= 0:
        return None, f"no decision threshold: on {where} the diagnosis is no better than chance."
    point = OperatingPoint(calibration, {}, {}, {}, where)
    scores = point.scores(average)
    # Of n healthy pictures the k-th separates k / (n + 1) of all healthy eyes, on average.
    healthy = scores[labels == 0]
    chosen = {"specificity": float(np.quantile(healthy, SPECIFICITY, method="weibull"))}
    if sick >= MINIMUM_PER_CLASS:
        false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
        # The first threshold refers nobody. Of equal ones the first has fewer false alarms.
        chosen["youden"] = float(thresholds[1:][int((true - false)[1:].argmax())])
    validation = {rule: _rates(labels, scores, threshold) for rule, threshold in chosen.items()}
    return OperatingPoint(calibration, chosen, validation, {}, where), ""


def calibrate(labels: Labels, average: Array) -> Calibration:
    """Fits Platt scaling, with Platt's targets in place of 0 and 1, which shrink the risks."""
    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # A soft target is two photographs, weighted.
    logits, twice = np.tile(_logit(average), 2)[:, None], np.repeat((1, 0), len(labels))
    weights = np.concatenate((targets, 1 - targets))
    model = LogisticRegression(C=100).fit(logits, twice, sample_weight=weights)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    return Calibration(slope, intercept, positives, negatives)


def measure_point(
    point: OperatingPoint,
    labels: Labels,
    average: Array,
    ungradable: NDArray[np.bool_] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures the decisions on other photographs than those that chose the thresholds.

    Args:
        point: The operating point.
        labels: 1 for glaucoma, 0 for none, -1 where unknown.
        average: Both classifiers' average; NaN where neither has one.
        ungradable: Which photographs cannot be graded; none by default.

    Returns:
        By rule: sensitivity and specificity of the gradable photographs, with 95 % intervals, and
        of all if those that cannot be graded are referred (`..._all`), and how many those are.
    """
    scores = point.scores(average)
    lost = np.isnan(average) if ungradable is None else ungradable | np.isnan(average)
    gradable = np.where(lost, -1, labels)
    measured: dict[str, dict[str, Any]] = {}
    for rule, threshold in point.thresholds.items():
        referred = scores >= threshold
        measured[rule] = _rates(gradable, scores, threshold)
        for name, label in (("sensitivity", 1), ("specificity", 0)):
            right = referred == (label == 1)
            interval = Bootstrap(len(labels)).mean(np.where(gradable == label, right, np.nan))
            measured[rule][f"{name}_interval"] = interval
        sensitivity, specificity = rates(labels, np.where(lost, np.inf, scores), threshold)
        measured[rule] |= {"sensitivity_all": sensitivity, "specificity_all": specificity}
        measured[rule]["ungradable"] = int((lost & (labels >= 0)).sum())
    return measured


def measure_calibration(labels: Labels, risks: Array, bins: int = 5) -> dict[str, float] | None:
    """Compares calibrated risks with what happened; None without photographs of both classes.

    Returns:
        The expected calibration error over `bins` of equal count, slope and intercept of a logistic
        regression on the risks' logits (1 and 0 if they are right), and the Brier score.
    """
    usable = (labels >= 0) & ~np.isnan(risks)
    labels, risks = labels[usable], risks[usable]
    if len(np.unique(labels)) < 2:
        return None
    parts = np.array_split(np.argsort(risks, kind="stable"), min(bins, len(labels)))
    error = sum(len(p) * abs(risks[p].mean() - labels[p].mean()) for p in parts) / len(labels)
    model = LogisticRegression(C=np.inf).fit(_logit(risks)[:, None], labels)
    return {
        "error": float(error),
        "slope": float(model.coef_[0, 0]),
        "intercept": float(model.intercept_[0]),
        "brier": float(((risks - labels) ** 2).mean()),
    }


def describe_transfer(point: OperatingPoint, found: Mapping[str, Any]) -> str:
    """Says in one sentence whether a run's threshold for a specificity holds on other photographs.

    Args:
        point: The run's operating point.
        found: What `measure_point` measured on them by the rule "specificity".
    """
    value, interval = found["specificity"], found["specificity_interval"]
    if value is None or interval is None:
        return "Whether the run's threshold carries over is unknown: no healthy photograph here."
    aimed = f"specificity {value:.2f}{show_interval(interval)} here, {SPECIFICITY} aimed at"
    sensitivity, known = found["sensitivity"], point.test.get("specificity", {}).get("sensitivity")
    upper = (found["sensitivity_interval"] or (0.0, 1.0))[1]
    if not interval[0] <= SPECIFICITY <= interval[1]:
        return f"The run's threshold does not carry over ({aimed}): use `--recalibrate`."
    if sensitivity is not None and known is not None and upper < known:
        lower = f"sensitivity {sensitivity:.2f}{show_interval(found['sensitivity_interval'])}"
        return (
            f"The run's threshold does not carry over: {lower} here, {known:.2f} on its own test."
        )
    return f"The run's threshold carries over ({aimed})."


def write_point(folder: Path, point: OperatingPoint | None, reason: str) -> None:
    """Writes a run's operating point, or the reason why there is none."""
    content: Mapping[str, Any] = {"missing": reason}
    if point:
        calibration = point.calibration and point.calibration._asdict()
        rules = {name: point.rule(name) for name in point.thresholds}
        content = asdict(point) | {"calibration": calibration, "rules": rules}
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
        found = content["calibration"]
        calibration = found and Calibration(
            float(found["slope"]),
            float(found["intercept"]),
            int(found.get("positives", 0)),
            int(found.get("negatives", 0)),
        )
        thresholds = {rule: float(content["thresholds"][rule]) for rule in content["thresholds"]}
        where = str(content.get("where", "validation"))
        point = OperatingPoint(
            calibration, thresholds, content["validation"], content["test"], where
        )
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
