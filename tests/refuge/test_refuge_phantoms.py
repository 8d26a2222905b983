"""Phantoms are reproducible, know their own truth, and show what REFUGE shows."""

import time

import numpy as np
import pytest

from refuge.metrics import vertical_cup_to_disc_ratio
from refuge.photographs.phantoms import COUNTS, draw_eye, draw_phantom, phantom_records, to_pixels

EYES = [draw_eye(seed) for seed in range(400)]


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = (draw_phantom(draw_eye(3), 64) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()
    assert first[0].tobytes() != draw_phantom(draw_eye(4), 64)[0].tobytes()


def test_splits_share_no_eye_and_stay_when_they_grow() -> None:
    """The test phantoms are unseen, and a shorter set is the beginning of the longer."""
    short = phantom_records(32, dict.fromkeys(COUNTS, 3))
    pictures = [r.read()[0].tobytes() for records in short.values() for r in records]
    assert len(set(pictures)) == 9
    long = phantom_records(32, dict.fromkeys(COUNTS, 5))
    for split, records in short.items():
        assert records == long[split][:3]


def test_masks_hold_refuges_values_around_the_true_disc() -> None:
    for eye in EYES[:20]:
        picture, mask = draw_phantom(eye, 96)
        values = np.asarray(mask)
        assert picture.size == mask.size == (96, 96)
        assert set(np.unique(values)) == {0, 128, 255}
        y, x = np.nonzero(values < 255)
        # An irregular outline moves the centre by less than two pixels.
        assert np.hypot(*np.subtract((x.mean(), y.mean()), to_pixels(eye.disc, 96))) < 2


def test_the_drawn_cup_has_the_drawn_ratio_where_the_rim_is_whole() -> None:
    """At 256 pixels a disc is about 45 pixels high, so heights are good to 5 percent."""
    for eye in [each for each in EYES if each.notch is None][:10]:
        values = np.asarray(draw_phantom(eye, 256)[1])
        ratio = vertical_cup_to_disc_ratio(values < 255, values == 0)
        assert ratio == pytest.approx(eye.vcdr, abs=0.05)


def test_the_fovea_lies_temporal_and_below_two_and_a_half_disc_diameters_away() -> None:
    """On average; it is the darkest region and inside the picture in every eye."""
    offsets = np.array([np.subtract(eye.fovea, eye.disc) for eye in EYES])
    diameters = np.array([2 * eye.radii[1] for eye in EYES])
    assert (np.hypot(*offsets.T) / diameters).mean() == pytest.approx(2.5, abs=0.05)
    assert offsets[:, 1].mean() > 0
    assert all(np.sign(offsets[:, 0]) == [eye.temporal for eye in EYES])
    assert all(0 < value < 63 for eye in EYES for value in to_pixels(eye.fovea, 64))


def test_the_disc_is_bright_the_macula_dark_and_the_corner_black() -> None:
    """What the eye sees first in a fundus photograph."""
    for eye in EYES[:20]:
        picture = np.asarray(draw_phantom(eye, 96)[0]).astype(int)
        green = picture[..., 1]
        mask = np.asarray(draw_phantom(eye, 96)[1])
        x, y = (round(value) for value in to_pixels(eye.fovea, 96))
        fovea = green[y - 2 : y + 3, x - 2 : x + 3].mean()
        inside = np.hypot(*(np.mgrid[:96, :96] - 47.5)) < 40
        assert green[mask < 255].mean() > 1.25 * np.median(green[inside])
        assert fovea < np.median(green[inside])
        assert picture[:4, :4].max() <= 8
        assert picture[inside][:, 0].mean() > 1.5 * picture[inside][:, 1].mean()


def test_ratios_overlap_and_a_second_sign_carries_part_of_the_label() -> None:
    """Otherwise one classifier would do."""
    sick = [eye for eye in EYES if eye.glaucoma]
    well = [eye for eye in EYES if not eye.glaucoma]
    assert 0.1 <= len(sick) / len(EYES) <= 0.5
    assert np.mean([e.vcdr for e in sick]) > np.mean([e.vcdr for e in well]) + 0.1
    assert min(e.vcdr for e in sick) < np.median([e.vcdr for e in well])
    signs = [
        np.mean([e.notch is not None or e.defect is not None for e in g]) for g in (sick, well)
    ]
    assert signs[0] > 0.6
    assert 0 < signs[1] < 0.2


def test_left_and_right_eyes_are_equally_many() -> None:
    share = np.mean([eye.temporal == 1 for eye in EYES])
    assert 0.4 < share < 0.6


def test_hundreds_are_drawn_in_seconds() -> None:
    """The default run draws 400 before it trains; idle, one takes about 15 ms."""
    start = time.process_time()
    for eye in EYES[:20]:
        draw_phantom(eye, 96)
    assert time.process_time() - start < 20 * 0.1
