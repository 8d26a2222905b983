"""Takes threshold and calibration from labelled photographs of another camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refuge.errors import InputError
from refuge.measurement.evaluation import Trained, evaluate
from refuge.measurement.operating import OperatingPoint, choose_point
from refuge.measurement.quality import Limits, grade, measure_limits, measure_quality
from refuge.photographs.data import Photographs, describe, load_all
from refuge.settings import Settings, complete


def recalibrate(
    trained: Trained, settings: Settings, folder: str, cache: Path
) -> tuple[OperatingPoint, Limits, Photographs]:
    """Chooses an operating point on a data set, of whichever split its photographs are.

    Args:
        trained: The network.
        settings: The run's settings.
        folder: The data set; healthy photographs alone give a threshold without a calibration.
        cache: Folder for decoded tensors.

    Returns:
        The operating point, the limits of what can be graded, and the photographs.

    Raises:
        InputError: The photographs cannot be read, or are too few.
    """
    data = complete({"data": folder})["data"]
    photographs = load_all(data, settings.size, trained.crop, cache)
    evaluation = evaluate(trained, photographs)
    limits = measure_limits(measure_quality(photographs, evaluation.predictions))
    evaluation = grade(photographs, evaluation, limits)
    labels = np.where(evaluation.ungradable, -1, photographs.labels.numpy())
    sick, well = int((labels == 1).sum()), int((labels == 0).sum())
    where = f"local ({describe(data)}: {sick} with glaucoma, {well} without)"
    point, reason = choose_point(labels, evaluation.diagnoses["both"], where)
    if point is None:
        raise InputError(f"`--recalibrate {folder}`: {reason}")
    return point, limits, photographs
