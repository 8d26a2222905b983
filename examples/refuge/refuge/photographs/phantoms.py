"""Phantoms: synthetic fundus photographs, drawn from a seed.

They stand in for REFUGE, which may not be redistributed. Lengths are in radii of the field of view,
whose centre is the origin; x runs to the right and y down, as in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from refuge.network import TASKS
from refuge.photographs.records import Record
from refuge.photographs.vessels import draw_vessels

Array = NDArray[np.float64]

FIELD = 0.965  # radius of the field of view, in half sides of the picture
# Colours of the fundus: the red of one camera, the orange of another, and a pale one.
PIGMENTS = np.array(((224.0, 72.0, 42.0), (196.0, 96.0, 24.0), (184.0, 112.0, 82.0)))
POSITIVES = 0.4
COUNTS = {"train": 480, "val": 80, "test": 160}


@dataclass(frozen=True)
class Eye:
    """Parameters of one synthetic eye.

    Attributes:
        seed: Seed of everything in the picture that carries no label.
        glaucoma: The label.
        temporal: +1 where the macula lies to the right of the disc, otherwise -1.
        disc: Centre of the optic disc.
        radii: Half width and half height of the disc.
        fovea: Centre of the macula.
        vcdr: Height of the cup over that of the disc, before the notch.
        notch: Angle of the rim notch, in radians from the temporal side; None for a whole rim.
        defect: Angle of the nerve-fibre-layer defect; None for a whole layer.
    """

    seed: int
    glaucoma: bool
    temporal: int
    disc: tuple[float, float]
    radii: tuple[float, float]
    fovea: tuple[float, float]
    vcdr: float
    notch: float | None
    defect: float | None


def phantom_records(size: int, counts: dict[str, int] = COUNTS) -> dict[str, list[Record]]:
    """Returns the phantoms of each split, always the same ones.

    Args:
        size: Side of the pictures in pixels.
        counts: Number per split; a longer split starts with the same pictures as a shorter one.
    """
    return {
        split: [_phantom(f"{split}{i:04}.png", 100_000 * part + i, size) for i in range(count)]
        for part, (split, count) in enumerate(counts.items())
    }


def _phantom(name: str, seed: int, size: int) -> Record:
    eye = draw_eye(seed)
    fovea = to_pixels(eye.fovea, size)
    return Record(
        name, frozenset(TASKS), int(eye.glaucoma), fovea, partial(draw_phantom, eye, size)
    )


def draw_eye(seed: int) -> Eye:
    """Samples the parameters of an eye: its geometry and the signs of glaucoma.

    The cup of a glaucomatous eye is wider, but the classes overlap (0.60 and 0.43, both with a
    standard deviation of 0.09). A notch of the rim and a defect of the nerve-fibre layer, which
    mostly come with glaucoma, carry the rest of the label.
    """
    rng = np.random.default_rng(seed)
    glaucoma = bool(rng.random() < POSITIVES)
    temporal = 1 if rng.random() < 0.5 else -1
    height = rng.uniform(0.165, 0.205)
    distance = 2.5 * 2 * height * rng.uniform(0.94, 1.06)
    tilt = np.deg2rad(rng.normal(7, 3))
    middle = rng.normal((0.0, 0.0), (0.05, 0.04))
    run, drop = distance * np.cos(tilt), distance * np.sin(tilt)
    vcdr = float(np.clip(rng.normal(0.60 if glaucoma else 0.43, 0.09), 0.2, 0.85))
    pole = 1 if rng.random() < 0.7 else -1
    angle = float(pole * np.deg2rad(rng.uniform(55, 80)))
    notched, defective = rng.random(2) < ((0.55, 0.65) if glaucoma else (0.03, 0.06))
    return Eye(
        seed=seed,
        glaucoma=glaucoma,
        temporal=temporal,
        disc=(float(middle[0] - temporal * run / 2), float(middle[1] - drop / 2)),
        radii=(float(height * rng.uniform(0.86, 0.97)), float(height)),
        fovea=(float(middle[0] + temporal * run / 2), float(middle[1] + drop / 2)),
        vcdr=vcdr,
        notch=angle if notched else None,
        defect=angle if defective else None,
    )


def draw_phantom(eye: Eye, size: int) -> tuple[Image.Image, Image.Image]:
    """Renders the photograph of an eye and its mask.

    Args:
        eye: The eye.
        size: Side of the picture in pixels.

    Returns:
        The photograph, and the mask in REFUGE's values (0 cup, 128 rim, 255 background).
    """
    rng = np.random.default_rng((eye.seed, 1))
    x, y = _grid(size)
    # Polar coordinates around the disc, the angle counted from the temporal side downwards.
    u, v = (x - eye.disc[0]) * eye.temporal, y - eye.disc[1]
    reach, angle = np.hypot(u / eye.radii[0], v / eye.radii[1]), np.arctan2(v, u)
    rim = (
        1
        + 0.03 * np.cos(2 * angle + rng.uniform(0, 6))
        + 0.02 * np.cos(3 * angle + rng.uniform(0, 6))
    )
    cup = _cup_edge(eye, angle, rng) * rim

    tissue = _fundus(eye, x, y, rng)
    tissue *= 1 - _defect(eye, np.hypot(u, v), angle, rng)[..., None]
    tissue = _paint_disc(tissue, reach, rim, cup, angle, eye, size, rng)
    picture = draw_vessels(
        tissue, complex(*eye.disc), complex(*eye.fovea), eye.radii[1], FIELD, rng
    )
    photograph = _photograph(picture, x, y, size, rng)

    mask = np.where(reach < cup, 0, np.where(reach < rim, 128, 255)).astype(np.uint8)
    return Image.fromarray(photograph), Image.fromarray(mask)


def to_pixels(point: tuple[float, float], size: int) -> tuple[float, float]:
    """Converts a point to pixels, where (0, 0) is the centre of the first pixel."""
    x, y = ((1 + FIELD * value) * size / 2 - 0.5 for value in point)
    return x, y


def _grid(size: int) -> tuple[Array, Array]:
    line = ((np.arange(size) + 0.5) * 2 / size - 1) / FIELD
    x, y = np.meshgrid(line, line)
    return x, y


def _noise(rng: np.random.Generator, cells: int, size: int) -> Array:
    """Returns smooth noise with `cells` bumps per side, the same at every size."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def _bump(x: Array, y: Array, centre: tuple[float, float], width: float) -> Array:
    return np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))


def _step(distance: Array, softness: float) -> Array:
    """Returns 0 far below zero, 1 far above it, with a ramp `softness` wide between."""
    return np.clip(distance / softness + 0.5, 0, 1)


def _fundus(eye: Eye, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Renders choroid, pigment and macula: the fundus without disc and vessels."""
    size = len(x)
    colour = rng.dirichlet((1.6, 1.0, 0.5)) @ PIGMENTS * rng.uniform(0.88, 1.05)
    # Ridges of smooth noise look like the choroid's own vessels behind a thin pigment layer.
    bands = _noise(rng, 26, size) + 0.8 * _noise(rng, 44, size)
    tigroid = np.exp(-((bands / 0.6) ** 2)) - 0.5
    mottle = 0.6 * _noise(rng, 4, size) + 0.3 * _noise(rng, 40, size) + 0.25 * _noise(rng, 90, size)
    # Most fundi are smooth; some are tessellated except at the macula.
    strength = 0.30 * rng.beta(0.7, 2.0)
    away = 1 - 0.85 * _bump(x, y, eye.fovea, 0.35)
    texture = 1 + strength * tigroid * away + rng.uniform(0.015, 0.045) * mottle
    tissue = colour * np.clip(texture, 0.2, None)[..., None] ** np.array((0.6, 1.5, 1.1))
    glow = _bump(x, y, eye.disc, 0.40)[..., None]
    tissue = tissue * (1 + glow * rng.uniform(0.2, 1.0) * np.array((0.05, 0.26, 0.26)))
    macula = rng.uniform(0.10, 0.30) * _bump(x, y, eye.fovea, rng.uniform(0.16, 0.26))
    pit = rng.uniform(0.08, 0.24) * _bump(x, y, eye.fovea, 0.065)
    shade = (macula + pit)[..., None] * np.array((0.75, 1.1, 0.7))
    return np.asarray(tissue * (1 - shade))


def _defect(eye: Eye, distance: Array, angle: Array, rng: np.random.Generator) -> Array:
    """Returns how much a nerve-fibre-layer defect darkens each pixel: a widening arc."""
    if eye.defect is None:
        return np.zeros_like(distance)
    # Nerve fibres bend around the macula, and so does the wedge they leave.
    centre = eye.defect * (1 - 0.42 * np.clip(distance - 0.15, 0, 1))
    inside = _step(0.17 - np.abs(angle - centre), 0.16)
    depth = rng.uniform(0.10, 0.20)
    return np.asarray(depth * inside * _step(distance - 0.15, 0.1) * _step(0.95 - distance, 0.7))


def _cup_edge(eye: Eye, angle: Array, rng: np.random.Generator) -> Array:
    """Returns the edge of the cup at each angle, as a fraction of the disc's."""
    wide = eye.vcdr * rng.uniform(0.92, 1.08)
    edge = wide * eye.vcdr / np.hypot(wide * np.sin(angle), eye.vcdr * np.cos(angle))
    if eye.notch is not None:
        edge = edge + (0.93 - edge) * np.exp(-(((angle - eye.notch) / 0.30) ** 2))
    return np.minimum(edge, 0.95)


def _paint_disc(
    tissue: Array,
    reach: Array,
    rim: Array,
    cup: Array,
    angle: Array,
    eye: Eye,
    size: int,
    rng: np.random.Generator,
) -> Array:
    edge = max(0.10, 2.5 / (size * eye.radii[1]))
    pallor = rng.uniform(0, 1)
    # The rim is pink, more so on the nasal side; the brightest part is the pale cup.
    rim_colour = np.array((240.0, 130 + 24 * pallor, 66 + 20 * pallor))
    rim_colour = rim_colour + 0.10 * np.cos(angle)[..., None] * np.array((20.0, 130.0, 90.0))
    rim_colour = rim_colour + rng.uniform(0.0, 0.3) * (tissue.mean(axis=(0, 1)) - rim_colour)
    cup_colour = np.array((252.0, 216 + 18 * pallor, 140 + 40 * pallor))
    halo = rng.uniform(0.0, 0.25) * np.exp(-np.clip(reach - 1, 0, None) / 0.18) * (reach > 0.9)
    tissue = tissue + halo[..., None] * (rim_colour - tissue)
    # A crescent of thin or dense pigment around the disc, mostly on the temporal side.
    crescent = rng.beta(0.5, 1.2) * np.clip(np.cos(angle - rng.normal(0, 0.5)), 0, 1) ** 2
    ring = np.exp(-(((reach - 1.08) / 0.10) ** 2))
    tissue = tissue * (1 + rng.choice((-0.4, 0.45)) * (crescent * ring)[..., None])
    inside = _step(rim - reach, edge)[..., None]
    tissue = tissue + inside * (rim_colour * (1 + 0.03 * _noise(rng, 60, size)[..., None]) - tissue)
    # The soft edge is centred on the mask's edge, so that picture and mask agree.
    inside = _step(cup - reach, 1.4 * edge)[..., None]
    return np.asarray(tissue + inside * rng.uniform(0.75, 1.0) * (cup_colour - tissue))


def _aperture(x: Array, y: Array, size: int, rng: np.random.Generator) -> Array:
    """Returns the field of view: a sharp disc, perhaps cropped, perhaps with an orientation tab."""
    soft = max(0.012, 3 / size)
    seen = _step(1 - np.hypot(x, y), soft)
    turned = np.deg2rad(rng.uniform(-45, -30))
    tab = np.hypot(x - 0.99 * np.cos(turned), y - 0.99 * np.sin(turned))
    if rng.random() < 0.6:
        seen = np.maximum(seen, _step(0.055 - tab, soft))
    if rng.random() < 0.35:
        seen = seen * _step(rng.uniform(0.80, 0.95) - np.abs(y), soft)
    return np.asarray(seen)


def _photograph(
    tissue: Array, x: Array, y: Array, size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Adds what a camera does: uneven light, haze, blur, grain and the round field of view."""
    radius = np.hypot(x, y)
    direction = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0, 0.16) * (x * np.cos(direction) + y * np.sin(direction))
    light = 1 + slope - rng.uniform(0.12, 0.34) * radius**2.5
    picture = tissue * light[..., None] * rng.uniform(0.80, 1.12)
    haze = rng.uniform(0, 0.14) * rng.uniform(0, 1)
    picture += haze * (np.array((190.0, 120.0, 80.0)) - picture)
    blur = rng.uniform(0.0008, 0.0045) * size
    picture = gaussian_filter(picture, (blur, blur, 0))
    picture += rng.normal(0, rng.uniform(1, 2.5), (size, size, 1)) + rng.normal(
        0, 1.2, (size, size, 3)
    )
    picture *= _aperture(x, y, size, rng)[..., None]
    return np.asarray(np.clip(picture + 0.5, 0, 255), dtype=np.uint8)
