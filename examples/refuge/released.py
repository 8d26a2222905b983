"""REFUGE as released: three zip files of pictures, three of annotations, unpacked anywhere."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openpyxl

from errors import InputError
from network import TASKS
from records import Record, file_record


@dataclass(frozen=True)
class Layout:
    """Where REFUGE keeps one split.

    Attributes:
        pictures: Names that the folder of pictures may have.
        annotations: Name of the folder of annotations.
        table: Name of the Excel file in it.
        label: Column of the label; None where the picture's folder is the label.
    """

    pictures: tuple[str, ...]
    annotations: str
    table: str
    label: str | None


LAYOUTS = {
    "train": Layout(("Training400",), "Annotation-Training400", "Fovea_location.xlsx", None),
    "val": Layout(
        ("REFUGE-Validation400",),
        "REFUGE-Validation400-GT",
        "Fovea_locations.xlsx",
        "Glaucoma Label",
    ),
    "test": Layout(
        ("Test400", "REFUGE-Test400"),
        "REFUGE-Test-GT",
        "Glaucoma_label_and_Fovea_location.xlsx",
        "Label(Glaucoma=1)",
    ),
}
FOLDER_LABELS = {"Glaucoma": 1, "Non-Glaucoma": 0}


def is_released(folder: Path) -> bool:
    """Tells whether REFUGE's own training folder lies in a folder, at whatever depth."""
    return any(folder.rglob("Training400"))


def released_records(folder: Path) -> dict[str, list[Record]]:
    """Finds the splits that are there, by REFUGE's own folder names.

    Args:
        folder: Where the zip files were unpacked; folders between are tolerated.

    Raises:
        InputError: A picture lacks its mask, its row or its label, or a row its picture.
    """
    files = [file for file in sorted(folder.rglob("*")) if _is_data(file)]
    splits = {split: _read_split(folder, files, layout) for split, layout in LAYOUTS.items()}
    return {split: records for split, records in splits.items() if records}


def _is_data(file: Path) -> bool:
    # macOS adds such shadows of every file to the zips it packs.
    return not file.name.startswith(".") and "__MACOSX" not in file.parts and file.is_file()


def _read_split(folder: Path, files: list[Path], layout: Layout) -> list[Record]:
    def inside(*names: str) -> Iterator[Path]:
        return (f for f in files if set(names) & set(f.relative_to(folder).parts[:-1]))

    pictures = {f.stem: f for f in inside(*layout.pictures) if f.suffix.lower() == ".jpg"}
    if not pictures:
        return []
    annotations = list(inside(layout.annotations))
    masks = {f.stem: f for f in annotations if f.suffix.lower() == ".bmp"}
    table = next((f for f in annotations if f.name == layout.table), None)
    if table is None:
        raise InputError(f"{folder}: needs {layout.annotations}/{layout.table}.")
    rows = _read_table(table, layout)
    if strangers := rows.keys() - pictures.keys():
        raise InputError(f"{table}: names {min(strangers)}, which is no picture in {folder}.")

    records = []
    for stem, picture in pictures.items():
        if stem not in masks:
            raise InputError(f"{picture}: {stem}.bmp is missing in {layout.annotations}.")
        if stem not in rows:
            raise InputError(f"{table}: has no row for {picture.name}.")
        *fovea, label = rows[stem]
        if layout.label is None:
            label = FOLDER_LABELS.get(picture.parent.name)
        if label not in (0, 1):
            where = table if layout.label else picture
            raise InputError(f"{where}: the label of {picture.name} must be 0 or 1, got {label!r}.")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in fovea):
            raise InputError(f"{table}: the fovea of {picture.name} must be numbers, got {fovea}.")
        point = (float(fovea[0]), float(fovea[1]))
        records.append(file_record(picture, masks[stem], frozenset(TASKS), int(label), point))
    return records


def _read_table(table: Path, layout: Layout) -> dict[str, tuple[Any, ...]]:
    """Reads Fovea_X, Fovea_Y and the label (None without a column) of each picture."""
    try:
        with warnings.catch_warnings():
            # openpyxl warns of Excel's own extensions, which no value depends on.
            warnings.simplefilter("ignore")
            header, *rows = openpyxl.load_workbook(table, data_only=True).active.values
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{table}: not a readable Excel file ({error}).") from error
    wanted = ["ImgName", "Fovea_X", "Fovea_Y", *([layout.label] if layout.label else [])]
    found = [str(name).strip() for name in header if name is not None]
    if missing := [column for column in wanted if column not in found]:
        raise InputError(f"{table}: column {missing[0]!r} is missing among {found}.")
    at = {str(name).strip(): i for i, name in enumerate(header)}
    values = {}
    for row in rows:
        name = row[at["ImgName"]]
        if name is not None:
            label = row[at[layout.label]] if layout.label else None
            values[Path(str(name)).stem] = (row[at["Fovea_X"]], row[at["Fovea_Y"]], label)
    return values
