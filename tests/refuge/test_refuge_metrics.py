"""Measures against numbers worked by hand, and null where there is nothing to measure."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from refuge.measurement.diagnosis import RatioClassifier, combine, fit_ratio_classifier
from refuge.metrics import (
    auc,
    centre_of_mass,
    dice,
    largest_component,
    mean,
    rates,
    vertical_cup_to_disc_ratio,
)

Mask = NDArray[np.bool_]


def mask(*rows: str) -> Mask:
    """Reads a mask from lines of `#` and `.`."""
    return np.array([[cell == "#" for cell in row] for row in rows])


def test_dice_is_twice_the_overlap_over_both_areas() -> None:
    """Areas 4 and 2, overlap 1: 2 / 6."""
    assert dice(mask("##.", "##."), mask(".##", "...")) == pytest.approx(1 / 3, rel=1e-15)


def test_dice_of_two_empty_masks_is_one() -> None:
    """REFUGE's own evaluation divides by zero there."""
    assert dice(mask("..."), mask("...")) == 1
    assert dice(mask("..."), mask("#..")) == 0


def test_the_largest_component_is_kept_alone() -> None:
    """Cells that touch at a corner alone are two components."""
    found = largest_component(mask("##..", "#..#", ".##.", "...."))
    assert (found == mask("##..", "#...", "....", "....")).all()


def test_an_empty_mask_has_no_component() -> None:
    assert not largest_component(mask("...", "...")).any()


def test_centre_of_mass_weighs_the_whole_map() -> None:
    """Mass 3 at (0, 1) and mass 1 at (2, 0): x = 2/4, y = 3/4."""
    maps = np.zeros((1, 2, 3))
    maps[0, 1, 0], maps[0, 0, 2] = 3, 1
    assert centre_of_mass(maps).tolist() == [[0.5, 0.75]]


def test_a_map_without_mass_is_centred() -> None:
    """It tells nothing, and must not become NaN."""
    assert centre_of_mass(np.zeros((1, 2, 3))).tolist() == [[1.0, 0.5]]


def test_vcdr_divides_the_largest_heights_of_any_column() -> None:
    """Disc: 4 pixels in the middle column; cup: 2 pixels, which need not touch."""
    disc = mask(".#.", "###", "###", ".#.")
    cup = mask("...", ".#.", "#..", ".#.")
    assert vertical_cup_to_disc_ratio(disc, cup) == 0.5


def test_vcdr_counts_the_cup_inside_the_disc_alone() -> None:
    """A cup that spills over would be taller than its disc."""
    disc = mask("...", ".#.", ".#.", "...")
    cup = mask(".#.", ".#.", "...", "...")
    assert vertical_cup_to_disc_ratio(disc, cup) == 0.5


def test_vcdr_without_a_disc_is_no_number() -> None:
    assert math.isnan(vertical_cup_to_disc_ratio(mask("..."), mask("#..")))
    assert vertical_cup_to_disc_ratio(mask("#.."), mask("...")) == 0


def test_sensitivity_and_specificity_at_one_half() -> None:
    """Two of three glaucomas are found, one of two healthy eyes is left alone; 0.5 is a finding."""
    labels = np.array([1, 1, 1, 0, 0])
    sensitivity, specificity = rates(labels, np.array([0.5, 0.9, 0.49, 0.1, 0.5]))
    assert sensitivity == pytest.approx(2 / 3)
    assert specificity == 0.5
    assert rates(np.ones(2, dtype=int), np.array([0.2, 0.8])) == (0.5, None)


def test_auc_is_the_share_of_pairs_in_order_and_null_for_one_class() -> None:
    """Of four pairs three are in order."""
    labels = np.array([0, 0, 1, 1])
    assert auc(labels, np.array([0.1, 0.6, 0.5, 0.9])) == 0.75
    assert auc(np.ones(3, dtype=int), np.array([0.1, 0.2, 0.3])) is None
    assert auc(np.array([], dtype=int), np.array([])) is None


def test_the_mean_of_no_number_is_null() -> None:
    assert mean(np.array([np.nan, 1.0, 3.0])) == 2
    assert mean(np.array([np.nan])) is None
    assert mean(np.array([])) is None


def test_the_ratio_classifier_solves_its_own_equations() -> None:
    """At the optimum of L2-penalised logistic regression both derivatives vanish."""
    ratios = np.array([0.3, 0.4, 0.5, 0.6, 0.7, np.nan, 0.9])
    labels = np.array([0, 0, 1, 0, 1, 1, -1])
    classifier, reason = fit_ratio_classifier(ratios, labels)
    assert classifier is not None
    assert reason == ""
    x, y = ratios[:5], labels[:5]
    residual = 1 / (1 + np.exp(-(classifier.slope * x + classifier.intercept))) - y
    # The solver stops at a gradient of 1e-4.
    assert residual.sum() == pytest.approx(0, abs=1e-3)
    assert (residual * x).sum() + classifier.slope == pytest.approx(0, abs=1e-3)


def test_the_ratio_classifier_judges_by_its_two_numbers() -> None:
    """2 * 0.5 - 1 = 0 is even odds; without a ratio there is no opinion."""
    found = RatioClassifier(2, -1).probabilities(np.array([0.5, 1.0, np.nan]))
    assert found[0] == 0.5
    assert found[1] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-15)
    assert math.isnan(found[2])


def test_without_cup_masks_or_a_second_class_there_is_no_ratio_classifier() -> None:
    """It says what it lacks instead of inventing a number."""
    none, reason = fit_ratio_classifier(np.array([np.nan, np.nan]), np.array([0, 1]))
    assert none is None
    assert "no training picture has disc, cup and glaucoma" in reason
    none, reason = fit_ratio_classifier(np.array([0.3, 0.5]), np.array([1, 1]))
    assert none is None
    assert "all of one class" in reason


def test_probabilities_are_averaged_over_the_classifiers_that_have_one() -> None:
    """An empty disc silences the vCDR classifier for that picture alone."""
    fc, vcdr = np.array([0.2, 0.4, np.nan]), np.array([0.6, np.nan, np.nan])
    np.testing.assert_array_equal(combine(fc, vcdr), [0.4, 0.4, np.nan])
