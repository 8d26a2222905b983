"""The disc enlarged: what a second look at a photograph is taken at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from refuge.photographs.records import Pair, Record

REACH = 2.5  # side of a crop in heights of the disc
SHAKE = 0.15  # how far off its centre lies in training, in heights: predictions are not exact
Box = tuple[int, int, int, int]


def crop_box(disc: Image.Image, shake: tuple[float, float] = (0, 0)) -> Box | None:
    """Finds the square around a disc, in pixels of its mask; None without a disc.

    Args:
        disc: The mask, 255 outside of the disc.
        shake: How far off the centre, in heights of the disc.
    """
    rows, columns = np.nonzero(np.asarray(disc) < 255)
    if len(rows) == 0:
        return None
    height = int(np.ptp(rows)) + 1
    half = max(1, round(REACH * height / 2))
    x = round(float(columns.min() + columns.max() + 1) / 2 + shake[0] * height)
    y = round(float(rows.min() + rows.max() + 1) / 2 + shake[1] * height)
    return x - half, y - half, x + half, y + half


def crop_records(records: Sequence[Record]) -> list[Record]:
    """Makes of every photograph with an annotated disc a second one, of the disc alone."""
    shakes = np.random.default_rng(0).uniform(-SHAKE, SHAKE, (len(records), 2))
    return [
        replace(
            record,
            name=f"disc of {record.name}",
            annotated=record.annotated & {"disc", "cup"},
            label=None,
            fovea=None,
            read=partial(_read_crop, record, (float(shake[0]), float(shake[1]))),
        )
        for record, shake in zip(records, shakes, strict=True)
        if "disc" in record.annotated
    ]


def _read_crop(record: Record, shake: tuple[float, float]) -> Pair:
    picture, mask = record.read()
    box = None if mask is None else crop_box(mask, shake)
    if mask is None or box is None:  # No disc was drawn: the whole picture says so too.
        return picture, mask
    # Outside of the photograph there is nothing, and no disc.
    outside = Image.new("L", (box[2] - box[0], box[3] - box[1]), 255)
    outside.paste(mask, (-box[0], -box[1]))
    return picture.crop(box), outside
