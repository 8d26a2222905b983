"""Paints and writes tiny data sets, and names the program under test."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
from PIL import Image

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
TRAIN_PY = (sys.executable, str(ROOT / "examples/refuge/train.py"))
SIZE = 40
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


def write_table(file: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes an Excel file as REFUGE's are."""
    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(list(row))
    file.parent.mkdir(parents=True, exist_ok=True)
    book.save(file)
