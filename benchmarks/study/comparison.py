"""Paired comparisons of methods over seeds, corrected for how many there are."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Of the family of all comparisons with one rival on one problem."""

Metrics = Mapping[str, float]


class Comparison(NamedTuple):
    """A method's difference to the rival, the larger the better."""

    mean: float
    low: float
    high: float
    """The mean's 95 % confidence interval, not corrected for other comparisons."""
    p: float
    """Of the paired t test, corrected by Holm's method."""

    @property
    def word(self) -> str:
        """Better or worse where the corrected test says so."""
        if self.p >= LEVEL:
            return "undecided"
        return "better" if self.mean > 0 else "worse"


def differences(
    own: Mapping[int, Metrics], rival: Mapping[int, Metrics], lower_is_better: Sequence[str]
) -> list[float]:
    """Returns the mean relative difference of the metrics in percent, seed by seed.

    Args:
        own: The method's metrics by seed.
        rival: The rival's; relative means relative to the mean of these over the seeds.
        lower_is_better: Metrics that are errors.
    """
    seeds = sorted(set(own) & set(rival))
    names = list(rival[seeds[0]])
    scale = {name: abs(np.mean([rival[seed][name] for seed in seeds])) for name in names}
    signs = {name: -1 if name in lower_is_better else 1 for name in names}
    return [
        float(100 * np.mean([signs[m] * (own[seed][m] - rival[seed][m]) / scale[m] for m in names]))
        for seed in seeds
    ]


def compare(found: Mapping[str, Sequence[float]]) -> dict[str, Comparison]:
    """Compares every method with the rival, given its differences over seeds.

    Two-sided paired t tests; Holm's method holds the probability of even one wrong "better" or
    "worse" among them at 5 %.
    """
    # Where a method's runs are the rival's very own, there is nothing to test.
    tested = {name: values for name, values in found.items() if np.ptp(values) > 0}
    raw = dict.fromkeys(found, 1.0)
    ends = {name: (float(values[0]), float(values[0])) for name, values in found.items()}
    if tested:
        result = stats.ttest_1samp(np.array(list(tested.values())), 0.0, axis=1)
        bounds = result.confidence_interval(0.95)
        raw |= zip(tested, map(float, result.pvalue), strict=True)
        ends |= zip(tested, zip(*(b.tolist() for b in bounds), strict=True), strict=True)
    corrected = holm(raw)
    return {
        name: Comparison(float(np.mean(values)), *ends[name], corrected[name])
        for name, values in found.items()
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean's 95 % confidence interval by Student's t."""
    found = compare({"": values})[""]
    return found.low, found.high


def holm(raw: Mapping[str, float]) -> dict[str, float]:
    """Corrects p values by Holm's step-down method."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for position, name in enumerate(sorted(raw, key=lambda name: raw[name])):
        largest = max(largest, min(1.0, (len(raw) - position) * raw[name]))
        corrected[name] = largest
    return corrected
