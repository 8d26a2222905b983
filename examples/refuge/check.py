"""Lists everything that is wrong with a data set, or probably wrong, before a run is started.

Exits with 1 if a photograph cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from refuge.errors import attempt, report_errors
from refuge.network import TASKS
from refuge.photographs.checks import find_warnings
from refuge.photographs.data import Photographs, find_records
from refuge.photographs.records import Record
from refuge.settings import Parser

SIZE = 128  # at which masks and repeated photographs are compared


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    faults: list[str] = []
    code = report_errors("check.py", lambda: check(_parser().parse_args(arguments), faults))
    return code or int(bool(faults))


def check(options: argparse.Namespace, faults: list[str]) -> None:
    """Prints faults and warnings, and how many photographs are annotated for what.

    Args:
        options: The command line.
        faults: Takes up a line for each fault.
    """
    found = find_records(options.data, lambda error: faults.extend(error.lines()))
    splits = {}
    for split, records in found.items():
        usable = [
            record
            for record in tqdm(records, f"reading {split}", unit="picture", disable=None)
            if _can_read(record, faults)
        ]
        if usable:
            splits[split] = Photographs(usable, SIZE)
    faults[:] = dict.fromkeys(faults)  # Several photographs may lack the same folder.
    for line in faults:
        print(f"fault: {line}")
    for line in find_warnings(splits, mirror=True):
        print(f"warning: {line}")
    for split in ("train", "val", "test"):
        if split not in splits:
            print(f"{split}: no photographs")
            continue
        known = splits[split].known
        counts = ", ".join(f"{task} {int(known[task].sum())}" for task in TASKS)
        positives = int((splits[split].labels == 1).sum())
        print(f"{split}: {len(splits[split])} photographs ({counts}; {positives} with glaucoma)")
    print(f"{options.data}: {len(faults)} faults")


def _can_read(record: Record, faults: list[str]) -> bool:
    return attempt(lambda error: faults.extend(error.lines()), record.read) is not None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="check.py", description=__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="a data set, as for train.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
