"""REFUGE as released: three zip files of pictures, three of annotations, unpacked anywhere."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openpyxl

from refuge.errors import InputError, attempt, raise_all
from refuge.network import TASKS
from refuge.photographs.records import Record, by_stem, file_record, only, to_number

Report = Callable[[InputError], None]


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
FOLDER_LABELS = {"Glaucoma": 1, "Non-Glaucoma": 0, "G": 1, "N": 0}


def is_released(folder: Path) -> bool:
    """Tells whether a folder contains REFUGE's own training folder, at any depth."""
    return any(f.is_dir() and not _is_shadow(folder, f) for f in folder.rglob("Training400"))


def released_records(folder: Path, report: Report) -> dict[str, list[Record]]:
    """Reads the splits that exist, found by REFUGE's own folder names.

    Args:
        folder: Where the zip files were unpacked; extra folders in between are allowed.
        report: Takes each fault of a photograph, which is left out if it does not raise.

    Raises:
        InputError: A picture lacks its mask, its row or its label, or a row its picture; or two
            files or rows contradict each other.
    """
    found = sorted(folder.rglob("*"))
    files = [file for file in found if file.is_file() and not _is_shadow(folder, file)]
    splits = {
        split: attempt(report, _read_split, folder, files, layout, report)
        for split, layout in LAYOUTS.items()
    }
    return {split: records for split, records in splits.items() if records}


def _is_shadow(folder: Path, file: Path) -> bool:
    # macOS adds hidden copies like these to its zip files.
    parts = file.relative_to(folder).parts
    return "__MACOSX" in parts or any(part.startswith(".") for part in parts)


def _read_split(folder: Path, files: list[Path], layout: Layout, report: Report) -> list[Record]:
    def inside(*names: str) -> Iterator[Path]:
        return (f for f in files if set(names) & set(f.relative_to(folder).parts[:-1]))

    endings = (".jpg", ".jpeg")
    pictures = by_stem(f for f in inside(*layout.pictures) if f.suffix.lower() in endings)
    annotations = list(inside(layout.annotations))
    if not pictures and not annotations:
        return []
    if not pictures:
        raise InputError(f"{folder}: has {layout.annotations} but no {layout.pictures[0]}/*.jpg.")
    masks = by_stem(f for f in annotations if f.suffix.lower() == ".bmp")
    tables = [f for f in annotations if f.name.casefold() == layout.table.casefold()]
    if not tables:
        raise InputError(f"{folder}: needs {layout.annotations}/{layout.table}.")
    table = only(tables)
    rows = _read_table(table, layout, report)
    for stem in sorted(rows.keys() - pictures.keys()):
        report(InputError(f"{table}: names {rows[stem][0]}, which is no picture in {folder}."))
    records = [
        attempt(report, _read_picture, stem, copies, masks.get(stem, []), rows, table, layout)
        for stem, copies in pictures.items()
    ]
    return [record for record in records if record]


def _read_picture(
    stem: str,
    copies: list[Path],
    masks: list[Path],
    rows: dict[str, tuple[Any, ...]],
    table: Path,
    layout: Layout,
) -> Record:
    errors: list[InputError] = []
    picture = attempt(errors.append, only, copies) or copies[0]
    mask = attempt(errors.append, only, masks) if masks else None
    if not masks:
        text = f"{picture.stem}.bmp is missing in {layout.annotations}"
        errors.append(InputError(f"{picture}: {text}."))
    if stem not in rows:
        errors.append(InputError(f"{table}: has no row for {picture.name}."))
    _, *place, given = rows.get(stem, (None, 0, 0, 0))
    where = table if layout.label else picture
    if layout.label is None:
        given = FOLDER_LABELS.get(picture.parent.name)
    label = to_number(given)
    if label not in (0, 1):
        text = f"the label of {picture.name} must be 0 or 1, got {given!r}"
        errors.append(InputError(f"{where}: {text}."))
    elif stem in rows:
        for file in (*copies, *masks):
            if FOLDER_LABELS.get(file.parent.name, label) != label:
                text = f"its folder contradicts {where}: which label is right?"
                errors.append(InputError(f"{file}: {text}"))
    x, y = map(to_number, place)
    if x is None or y is None:
        text = f"the fovea of {picture.name} must be numbers, got {place}"
        errors.append(InputError(f"{table}: {text}."))
    fovea = None if x is None or y is None or stem not in rows else (x, y)
    record = file_record(
        picture, mask, frozenset(TASKS), None if label is None else int(label), fovea
    )
    if errors:
        # All of a photograph's faults are said at once.
        attempt(errors.append, record.read)
    raise_all(errors)
    return record


def _read_table(table: Path, layout: Layout, report: Report) -> dict[str, tuple[Any, ...]]:
    """Reads ImgName, Fovea_X, Fovea_Y and the label (None without a column) by picture."""
    try:
        with warnings.catch_warnings():
            # openpyxl warns of Excel's extensions, which do not affect the values.
            warnings.simplefilter("ignore")
            content = io.BytesIO(table.read_bytes())
            sheet = openpyxl.load_workbook(content, read_only=True, data_only=True).active
            sheet.reset_dimensions()  # the file's own statement may be wrong
            rows = [[_strip(cell) for cell in row] for row in sheet.values]
    # openpyxl raises nearly any exception for a damaged file.
    except Exception as error:
        raise InputError(f"{table}: not a readable Excel file ({error}).") from error
    filled = [row for row in rows if any(cell is not None for cell in row)]
    header = filled[0] if filled else []
    wanted = ["ImgName", "Fovea_X", "Fovea_Y", *([layout.label] if layout.label else [])]
    found = [name for name in header if name is not None]
    raise_all(
        [
            InputError(f"{table}: must have one column {name!r}, got {count} in {found}.")
            for name in wanted
            if (count := found.count(name)) != 1
        ]
    )
    values: dict[str, tuple[Any, ...]] = {}
    for row in filled[1:]:
        cells = dict(zip(header, row, strict=False))
        name, *others = (cells.get(column) for column in wanted)
        if name is None and others == [None] * len(others):
            continue
        if name is None:
            report(InputError(f"{table}: a row lacks its ImgName: {others}."))
            continue
        stem = Path(str(name)).stem.casefold()
        label = others[2] if layout.label else None
        value = (name, others[0], others[1], label)
        if values.setdefault(stem, value)[1:] != value[1:]:
            report(InputError(f"{table}: has two rows for {name} that differ."))
    return values


def _strip(cell: Any) -> Any:
    return (cell.strip() or None) if isinstance(cell, str) else cell
