"""Applies the network to one photograph and decides about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from refuge.measurement.evaluation import SecondLook, Trained, diagnose, look_again, summarise
from refuge.measurement.operating import OperatingPoint
from refuge.measurement.quality import Limits, Quality, assess
from refuge.photographs.records import file_record
from refuge.screening.reading import Prepared

Array = NDArray[np.float64]
SURE_OF_FOVEA = 0.2  # probability at the fovea, below which the side of the eye is not stated


@dataclass(frozen=True)
class Decision:
    """How a call decides.

    Attributes:
        point: The operating point, if there is one.
        rule: Which of its thresholds to use.
        limits: Limits of what can be graded.
        reason: Why there is no operating point.
    """

    point: OperatingPoint | None
    rule: str
    limits: Limits
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """The network's findings in one photograph; None or NaN for tasks it has not learned.

    Attributes:
        maps: Probability maps of disc and cup, (size, size), of the part that the network saw.
        seen: The second look at the disc, if there was one.
        fovea: x and y in the photograph's pixels, or None.
        ratio: vCDR, measured on the masks at the network's input size.
        probabilities: Probability of glaucoma by classifier.
        risk: Their average, calibrated; NaN without a calibration.
        verdict: "refer", "no sign", "ungradable", or "" if there is no threshold.
        reason: Why the photograph cannot be graded, or "".
        eye: "left", "right", or "" if disc or fovea were not found.
        quality: What was measured of it.
    """

    maps: Mapping[str, NDArray[np.float32]]
    seen: SecondLook | None
    fovea: Array | None
    ratio: float
    probabilities: Mapping[str, float]
    risk: float
    verdict: str
    reason: str
    eye: str
    quality: Quality


def examine(trained: Trained, file: Path, prepared: Prepared, decision: Decision) -> Finding:
    """Applies a network to one photograph.

    Args:
        trained: The network.
        file: The photograph, which a second look reads again.
        prepared: What was read of it.
        decision: How to decide about it.
    """
    frame = prepared.frame
    answer = trained.ask(torch.from_numpy(prepared.pixels)[None].float() / 255)
    predictions = summarise([answer])
    seen = None
    if trained.second_pass and len(predictions.masks) == 2:
        picture, _ = file_record(file, None, frozenset(), None, None).read()
        seen = look_again(trained, picture, predictions.masks["disc"][0], frame)
    if seen:
        predictions.ratios[0] = seen.ratio
    fovea = None
    if predictions.points is not None:
        fovea = frame.to_original(predictions.points, len(prepared.pixels[0]))[0]
    found = {name: float(p[0]) for name, p in diagnose(predictions, trained.classifier).items()}
    quality = assess(prepared.field[None], [frame], [prepared.size], predictions)
    reason = quality.reasons(decision.limits)[0]
    risk, verdict = judge(found["both"], reason, decision.point, decision.rule)
    return Finding(
        maps={task: answer[task].astype(np.float32) for task in predictions.masks},
        seen=seen,
        fovea=fovea,
        ratio=float(predictions.ratios[0]),
        probabilities=found,
        risk=risk,
        verdict=verdict,
        reason=reason,
        eye=find_eye(quality, predictions.masks.get("disc"), predictions.points),
        quality=quality,
    )


def judge(
    average: float, reason: str, point: OperatingPoint | None, rule: str
) -> tuple[float, str]:
    """Returns the calibrated risk and the verdict on a photograph.

    Args:
        average: Both classifiers' average; NaN if there is none.
        reason: Why the photograph cannot be graded, or "".
        point: The operating point, if there is one.
        rule: Which of its thresholds to use.
    """
    risk = float("nan") if point is None else float(point.risks(np.array(average)))
    if reason or np.isnan(average):
        return risk, "ungradable"
    if point is None:
        return risk, ""
    score = float(point.scores(np.array(average)))
    return risk, "refer" if score >= point.thresholds[rule] else "no sign"


def find_eye(quality: Quality, discs: NDArray[np.bool_] | None, points: Array | None) -> str:
    """Returns which eye it is: the fovea lies temporally of the disc.

    In a right eye's photograph the fovea is left of the disc. A mirrored photograph is taken for
    the other eye.
    """
    if discs is None or points is None or not discs[0].any():
        return ""
    if quality.features["fovea certainty"][0] < SURE_OF_FOVEA:
        return ""
    offset = points[0, 0] - np.nonzero(discs[0])[1].mean()
    # Nearer than half a disc the side is anybody's guess.
    if abs(offset) < np.ptp(np.nonzero(discs[0])[1]) / 2:
        return ""
    return "left" if offset > 0 else "right"
