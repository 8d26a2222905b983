"""Photographs and their annotations, before they are decoded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from refuge.errors import InputError, attempt, raise_all

Pair = tuple[Image.Image, Image.Image | None]
MASK_VALUES = (0, 128, 255)  # cup, rim, background
EYES = ("", "left", "right")
DICOM = (".dcm", ".dicom")
LATERALITY = ("ImageLaterality", "Laterality")  # of the photograph; of the series
SIDES = {"L": "left", "R": "right"}

# More pixels than any fundus camera has: an error that names the file, not a bare warning.
warnings.simplefilter("error", Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Record:
    """A photograph with its annotations.

    Attributes:
        name: File name of the photograph, with its ending.
        annotated: Tasks whose truth is known.
        label: 1 for glaucoma, 0 for none; None if unknown.
        fovea: x and y in the photograph's own pixels, (0, 0) the centre of the first one.
        read: Decodes the photograph and, if disc or cup is annotated, the mask.
        files: The files that `read` reads, so that a cache can detect changes.
        whole: Whether the network sees the whole picture, as it is already a crop.
        eye: "left", "right", or "" if unknown.
    """

    name: str
    annotated: frozenset[str]
    label: int | None
    fovea: tuple[float, float] | None
    read: Callable[[], Pair] = field(compare=False)
    files: tuple[Path, ...] = ()
    whole: bool = False
    eye: str = ""


def file_record(
    picture: Path,
    mask: Path | None,
    annotated: frozenset[str],
    label: int | None,
    fovea: tuple[float, float] | None,
    size: tuple[float, float] | None = None,
    eye: str = "",
) -> Record:
    """Returns the record of a photograph and a mask stored in files.

    Args:
        picture: The photograph's file.
        mask: The mask's file; None if neither disc nor cup is annotated.
        annotated: Tasks whose truth is known.
        label: As in `Record`.
        fovea: As in `Record`.
        size: Width and height according to an index; the photograph must agree.
        eye: As in `Record`.
    """
    files = (picture,) if mask is None else (picture, mask)
    read = partial(_read, picture, mask, fovea, size)
    return Record(picture.name, annotated, label, fovea, read, files, eye=eye)


def by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Groups files by name without suffix, ignoring case."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.stem.casefold(), []).append(file)
    return groups


def only(files: Sequence[Path]) -> Path:
    """Returns the only file of a name; identical copies count as one.

    Raises:
        InputError: The files differ.
    """
    first, *others = files
    for other in others:
        if other.read_bytes() != first.read_bytes():
            raise InputError(f"{other}: differs from {first}; remove one of the two.")
    return first


def to_number(value: object) -> float | None:
    """Parses a finite number, stored as such or as text; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _read(
    picture_file: Path,
    mask_file: Path | None,
    fovea: tuple[float, float] | None,
    size: tuple[float, float] | None,
) -> Pair:
    errors: list[InputError] = []
    picture = attempt(errors.append, read_photograph, picture_file, fovea, size)
    mask = attempt(errors.append, read_mask, mask_file) if mask_file else None
    if picture and mask and mask_file:
        attempt(errors.append, check_mask, mask_file, mask.size, picture.size)
    raise_all(errors)
    assert picture
    return picture, mask


def check_mask(file: Path, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raises an InputError if a mask is not of its picture's size."""
    if size != wanted:
        raise InputError(
            f"{file}: a mask must be of its picture's size ({wanted[0]} x {wanted[1]}), "
            f"got {size[0]} x {size[1]}."
        )


def read_photograph(
    file: Path, fovea: tuple[float, float] | None = None, size: tuple[float, float] | None = None
) -> Image.Image:
    """Decodes a photograph.

    Args:
        file: Its file.
        fovea: A point that must lie in it.
        size: Width and height according to an index; the photograph must agree.

    Raises:
        InputError: It cannot be decoded, or contradicts the other arguments.
    """
    picture = _read_picture(file)
    width, height = picture.size
    errors = []
    if size and size != picture.size:
        text = f"must be of the size its index states ({size[0]:g} x {size[1]:g})"
        errors.append(InputError(f"{file}: {text}, got {width} x {height}."))
    if fovea and not (-0.5 <= fovea[0] <= width - 0.5 and -0.5 <= fovea[1] <= height - 0.5):
        text = f"the fovea must lie in the picture ({width} x {height})"
        errors.append(InputError(f"{file}: {text}, got {fovea}."))
    raise_all(errors)
    return picture


def _read_picture(file: Path) -> Image.Image:
    image = read_image(file)
    if image.mode == "L":
        return image.convert("RGB")
    if image.mode == "RGBA":  # black, as around the field of view
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    if image.mode != "RGB":
        raise InputError(f"{file}: a picture must have 8 bits a channel, got mode {image.mode}.")
    return image


def read_mask(file: Path) -> Image.Image:
    """Decodes a mask.

    Raises:
        InputError: It cannot be decoded, or holds other values than `MASK_VALUES`.
    """
    values = np.asarray(read_image(file))
    if values.ndim == 3:
        if (values[..., 1:3] != values[..., :1]).any():
            raise InputError(f"{file}: a mask must be grey, got colours.")
        if (values[..., 3:] < 255).any():
            raise InputError(f"{file}: a mask must be opaque, got transparent pixels.")
        values = values[..., 0]
    other = np.setdiff1d(values, MASK_VALUES)
    if len(other):
        raise InputError(
            f"{file}: a mask must hold 0 (cup), 128 (rim) and 255 (background) alone, "
            f"got {other[0]}."
        )
    return Image.fromarray(values.astype(np.uint8))


def read_image(file: Path) -> Image.Image:
    """Decodes to RGB, or RGBA if pixels are transparent; keeps 8-bit grey and deeper pixels."""
    try:
        if file.suffix.lower() in DICOM:
            return _read_dicom(file)
        with Image.open(file) as image:
            # Annotations are assumed to refer to the picture as viewers show it. Sizes reveal
            # where that is wrong, except for square pictures and rotations by 180 degrees.
            shown = ImageOps.exif_transpose(image)
        if shown.mode.startswith(("I", "F")):  # `convert` would clip them
            return shown
        if shown.has_transparency_data:
            return shown.convert("RGBA")
        return shown if shown.mode == "L" else shown.convert("RGB")
    except InputError:
        raise
    # Decoders raise nearly any exception for a damaged file.
    except Exception as error:
        raise InputError(f"{file}: not a readable picture ({error}).") from error


def read_eye(file: Path) -> str:
    """Returns "left" or "right" if a DICOM file states one of the two, otherwise ""."""
    if file.suffix.lower() not in DICOM:
        return ""
    try:
        from pydicom import dcmread  # noqa: PLC0415  # optional

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = dcmread(file, specific_tags=list(LATERALITY), stop_before_pixels=True)
            stated = [str(header.get(tag)) for tag in LATERALITY]
    # Reading the pixels, or trying to, says what is wrong with the file.
    except Exception:
        return ""
    return next((SIDES[side] for side in stated if side in SIDES), "")


def _read_dicom(file: Path) -> Image.Image:
    """Decodes the pixels of a DICOM file, and nothing of what it says about the patient."""
    try:
        from pydicom.pixels.utils import pixel_array  # noqa: PLC0415  # optional
    except ImportError as error:
        raise InputError(f"{file}: DICOM needs pydicom: pip install 'pydicom>=3'.") from error
    with warnings.catch_warnings():
        # pydicom warns of values that no pixel depends on.
        warnings.simplefilter("ignore")
        return Image.fromarray(pixel_array(file))
