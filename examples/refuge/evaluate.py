"""Evaluates a run's best weights on any split, or on other photographs.

Writes metrics-SPLIT.json and predictions-SPLIT.csv into the run folder, or into `--out`. With
`--data` it is an external validation: does the run's threshold carry over, are its risks
calibrated? `--recalibrate` takes both from some tens of labelled photographs of the other camera.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refuge.best import load_photographs, open_run
from refuge.errors import InputError, report_errors
from refuge.files import make_folder
from refuge.measurement.evaluation import evaluate
from refuge.measurement.operating import (
    describe_transfer,
    measure_calibration,
    read_point,
    write_point,
)
from refuge.measurement.quality import (
    describe_differences,
    grade,
    measure_quality,
    read_limits,
    write_limits,
)
from refuge.measurement.report import decide, missing_ratios, write_measured
from refuge.photographs.data import describe, find_repeats
from refuge.photographs.repacked import SPLITS
from refuge.recalibration import recalibrate
from refuge.settings import Parser, complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return report_errors("evaluate.py", lambda: measure(_parser().parse_args(arguments)))


def measure(options: argparse.Namespace) -> None:
    """Evaluates a split; writes and prints the results."""
    if (options.data or options.recalibrate) and not options.out:
        flag = "--data" if options.data else "--recalibrate"
        raise InputError(f"`{flag}` needs `--out`: the run folder is for the run's own numbers.")
    trained, settings = open_run(options.run, options.device)
    (point, reason), limits = read_point(options.run), read_limits(options.run)
    if options.data:
        settings = replace(settings, data=complete({"data": options.data})["data"], fold="")
    split, source, out = options.split, describe(settings.data), options.out or options.run
    cache = out.parent / ".cache"
    photographs = load_photographs(settings, cache, [split])[split]
    if options.recalibrate:
        point, limits, local = recalibrate(trained, settings, options.recalibrate, cache)
        if repeats := find_repeats(local, photographs):
            raise InputError(
                f"`--recalibrate {options.recalibrate}`: {repeats[0][0]} is also among the "
                f"photographs to be measured ({len(repeats)} are); use others."
            )
        reason = ""
    evaluation = evaluate(trained, photographs)
    notes = [*([reason] if reason else []), *missing_ratios(evaluation)]
    if differences := describe_differences(
        measure_quality(photographs, evaluation.predictions), limits
    ):
        notes.append(f"{differences}.")
    evaluation = grade(photographs, evaluation, limits)
    facts: dict[str, Any] = {
        "split": split,
        "photographs": len(photographs),
    }
    if point:
        facts["threshold_from"] = point.where
        labels = np.where(evaluation.ungradable, -1, photographs.labels.numpy())
        risks = point.risks(evaluation.diagnoses["both"])
        facts["calibration"] = measure_calibration(labels, risks)
        found = decide(point, photographs, evaluation).get("specificity")
        if found and (options.data or options.recalibrate):
            facts["transfer"] = describe_transfer(point, found)
            notes.append(facts["transfer"])
        if options.recalibrate:
            notes.append(f"threshold and calibration are {point.where}, not the run's own.")
    make_folder(out)
    if options.recalibrate and point:
        write_point(out, point, "")
        write_limits(out, limits)
    facts["notes"] = notes
    write_measured(out, split, source, photographs, evaluation, point, facts)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(split="test", data=None, out=None, device="auto", recalibrate=None)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--split", choices=SPLITS, help="which photographs (default: test)")
    parser.add_argument("--data", metavar="DIR", help="of which set (default: the run's own)")
    parser.add_argument(
        "--recalibrate", metavar="DIR", help="take threshold and calibration from this set"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUN)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
