"""Evaluates a run's best weights on any split, or on other photographs.

Writes metrics-SPLIT.json and predictions-SPLIT.csv into the run folder, or into `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from refuge.best import load_photographs, open_run
from refuge.errors import InputError, report_errors
from refuge.files import make_folder
from refuge.measurement.evaluation import evaluate
from refuge.measurement.operating import read_point
from refuge.measurement.report import missing_ratios, write_measured
from refuge.photographs.data import describe
from refuge.photographs.repacked import SPLITS
from refuge.settings import Parser, complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return report_errors("evaluate.py", lambda: measure(_parser().parse_args(arguments)))


def measure(options: argparse.Namespace) -> None:
    """Evaluates a split; writes and prints the results."""
    if options.data and not options.out:
        raise InputError("`--data` needs `--out`: the run folder is for the run's own photographs.")
    trained, settings = open_run(options.run, options.device)
    if options.data:
        settings = replace(settings, data=complete({"data": options.data})["data"], fold="")
    split, source = options.split, describe(settings.data)
    cache = (options.out or options.run).parent / ".cache"
    photographs = load_photographs(settings, cache, [split])[split]
    evaluation = evaluate(trained, photographs)
    point, reason = read_point(options.run)
    out = options.out or options.run
    make_folder(out)
    notes = [*([reason] if reason else []), *missing_ratios(evaluation)]
    facts = {"split": split, "photographs": len(photographs), "notes": notes}
    write_measured(out, split, source, photographs, evaluation, point, facts)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.set_defaults(split="test", data=None, out=None, device="auto")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--split", choices=SPLITS, help="which photographs (default: test)")
    parser.add_argument("--data", metavar="DIR", help="of which set (default: the run's own)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUN)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
