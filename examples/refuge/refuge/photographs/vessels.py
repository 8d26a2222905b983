"""Retinal vessels of the phantoms: arcades that leave the disc, branch and bend around the macula.

Points are complex numbers, x + iy, so that a heading is an angle and a step is `exp(i heading)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float64]
Points = NDArray[np.complexfloating]

VEIN = np.array((0.36, 0.68, 0.62))  # share of red, green and blue that a vessel absorbs
ARTERY = np.array((0.15, 0.48, 0.46))
FINE = 4  # vessels are drawn this much finer than the picture, then averaged


@dataclass(frozen=True)
class Vessels:
    """Some vessels: points along each (n, k) in field radii, and the width at each point."""

    points: Points
    widths: Array


def draw_vessels(
    tissue: Array,
    disc: complex,
    fovea: complex,
    radius: float,
    field: float,
    rng: np.random.Generator,
) -> Array:
    """Draws veins and arteries over the fundus.

    Args:
        tissue: The fundus, (size, size, 3).
        disc: Centre of the optic disc.
        fovea: Centre of the macula, which vessels spare.
        radius: Half height of the disc; widths follow it.
        field: Radius of the field of view in half sides of the picture.
        rng: Random generator.
    """
    size = len(tissue)
    contrast = rng.uniform(0.65, 1.0)
    # Arteries leave the disc on the inner side of the veins; they are thinner and brighter.
    for absorbed, width, inside in ((VEIN, 0.150, 0.0), (ARTERY, 0.105, 1.0)):
        vessels = _grow_trees(disc, fovea, radius, width * radius, inside, rng)
        cover = _rasterise(vessels, size, field, fovea)
        tissue = tissue * (1 - contrast * cover[..., None] * absorbed)
    return tissue


def _grow_trees(
    disc: complex,
    fovea: complex,
    radius: float,
    width: float,
    inside: float,
    rng: np.random.Generator,
) -> list[Vessels]:
    """Grows temporal arcades and nasal vessels with two generations of branches, and twigs."""
    distance = abs(fovea - disc)
    temporal = 1 if fovea.real > disc.real else -1
    up_and_down = np.array((-1, 1))
    # Vessels emerge at the nasal edge of the cup.
    roots = disc + radius * (
        rng.normal(0, 0.06, 2) - 0.32 * temporal + 1j * (rng.normal(0, 0.08, 2) + 0.1 * up_and_down)
    )

    # Arcades leave the disc steeply and bend around the macula, less so with distance.
    steep = np.deg2rad(rng.uniform(82, 108, (2, 1)) - 24 * inside)
    bend = distance * rng.uniform(0.54, 0.68, (2, 1))
    length = (1.7 + 0.2 * inside) * distance
    fading = np.exp(-((np.linspace(0, length, 44) / bend) ** 1.3))
    rise = np.deg2rad(rng.uniform(-24, -6, (2, 1))) + steep * fading
    headings = _heading(rise, temporal, up_and_down[:, None])
    arcades = _walk(roots, headings, np.full(2, length), np.full(2, width), 0.4, rng)

    rise = np.deg2rad(rng.uniform(30, 62, (2, 1)) + 16 * inside)
    headings = np.repeat(_heading(rise, -temporal, up_and_down[:, None]), 26, axis=1)
    nasal = _walk(roots, headings, np.ones(2), np.full(2, 0.75 * width), 1.0, rng)

    headings = np.repeat(_heading(rng.uniform(-0.8, 0.8, (2, 1)), temporal, 1), 14, axis=1)
    lengths = rng.uniform(0.4, 0.7, 2)
    twigs = _walk(roots, headings, lengths, np.full(2, 0.26 * width), 1.0, rng)
    grown = [twigs]
    for trunks in (arcades, nasal):
        branches = _branch(trunks, 5, 0.95, 18, rng)
        grown += [trunks, branches, _branch(branches, 3, 0.5, 12, rng)]
    return grown


def _heading(rise: Array, horizontal: int, vertical: Array | int) -> Array:
    return np.asarray(np.angle(horizontal * np.cos(rise) + 1j * vertical * np.sin(rise)))


def _walk(
    starts: Points,
    headings: Array,
    lengths: Array,
    widths: Array,
    restless: float,
    rng: np.random.Generator,
) -> Vessels:
    """Grows vessels from `starts` along `headings` (n, k), wandering and getting thinner."""
    count, steps = headings.shape
    gone = np.arange(steps + 1) / steps
    wander = rng.normal(0, 0.06 * restless, (count, steps + 2))
    wander = np.cumsum(wander[:, 2:] + wander[:, 1:-1] + wander[:, :-2], axis=1)
    # Vessels also wind, each with its own frequency.
    waves = rng.uniform(2.5, 5, (count, 1)) * lengths[:, None] * gone[1:]
    winding = rng.uniform(0.08, 0.30, (count, 1)) * np.sin(
        2 * np.pi * (waves + rng.uniform(0, 1, (count, 1)))
    )
    angles = headings + (wander + winding) * (0.3 + 0.7 * gone[1:])
    path = np.cumsum(np.exp(1j * angles), axis=1) * (lengths / steps)[:, None]
    points = starts[:, None] + np.concatenate((np.zeros((count, 1)), path), axis=1)
    return Vessels(points, widths[:, None] * (1 - 0.65 * gone))


def _branch(
    parents: Vessels, each: int, longest: float, steps: int, rng: np.random.Generator
) -> Vessels:
    """Grows branches from random places of every parent, left and right in turn."""
    count, last = parents.points.shape[0], parents.points.shape[1] - 1
    at = (np.sort(rng.uniform(0.22, 0.9, (count, each)), axis=1) * last).astype(int)
    side = np.where((np.arange(each) + rng.integers(0, 2, (count, 1))) % 2, 1, -1)
    rows = np.arange(count)[:, None]
    along = parents.points[rows, at + 1] - parents.points[rows, at - 1]
    leaves = np.angle(along) + side * rng.uniform(0.45, 0.95, at.shape)
    # A branch turns back towards its parent's direction.
    turns = side * rng.uniform(0.1, 0.9, at.shape)
    headings = leaves[..., None] - turns[..., None] * np.linspace(0, 1, steps)
    lengths = longest * rng.uniform(0.43, 1, at.shape)
    widths = parents.widths[rows, at] * rng.uniform(0.45, 0.75, at.shape)
    starts = parents.points[rows, at]
    flat = headings.reshape(-1, steps)
    return _walk(starts.ravel(), flat, lengths.ravel(), widths.ravel(), 1.0, rng)


def _rasterise(vessels: list[Vessels], size: int, field: float, fovea: complex) -> Array:
    """Returns the fraction of each pixel covered by vessels, fading out around the fovea."""
    fine = FINE * size
    canvas = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(canvas)
    for some in vessels:
        pixels = ((1 + 1j + field * some.points) * fine / 2).view(np.float64)
        widths = some.widths * field * fine / 2
        fade = np.clip((abs(some.points - fovea) - 0.08) / 0.22, 0, 1)
        # A line thinner than a pixel of the fine canvas is drawn fainter instead.
        inks = (255 * fade * np.minimum(1, widths / 1.5)).astype(int)
        pens = np.maximum(1, np.rint(widths)).astype(int)
        for line, ink, wide in zip(pixels.tolist(), inks.tolist(), pens.tolist(), strict=True):
            for i in range(0, len(ink) - 1, 3):
                pen.line(line[2 * i : 2 * i + 8], fill=ink[i], width=wide[i])
    return np.asarray(canvas.reduce(FINE), dtype=np.float64) / 255
