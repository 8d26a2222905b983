"""Decides whether a photograph can be graded, by rules measured on the validation photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refuge.errors import InputError
from refuge.files import read_json, write_json
from refuge.measurement.evaluation import Evaluation, Predictions
from refuge.photographs.data import Photographs
from refuge.photographs.frames import FIELD_FEATURES, Frame

Array = NDArray[np.float64]
FILE = "quality.json"
MINIMUM = 20  # validation photographs; fewer say too little about what is usual
UNGRADABLE = 4.0  # spreads beyond the validation photographs' median, see `measure_limits`
UNUSUAL = 1.5
SHARE = 0.2  # of the photographs of a call; so many unusual ones are a warning

# What each feature below or above its limits means.
REASONS = {
    "fill": ("field of view of an unusual shape", "no round field of view"),
    "shape": ("field of view much wider than high", "field of view much higher than wide"),
    "brightness": ("too dark", "too bright"),
    "red": ("colours unlike a fundus", "colours unlike a fundus"),
    "blue": ("colours unlike a fundus", "colours unlike a fundus"),
    "contrast": ("too little contrast", "too much contrast"),
    "sharpness": ("blurred", "grainy"),
    "disc size": ("disc too small", "disc too large"),
    "disc roundness": ("disc not round", "disc not round"),
    "disc outline": ("disc outline ragged", "disc outline ragged"),
    "disc certainty": ("disc uncertain", "disc uncertain"),
    "disc position": ("disc in an unusual place", "disc in an unusual place"),
    "fovea distance": ("fovea too near to the disc", "fovea too far from the disc"),
    "fovea certainty": ("fovea uncertain", "fovea uncertain"),
}
Limits = Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Quality:
    """What was measured of some photographs, and of the network's predictions for them.

    Attributes:
        features: Values (n,) by the names of `REASONS`; NaN where one cannot be measured.
        faults: For each photograph, why it cannot be graded whatever the limits are; "" if it can.
    """

    features: dict[str, Array]
    faults: list[str] = field(default_factory=list)

    def reasons(self, limits: Limits) -> list[str]:
        """Returns for each photograph why it cannot be graded; "" if it can."""
        found = []
        for row, fault in enumerate(self.faults):
            reasons = [fault] if fault else []
            for name, values in self.features.items():
                low, high = _bounds(limits, name, UNGRADABLE)
                high = np.inf if name.endswith("certainty") else high
                # Without a disc the features of the disc say nothing.
                if not (low <= values[row] <= high) and not np.isnan(values[row]):
                    reasons.append(REASONS[name][int(values[row] > high)])
            found.append("; ".join(dict.fromkeys(reasons)))
        return found

    def unusual(self, limits: Limits) -> dict[str, int]:
        """Returns how many photographs differ from those of validation, by what differs."""
        counts = {}
        for name, values in self.features.items():
            low, high = _bounds(limits, name, UNUSUAL)
            if count := int(((values < low) | (values > high)).sum()):
                counts[name] = count
        return counts


def grade(photographs: Photographs, evaluation: Evaluation, limits: Limits) -> Evaluation:
    """Adds to the evaluation of a split which of its photographs cannot be graded, and why."""
    reasons = measure_quality(photographs, evaluation.predictions).reasons(limits)
    return replace(evaluation, reasons=reasons)


def measure_quality(photographs: Photographs, predictions: Predictions) -> Quality:
    """Measures the photographs of a split, and the predictions for them."""
    rows = range(len(photographs))
    return assess(
        photographs.fields.numpy(),
        [photographs.frame(row) for row in rows],
        [(int(width), int(height)) for width, height in photographs.sizes.tolist()],
        predictions,
    )


def assess(
    fields: Array,
    frames: Sequence[Frame],
    sizes: Sequence[tuple[int, int]],
    predictions: Predictions,
) -> Quality:
    """Measures some photographs, and the predictions for them.

    Args:
        fields: (n, features) of the fields of view.
        frames: The part of each photograph that the network saw.
        sizes: Width and height of each photograph.
        predictions: The network's predictions.
    """
    count = len(fields)
    features = dict(zip(FIELD_FEATURES, fields.T, strict=True))
    faults = ["no field of view" if np.isnan(row).any() else "" for row in fields]
    discs = predictions.masks.get("disc")
    if discs is not None:
        columns = np.full((count, 4), np.nan)
        for row in range(count):
            faults[row] = faults[row] or _disc_fault(predictions, row, frames[row], sizes[row])
            if discs[row].any():
                columns[row] = _describe_disc(discs[row])
        names = ("disc size", "disc roundness", "disc outline", "disc position")
        features |= dict(zip(names, columns.T, strict=True))
        if predictions.points is not None:
            side = discs.shape[-1]
            centres = np.array([_centre(disc) for disc in discs])
            features["fovea distance"] = np.hypot(*(predictions.points - centres).T) / side
    return Quality(features | predictions.certainty, faults)


def measure_limits(quality: Quality) -> Limits:
    """Returns for each feature its median and how far the validation photographs spread.

    The spreads are the distances from the median to the quantiles of 5 % and 95 %; in a Gaussian,
    1.64 standard deviations. No photograph of validation is outside `UNGRADABLE` of them unless
    the network found no disc in it, so spreads grow where single photographs need it.

    Returns:
        For each feature (median, spread below, spread above); nothing for fewer than `MINIMUM`
        photographs.
    """
    limits = {}
    sound = np.array([not fault for fault in quality.faults])
    for name, values in quality.features.items():
        known = values[sound & ~np.isnan(values)]
        if len(known) < MINIMUM:
            continue
        low, median, high = np.quantile(known, (0.05, 0.5, 0.95))
        least = 0.02 * abs(median) + 1e-3
        below = max(median - low, least, (median - known.min()) / UNGRADABLE)
        above = max(high - median, least, (known.max() - median) / UNGRADABLE)
        limits[name] = (float(median), float(below), float(above))
    return limits


def describe_differences(quality: Quality, limits: Limits) -> str:
    """Says in one line how photographs differ from those of validation; "" if they do not."""
    count = len(quality.faults)
    differing = {n: k for n, k in quality.unusual(limits).items() if k > SHARE * count}
    if not differing:
        return ""
    listed = ", ".join(f"{name} ({number} of {count})" for name, number in differing.items())
    return f"these photographs differ from the run's own: {listed}; its rates may not hold for them"


def write_limits(folder: Path, limits: Limits) -> None:
    """Writes a run's limits."""
    write_json(folder / FILE, dict(limits))


def read_limits(folder: Path) -> Limits:
    """Reads a run's limits; there are none if the file is missing.

    Raises:
        InputError: The file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    limits = {}
    for name, numbers in read_json(file).items():
        if name not in REASONS or not isinstance(numbers, list) or len(numbers) != 3:
            raise InputError(f"{file}: `{name}` must be a known feature and three numbers.")
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise InputError(f"{file}: `{name}` must be three numbers, got {numbers}.")
        limits[name] = (float(numbers[0]), float(numbers[1]), float(numbers[2]))
    return limits


def _bounds(limits: Limits, name: str, factor: float) -> tuple[float, float]:
    if name not in limits:
        return -np.inf, np.inf
    median, below, above = limits[name]
    # Rounding must not put validation's own extreme outside.
    return median - factor * below * (1 + 1e-9), median + factor * above * (1 + 1e-9)


def _disc_fault(predictions: Predictions, row: int, frame: Frame, size: tuple[int, int]) -> str:
    disc, cup = predictions.masks["disc"][row], predictions.masks.get("cup")
    if not disc.any():
        return "no optic disc found"
    # Columns and rows of the network's input that lie in the photograph.
    for axis, (corner, side, whole) in enumerate(zip(frame[:2], frame[2:], size, strict=True)):
        places = corner + (np.arange(len(disc)) + 0.5) * side / len(disc)
        inside = np.flatnonzero((places >= 0) & (places < whole))
        lines = disc.any(axis=axis)
        if lines[inside[0]] or lines[inside[-1]]:
            return "the disc touches the edge of the photograph"
    if cup is not None and cup[row].any() and (cup[row] & disc).sum() < cup[row].sum() / 2:
        return "a cup outside the disc"
    return ""


def _centre(disc: NDArray[np.bool_]) -> tuple[float, float]:
    rows, columns = np.nonzero(disc)
    return (float(columns.mean()), float(rows.mean())) if len(rows) else (np.nan, np.nan)


def _describe_disc(disc: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Returns size, roundness, how well an ellipse fits, and distance from the middle."""
    rows, columns = np.nonzero(disc)
    # A pixel is a square, not a point.
    covariance = np.cov(np.stack((columns, rows)), bias=True) + np.eye(2) / 12
    small, large = np.linalg.eigvalsh(covariance)
    ellipse = 4 * np.pi * np.sqrt(small * large)
    x, y = _centre(disc)
    middle = (len(disc) - 1) / 2
    return (
        float(4 * np.sqrt(large) / len(disc)),
        float(np.sqrt(small / large)),
        float(len(rows) / ellipse),
        float(np.hypot(x - middle, y - middle) / len(disc)),
    )
