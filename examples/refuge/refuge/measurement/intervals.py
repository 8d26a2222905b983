"""Confidence intervals: 95 %, by the bootstrap over photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = Sequence[float]  # low and high
DRAWS = 1000


class Bootstrap:
    """Resamples photographs with replacement, the same way for the same number.

    Args:
        count: Number of photographs.
        draws: Number of resamples.
    """

    def __init__(self, count: int, draws: int = DRAWS) -> None:
        # How often each photograph was drawn, (draws, count).
        self.weights = np.zeros((draws, count))
        if count:
            chances = np.full(count, 1 / count)
            self.weights += np.random.default_rng(0).multinomial(count, chances, draws)

    def mean(self, values: Array) -> Interval | None:
        """Returns the interval of the mean of the values that are not NaN; None if all are."""
        there = ~np.isnan(values)
        total, weight = self.weights[:, there] @ values[there], self.weights[:, there].sum(axis=1)
        return _interval(total[weight > 0] / weight[weight > 0])

    def auc(self, labels: NDArray[np.integer], scores: Array) -> Interval | None:
        """Returns the interval of the area under the ROC curve, where both classes occur."""
        sick, well = labels == 1, labels == 0
        difference = scores[sick, None] - scores[well]
        order = (difference > 0) + 0.5 * (difference == 0)
        ill, healthy = self.weights[:, sick], self.weights[:, well]
        pairs = ill.sum(axis=1) * healthy.sum(axis=1)
        right = (ill @ order * healthy).sum(axis=1)
        return _interval(right[pairs > 0] / pairs[pairs > 0])

    def sensitivity(
        self, labels: NDArray[np.integer], scores: Array, specificity: float
    ) -> Interval | None:
        """Returns the interval of the sensitivity at a specificity, interpolating the ROC curve."""
        if len(np.unique(labels)) < 2:
            return None
        order = np.argsort(-scores, kind="stable")
        last = np.flatnonzero(np.diff(-scores[order], append=np.inf) > 0)  # of equal scores
        found, alarms = (
            np.cumsum(self.weights[:, order] * (labels[order] == label), axis=1)[:, last]
            for label in (1, 0)
        )
        values = [
            np.interp(1 - specificity, np.append(0, x / x[-1]), np.append(0, y / y[-1]))
            for x, y in zip(alarms, found, strict=True)
            if x[-1] and y[-1]
        ]
        return _interval(np.array(values))


def show_interval(interval: Interval | None, form: str = ".2f") -> str:
    """Formats an interval to follow its number; empty if there is none."""
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def show_rates(
    rates: Mapping[str, float | None], prefix: str, intervals: Mapping[str, Interval | None]
) -> str:
    """Formats sensitivity and specificity with their intervals."""
    names = ("sensitivity", "specificity")
    values = {name: rates[f"{prefix}{name}"] for name in names}
    return ", ".join(
        f"{name} "
        + ("-" if value is None else f"{value:.2f}")
        + show_interval(intervals.get(f"{prefix}{name}"))
        for name, value in values.items()
    )


def _interval(values: Array) -> Interval | None:
    if len(values) == 0:
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]
