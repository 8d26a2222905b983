"""Applies a trained network to photographs of any number and size.

PICTURE is a file, a folder, a pattern ("clinic/**/*.jpg") or a CSV file with a column `picture`.
Writes report.html (counts, then fifty photographs a page, the most urgent first), predictions.csv,
and for each photograph masks/NAME.png (0 cup, 128 rim, 255 background, at the original size) and
overlays/NAME.jpg. Photographs that cannot be read are skipped and listed, and the exit code is 1.
`--submission` writes instead what REFUGE's own evaluation reads: segmentation/NAME.bmp,
classification_results.csv and fovea_localization_results.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mtlopt
from refuge.best import BEST, open_run
from refuge.errors import InputError, report_errors
from refuge.files import lock_folder, make_folder, write_csv
from refuge.measurement.evaluation import Trained
from refuge.measurement.operating import RULES, read_point
from refuge.measurement.quality import read_limits
from refuge.network import TASKS
from refuge.photographs.data import describe
from refuge.recalibration import recalibrate
from refuge.screening.drawing import write_pictures
from refuge.screening.examining import Decision, Finding, examine
from refuge.screening.inputs import Photograph, find_photographs
from refuge.screening.page import Summary, count, write_pages
from refuge.screening.reading import Prepared, read_photograph
from refuge.screening.results import (
    describe_decision,
    format_number,
    make_card,
    make_row,
    warn_of_differences,
    warn_of_eyes,
)
from refuge.screening.table import Table
from refuge.screening.workers import Workers
from refuge.settings import Parser, Settings

FEW = 50  # photographs that are not worth the start of worker processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    failed: list[str] = []
    code = report_errors("predict.py", lambda: predict(_parser().parse_args(arguments), failed))
    return code or int(bool(failed))


def predict(options: argparse.Namespace, failed: list[str]) -> None:
    """Examines each photograph and writes the findings.

    Args:
        options: The command line.
        failed: Takes up a line for each photograph that cannot be read.
    """
    photographs = find_photographs(options.pictures)
    workers, cores = options.workers, os.cpu_count() or 1
    if workers is None:
        workers = 0 if len(photographs) < FEW else min(4, cores)
    if workers < 0:
        raise InputError(f"`--workers` must be at least 0, got {workers}.")
    if workers:  # They and torch's threads would take turns on the cores.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
    with closing(Workers(workers)) as pool, ExitStack() as opened:
        trained, settings = open_run(options.run, options.device)
        decision = make_decision(options, trained, settings)
        if options.submission:
            submit(options, photographs, pool, (trained, settings, decision), failed)
        else:
            screen(options, photographs, pool, (trained, settings, decision), failed, opened)
    for line in failed:
        print(f"predict.py: skipped: {line}", file=sys.stderr)


def make_decision(options: argparse.Namespace, trained: Trained, settings: Settings) -> Decision:
    """Reads how the run decides, or takes it from local photographs."""
    (point, reason), limits = read_point(options.run), read_limits(options.run)
    if options.recalibrate:
        cache = options.out.parent / ".cache"
        point, limits, _ = recalibrate(trained, settings, options.recalibrate, cache)
    if point and options.rule not in point.thresholds:
        reason, point = f"no decision threshold by the rule {options.rule}.", None
    return Decision(point, options.rule, limits, reason)


def screen(
    options: argparse.Namespace,
    photographs: Sequence[Photograph],
    pool: Workers,
    run: tuple[Trained, Settings, Decision],
    failed: list[str],
    opened: ExitStack,
) -> None:
    """Writes tables, masks, drawings and pages."""
    trained, settings, decision = run
    out, names = options.out, {photograph.name for photograph in photographs}
    point = decision.point
    call = {
        "run": str(options.run.resolve()),
        "weights": hashlib.sha256((options.run / BEST).read_bytes()).hexdigest(),
        "rule": options.rule,
        "threshold": point.thresholds[options.rule] if point else None,
        "threshold_from": point.where if point else None,
    }
    table: Table | None = None
    if options.resume and (out / "predictions.csv").exists():
        table = _open_table(out, call, True, opened)
    done = {row["photograph"] for row in table.rows} if table else set()
    todo = [photograph for photograph in photographs if photograph.name not in done]
    written: deque[tuple[Future[None], dict[str, str]]] = deque()
    qualities = []
    arguments = [(photograph.file, settings.size, trained.crop) for photograph in todo]
    results = zip(todo, pool.map(read_photograph, arguments), strict=True)
    bar = tqdm(results, total=len(photographs), initial=len(done), unit="picture", disable=None)
    for photograph, prepared in bar:
        if prepared.error:
            failed.append(prepared.error)
            continue
        finding = examine(trained, photograph.file, prepared, decision)
        qualities.append(finding.quality)
        if table is None:  # Nothing is written before a photograph could be read.
            table = _open_table(out, call, False, opened)
        future = pool.start(write_pictures, *_drawing(out, photograph, prepared, finding))
        eye = photograph.eye or prepared.eye
        written.append((future, make_row(photograph, finding, decision, eye)))
        # A row says that its pictures are there.
        while written and (len(written) > pool.ahead or written[0][0].done()):
            _append(table, written)
    if table is None:
        raise InputError(failed[0] if failed else "no photograph was given.")
    while written:
        _append(table, written)
    rows = [row for row in table.rows if row["photograph"] in names]
    cards = [make_card(row, decision) for row in rows]
    warnings = warn_of_differences(qualities, decision) + warn_of_eyes(rows)
    where = f"{describe(settings.data)} ({options.run.resolve().name})"
    facts = {
        "network": f"trained on {where}",
        "run": str(options.run),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": f"mtlopt {mtlopt.__version__}",
    }
    how = describe_decision(decision, describe(settings.data))
    summary = Summary(facts, how, warnings, failed)
    write_pages(out, cards, summary)
    for line in (how, *warnings, f"{out}: {count(cards, summary)}"):
        print(line)


def submit(
    options: argparse.Namespace,
    photographs: Sequence[Photograph],
    pool: Workers,
    run: tuple[Trained, Settings, Decision],
    failed: list[str],
) -> None:
    """Writes the files that REFUGE's evaluation reads."""
    trained, settings, decision = run
    if missing := [task for task in TASKS if task not in trained.tasks]:
        raise InputError(f"{options.run}: a submission needs all tasks, but {missing} not learned.")
    stems = [photograph.file.stem for photograph in photographs]
    if twice := [p.file for p in photographs if stems.count(p.file.stem) > 1]:
        raise InputError(f"{twice[-1]}: another picture has the same name.")
    risks, foveas, written = [], [], deque[Future[None]]()
    arguments = [(photograph.file, settings.size, trained.crop) for photograph in photographs]
    bar = tqdm(pool.map(read_photograph, arguments), total=len(photographs), disable=None)
    for photograph, prepared in zip(photographs, bar, strict=True):
        if prepared.error:
            failed.append(prepared.error)
            continue
        finding, file = examine(trained, photograph.file, prepared, decision), photograph.file
        assert finding.fovea is not None
        mask = options.out / "segmentation" / f"{file.stem}.bmp"
        arguments_of_mask = (prepared, dict(finding.maps), finding.seen, None, mask, None)
        written.append(pool.start(write_pictures, *arguments_of_mask))
        while len(written) > pool.ahead:
            written.popleft().result()
        risks.append([file.name, format_number(finding.probabilities["both"])])
        foveas.append([file.name, *map(format_number, finding.fovea)])
    if not risks:
        raise InputError(failed[0])
    for future in written:
        future.result()
    make_folder(options.out)
    header = ["Filename", "Glaucoma Risk"]
    write_csv(options.out / "classification_results.csv", header, risks)
    header = ["ImageName", "Fovea_X", "Fovea_Y"]
    write_csv(options.out / "fovea_localization_results.csv", header, foveas)
    print(f"{options.out}: {len(risks)} pictures")


def _drawing(
    out: Path, photograph: Photograph, prepared: Prepared, finding: Finding
) -> tuple[object, ...]:
    mask = out / "masks" / f"{photograph.output}.png"
    drawing = out / "overlays" / f"{photograph.output}.jpg"
    return prepared, dict(finding.maps), finding.seen, finding.fovea, mask, drawing


def _open_table(out: Path, call: Mapping[str, Any], resume: bool, opened: ExitStack) -> Table:
    make_folder(out)
    opened.enter_context(lock_folder(out))
    return opened.enter_context(closing(Table(out, call, resume)))


def _append(table: Table, written: deque[tuple[Future[None], dict[str, str]]]) -> None:
    future, row = written.popleft()
    future.result()
    table.append(row)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(
        submission=False,
        device="auto",
        rule="specificity",
        recalibrate=None,
        resume=False,
        workers=None,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders, patterns")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    rules = "; ".join(f"{name}: {text.format(where='validation')}" for name, text in RULES.items())
    rules = rules.replace("%", "%%")
    parser.add_argument("--rule", choices=tuple(RULES), help=f"when to refer ({rules})")
    parser.add_argument(
        "--recalibrate", metavar="DIR", help="take threshold and calibration from this data set"
    )
    parser.add_argument("--resume", action="store_true", help="continue the table in --out")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read and write")
    parser.add_argument("--submission", action="store_true", help="write a challenge submission")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
