"""Paints and writes tiny data sets, and names the program under test."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from refuge.photographs.phantoms import Eye, draw_phantom, to_pixels

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]
TRAIN_PY = (sys.executable, str(ROOT / "examples/refuge/train.py"))
SIZE = 40
TINY = ("--size", 32, "--width", 2, "--batch-size", 4)  # of a run that takes a second
# The package is found beside the programs where it is not installed.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
}


def paint(seed: int) -> tuple[Image.Image, Image.Image]:
    """Paints noise with a bright disc of radius 8 and a cup of radius 4 in the middle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    reach = np.hypot(x, y)
    picture = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
    picture[reach < 8] += 80
    picture[reach < 4] += 50
    mask = np.where(reach < 4, 0, np.where(reach < 8, 128, 255)).astype(np.uint8)
    return Image.fromarray(picture), Image.fromarray(mask)


def entry(name: str, label: int | None = 0, **others: Any) -> dict[str, Any]:
    """Makes an entry of `index.json`."""
    size = {"Size_X": SIZE, "Size_Y": SIZE}
    return {"ImgName": name, **size, "Label": label, "Fovea_X": 30.0, "Fovea_Y": 20.0} | others


def write_split(folder: Path, entries: Sequence[dict[str, Any]], masks: str = "seg") -> None:
    """Writes one split in the re-packed form."""
    (folder / "images").mkdir(parents=True)
    (folder / masks).mkdir()
    for seed, each in enumerate(entries):
        picture, mask = paint(seed)
        picture.save(folder / "images" / each["ImgName"])
        mask.save(folder / masks / f"{Path(each['ImgName']).stem}.bmp")
    index = {str(i): each for i, each in enumerate(entries)}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def write_table(file: Path, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
    """Writes an Excel file as REFUGE's are."""
    import openpyxl  # The oldest environment is tested without the program and its packages.

    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(list(row))
    file.parent.mkdir(parents=True, exist_ok=True)
    book.save(file)


def write_repacked(folder: Path) -> None:
    """Writes twelve training and four test pictures, alternately with and without glaucoma."""
    write_split(folder / "train", [entry(f"a{i:02}.jpg", i % 2) for i in range(12)])
    write_split(folder / "test", [entry(f"t{i:02}.jpg", i % 2) for i in range(4)])


def write_released(folder: Path) -> None:
    """Writes REFUGE's own layout, two pictures a split, with folders between as zips leave them."""
    pictures = {
        "g0001": "Training400/Training400/Glaucoma",
        "n0001": "Training400/Training400/Non-Glaucoma",
        "V0001": "REFUGE-Validation400",
        "V0002": "REFUGE-Validation400",
        "T0001": "zip/Test400",
        "T0002": "zip/Test400",
    }
    masks = {
        "g0001": "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Glaucoma",
        "n0001": "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma",
        "V0001": "REFUGE-Validation400-GT/Disc_Cup_Masks",
        "V0002": "REFUGE-Validation400-GT/Disc_Cup_Masks",
        "T0001": "REFUGE-Test-GT/Disc_Cup_Masks/G",
        "T0002": "REFUGE-Test-GT/Disc_Cup_Masks/N",
    }
    for seed, stem in enumerate(pictures):
        picture, mask = paint(seed)
        for image, place in (
            (picture, f"{pictures[stem]}/{stem}.jpg"),
            (mask, f"{masks[stem]}/{stem}.bmp"),
        ):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / place)
    write_table(
        folder / "Annotation-Training400/Annotation-Training400/Fovea_location.xlsx",
        ("ID", "ImgName", "Fovea_X", "Fovea_Y"),
        [(1, "g0001.jpg", 10.5, 20), (2, "n0001.jpg", 11, 21)],
    )
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma Label", "Fovea_X", "Fovea_Y"),
        [(1, "V0001.jpg", 1, 12, 22), (2, "V0002.jpg", 0, 13, 23)],
    )
    write_table(
        folder / "REFUGE-Test-GT/Glaucoma_label_and_Fovea_location.xlsx",
        ("ID", "ImgName", "Label(Glaucoma=1)", "Fovea_X", "Fovea_Y"),
        [(1, "T0001.jpg", 1, 14, 24), (2, "T0002.jpg", 0, 15, 25)],
    )


def write_phantoms(folder: Path, eyes: Sequence[Eye], size: int = 96, flip: bool = False) -> None:
    """Writes phantoms as one split in the re-packed form, perhaps mirrored."""
    (folder / "images").mkdir(parents=True)
    (folder / "seg").mkdir()
    index = {}
    for each in eyes:
        picture, mask = draw_phantom(each, size)
        x, y = to_pixels(each.fovea, size)
        if flip:
            picture, mask, x = ImageOps.mirror(picture), ImageOps.mirror(mask), size - 1 - x
        name = f"p{each.seed:06}"
        picture.save(folder / "images" / f"{name}.png")
        mask.save(folder / "seg" / f"{name}.bmp")
        place = {"Fovea_X": x, "Fovea_Y": y}
        index[str(each.seed)] = {"ImgName": f"{name}.png", "Label": int(each.glaucoma), **place}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
