"""The table of predictions: a row for each photograph, appended as they are made."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from refuge.errors import InputError
from refuge.files import make_folder, read_json, write_csv, write_json

COLUMNS = (
    *("photograph", "probability", "probability_fc", "probability_vcdr", "vcdr"),
    *("fovea_x", "fovea_y", "risk", "verdict", "reason", "eye", "stated_eye", "output"),
)
Row = dict[str, str]


class Table:
    """`predictions.csv`, which an interrupted call leaves with the rows that it has made.

    Args:
        folder: Where it lies.
        call: What the rows depend on; a resumed call must agree.
        resume: Whether to keep the rows that are there.

    Raises:
        InputError: The rows that are there are of another call.
    """

    def __init__(self, folder: Path, call: Mapping[str, Any], resume: bool) -> None:
        self.file = folder / "predictions.csv"
        self.rows: list[Row] = []
        make_folder(folder)
        record = folder / "call.json"
        if resume and self.file.exists():
            before = read_json(record)
            for name, value in call.items():
                if before.get(name) != value:
                    raise InputError(
                        f"{folder}: holds predictions with `{name}` {before.get(name)}, not "
                        f"{value}; take another `--out`."
                    )
            self.rows = list(_read_rows(self.file))
        write_csv(self.file, COLUMNS, ([row[name] for name in COLUMNS] for row in self.rows))
        write_json(record, call)
        self._opened: IO[str] | None = None

    def append(self, row: Row) -> None:
        """Adds a row, at once."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(name, "") for name in COLUMNS])
        try:
            if self._opened is None:
                self._opened = self.file.open("a", encoding="utf-8", newline="")
            self._opened.write(line.getvalue())
            self._opened.flush()
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror}).") from error
        self.rows.append(row)

    def close(self) -> None:
        """Closes the file."""
        if self._opened:
            self._opened.close()


def _read_rows(file: Path) -> Iterable[Row]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable ({error}).") from error
    # A kill may have cut the last line.
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(io.StringIO(whole, newline="")))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise InputError(f"{file}: not a table of this program; take another `--out`.")
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:] if len(row) == len(COLUMNS)]
