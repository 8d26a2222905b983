"""REFUGE's metrics of masks, points and probabilities; None where one is undefined."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score, roc_curve

Mask = NDArray[np.bool_]
Array = NDArray[np.float64]


def largest_component(mask: Mask) -> Mask:
    """Returns the largest 4-connected component of a mask; an empty mask stays empty."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())[1:]
    kept: Mask = labels == 1 + sizes.argmax()
    return kept


def dice(predicted: Mask, true: Mask) -> float:
    """Returns twice the overlap over the sum of two masks' areas; 1 if both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 1.0


def centre_of_mass(maps: Array) -> Array:
    """Returns the centre of mass of saliency maps.

    Args:
        maps: (n, height, width), non-negative.

    Returns:
        (n, 2), x and y in pixels; the picture's centre for a map without mass.
    """
    maps = np.where(maps.sum(axis=(1, 2), keepdims=True) > 0, maps, 1)
    down, across = maps.sum(axis=2), maps.sum(axis=1)
    x = across @ np.arange(maps.shape[2]) / across.sum(axis=1)
    y = down @ np.arange(maps.shape[1]) / down.sum(axis=1)
    return np.stack((x, y), axis=1)


def vertical_cup_to_disc_ratio(disc: Mask, cup: Mask) -> float:
    """Returns the height of the cup over that of the disc; NaN without a disc.

    Heights are measured as REFUGE does: the largest number of pixels in any column. Only the part
    of the cup inside the disc counts.
    """
    height = disc.sum(axis=0).max(initial=0)
    return float((disc & cup).sum(axis=0).max(initial=0) / height) if height else float("nan")


def auc(labels: NDArray[np.integer], probabilities: Array) -> float | None:
    """Returns the area under the ROC curve; None if there is only one class."""
    return float(roc_auc_score(labels, probabilities)) if len(np.unique(labels)) == 2 else None


def rates(
    labels: NDArray[np.integer], probabilities: Array, threshold: float = 0.5
) -> tuple[float | None, float | None]:
    """Returns sensitivity and specificity at a threshold; None for a class without members."""
    right = ((probabilities >= threshold) == labels).astype(float)
    return mean(right[labels == 1]), mean(right[labels == 0])


def reference_sensitivity(
    labels: NDArray[np.integer], probabilities: Array, specificity: float
) -> float | None:
    """Returns the sensitivity at a specificity, interpolating the ROC curve as REFUGE does."""
    if len(np.unique(labels)) < 2:
        return None
    false, true, _ = roc_curve(labels, probabilities)
    return float(np.interp(1 - specificity, false, true))


def mean(values: Array) -> float | None:
    """Returns the mean of the values that are not NaN; None if all are."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
