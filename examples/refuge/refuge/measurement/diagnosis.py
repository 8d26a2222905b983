"""Diagnosis from the cup-to-disc ratio, and combined with the network's own head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float64]


class RatioClassifier(NamedTuple):
    """Logistic regression on vCDR: two numbers, so that a checkpoint holds no pickle."""

    slope: float
    intercept: float

    def probabilities(self, ratios: Array) -> Array:
        """Returns the probability of glaucoma at each ratio; NaN stays NaN."""
        return np.asarray(expit(self.slope * ratios + self.intercept))


def fit_ratio_classifier(
    ratios: Array, labels: NDArray[np.integer]
) -> tuple[RatioClassifier | None, str]:
    """Fits the classifier to the training masks.

    Args:
        ratios: vCDR of each training picture, NaN where it is unknown.
        labels: 1 for glaucoma, 0 for none, -1 where unknown.

    Returns:
        The classifier and "", or None and the reason in one line.
    """
    usable = ~np.isnan(ratios) & (labels >= 0)
    if not usable.any():
        return None, "no vCDR classifier: no training picture has disc, cup and glaucoma annotated."
    if len(np.unique(labels[usable])) < 2:
        return None, "no vCDR classifier: the training pictures with a vCDR are all of one class."
    model = LogisticRegression().fit(ratios[usable, None], labels[usable])
    return RatioClassifier(float(model.coef_[0, 0]), float(model.intercept_[0])), ""


def combine(*opinions: Array) -> Array:
    """Averages the classifiers' probabilities, ignoring NaN; NaN where all are."""
    stacked = np.stack(opinions)
    present = ~np.isnan(stacked)
    total = np.where(present, stacked, 0).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / present.sum(axis=0))
