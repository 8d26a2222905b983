"""Applies a trained network to photographs of any size: masks, fovea, diagnosis, referral.

Writes report.html with a card for each eye, predictions.csv, and for each photograph masks/NAME.png
(0 cup, 128 rim, 255 background, at the original size) and overlays/NAME.png. `--submission` writes
instead what REFUGE's own evaluation reads: segmentation/NAME.bmp, classification_results.csv and
fovea_localization_results.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from refuge.best import open_run
from refuge.errors import InputError, report_errors
from refuge.files import make_folder, write_csv, write_whole
from refuge.measurement.evaluation import SecondLook, Trained, diagnose, look_again, summarise
from refuge.measurement.figures import outline, save
from refuge.measurement.operating import RULES, OperatingPoint, read_point
from refuge.measurement.page import Card, write_page
from refuge.measurement.report import show_rates
from refuge.metrics import largest_component
from refuge.network import TASKS
from refuge.photographs.data import describe, shrink
from refuge.photographs.records import file_record
from refuge.settings import Parser

MARK = "deepskyblue"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """The network's findings in one photograph; None or NaN for tasks it has not learned.

    Attributes:
        picture: The photograph.
        mask: (height, width) of 0 cup, 128 rim, 255 background, or None.
        fovea: x and y in the photograph's pixels, or None.
        ratio: vCDR, measured on the masks at the network's input size.
        probabilities: Probability of glaucoma by classifier.
        risk: Their average, calibrated on validation; NaN if the run is not calibrated.
        verdict: "refer", "no sign", "ungradable", or "" if the run has no threshold.
    """

    picture: Image.Image
    mask: NDArray[np.uint8] | None
    fovea: Array | None
    ratio: float
    probabilities: Mapping[str, float]
    risk: float
    verdict: str


def examine(
    trained: Trained,
    file: Path,
    size: int,
    point: OperatingPoint | None = None,
    rule: str = "specificity",
) -> Finding:
    """Applies a network to one photograph.

    Args:
        trained: The network.
        file: The photograph.
        size: Side of the network's input.
        point: The run's operating point, if it has one.
        rule: Which of its thresholds to use.

    Raises:
        InputError: The file is not a readable picture.
    """
    picture, _ = file_record(file, None, frozenset(), None, None).read()
    answer = trained.ask(torch.from_numpy(shrink(picture, size).copy())[None].float() / 255)
    predictions = summarise([answer])
    mask = fovea = seen = None
    if trained.second_pass and len(predictions.masks) == 2:
        seen = look_again(trained, picture, predictions.masks["disc"][0])
    if seen:
        predictions.ratios[0] = seen.ratio
    if "disc" in answer:
        disc = largest_component(_enlarge(answer["disc"], picture.size) > 0.5)
        mask = np.where(disc, 128, 255).astype(np.uint8)
        if "cup" in answer:
            cup = _place(seen, picture.size) if seen else _enlarge(answer["cup"], picture.size)
            mask[disc & largest_component(cup > 0.5)] = 0
    if predictions.points is not None:
        fovea = (predictions.points[0] + 0.5) * np.array(picture.size) / size - 0.5
    said = {name: float(p[0]) for name, p in diagnose(predictions, trained.classifier).items()}
    risk, verdict = (float("nan"), "") if point is None else judge(trained, said, point, rule)
    return Finding(picture, mask, fovea, float(predictions.ratios[0]), said, risk, verdict)


def judge(
    trained: Trained, said: Mapping[str, float], point: OperatingPoint, rule: str
) -> tuple[float, str]:
    """Calibrates the average of both classifiers and compares it with the threshold.

    The threshold was chosen on photographs that both classifiers had judged. A photograph that one
    of them cannot judge, for want of a disc, is left to a human reader.
    """
    risk = float(point.calibration.probabilities(np.array(said["both"])))
    lost = trained.classifier is not None and np.isnan(said["vcdr"])
    if np.isnan(risk) or lost:
        return risk, "ungradable"
    return risk, "refer" if risk >= point.thresholds[rule] else "no sign"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return report_errors("predict.py", lambda: predict(_parser().parse_args(arguments)))


def predict(options: argparse.Namespace) -> None:
    """Examines each photograph and writes the findings."""
    trained, settings = open_run(options.run, options.device)
    if options.submission and (missing := [t for t in TASKS if t not in trained.tasks]):
        raise InputError(f"{options.run}: a submission needs all tasks, but {missing} not learned.")
    stems = [file.stem for file in options.pictures]
    if twice := [file for file in options.pictures if stems.count(file.stem) > 1]:
        raise InputError(f"{twice[-1]}: another picture has the same name; give them one by one.")
    point, reason = read_point(options.run)
    if point and options.rule not in point.thresholds:
        point, reason = None, f"no decision threshold by the rule {options.rule}."
    how = explain(point, reason, options.rule)
    # One at a time: full-size masks of a whole test split would fill the memory.
    pictures = tqdm(options.pictures, unit="picture", disable=None)
    findings = (
        (file, examine(trained, file, settings.size, point, options.rule)) for file in pictures
    )
    if options.submission:
        write_submission(options.out, findings)
    else:
        write_findings(options.out, findings, describe(settings.data), how)
        print(how)
    print(f"{options.out}: {len(stems)} pictures")


def explain(point: OperatingPoint | None, reason: str, rule: str) -> str:
    """Describes in one line when a photograph is referred, and how accurate that is."""
    if point is None:
        return reason
    found, split = point.test.get(rule), "test"
    if not found or None in (found["sensitivity"], found["specificity"]):
        found, split = point.validation[rule], "validation"
    both = ("sensitivity", "specificity")
    intervals: dict[str, Any] = {name: found.get(f"{name}_interval") for name in both}
    return (
        f"refer at a calibrated probability of at least {point.thresholds[rule]:.3f} "
        f"({RULES[rule]}); on the {split} split {show_rates(found, '', intervals)}."
    )


def write_findings(
    out: Path, findings: Iterable[tuple[Path, Finding]], source: str, how: str
) -> None:
    """Writes a page and a table, and masks and overlays as pictures.

    Args:
        out: The folder to write to.
        findings: Each photograph's file and findings.
        source: Name of the photographs that the network was trained on.
        how: The rule for referral, in words.
    """
    rows, cards = [], []
    for file, finding in findings:
        if finding.mask is not None:
            _write_mask(out / "masks" / f"{file.stem}.png", finding.mask)
        make_folder(out / "overlays")
        draw(out / "overlays" / f"{file.stem}.png", finding)
        x, y = (None, None) if finding.fovea is None else finding.fovea
        p = finding.probabilities
        numbers = (p["both"], p["fc"], p["vcdr"], finding.ratio, x, y, finding.risk)
        rows.append([file.name, *map(_number, numbers), finding.verdict])
        cards.append(
            Card(
                name=file.name,
                picture=f"overlays/{file.stem}.png",
                verdict=finding.verdict,
                numbers={
                    "vCDR": finding.ratio,
                    "calibrated probability": finding.risk,
                    "network's head": p["fc"],
                    "from vCDR": p["vcdr"],
                    "average": p["both"],
                },
            )
        )
    make_folder(out)
    header = ["photograph", "probability", "probability_fc", "probability_vcdr", "vcdr"]
    header += ["fovea_x", "fovea_y", "risk", "verdict"]
    write_csv(out / "predictions.csv", header, rows)
    write_page(out / "report.html", cards, source, how)


def write_submission(out: Path, findings: Iterable[tuple[Path, Finding]]) -> None:
    """Writes the files that REFUGE's evaluation reads."""
    risks, foveas = [], []
    for file, finding in findings:
        assert finding.mask is not None
        assert finding.fovea is not None
        _write_mask(out / "segmentation" / f"{file.stem}.bmp", finding.mask)
        risks.append([file.name, _number(finding.probabilities["both"])])
        foveas.append([file.name, *map(_number, finding.fovea)])
    make_folder(out)
    write_csv(out / "classification_results.csv", ["Filename", "Glaucoma Risk"], risks)
    columns = ["ImageName", "Fovea_X", "Fovea_Y"]
    write_csv(out / "fovea_localization_results.csv", columns, foveas)


def draw(file: Path, finding: Finding) -> None:
    """Draws the outlines of disc and cup and the fovea over a photograph, and the disc enlarged."""
    width, height = finding.picture.size
    pixels = np.asarray(finding.picture)
    disc = np.zeros((height, width), bool) if finding.mask is None else finding.mask < 255
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2 if disc.any() else 1, squeeze=False)[0]
    for ax in axes:
        ax.axis("off")
        ax.imshow(pixels)
        outline(ax, disc, MARK, "solid")
        if finding.mask is not None:
            outline(ax, finding.mask == 0, MARK, "dashed")
    if finding.fovea is not None:
        axes[0].plot(*finding.fovea, "x", color=MARK, markersize=9)
    if disc.any():
        rows, columns = np.nonzero(disc)
        reach = 1.1 * max(int(np.ptp(rows)), int(np.ptp(columns)), 4)
        axes[1].set_xlim(columns.mean() - reach, columns.mean() + reach)
        axes[1].set_ylim(rows.mean() + reach, rows.mean() - reach)
    save(figure, file)


def _enlarge(probabilities: Array, size: tuple[int, int]) -> Array:
    """Resizes a map to a photograph's size, with the same filter that resized the photograph."""
    maps = torch.from_numpy(probabilities)[None, None]
    large = torch.nn.functional.interpolate(maps, size[::-1], mode="bilinear", antialias=True)
    return large[0, 0].numpy()


def _place(seen: SecondLook, size: tuple[int, int]) -> Array:
    """Pastes the cup of a second look, resized, into an empty map of the photograph's size."""
    left, _, right, bottom = seen.box
    side = right - left
    # The box may extend beyond the photograph, by less than its own side.
    whole = np.zeros((size[1] + 2 * side, size[0] + 2 * side))
    whole[bottom : bottom + side, right : right + side] = _enlarge(seen.cup, (side, side))
    return whole[side : side + size[1], side : side + size[0]]


def _write_mask(file: Path, mask: NDArray[np.uint8]) -> None:
    make_folder(file.parent)
    form = file.suffix.removeprefix(".")
    write_whole(file, lambda opened: Image.fromarray(mask).save(opened, format=form))


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.6f}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(submission=False, device="auto", rule="specificity")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    rules = "; ".join(f"{name}: {what}" for name, what in RULES.items())
    parser.add_argument("--rule", choices=tuple(RULES), help=f"when to refer ({rules})")
    parser.add_argument("--submission", action="store_true", help="write a challenge submission")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
