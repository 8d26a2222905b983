"""REFUGE's re-packed form: a folder per split with `index.json`, pictures and masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from refuge.errors import InputError, attempt, raise_all
from refuge.network import TASKS
from refuge.photographs.records import (
    EYES,
    Record,
    by_stem,
    file_record,
    only,
    read_eye,
    read_mask,
    to_number,
)

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
    found = [split for split in SPLITS if (folder / split).is_dir()]
    return {split: attempt(report, _read_split, folder / split, report) or [] for split in found}


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
    stems: set[str] = set()
    records = [
        attempt(report, _read_entry, f'{index}: entry "{key}"', entry, listing, stems)
        for key, entry in entries.items()
    ]
    return [record for record in records if record]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # `json` would silently keep the last of two labels.
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return entries


def _read_entry(where: str, entry: dict[str, Any], listing: Listing, stems: set[str]) -> Record:
    errors: list[InputError] = []
    report = errors.append
    attempt(report, _check_columns, where, entry)
    annotated = attempt(report, _read_annotated, where, entry) or []
    label = attempt(report, _read_label, where, entry) if "glaucoma" in annotated else None
    fovea = attempt(report, _read_fovea, where, entry) if "fovea" in annotated else None
    name = attempt(report, _read_name, where, entry, stems)
    picture = mask = None
    if name:
        picture = attempt(report, _find_picture, where, name, listing)
        if {"disc", "cup"} & set(annotated):
            mask = attempt(report, _find_mask, where, name, listing)
    eye = attempt(report, _read_eye, where, entry)
    size = attempt(report, _read_size, where, entry)
    if picture is None:
        if mask:
            attempt(report, read_mask, mask)
        raise_all(errors)
    assert picture
    eye = eye or read_eye(picture)
    record = file_record(picture, mask, frozenset(annotated), label, fovea, size, eye)
    if errors:
        # All of an entry's faults are said at once.
        attempt(report, record.read)
    raise_all(errors)
    return record


def _check_columns(where: str, entry: dict[str, Any]) -> None:
    # A misspelt `Annotations` would silently declare everything annotated.
    unknown = sorted(entry.keys() - {*REQUIRED, *OPTIONAL})
    faults = [f"unknown column {column!r}." for column in unknown]
    faults += [f"column {column!r} is missing." for column in REQUIRED if column not in entry]
    raise_all([InputError(f"{where}: {fault}") for fault in faults])


def _read_annotated(where: str, entry: dict[str, Any]) -> list[str]:
    annotated = entry.get("Annotations", list(TASKS))
    if not isinstance(annotated, list) or not all(task in TASKS for task in annotated):
        raise InputError(f"{where}: `Annotations` must be among {TASKS}, got {annotated}.")
    return annotated


def _read_label(where: str, entry: dict[str, Any]) -> int | None:
    if "Label" not in entry:
        return None
    label = to_number(entry["Label"])
    if label not in (0, 1):
        raise InputError(f"{where}: `Label` must be 0 or 1, got {entry['Label']!r}.")
    return int(label)


def _read_fovea(where: str, entry: dict[str, Any]) -> tuple[float, float] | None:
    if not {"Fovea_X", "Fovea_Y"} <= entry.keys():
        return None
    errors: list[InputError] = []
    x, y = (attempt(errors.append, _number, where, entry, f"Fovea_{axis}") for axis in "XY")
    raise_all(errors)
    assert x is not None
    assert y is not None
    return x, y


def _read_name(where: str, entry: dict[str, Any], stems: set[str]) -> str | None:
    if "ImgName" not in entry:
        return None
    name = entry["ImgName"]
    if not isinstance(name, str) or not name or {"/", "\\"} & set(name):
        raise InputError(f"{where}: `ImgName` must be a file name, got {name!r}.")
    # Masks are found by this name, so two pictures cannot share it.
    stem = Path(name).stem.casefold()
    if stem in stems:
        raise InputError(f"{where}: {name} is in an entry before it.")
    stems.add(stem)
    return name


def _read_eye(where: str, entry: dict[str, Any]) -> str:
    eye = entry.get("Eye", "")
    if eye not in EYES:
        raise InputError(f"{where}: `Eye` must be left or right, got {eye!r}.")
    return str(eye)


def _find_picture(where: str, name: str, listing: Listing) -> Path:
    pictures = listing(PICTURES).get(Path(name).stem.casefold(), [])
    pictures = [f for f in pictures if f.name.casefold() == name.casefold()]
    pictures = [f for f in pictures if f.name == name] or pictures
    if not pictures:
        raise InputError(f"{where}: {name}: no such file.")
    return only(pictures)


def _find_mask(where: str, name: str, listing: Listing) -> Path:
    masks = listing(MASKS).get(Path(name).stem.casefold(), [])
    masks = [f for f in masks if f.suffix.lower() in MASK_ENDINGS]
    if not masks:
        raise InputError(f"{where}: {Path(name).stem}.bmp: no such file.")
    return only(masks)


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
