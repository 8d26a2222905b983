"""Settings of a run: the flags of `train.py`, their defaults and their rules."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from refuge.errors import InputError
from refuge.files import lock_folder, make_folder, read_json
from refuge.network import ENCODERS, NORMS, TASKS

METHODS = ("independent", "alternating", "joint", "balanced", "pcgrad", "gradnorm", "single")
AGGREGATED = "torchjd:"  # followed by the name of an aggregator
SWITCH = ("on", "off")
CHANGEABLE = ("epochs", "device")  # settings that a resumed run may change
RUNS = Path("runs")


@dataclass(frozen=True)
class Settings:
    """Everything that a run's final weights depend on; the defaults suit two CPU cores.

    As published: width 64, size 256, lr 1e-4, 300 epochs, batch size 8, norm "batch", mirror and
    crop "off".
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
    features: bool = False
    mirror: str = "on"
    crop: str = "on"
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
            rules["group_size"] = (self.group_size == 1, "1 when each task has its own network")
        if self.fold:
            kept = self.folds() is not None
            rules["fold"] = (kept, "like 1/5: which fold tests, of at least 3")
        if self.weights:
            kept = self.method == "joint" and self.loss_weights() is not None
            rules["weights"] = (kept, "like fovea=30,cup=2, positive, and with `--method joint`")
        if self.features:
            cut = self.method in ("balanced", "pcgrad", "gradnorm")
            cut = cut or self.method.startswith(AGGREGATED)
            rules["features"] = (cut, f"for balanced, pcgrad, gradnorm or {AGGREGATED}NAME")
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
        """Returns every task's weight in the joint loss; None if `--weights` cannot be parsed."""
        pairs = [pair.partition("=") for pair in self.weights.split(",") if pair]
        try:
            given = {task: float(weight) for task, _, weight in pairs}
        except ValueError:
            return None
        if len(given) < len(pairs) or not all(0 < weight < inf for weight in given.values()):
            return None
        return dict.fromkeys(TASKS, 1.0) | given if given.keys() <= set(TASKS) else None

    def folds(self) -> tuple[int, int] | None:
        """Returns which fold is tested and how many there are; None if `--fold` is not set."""
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.fold)
        if not found:
            return None
        fold, folds = int(found[1]), int(found[2])
        return (fold, folds) if 1 <= fold <= folds and folds >= 3 else None

    def torch_device(self) -> torch.device:
        """Resolves "auto" to the GPU if there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class Request(NamedTuple):
    """A request for a run: settings, the folder if one was named, and whether to resume."""

    settings: Settings
    out: Path | None
    resume: bool


class Parser(argparse.ArgumentParser):
    """Accepts no abbreviated flags, omits flags not given, and reports errors in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises an InputError instead of exiting."""
        raise InputError(message)


def parse(arguments: Sequence[str] | None = None) -> Request:
    """Parses the command line of `train.py`.

    A resumed run keeps its settings; only `--epochs` and `--device` may change.

    Raises:
        InputError: A value breaks its rule, or differs from the run to be resumed.
    """
    parser = Parser(
        prog="train.py",
        description="Trains one network for four tasks on fundus photographs.",
    )
    add_flags(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: in {RUNS}/)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    given = vars(parser.parse_args(arguments))
    out, resume = given.pop("out", None), given.pop("resume", False)
    given = complete(given)
    if resume:
        if out is None:
            raise InputError("`--resume` needs `--out`, the folder of the run to continue.")
        settings = _resumed(out, given)
    else:
        # The published norm does not suit the small size at which phantoms are trained.
        published = {} if given.get("data", "phantom") == "phantom" else {"norm": "batch"}
        settings = Settings(**(published | given))
    settings.check()
    return Request(settings, out, resume)


def add_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Adds the flags of a run to a parser, except those named in `without`."""
    default = asdict(Settings())

    def add(name: str, text: str, **options: Any) -> None:
        if name not in without:
            text = f"{text} (default: {default[name]})"
            parser.add_argument(_flag(name), help=text, **options)

    add("data", "phantom, or a folder with REFUGE as released or re-packed", metavar="DIR")
    methods = f"{', '.join(METHODS)} or {AGGREGATED}NAME, an aggregator of TorchJD"
    add("method", f"how the tasks are trained together: {methods}", metavar="NAME")
    add("epochs", "passes over the training pictures", type=int, metavar="N")
    add("lr", "learning rate of Adam", type=float, metavar="X")
    add("batch_size", "pictures per iteration and process", type=int, metavar="N")
    add("width", "channels of the first stage", type=int, metavar="N")
    add("size", "side of the network's input in pixels", type=int, metavar="N")
    drawn = "seed of weights, order, dropout, groups and held-out pictures"
    add("seed", drawn, type=int, metavar="N")
    add("encoder", "depth of the encoder", choices=tuple(ENCODERS))
    weights = "initial weights of the encoder: none, imagenet (a download) or a file"
    add("pretrained", weights, metavar="FILE")
    add("norm", "normalisation after each convolution; for photographs: batch", choices=NORMS)
    add("dropout", "dropout probability before the glaucoma head", type=float, metavar="P")
    add("group_size", "tasks per objective, grouped at random once", type=int, metavar="N")
    add(
        "weights",
        "weights in the joint loss, such as fovea=30; others are 1",
        metavar="A=X,B=Y",
    )
    cut = "combine gradients where the heads begin, with pcgrad, gradnorm or torchjd"
    add("features", cut, action="store_true")
    add("mirror", "mirror training pictures at random: off as published", choices=SWITCH)
    add("crop", "cut photographs to their field of view: off as published", choices=SWITCH)
    add("augment", "rotate, scale and recolour training pictures at random", action="store_true")
    add("second_pass", "segment the cup a second time, in the enlarged disc", action="store_true")
    stop = "stop after N validations without improvement; 0 for never"
    add("patience", stop, type=int, metavar="N")
    add("fold", "test on fold K of N of all pictures", metavar="K/N")
    add("amp", "precision of the forward pass", choices=("off", "bf16", "fp16"))
    add("compile", "compile the network first", action="store_true")
    add("device", "where to train", choices=("auto", "cpu", "cuda"))


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """Makes paths absolute, since a run may be resumed from elsewhere; adds `processes`."""
    given = given | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}
    for name, words in (("data", ("phantom",)), ("pretrained", ("none", "imagenet"))):
        if name in given and given[name] not in words:
            given[name] = str(Path(given[name]).resolve())
    return given


def read_settings(folder: Path) -> Settings:
    """Reads the settings in a run folder's `config.json`.

    Raises:
        InputError: The folder contains no run.
    """
    file = folder / "config.json"
    saved = read_json(file)
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
    for name in given.keys() - set(CHANGEABLE):
        if given[name] != (before := getattr(saved, name)):
            raise InputError(
                f"`{_flag(name)}` must be {before} as in {out / 'config.json'}, got {given[name]}."
            )
    return replace(saved, **given)


def compare(saved: Mapping[str, Any], settings: Settings) -> str:
    """Says in which setting a checkpoint and `config.json` differ, as somebody edited one; or "".

    Args:
        saved: The settings in the checkpoint.
        settings: The settings in `config.json`.
    """
    for name, value in asdict(settings).items():
        if name not in (*CHANGEABLE, "data") and saved.get(name) != value:
            return f"`{name}` was {saved.get(name)}, `config.json` says {value}"
    return ""


def claim_folder(request: Request, claimed: ExitStack | None = None) -> Path:
    """Creates the folder of a run; picks a free name if none was given.

    Args:
        request: The run.
        claimed: Takes up a lock on the folder.

    Raises:
        InputError: The folder cannot be created, or already contains a run.
    """
    out = request.out or _free_folder(request.settings)
    if not request.resume and (out / "config.json").exists():
        raise InputError(f"{out}: contains a run; give `--resume` to continue it.")
    make_folder(out)
    if claimed:
        claimed.enter_context(lock_folder(out))
    return out


def _free_folder(settings: Settings) -> Path:
    name = f"{Path(settings.data).resolve().name}-{settings.method.replace(':', '-')}"
    number = 1
    while (out := RUNS / (f"{name}-{number}" if number > 1 else name)).exists():
        number += 1
    return out


def _flag(name: str) -> str:
    return "--nproc-per-node" if name == "processes" else "--" + name.replace("_", "-")
