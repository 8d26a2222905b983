"""What a mask, a map, a probability are worth: REFUGE's measures, None where there is none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score, roc_curve

Mask = NDArray[np.bool_]
Array = NDArray[np.float64]


def largest_component(mask: Mask) -> Mask:
    """Keeps the largest 4-connected component of a mask; an empty mask stays empty."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())[1:]
    kept: Mask = labels == 1 + sizes.argmax()
    return kept


def dice(predicted: Mask, true: Mask) -> float:
    """Twice the overlap over the sum of two masks' areas; 1 where both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 1.0


def centre_of_mass(maps: Array) -> Array:
    """Finds the centre of mass of saliency maps.

    Args:
        maps: (n, height, width), not negative.

    Returns:
        (n, 2), x and y in pixels. A map without mass tells nothing: its centre is the picture's.
    """
    maps = np.where(maps.sum(axis=(1, 2), keepdims=True) > 0, maps, 1)
    down, across = maps.sum(axis=2), maps.sum(axis=1)
    x = across @ np.arange(maps.shape[2]) / across.sum(axis=1)
    y = down @ np.arange(maps.shape[1]) / down.sum(axis=1)
    return np.stack((x, y), axis=1)


def vertical_cup_to_disc_ratio(disc: Mask, cup: Mask) -> float:
    """Divides the height of the cup by that of the disc; NaN without a disc.

    The height is REFUGE's: the largest number of pixels in any column. The cup counts where it
    lies in the disc.
    """
    height = disc.sum(axis=0).max(initial=0)
    return float((disc & cup).sum(axis=0).max(initial=0) / height) if height else float("nan")


def auc(labels: NDArray[np.integer], probabilities: Array) -> float | None:
    """Area under the ROC curve; None where only one class is there."""
    return float(roc_auc_score(labels, probabilities)) if len(np.unique(labels)) == 2 else None


def rates(
    labels: NDArray[np.integer], probabilities: Array, threshold: float = 0.5
) -> tuple[float | None, float | None]:
    """Sensitivity and specificity at a threshold; None for a class that is not there."""
    right = ((probabilities >= threshold) == labels).astype(float)
    return mean(right[labels == 1]), mean(right[labels == 0])


def reference_sensitivity(
    labels: NDArray[np.integer], probabilities: Array, specificity: float
) -> float | None:
    """Sensitivity at a specificity, between two thresholds by a straight line, as REFUGE has it."""
    if len(np.unique(labels)) < 2:
        return None
    false, true, _ = roc_curve(labels, probabilities)
    return float(np.interp(1 - specificity, false, true))


def mean(values: Array) -> float | None:
    """Mean of the values that are numbers; None where none is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
