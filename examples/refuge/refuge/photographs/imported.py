"""Photographs listed in `photographs.csv`, with a mask file each for disc and cup."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from refuge.errors import InputError, attempt, raise_all
from refuge.photographs.records import (
    EYES,
    Pair,
    Record,
    check_mask,
    read_eye,
    read_image,
    read_photograph,
    to_number,
)

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
    for column in columns:
        if column not in COLUMNS:
            text = f"unknown column {column!r}; known are {list(COLUMNS)}"
            report(InputError(f"{table}: {text}."))
    patients: dict[str, int] = {}
    names: set[str] = set()
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for line, row in enumerate(rows, 2):
        cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
        if "split" not in columns:
            number = patients.setdefault(cells["patient"] or cells["picture"], len(patients))
            cells["split"] = {0: "test", 1: "val"}.get(number % 5, "train")
        record = attempt(report, _read_row, folder, f"{table}: line {line}", cells, names)
        if record:
            splits[cells["split"]].append(record)
    return {split: records for split, records in splits.items() if records}


def _read_row(folder: Path, where: str, cells: dict[str, str], names: set[str]) -> Record:
    faults = []
    if not cells["picture"]:
        faults.append("names no picture.")
    elif cells["picture"] in names:
        faults.append(f"{cells['picture']} is in a line before it.")
    names.add(cells["picture"])
    given = {name: folder / cells[name] for name in ("picture", "disc", "cup") if cells[name]}
    files = {name: file for name, file in given.items() if file.is_file()}
    faults += [f"`{name}` {cells[name]}: no such file." for name in given if name not in files]
    if "cup" in given and "disc" not in given:
        faults.append("a cup needs the mask of its disc.")
    label, place = to_number(cells["glaucoma"]), (cells["fovea_x"], cells["fovea_y"])
    if cells["glaucoma"] and label not in (0, 1):
        faults.append(f"`glaucoma` must be 0 or 1, got {cells['glaucoma']}.")
    x, y = map(to_number, place)
    if any(place) and (x is None or y is None):
        faults.append("`fovea_x` and `fovea_y` must be two numbers.")
    fovea = None if x is None or y is None else (x, y)
    if cells["eye"] not in EYES:
        faults.append(f"`eye` must be left or right, got {cells['eye']}.")
    if cells["split"] not in SPLITS:
        faults.append(f"`split` must be in {SPLITS}, got {cells['split']}.")
    if faults:
        # All of a row's faults are said at once.
        errors = [InputError(f"{where}: {fault}") for fault in faults]
        if "picture" in files:
            attempt(errors.append, _read, files, fovea)
        else:
            for file in files.values():
                attempt(errors.append, read_image, file)
        raise_all(errors)
    known = {"glaucoma": label is not None, "fovea": fovea is not None}
    return Record(
        cells["picture"],
        frozenset({*files, *(task for task in known if known[task])} - {"picture"}),
        None if label is None else int(label),
        fovea,
        partial(_read, files, fovea),
        tuple(files.values()),
        eye=cells["eye"] or read_eye(files["picture"]),
    )


def _read(files: dict[str, Path], fovea: tuple[float, float] | None) -> Pair:
    errors: list[InputError] = []
    picture = attempt(errors.append, read_photograph, files["picture"], fovea)
    masks = [name for name in ("disc", "cup") if name in files]
    greys = {name: attempt(errors.append, read_image, files[name]) for name in masks}
    for name, grey in greys.items():
        if grey and picture:
            attempt(errors.append, check_mask, files[name], grey.size, picture.size)
    raise_all(errors)
    assert picture
    inside = {name: np.asarray(g.convert("L")) >= 128 for name, g in greys.items() if g}
    if "disc" not in inside:
        return picture, None
    mask = np.where(inside["disc"], np.uint8(128), np.uint8(255))
    if "cup" in inside:
        mask[inside["cup"] & inside["disc"]] = 0
    return picture, Image.fromarray(mask)
