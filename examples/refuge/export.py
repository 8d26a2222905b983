"""Exports a run's best weights to ONNX, with what a program needs to reproduce its answers.

Writes network.onnx (input `images`, (1, 3, size, size); outputs the logits of each task) and
network.json: how photographs become that input, and how logits become masks, fovea, risk, verdict.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import mtlopt
from refuge.best import open_run
from refuge.errors import InputError, report_errors
from refuge.files import make_folder, write_json, write_whole
from refuge.measurement.evaluation import Trained
from refuge.measurement.operating import read_point
from refuge.measurement.quality import UNGRADABLE, read_limits
from refuge.settings import Parser, Settings

STEPS = {
    "colour": "RGB, 8 bits a channel, turned as its EXIF data say",
    "field": "bright part: largest of red, green, blue above a tenth of their 95 % quantile",
    "resize": "bilinear with antialiasing (Pillow's BILINEAR), to size x size",
    "values": "divided by 255; channels first, red, green, blue",
}
ANSWERS = {
    "disc, cup": "sigmoid, above 0.5, the largest component; only the part of the cup in the disc",
    "fovea": "centre of mass of the sigmoid, in double precision",
    "vcdr": "highest column of the cup over highest column of the disc",
    "probability": "mean of sigmoid(glaucoma) and sigmoid(slope * vcdr + intercept)",
    "score": "sigmoid(slope * logit(probability) + intercept) of the calibration, if there is one",
    "refer": "a score at or above the threshold, of a photograph that can be graded",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return report_errors("export.py", lambda: export(_parser().parse_args(arguments)))


def export(options: argparse.Namespace) -> None:
    """Writes the network and its description."""
    trained, settings = open_run(options.run, "cpu")
    if trained.second_pass:
        raise InputError(f"{options.run}: a run with `--second-pass` asks its network twice.")
    out = options.out or options.run
    make_folder(out)
    content = to_onnx(trained, settings)
    write_whole(out / "network.onnx", lambda opened: opened.write(content))
    point, reason = read_point(options.run)
    limits = read_limits(options.run)
    description = {
        "size": settings.size,
        "input": STEPS,
        "crop": "to a square around the field of view, black outside" if trained.crop else "none",
        "outputs": list(trained.tasks),
        "answers": ANSWERS,
        "ratio_classifier": trained.classifier and trained.classifier._asdict(),
        "operating_point": asdict(point) if point else reason,
        "ungradable": {
            name: [median - UNGRADABLE * below, median + UNGRADABLE * above]
            for name, (median, below, above) in limits.items()
        },
        "version": mtlopt.__version__,
    }
    write_json(out / "network.json", description)
    print(f"{out / 'network.onnx'}: {len(content)} bytes, {', '.join(trained.tasks)}")


def to_onnx(trained: Trained, settings: Settings) -> bytes:
    """Returns the network as an ONNX file.

    Raises:
        InputError: The packages for it are not installed.
    """
    images = torch.zeros(1, 3, settings.size, settings.size)
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own and its libraries' future.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Logits(trained).eval(),
                (images,),
                input_names=["images"],
                output_names=list(trained.tasks),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            content: bytes = program.model_proto.SerializeToString()
    except ImportError as error:
        raise InputError("an export needs ONNX: pip install onnx onnxscript.") from error
    return content


class Logits(nn.Module):
    """A network as a function of photographs alone."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.network, self.tasks = trained.network, tuple(trained.tasks)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the logits of all tasks, in their order."""
        logits = self.network(images, self.tasks)
        return tuple(logits[task] for task in self.tasks)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(out=None)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUN)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
