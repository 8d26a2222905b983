"""Says what a trained network sees in photographs of any size.

Writes predictions.csv, and for each photograph masks/NAME.png (0 cup, 128 rim, 255 background, at
the original size) and overlays/NAME.png. `--submission` writes instead what REFUGE's own evaluation
reads: segmentation/NAME.bmp, classification_results.csv and fovea_localization_results.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from checkpoint import make_folder, write_csv, write_whole
from errors import InputError, report_errors
from measurement.evaluation import Trained, diagnose, summarise
from measurement.figures import outline, save
from metrics import largest_component
from network import TASKS
from photographs.data import shrink
from photographs.records import file_record
from runs import open_run
from settings import Parser

MARK = "deepskyblue"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What the network sees in one photograph; None or NaN for what it has not learned.

    Attributes:
        picture: The photograph.
        mask: (height, width) of 0 cup, 128 rim, 255 background, or None.
        fovea: x and y in the photograph's pixels, or None.
        ratio: vCDR, measured on the masks of the network's own size.
        probabilities: Of glaucoma, by name of classifier.
    """

    picture: Image.Image
    mask: NDArray[np.uint8] | None
    fovea: Array | None
    ratio: float
    probabilities: Mapping[str, float]


def examine(trained: Trained, file: Path, size: int) -> Finding:
    """Shows one photograph to a network.

    Args:
        trained: The network.
        file: The photograph.
        size: Side of the network's input.

    Raises:
        InputError: The file is no readable picture.
    """
    picture, _ = file_record(file, None, frozenset(), None, None).read()
    answer = trained.ask(torch.from_numpy(shrink(picture, size).copy())[None].float() / 255)
    predictions = summarise([answer])
    mask = fovea = None
    if "disc" in answer:
        disc = largest_component(_enlarge(answer["disc"], picture.size) > 0.5)
        mask = np.where(disc, 128, 255).astype(np.uint8)
        if "cup" in answer:
            mask[disc & largest_component(_enlarge(answer["cup"], picture.size) > 0.5)] = 0
    if predictions.points is not None:
        fovea = (predictions.points[0] + 0.5) * np.array(picture.size) / size - 0.5
    said = {name: float(p[0]) for name, p in diagnose(predictions, trained.classifier).items()}
    return Finding(picture, mask, fovea, float(predictions.ratios[0]), said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return report_errors("predict.py", lambda: predict(_parser().parse_args(arguments)))


def predict(options: argparse.Namespace) -> None:
    """Writes what the network sees in each photograph."""
    trained, settings = open_run(options.run, options.device)
    if options.submission and (missing := [t for t in TASKS if t not in trained.tasks]):
        raise InputError(f"{options.run}: a submission needs all tasks, but {missing} not learned.")
    stems = [file.stem for file in options.pictures]
    if twice := [file for file in options.pictures if stems.count(file.stem) > 1]:
        raise InputError(f"{twice[-1]}: another picture has the same name; give them one by one.")
    # One at a time: a test split of full-size masks would fill the memory.
    pictures = tqdm(options.pictures, unit="picture", disable=None)
    findings = ((file, examine(trained, file, settings.size)) for file in pictures)
    (write_submission if options.submission else write_findings)(options.out, findings)
    print(f"{options.out}: {len(stems)} pictures")


def write_findings(out: Path, findings: Iterable[tuple[Path, Finding]]) -> None:
    """Writes a table, and masks and overlays as pictures."""
    rows = []
    for file, finding in findings:
        if finding.mask is not None:
            _write_mask(out / "masks" / f"{file.stem}.png", finding.mask)
        make_folder(out / "overlays")
        draw(out / "overlays" / f"{file.stem}.png", file.name, finding)
        x, y = (None, None) if finding.fovea is None else finding.fovea
        p = finding.probabilities
        numbers = (p["both"], p["fc"], p["vcdr"], finding.ratio, x, y)
        rows.append([file.name, *map(_number, numbers)])
    make_folder(out)
    header = ["photograph", "probability", "probability_fc", "probability_vcdr", "vcdr"]
    write_csv(out / "predictions.csv", [*header, "fovea_x", "fovea_y"], rows)


def write_submission(out: Path, findings: Iterable[tuple[Path, Finding]]) -> None:
    """Writes what REFUGE's evaluation reads."""
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


def draw(file: Path, name: str, finding: Finding) -> None:
    """Draws outlines of disc and cup and the fovea over a photograph."""
    width, height = finding.picture.size
    figure = Figure(figsize=(5, 5 * height / width + 0.4), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    ax.imshow(np.asarray(finding.picture))
    if finding.mask is not None:
        outline(ax, finding.mask < 255, MARK, "solid")
        outline(ax, finding.mask == 0, MARK, "dashed")
    if finding.fovea is not None:
        ax.plot(*finding.fovea, "x", color=MARK, markersize=9)
    probability, ratio = finding.probabilities["both"], finding.ratio
    said = [] if np.isnan(probability) else [f"glaucoma {probability:.2f}"]
    said += [] if np.isnan(ratio) else [f"vCDR {ratio:.2f}"]
    ax.set_title(", ".join([name, *said]), fontsize=9)
    save(figure, file)


def _enlarge(probabilities: Array, size: tuple[int, int]) -> Array:
    """Resizes a map to a photograph's width and height, by the rule the photograph shrank by."""
    maps = torch.from_numpy(probabilities)[None, None]
    large = torch.nn.functional.interpolate(maps, size[::-1], mode="bilinear", antialias=True)
    return large[0, 0].numpy()


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
    parser.set_defaults(submission=False, device="auto")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--submission", action="store_true", help="in the challenge's own form")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
