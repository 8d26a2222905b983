"""Draws pictures that are no fundus photographs, or no whole ones."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 160


def draw_all(fundi: list[Image.Image]) -> Iterator[tuple[str, Image.Image]]:
    """Yields forty pictures with their names: documents, noise, ramps, organs, parts of fundi.

    Args:
        fundi: At least four fundus photographs with the disc on the left, to be cut and spoilt.
    """
    rng = np.random.default_rng(0)
    for number in range(8):
        yield f"document{number}", draw_document(rng, number)
    for number in range(6):
        yield f"noise{number}", draw_noise(rng, number)
    for number in range(6):
        yield f"ramp{number}", draw_ramp(number)
    for number in range(8):
        yield f"organ{number}", draw_organ(rng, number)
    for number, fundus in enumerate(fundi[:4]):
        width, height = fundus.size
        yield f"half{number}", fundus.crop((int(0.6 * width), 0, width, height))
        yield f"detail{number}", fundus.crop((int(0.6 * width), height // 3, width, height))
        yield f"dark{number}", fundus.point(lambda value: value // 12)


def draw_document(rng: np.random.Generator, number: int) -> Image.Image:
    """A page of lines, or a form with boxes, on white or yellowed paper."""
    page = Image.new("RGB", (SIDE, SIDE + 40), ("white", "#f4ecd8", "#dddddd")[number % 3])
    pen = ImageDraw.Draw(page)
    for y in range(12, page.height - 8, 6 + number % 4):
        for x in range(10, SIDE - 20, 12):
            if rng.random() < 0.85:
                pen.line((x, y, x + int(rng.integers(4, 11)), y), fill=(30, 30, 40))
    if number % 2:
        pen.rectangle((30, 30, 80, 70), outline=(0, 0, 0))
    return page


def draw_noise(rng: np.random.Generator, number: int) -> Image.Image:
    """Noise, grey or coloured, fine or coarse, over the whole picture or in a circle."""
    side = (SIDE, SIDE // 8)[number % 2]
    pixels = rng.integers(0, 256, (side, side, 1 if number < 2 else 3), dtype=np.uint8)
    image = Image.fromarray(np.repeat(pixels, 3 if number < 2 else 1, axis=2))
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return in_circle(image) if number > 3 else image


def draw_ramp(number: int) -> Image.Image:
    """A ramp of grey or of one colour, also in a circle; a plain picture, black or white."""
    if number > 3:
        return Image.new("RGB", (SIDE, SIDE), ("black", "white")[number - 4])
    grey = np.tile(np.linspace(0, 255, SIDE), (SIDE, 1))
    colour = ((1, 1, 1), (1, 1, 1), (1, 0.5, 0.3), (0.2, 0.4, 1))[number]
    pixels = (grey[..., None] * np.array(colour)).astype(np.uint8)
    image = Image.fromarray(
        np.ascontiguousarray(pixels.transpose(1, 0, 2) if number % 2 else pixels)
    )
    return in_circle(image) if number > 1 else image


def draw_organ(rng: np.random.Generator, number: int) -> Image.Image:
    """A face, a hand, a moon-like ear drum, a mole on skin, an X-ray, an iris."""
    image = Image.new("RGB", (SIDE, SIDE), ("#e0ac8f", "#101010", "#c98f70", "black")[number % 4])
    pen = ImageDraw.Draw(image)
    x, y = (int(value) for value in rng.integers(60, 100, 2))
    if number in (0, 4):  # a face
        pen.ellipse((40, 20, 120, 140), fill="#f1c7a8" if number else "#d99c78")
        for eye in (65, 95):
            pen.ellipse((eye - 6, 60, eye + 6, 68), fill="white")
            pen.ellipse((eye - 3, 61, eye + 3, 67), fill="black")
        pen.arc((60, 90, 100, 120), 20, 160, fill="#a03030", width=3)
    elif number in (1, 5):  # an X-ray of a chest
        for side in (-1, 1):
            pen.ellipse((80 + side * 40 - 28, 30, 80 + side * 40 + 28, 140), fill="#808080")
        for rib in range(40, 140, 14):
            pen.arc((30, rib - 20, 130, rib + 20), 0, 180, fill="#b0b0b0", width=2)
    elif number in (2, 6):  # a mole
        pen.ellipse((x - 22, y - 18, x + 20, y + 22), fill="#5a3020")
        image = image.filter(ImageFilter.GaussianBlur(1.5))
    else:  # an iris
        pen.ellipse((10, 10, 150, 150), fill="#f5f0ea")
        pen.ellipse((40, 40, 120, 120), fill="#4a78a0" if number == 3 else "#7a5030")
        pen.ellipse((65, 65, 95, 95), fill="black")
    return image


def in_circle(image: Image.Image) -> Image.Image:
    """Blackens a picture outside of a circle, as a fundus camera does."""
    y, x = np.mgrid[: image.height, : image.width]
    middle = (SIDE - 1) / 2
    pixels: NDArray[np.uint8] = np.array(image)
    pixels[np.hypot(x - middle, y - middle) > 0.48 * SIDE] = 0
    return Image.fromarray(pixels)
