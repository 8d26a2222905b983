"""REFUGE's re-packed form: a folder per split with `index.json`, pictures and masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from refuge.errors import InputError
from refuge.network import TASKS
from refuge.photographs.records import EYES, Record, by_stem, file_record, only, to_number

SPLITS = ("train", "val", "test")
PICTURES = ("images", "Images")
MASKS = ("seg", "gts", "Masks")
MASK_ENDINGS = (".bmp", ".png", ".tif", ".tiff", ".gif", ".jpg", ".jpeg")
REQUIRED = ("ImgName", "Label", "Fovea_X", "Fovea_Y")
OPTIONAL = ("Size_X", "Size_Y", "Eye", "Annotations")
Report = Callable[[InputError], None]
Listing = Callable[[tuple[str, ...]], dict[str, list[Path]]]


def is_repacked(folder: Path) -> bool:
    """Tells whether a folder has this form."""
    return any((folder / split / "index.json").is_file() for split in SPLITS)


def repacked_records(folder: Path, report: Report) -> dict[str, list[Record]]:
    """Reads the splits that exist.

    Args:
        folder: Contains `{train,val,test}/index.json`.
        report: Takes each fault of an entry, which is left out if it does not raise.

    Raises:
        InputError: An index cannot be read, or names a file or a column that does not exist.
    """
    return {
        split: _read_split(folder / split, report) for split in SPLITS if (folder / split).is_dir()
    }


def _read_split(folder: Path, report: Report) -> list[Record]:
    index = folder / "index.json"
    try:
        # Windows' editors start UTF-8 files with a byte order mark.
        text = index.read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{index}: not readable as JSON ({error}).") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise InputError(f"{index}: must map numbers to entries like {{'ImgName': ...}}.")
    listing: Listing = cache(partial(_list_files, folder))
    records: dict[str, Record] = {}
    for key, entry in entries.items():
        where = f'{index}: entry "{key}"'
        try:
            record = _read_entry(where, entry, listing)
            # Masks are found by this name, so two pictures cannot share it.
            stem = Path(record.name).stem.casefold()
            if stem in records:
                raise InputError(f"{where}: {record.name} is in an entry before it.")
        except InputError as error:
            report(error)
            continue
        records[stem] = record
    return list(records.values())


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # `json` would silently keep the last of two labels.
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return entries


def _read_entry(where: str, entry: dict[str, Any], listing: Listing) -> Record:
    # A misspelt `Annotations` would silently declare everything annotated.
    if unknown := sorted(entry.keys() - {*REQUIRED, *OPTIONAL}):
        raise InputError(f"{where}: unknown column {unknown[0]!r}.")
    if missing := [column for column in REQUIRED if column not in entry]:
        raise InputError(f"{where}: column {missing[0]!r} is missing.")
    annotated = entry.get("Annotations", list(TASKS))
    if not isinstance(annotated, list) or not all(task in TASKS for task in annotated):
        raise InputError(f"{where}: `Annotations` must be among {TASKS}, got {annotated}.")

    label = fovea = mask = None
    if "glaucoma" in annotated:
        label = to_number(entry["Label"])
        if label not in (0, 1):
            raise InputError(f"{where}: `Label` must be 0 or 1, got {entry['Label']!r}.")
    if "fovea" in annotated:
        fovea = (_number(where, entry, "Fovea_X"), _number(where, entry, "Fovea_Y"))
    name = entry["ImgName"]
    if not isinstance(name, str) or not name or {"/", "\\"} & set(name):
        raise InputError(f"{where}: `ImgName` must be a file name, got {name!r}.")
    stem = Path(name).stem.casefold()
    pictures = listing(PICTURES).get(stem, [])
    pictures = [f for f in pictures if f.name.casefold() == name.casefold()]
    pictures = [f for f in pictures if f.name == name] or pictures
    if not pictures:
        raise InputError(f"{where}: {name}: no such file.")
    if {"disc", "cup"} & set(annotated):
        masks = [f for f in listing(MASKS).get(stem, []) if f.suffix.lower() in MASK_ENDINGS]
        if not masks:
            raise InputError(f"{where}: {Path(name).stem}.bmp: no such file.")
        mask = only(masks)
    eye = entry.get("Eye", "")
    if eye not in EYES:
        raise InputError(f"{where}: `Eye` must be left or right, got {eye!r}.")
    label = None if label is None else int(label)
    size = _read_size(where, entry)
    return file_record(only(pictures), mask, frozenset(annotated), label, fovea, size, eye)


def _read_size(where: str, entry: dict[str, Any]) -> tuple[float, float] | None:
    if "Size_X" not in entry and "Size_Y" not in entry:
        return None
    if missing := [column for column in ("Size_X", "Size_Y") if column not in entry]:
        raise InputError(f"{where}: column {missing[0]!r} is missing.")
    return _number(where, entry, "Size_X"), _number(where, entry, "Size_Y")


def _number(where: str, entry: dict[str, Any], column: str) -> float:
    number = to_number(entry[column])
    if number is None:
        raise InputError(f"{where}: `{column}` must be a number, got {entry[column]!r}.")
    return number


def _list_files(folder: Path, names: tuple[str, ...]) -> dict[str, list[Path]]:
    found = sorted(f for f in folder.iterdir() if f.name in names and f.is_dir())
    if not found:
        raise InputError(f"{folder}: needs a folder named {' or '.join(names)}.")
    if len(found) > 1:
        both = " and ".join(f.name for f in found)
        raise InputError(f"{folder}: needs one folder named {' or '.join(names)}, got {both}.")
    files = sorted(found[0].iterdir())
    # macOS adds a hidden `._a.bmp` to `a.bmp`.
    return by_stem(f for f in files if f.is_file() and not f.name.startswith("."))
