"""Photographs listed in `photographs.csv`, with a mask file each for disc and cup."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from refuge.errors import InputError
from refuge.photographs.records import EYES, Pair, Record, read_image, read_photograph, to_number

TABLE = "photographs.csv"
SPLITS = ("train", "val", "test")
COLUMNS = {
    "picture": "the photograph, a path relative to the table; the only required column",
    "split": "train, val or test; without the column every fifth patient tests and the next is val",
    "patient": "whose eye it is; both eyes of a patient stay in one split",
    "eye": "left or right",
    "glaucoma": "1 or 0; empty where unknown",
    "disc": "mask of the optic disc with its cup, white inside; empty where not annotated",
    "cup": "mask of the cup, white inside",
    "fovea_x": "of the fovea in the photograph's pixels, the first pixel's centre being 0",
    "fovea_y": "the same from above",
}
Report = Callable[[InputError], None]


def is_imported(folder: Path) -> bool:
    """Tells whether a folder has this form."""
    return (folder / TABLE).is_file()


def imported_records(folder: Path, report: Report) -> dict[str, list[Record]]:
    """Reads the table.

    Args:
        folder: Contains `photographs.csv`.
        report: Takes each fault; the row is left out if it does not raise.

    Raises:
        InputError: The table cannot be read.
    """
    table = folder / TABLE
    try:
        with table.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: not readable as CSV ({error}).") from error
    if "picture" not in columns:
        raise InputError(f"{table}: needs a column `picture`, got {columns}.")
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise InputError(f"{table}: unknown column {unknown[0]!r}; known are {list(COLUMNS)}.")
    patients: dict[str, int] = {}
    names: set[str] = set()
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for line, row in enumerate(rows, 2):
        cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
        try:
            record = _read_row(folder, f"{table}: line {line}", cells)
            if record.name in names:
                raise InputError(f"{table}: line {line}: {record.name} is in a line before it.")
            split = cells["split"]
            if "split" not in columns:
                number = patients.setdefault(cells["patient"] or cells["picture"], len(patients))
                split = {0: "test", 1: "val"}.get(number % 5, "train")
            if split not in SPLITS:
                raise InputError(f"{table}: line {line}: `split` must be in {SPLITS}, got {split}.")
        except InputError as error:
            report(error)
            continue
        names.add(record.name)
        splits[split].append(record)
    return {split: records for split, records in splits.items() if records}


def _read_row(folder: Path, where: str, cells: dict[str, str]) -> Record:
    if not cells["picture"]:
        raise InputError(f"{where}: names no picture.")
    files = {name: folder / cells[name] for name in ("picture", "disc", "cup") if cells[name]}
    for name, file in files.items():
        if not file.is_file():
            raise InputError(f"{where}: `{name}` {cells[name]}: no such file.")
    if "cup" in files and "disc" not in files:
        raise InputError(f"{where}: a cup needs the mask of its disc.")
    annotated, label, fovea = set(files) - {"picture"}, None, None
    if cells["glaucoma"]:
        label = to_number(cells["glaucoma"])
        if label not in (0, 1):
            raise InputError(f"{where}: `glaucoma` must be 0 or 1, got {cells['glaucoma']}.")
        annotated.add("glaucoma")
    if cells["fovea_x"] or cells["fovea_y"]:
        x, y = to_number(cells["fovea_x"]), to_number(cells["fovea_y"])
        if x is None or y is None:
            raise InputError(f"{where}: `fovea_x` and `fovea_y` must be two numbers.")
        fovea = (x, y)
        annotated.add("fovea")
    if cells["eye"] not in EYES:
        raise InputError(f"{where}: `eye` must be left or right, got {cells['eye']}.")
    return Record(
        cells["picture"],
        frozenset(annotated),
        None if label is None else int(label),
        fovea,
        partial(_read, files, fovea),
        tuple(files.values()),
        eye=cells["eye"],
    )


def _read(files: dict[str, Path], fovea: tuple[float, float] | None) -> Pair:
    picture = read_photograph(files["picture"], fovea)
    if "disc" not in files:
        return picture, None
    mask = np.full(picture.size[::-1], 255, np.uint8)
    for name, value in (("disc", 128), ("cup", 0)):
        if name in files:
            inside = np.asarray(read_image(files[name]).convert("L")) >= 128
            if inside.shape != mask.shape:
                raise InputError(
                    f"{files[name]}: a mask must be of its picture's size ({picture.width} x "
                    f"{picture.height}), got {inside.shape[1]} x {inside.shape[0]}."
                )
            mask[inside & ((mask < 255) | (name == "disc"))] = value
    return picture, Image.fromarray(mask)
