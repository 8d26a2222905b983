"""One photograph and what is known about it, before it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from errors import InputError

Pair = tuple[Image.Image, Image.Image | None]
MASK_VALUES = (0, 128, 255)  # cup, rim, background


@dataclass(frozen=True)
class Record:
    """A photograph with its annotations.

    Attributes:
        name: File name of the photograph, with its ending.
        annotated: Tasks whose truth is known.
        label: 1 for glaucoma, 0 for none; None where unknown.
        fovea: x and y in the photograph's own pixels, (0, 0) the centre of the first one.
        read: Decodes the photograph and, where disc or cup is annotated, the mask.
        files: What `read` reads, so that a cache can tell whether it changed.
    """

    name: str
    annotated: frozenset[str]
    label: int | None
    fovea: tuple[float, float] | None
    read: Callable[[], Pair] = field(compare=False)
    files: tuple[Path, ...] = ()


def file_record(
    picture: Path,
    mask: Path | None,
    annotated: frozenset[str],
    label: int | None,
    fovea: tuple[float, float] | None,
    size: tuple[int, int] | None = None,
) -> Record:
    """Makes the record of a photograph and a mask that lie in files.

    Args:
        picture: The photograph's file.
        mask: The mask's file; None where neither disc nor cup is annotated.
        annotated: Tasks whose truth is known.
        label: As in `Record`.
        fovea: As in `Record`.
        size: Width and height that an index states; the photograph must agree.

    Raises:
        InputError: A file is missing.
    """
    files = (picture,) if mask is None else (picture, mask)
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file.")
    read = partial(_read, picture, mask, fovea, size)
    return Record(picture.name, annotated, label, fovea, read, files)


def _read(
    picture_file: Path,
    mask_file: Path | None,
    fovea: tuple[float, float] | None,
    size: tuple[int, int] | None,
) -> Pair:
    picture = _decode(picture_file, "RGB")
    width, height = picture.size
    if size and size != picture.size:
        raise InputError(
            f"{picture_file}: must be of the size its index states ({size[0]} x {size[1]}), "
            f"got {width} x {height}."
        )
    if fovea and not (-0.5 <= fovea[0] <= width - 0.5 and -0.5 <= fovea[1] <= height - 0.5):
        raise InputError(
            f"{picture_file}: the fovea must lie in the picture ({width} x {height}), got {fovea}."
        )
    if mask_file is None:
        return picture, None
    mask = _decode(mask_file, "L")
    if mask.size != picture.size:
        raise InputError(
            f"{mask_file}: a mask must be of its picture's size ({width} x {height}), "
            f"got {mask.width} x {mask.height}."
        )
    other = np.setdiff1d(np.asarray(mask), MASK_VALUES)
    if len(other):
        raise InputError(
            f"{mask_file}: a mask must hold 0 (cup), 128 (rim) and 255 (background) alone, "
            f"got {other[0]}."
        )
    return picture, mask


def _decode(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert(mode)
    # Pillow's decoders raise SyntaxError and ValueError too for a file that is cut short.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: not a readable picture ({error}).") from error
