"""Crops of the disc, for the second pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from refuge.photographs.records import Pair, Record

SIDE = 2.5  # side of a crop, in heights of the disc
JITTER = 0.15  # offset of training crops, in disc heights: predicted discs are not exact
Box = tuple[int, int, int, int]


def crop_box(disc: Image.Image, shake: tuple[float, float] = (0, 0)) -> Box | None:
    """Returns the square around a disc, in pixels of its mask; None without a disc.

    Args:
        disc: The mask, 255 outside the disc.
        shake: Offset of the centre, in heights of the disc.
    """
    rows, columns = np.nonzero(np.asarray(disc) < 255)
    if len(rows) == 0:
        return None
    height = int(np.ptp(rows)) + 1
    half = max(1, round(SIDE * height / 2))
    x = round(float(columns.min() + columns.max() + 1) / 2 + shake[0] * height)
    y = round(float(rows.min() + rows.max() + 1) / 2 + shake[1] * height)
    return x - half, y - half, x + half, y + half


def crop_records(records: Sequence[Record]) -> list[Record]:
    """Returns for every photograph with an annotated disc a record of the disc alone."""
    shakes = np.random.default_rng(0).uniform(-JITTER, JITTER, (len(records), 2))
    return [
        replace(
            record,
            name=f"disc of {record.name}",
            annotated=record.annotated & {"disc", "cup"},
            label=None,
            fovea=None,
            whole=True,
            read=partial(_read_crop, record, (float(shake[0]), float(shake[1]))),
        )
        for record, shake in zip(records, shakes, strict=True)
        if "disc" in record.annotated
    ]


def _read_crop(record: Record, shake: tuple[float, float]) -> Pair:
    picture, mask = record.read()
    box = None if mask is None else crop_box(mask, shake)
    if mask is None or box is None:  # The mask is empty: keep the whole picture.
        return picture, mask
    # The crop may extend beyond the photograph, where there is no disc.
    outside = Image.new("L", (box[2] - box[0], box[3] - box[1]), 255)
    outside.paste(mask, (-box[0], -box[1]))
    return picture.crop(box), outside
