"""Writes a photograph's mask at its own size, and a drawing; runs in worker processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from refuge.files import make_folder, write_whole
from refuge.measurement.evaluation import SecondLook
from refuge.metrics import largest_component
from refuge.photographs.frames import Frame
from refuge.screening.reading import Prepared

MARK = (0, 191, 255)
HEIGHT = 480  # of a drawing
Maps = dict[str, NDArray[np.float32]]


def original_mask(
    maps: Maps, seen: SecondLook | None, frame: Frame, size: tuple[int, int]
) -> NDArray[np.uint8] | None:
    """Returns the mask at the photograph's own size: 0 cup, 128 rim, 255 background.

    The maps are enlarged before they are thresholded, as the photograph was reduced. Only the
    largest component of each is kept, and of the cup only what lies in the disc.

    Args:
        maps: Probability maps of disc and perhaps cup.
        seen: The second look at the disc, if there was one.
        frame: The part of the photograph that the maps cover.
        size: Width and height of the photograph.

    Returns:
        (height, width), or None for a network without a disc.
    """
    if "disc" not in maps:
        return None
    disc = largest_component(_enlarge(maps["disc"], frame, size) > 0.5)
    mask = np.where(disc, 128, 255).astype(np.uint8)
    if seen:
        left, top, right, bottom = seen.box
        part = Frame(left, top, right - left, bottom - top)
        mask[disc & largest_component(_enlarge(seen.cup, part, size) > 0.5)] = 0
    elif "cup" in maps:
        mask[disc & largest_component(_enlarge(maps["cup"], frame, size) > 0.5)] = 0
    return mask


def write_pictures(
    prepared: Prepared,
    maps: Maps,
    seen: SecondLook | None,
    fovea: NDArray[np.float64] | None,
    mask_file: Path,
    drawing: Path | None,
) -> None:
    """Writes the mask, if there is one, and the drawing, if there is a file for it."""
    mask = original_mask(maps, seen, prepared.frame, prepared.size)
    if mask is not None:
        make_folder(mask_file.parent)
        form = mask_file.suffix.removeprefix(".")
        write_whole(mask_file, lambda opened: Image.fromarray(mask).save(opened, format=form))
    if drawing:
        make_folder(drawing.parent)
        picture = draw(prepared, mask, fovea)
        write_whole(drawing, lambda opened: picture.save(opened, format="jpeg", quality=85))


def draw(
    prepared: Prepared, mask: NDArray[np.uint8] | None, fovea: NDArray[np.float64] | None
) -> Image.Image:
    """Draws the outlines of disc and cup and the fovea over a photograph, and the disc enlarged."""
    copy, scale = Image.fromarray(prepared.copy), prepared.copy.shape[1] / prepared.size[0]
    panels = [(copy, (0.0, 0.0, float(copy.width), float(copy.height)))]
    small = None
    if mask is not None:
        small = Image.fromarray(mask).resize(copy.size, Image.Resampling.NEAREST)
        rows, columns = np.nonzero(np.asarray(small) < 255)
        if len(rows):
            half = 1.1 * max(int(np.ptp(rows)), int(np.ptp(columns)), 4)
            x, y = float(columns.mean()), float(rows.mean())
            panels.append((copy, (x - half, y - half, x + half, y + half)))
    drawn = []
    for number, (picture, box) in enumerate(panels):
        width = max(1, round(HEIGHT * (box[2] - box[0]) / (box[3] - box[1])))
        left, top, right, bottom = map(round, box)
        part = Frame(left, top, right - left, bottom - top)
        shown = part.cut(picture).resize((width, HEIGHT), Image.Resampling.BILINEAR)
        if small is not None:
            shown = _outline(shown, part.cut(small, outside=255))
        if number == 0 and fovea is not None:
            x, y = (fovea + 0.5) * scale * HEIGHT / copy.height - 0.5
            pen = ImageDraw.Draw(shown)
            for sign in (-1, 1):
                pen.line((x - 7, y - 7 * sign, x + 7, y + 7 * sign), fill=MARK, width=2)
        drawn.append(shown)
    whole = Image.new("RGB", (sum(each.width for each in drawn), HEIGHT))
    for number, each in enumerate(drawn):
        whole.paste(each, (sum(other.width for other in drawn[:number]), 0))
    return whole


def _outline(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Draws the disc's outline solid and the cup's dashed, two pixels wide."""
    pixels = np.array(picture)
    values = np.asarray(mask.resize(picture.size, Image.Resampling.NEAREST))
    for inside, dashed in ((values < 255, False), (values == 0, True)):
        for box in ndimage.find_objects(inside.astype(np.uint8)):
            part = tuple(slice(max(0, side.start - 2), side.stop + 2) for side in box)
            shape = inside[part]
            edge = shape & ~ndimage.binary_erosion(shape, iterations=2, border_value=1)
            if dashed:
                rows, columns = np.indices(shape.shape, sparse=True)
                edge &= (rows + part[0].start + columns + part[1].start) // 6 % 2 == 0
            pixels[part][edge] = MARK
    return Image.fromarray(pixels)


def _enlarge(
    values: NDArray[np.floating], frame: Frame, size: tuple[int, int]
) -> NDArray[np.float32]:
    """Resizes a map to a part of a photograph, and places it in an array of the whole."""
    maps = Image.fromarray(values.astype(np.float32))
    large = maps.resize((frame.width, frame.height), Image.Resampling.BILINEAR)
    return frame.place(np.asarray(large), size).astype(np.float32, copy=False)
