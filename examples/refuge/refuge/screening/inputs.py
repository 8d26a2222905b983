"""Finds the photographs that a command line means: files, folders, patterns, and CSV files."""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from refuge.errors import InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
EYES = ("", "left", "right")


class Photograph(NamedTuple):
    """A photograph to examine.

    Attributes:
        file: Its file.
        name: Its name in tables and pages: the file's, with folders where those are needed to tell
            photographs apart.
        output: Path of its mask and drawing, without an ending, in the folder of each.
        eye: "left", "right", or "" where nobody said.
    """

    file: Path
    name: str
    output: str
    eye: str = ""


def find_photographs(arguments: Sequence[str]) -> list[Photograph]:
    """Lists the photographs, each once, in the order of the arguments.

    Args:
        arguments: Files; folders, searched to any depth; patterns such as `clinic/**/*.jpg`; and
            CSV files with a column `picture` (a path relative to the CSV file) and perhaps `eye`.

    Raises:
        InputError: A folder or pattern has no photographs, or a CSV file cannot be read.
    """
    found: dict[Path, str] = {}
    for argument in arguments:
        for file, eye in _expand(argument):
            found.setdefault(file, eye)
    names = [file.name for file in found]
    if len(set(names)) < len(names):
        # The shortest paths that tell all of them apart begin below what they have in common.
        absolute = [Path(os.path.abspath(file)) for file in found]
        common = Path(os.path.commonpath([file.parent for file in absolute]))
        names = [file.relative_to(common).as_posix() for file in absolute]
    stems = [os.path.splitext(name)[0] for name in names]
    folded = [stem.casefold() for stem in stems]
    repeated = (
        {stem for stem in folded if folded.count(stem) > 1}
        if len(set(folded)) < len(folded)
        else set()
    )
    return [
        Photograph(file, name, name if key in repeated else stem, eye)
        for (file, eye), name, stem, key in zip(found.items(), names, stems, folded, strict=True)
    ]


def _expand(argument: str) -> Iterator[tuple[Path, str]]:
    path = Path(argument)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())
        files = [f for f in files if not f.name.startswith(".")]
        if not files:
            raise InputError(f"{path}: has no photographs ({', '.join(ENDINGS)}).")
        yield from ((file, "") for file in files)
    elif path.suffix.lower() == ".csv":
        yield from _read_table(path)
    elif not path.exists() and glob.has_magic(argument):
        files = [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
        if not files:
            raise InputError(f"{argument}: no file matches this pattern.")
        yield from ((file, "") for file in files if not file.is_dir())
    else:
        yield path, ""


def _read_table(table: Path) -> Iterator[tuple[Path, str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: not readable as CSV ({error}).") from error
    if not rows or "picture" not in rows[0]:
        raise InputError(f"{table}: needs a column `picture` and at least one row.")
    for number, row in enumerate(rows, 2):
        name, eye = (row["picture"] or "").strip(), (row.get("eye") or "").strip().lower()
        if not name:
            raise InputError(f"{table}: line {number} names no picture.")
        if eye not in EYES:
            raise InputError(f"{table}: line {number}: `eye` must be left or right, got {eye}.")
        yield table.parent / name, eye
