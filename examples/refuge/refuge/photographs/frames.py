"""Finds the field of view of a photograph, and the square around it that the network sees."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from refuge.metrics import largest_component

COARSE = 256  # longest side of the copy in which the field of view is looked for
DARKEST = 10  # the black around the field of view, with a JPEG's noise, is below this of 255
SMALLEST = 0.1  # share of a photograph that its field of view fills at least
TAB = 0.1  # rows and columns with less of the field than this belong to a tab or to lettering
# What is measured of the field of view: how it fills its bounding box (a circle: 0.79), height over
# width, mean brightness, shares of red and blue, contrast, and the logarithm of the sharpness.
FIELD_FEATURES = ("fill", "shape", "brightness", "red", "blue", "contrast", "sharpness")
Array = NDArray[np.float64]


class Frame(NamedTuple):
    """Part of a photograph that becomes the network's input; it may extend beyond the photograph.

    Attributes:
        left: First column, in the photograph's pixels.
        top: First row.
        width: Number of columns.
        height: Number of rows.
    """

    left: int
    top: int
    width: int
    height: int

    def cut(self, picture: Image.Image, outside: int = 0) -> Image.Image:
        """Returns this part of a picture, filled with `outside` beyond its edges."""
        if outside == 0:
            return picture.crop(
                (self.left, self.top, self.left + self.width, self.top + self.height)
            )
        part = Image.new(picture.mode, (self.width, self.height), outside)
        part.paste(picture, (-self.left, -self.top))
        return part

    def place(self, values: NDArray[np.generic], size: tuple[int, int]) -> NDArray[np.generic]:
        """Returns an array of a picture's width and height, with `values` in this part of it.

        Args:
            values: (height, width) of this frame.
            size: Width and height of the picture; it is zero outside this frame.
        """
        whole = np.zeros(size[::-1], values.dtype)
        left, top = max(self.left, 0), max(self.top, 0)
        right, bottom = min(self.left + self.width, size[0]), min(self.top + self.height, size[1])
        if left < right and top < bottom:
            rows, columns = (
                slice(top - self.top, bottom - self.top),
                slice(left - self.left, right - self.left),
            )
            whole[top:bottom, left:right] = values[rows, columns]
        return whole

    def to_original(self, points: Array, size: int) -> Array:
        """Converts points (n, 2) in pixels of the network's input to the photograph's own."""
        sides, corner = np.array((self.width, self.height)), np.array((self.left, self.top))
        return np.asarray((points + 0.5) * sides / size - 0.5 + corner)


class Field(NamedTuple):
    """The field of view of a photograph.

    Attributes:
        frame: Its bounding box.
        features: `FIELD_FEATURES`, in this order.
    """

    frame: Frame
    features: Array


def choose_frame(picture: Image.Image, crop: bool) -> tuple[Frame, Array]:
    """Chooses the part of a photograph that the network sees.

    Args:
        picture: The photograph.
        crop: Whether to cut it to its field of view and to pad that to a square; otherwise the
            whole photograph is stretched to a square, as published.

    Returns:
        The part, and the `FIELD_FEATURES`, NaN where there is no field of view.
    """
    field = find_field(picture)
    features = field.features if field else np.full(len(FIELD_FEATURES), np.nan)
    whole = Frame(0, 0, *picture.size)
    if not crop:
        return whole, features
    left, top, width, height = field.frame if field else whole
    side = max(width, height)
    return Frame(left + (width - side) // 2, top + (height - side) // 2, side, side), features


def find_field(picture: Image.Image) -> Field | None:
    """Finds the bright part of a photograph, which black surrounds; None if there is none."""
    shrink = max(1.0, max(picture.size) / COARSE)
    width, height = (max(1, round(side / shrink)) for side in picture.size)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64)
    bright = pixels.max(axis=2)
    inside = bright > max(DARKEST, 0.1 * float(np.quantile(bright, 0.95)))
    # Padded, for opening takes what lies beyond the picture for black.
    inside = ndimage.binary_opening(np.pad(inside, 2, mode="edge"), np.ones((3, 3)))[2:-2, 2:-2]
    inside = largest_component(inside)
    if inside.sum() < SMALLEST * inside.size:
        return None
    (top, bottom), (left, right) = (_extent(inside.sum(axis=axis)) for axis in (1, 0))
    scales = picture.width / width, picture.height / height
    x = int(np.floor(left * scales[0])), int(np.ceil((right + 1) * scales[0]))
    y = int(np.floor(top * scales[1])), int(np.ceil((bottom + 1) * scales[1]))
    frame = Frame(x[0], y[0], min(x[1], picture.width) - x[0], min(y[1], picture.height) - y[0])
    box = slice(top, bottom + 1), slice(left, right + 1)
    return Field(frame, _measure(pixels[box], inside[box], frame))


def _extent(counts: NDArray[np.int64]) -> tuple[int, int]:
    kept = np.flatnonzero(counts >= TAB * counts.max())
    return int(kept[0]), int(kept[-1])


def _measure(pixels: Array, inside: NDArray[np.bool_], frame: Frame) -> Array:
    means = pixels[inside].mean(axis=0)
    grey = pixels.mean(axis=2)
    brightness = float(grey[inside].mean())
    # Away from the rim, whose edge is always sharp.
    core = ndimage.binary_erosion(inside, iterations=4, border_value=0)
    core = core if core.any() else inside
    edges = float(ndimage.laplace(ndimage.gaussian_filter(grey, 0.7))[core].var())
    return np.array(
        (
            inside.mean(),
            frame.height / frame.width,
            brightness,
            means[0] / max(1, means.sum()),
            means[2] / max(1, means.sum()),
            grey[core].std() / max(1, brightness),
            np.log(edges / max(1, brightness) ** 2 + 1e-6),
        )
    )
