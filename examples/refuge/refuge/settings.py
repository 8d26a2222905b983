"""What the user asks of a run: the flags of `train.py`, their defaults and their rules."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from refuge.errors import InputError
from refuge.files import make_folder, read_json
from refuge.network import ENCODERS, NORMS, TASKS

METHODS = ("independent", "alternating", "joint", "pcgrad", "gradnorm", "single")
AGGREGATED = "torchjd:"  # and the name of an aggregator
LATER = ("augment", "second_pass", "patience", "fold")
RUNS = Path("runs")


@dataclass(frozen=True)
class Settings:
    """Everything that a run's final weights depend on; the defaults suit two CPU cores.

    As published: width 64, size 256, lr 1e-4, 300 epochs, batch size 8, norm "batch".
    """

    data: str = "phantom"
    method: str = "independent"
    epochs: int = 7
    lr: float = 1e-3
    batch_size: int = 8
    width: int = 16
    size: int = 64
    seed: int = 0
    encoder: str = "vgg13"
    pretrained: str = "none"
    norm: str = "running"
    dropout: float = 0.8
    group_size: int = 1
    weights: str = ""
    augment: bool = False
    second_pass: bool = False
    patience: int = 0
    fold: str = ""
    amp: str = "off"
    compile: bool = False
    device: str = "auto"
    processes: int = 1

    def check(self) -> None:
        """Raises an InputError that names the flag, its rule and the value."""
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < inf, "positive"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "width": (self.width >= 1, "at least 1"),
            "size": (self.size >= 32 and self.size % 16 == 0, "a multiple of 16, at least 32"),
            "seed": (0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "patience": (self.patience >= 0, "at least 0"),
            "group_size": (1 <= self.group_size <= len(TASKS), f"between 1 and {len(TASKS)}"),
            "method": (
                self.method in METHODS or self.method.startswith(AGGREGATED),
                f"{', '.join(METHODS)} or {AGGREGATED}NAME",
            ),
        }
        if self.pretrained != "none":
            rules["width"] = (self.width == 64, "64 as the pretrained encoders have")
        if self.method == "single":
            rules["group_size"] = (self.group_size == 1, "1 where each task has its own network")
        if self.fold:
            kept = self.folds() is not None
            rules["fold"] = (kept, "like 1/5: which fold tests, of at least 3")
        if self.weights:
            kept = self.method == "joint" and self.loss_weights() is not None
            rules["weights"] = (kept, "like fovea=30,cup=2, positive, and with `--method joint`")
        for name, (kept, rule) in rules.items():
            if not kept:
                raise InputError(f"`{_flag(name)}` must be {rule}, got {getattr(self, name)}.")
        try:
            torch.empty(0, device=self.torch_device())
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"`--device` must be one that works here, got {self.device}."
            ) from error

    def loss_weights(self) -> dict[str, float] | None:
        """Gives every task's weight in the joint loss; None where `--weights` cannot be read."""
        pairs = [pair.partition("=") for pair in self.weights.split(",") if pair]
        try:
            given = {task: float(weight) for task, _, weight in pairs}
        except ValueError:
            return None
        if len(given) < len(pairs) or not all(0 < weight < inf for weight in given.values()):
            return None
        return dict.fromkeys(TASKS, 1.0) | given if given.keys() <= set(TASKS) else None

    def folds(self) -> tuple[int, int] | None:
        """Gives which fold tests and how many there are; None where `--fold` says none."""
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.fold)
        if not found:
            return None
        fold, folds = int(found[1]), int(found[2])
        return (fold, folds) if 1 <= fold <= folds and folds >= 3 else None

    def torch_device(self) -> torch.device:
        """Resolves "auto" to the GPU where there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class Request(NamedTuple):
    """A run: its settings, its folder where one was named, and whether it goes on."""

    settings: Settings
    out: Path | None
    resume: bool


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, leaves out those not given, and fails in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises an InputError in the place of ending the program."""
        raise InputError(message)


def parse(arguments: Sequence[str] | None = None) -> Request:
    """Reads the command line of `train.py`.

    A resumed run keeps its settings; only `--epochs` and `--device` may be given anew.

    Raises:
        InputError: A value breaks its rule, or the run to go on with is another.
    """
    parser = Parser(
        prog="train.py",
        description="Trains one network for four tasks on fundus photographs.",
    )
    add_flags(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: in {RUNS}/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    given = vars(parser.parse_args(arguments))
    out, resume = given.pop("out", None), given.pop("resume", False)
    given = complete(given)
    if resume:
        if out is None:
            raise InputError("`--resume` needs `--out`, the folder of the run to go on with.")
        settings = _resumed(out, given)
    else:
        # Photographs are trained on as published, phantoms at a size that this norm does not suit.
        published = {} if given.get("data", "phantom") == "phantom" else {"norm": "batch"}
        settings = Settings(**(published | given))
    settings.check()
    return Request(settings, out, resume)


def add_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Adds the flags of a run to a program's own, but for some."""
    default = asdict(Settings())

    def add(name: str, text: str, **options: Any) -> None:
        if name not in without:
            text = f"{text} (default: {default[name]})"
            parser.add_argument(_flag(name), help=text, **options)

    add("data", "phantom, or a folder with REFUGE as released or re-packed", metavar="DIR")
    methods = f"{', '.join(METHODS)} or {AGGREGATED}NAME, an aggregator of TorchJD"
    add("method", f"how the tasks share the network: {methods}", metavar="NAME")
    add("epochs", "passes over the training pictures", type=int, metavar="N")
    add("lr", "learning rate of Adam", type=float, metavar="X")
    add("batch_size", "pictures in an iteration of each process", type=int, metavar="N")
    add("width", "channels of the first stage", type=int, metavar="N")
    add("size", "side of the network's input in pixels", type=int, metavar="N")
    drawn = "draws weights, order, dropout, groups and held-out pictures"
    add("seed", drawn, type=int, metavar="N")
    add("encoder", "depth of the encoder", choices=tuple(ENCODERS))
    weights = "weights the encoder starts from: none, imagenet (a download) or a file"
    add("pretrained", weights, metavar="FILE")
    add("norm", "normalisation after each convolution; of photographs: batch", choices=NORMS)
    add("dropout", "probability before the glaucoma head", type=float, metavar="P")
    add("group_size", "tasks in an objective, grouped at random once", type=int, metavar="N")
    add("weights", "weights in the joint loss, as fovea=30; the others are 1", metavar="A=X,B=Y")
    add("augment", "turn, mirror and recolour training pictures", action="store_true")
    add("second_pass", "look at the disc again, enlarged, for the cup", action="store_true")
    stop = "end after N validations without a better one; 0 for never"
    add("patience", stop, type=int, metavar="N")
    add("fold", "test on fold K of N of all pictures", metavar="K/N")
    add("amp", "precision of the forward pass", choices=("off", "bf16", "fp16"))
    add("compile", "compile the network first", action="store_true")
    add("device", "where to train", choices=("auto", "cpu", "cuda"))


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """Makes paths absolute, since a run may be resumed from elsewhere, and counts the processes."""
    given = given | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}
    for name, words in (("data", ("phantom",)), ("pretrained", ("none", "imagenet"))):
        if name in given and given[name] not in words:
            given[name] = str(Path(given[name]).resolve())
    return given


def read_settings(folder: Path) -> Settings:
    """Reads what a run folder's `config.json` says of the run.

    Raises:
        InputError: The folder holds no run.
    """
    file = folder / "config.json"
    saved = read_json(file)
    # Runs of before these options were there did without.
    saved = {name: getattr(Settings(), name) for name in LATER} | saved
    names = [each.name for each in fields(Settings)]
    if missing := [name for name in names if name not in saved]:
        raise InputError(f"{file}: `{missing[0]}` is missing.")
    for name, default in asdict(Settings()).items():
        if not isinstance(
            saved[name], (int, float) if isinstance(default, float) else type(default)
        ):
            raise InputError(f"{file}: `{name}` must be like {default!r}, got {saved[name]!r}.")
    return Settings(**{name: saved[name] for name in names})


def _resumed(out: Path, given: dict[str, Any]) -> Settings:
    saved = read_settings(out)
    for name in given.keys() - {"epochs", "device"}:
        if given[name] != (before := getattr(saved, name)):
            raise InputError(
                f"`{_flag(name)}` must be {before} as in {out / 'config.json'}, got {given[name]}."
            )
    return replace(saved, **given)


def claim_folder(request: Request) -> Path:
    """Makes the folder of a run; one that was not named gets a free name.

    Raises:
        InputError: It cannot be made, or holds a run already.
    """
    out = request.out or _free_folder(request.settings)
    if not request.resume and (out / "config.json").exists():
        raise InputError(f"{out}: holds a run; give `--resume` to go on with it.")
    make_folder(out)
    return out


def _free_folder(settings: Settings) -> Path:
    name = f"{Path(settings.data).resolve().name}-{settings.method.replace(':', '-')}"
    number = 1
    while (out := RUNS / (f"{name}-{number}" if number > 1 else name)).exists():
        number += 1
    return out


def _flag(name: str) -> str:
    return "--nproc-per-node" if name == "processes" else "--" + name.replace("_", "-")
