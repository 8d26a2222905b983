"""The files of results: a row per finished run, readable by anything, whole after a kill."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Config

RUNS = (*Config._fields, "score", "step", "validation", "test", "seconds", "error")
COSTS = ("method", "seconds", "forward", "backward", "error")


def write(value: Any) -> str:
    """Writes a cell; metrics as `name=value;name=value`."""
    if isinstance(value, Mapping):
        return ";".join(f"{name}={write(each)}" for name, each in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_metrics(text: str) -> dict[str, float]:
    """Reads a cell of metrics."""
    pairs = (pair.rpartition("=") for pair in text.split(";") if pair)
    return {name: float(value) for name, _, value in pairs}


def read_config(row: Mapping[str, str]) -> Config:
    """Reads which run a row is of."""
    return Config(
        row["method"], float(row["lr"]), row["variant"], int(row["seed"]), int(row["steps"])
    )


def read_scores(rows: Iterable[Mapping[str, str]]) -> dict[Config, float]:
    """Reads the validation scores of finished runs, which is all that the plan knows of them."""
    return {read_config(row): float(row["score"] or "-inf") for row in rows}


def append_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows in one write, behind the header and the last whole line."""
    columns = list(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    kept = path.read_bytes() if path.exists() else b""
    # A kill may have cut the last line short: that run is not finished.
    kept = kept[: kept.rfind(b"\n") + 1]
    if not kept:
        writer.writeheader()
    for row in rows:
        writer.writerow({column: write(row.get(column, "")) for column in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(len(kept))
        file.seek(len(kept))
        file.write(text.getvalue().encode())


def load_rows(path: Path) -> list[dict[str, str]]:
    """Reads the whole lines."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
