"""Reads one photograph for the network and for drawing; runs in worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refuge.errors import InputError
from refuge.photographs.data import shrink
from refuge.photographs.frames import Frame, choose_frame
from refuge.photographs.records import file_record, read_eye

COPY = 1000  # longest side of the copy for drawing


@dataclass(frozen=True)
class Prepared:
    """A photograph as the network and the drawing need it.

    Attributes:
        pixels: (3, size, size), the network's input.
        frame: The part of the photograph in it.
        size: Width and height of the photograph.
        field: `FIELD_FEATURES` of its field of view.
        copy: (height, width, 3), at most `COPY` pixels a side.
        eye: "left" or "right" if the file states it, otherwise "".
        error: Why the photograph cannot be read; "" if it can, and otherwise all else is empty.
    """

    pixels: NDArray[np.uint8]
    frame: Frame
    size: tuple[int, int]
    field: NDArray[np.float64]
    copy: NDArray[np.uint8]
    eye: str = ""
    error: str = ""


def read_photograph(file: Path, size: int, crop: bool) -> Prepared:
    """Decodes a photograph, unless it cannot be read.

    Args:
        file: Its file.
        size: Side of the network's input.
        crop: Whether to cut it to its field of view.
    """
    nothing = np.zeros(0)
    try:
        picture, _ = file_record(file, None, frozenset(), None, None).read()
    except InputError as error:
        empty = np.zeros((0, 0, 3), np.uint8)
        return Prepared(empty, Frame(0, 0, 0, 0), (0, 0), nothing, empty, error=str(error))
    frame, field = choose_frame(picture, crop)
    pixels = shrink(frame.cut(picture), size)
    full = picture.size
    picture.thumbnail((COPY, COPY), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Prepared(pixels.copy(), frame, full, field, np.asarray(picture), read_eye(file))
