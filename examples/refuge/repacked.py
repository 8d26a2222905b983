"""REFUGE's re-packed form: a folder per split with `index.json`, pictures and masks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from errors import InputError
from network import TASKS
from records import Record, file_record

SPLITS = ("train", "val", "test")
PICTURES = ("images", "Images")
MASKS = ("seg", "gts", "Masks")
REQUIRED = ("ImgName", "Size_X", "Size_Y", "Label", "Fovea_X", "Fovea_Y")


def is_repacked(folder: Path) -> bool:
    """Tells whether a folder has this form."""
    return any((folder / split / "index.json").is_file() for split in SPLITS)


def repacked_records(folder: Path) -> dict[str, list[Record]]:
    """Reads the indexes of the splits that are there.

    Args:
        folder: Holds `{train,val,test}/index.json`.

    Raises:
        InputError: An index cannot be read, or names a file or a column that there is none of.
    """
    return {
        split: _read_split(folder / split)
        for split in SPLITS
        if (folder / split / "index.json").is_file()
    }


def _read_split(folder: Path) -> list[Record]:
    index = folder / "index.json"
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: not readable as JSON ({error}).") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise InputError(f"{index}: must map numbers to entries like {{'ImgName': ...}}.")
    return [_read_entry(index, key, entry) for key, entry in entries.items()]


def _read_entry(index: Path, key: str, entry: dict[str, Any]) -> Record:
    where = f'{index}: entry "{key}"'
    # A misspelt `Annotations` would silently declare everything annotated.
    if unknown := sorted(entry.keys() - {*REQUIRED, "Annotations"}):
        raise InputError(f"{where}: unknown column {unknown[0]!r}.")
    if missing := [column for column in REQUIRED if column not in entry]:
        raise InputError(f"{where}: column {missing[0]!r} is missing.")
    annotated = entry.get("Annotations", list(TASKS))
    if not isinstance(annotated, list) or not all(task in TASKS for task in annotated):
        raise InputError(f"{where}: `Annotations` must be among {TASKS}, got {annotated}.")

    label = fovea = mask = None
    if "glaucoma" in annotated:
        label = entry["Label"]
        if label not in (0, 1):
            raise InputError(f"{where}: `Label` must be 0 or 1, got {label!r}.")
    if "fovea" in annotated:
        fovea = (_number(where, entry, "Fovea_X"), _number(where, entry, "Fovea_Y"))
    name = entry["ImgName"]
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: `ImgName` must be a file name, got {name!r}.")
    picture = _subfolder(index.parent, PICTURES) / name
    if {"disc", "cup"} & set(annotated):
        masks = _subfolder(index.parent, MASKS)
        mask = next(iter(sorted(masks.glob(f"{picture.stem}.*"))), masks / f"{picture.stem}.bmp")
    size = (entry["Size_X"], entry["Size_Y"])
    return file_record(picture, mask, frozenset(annotated), label, fovea, size)


def _number(where: str, entry: dict[str, Any], column: str) -> float:
    value = entry[column]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: `{column}` must be a number, got {value!r}.")
    return float(value)


def _subfolder(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise InputError(f"{folder}: needs a folder named {' or '.join(names)}.")
