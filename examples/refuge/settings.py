"""What the user asks of `train.py`: its flags, their defaults and their rules."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from checkpoint import read_json
from errors import InputError
from network import NORMS, TASKS

METHODS = ("independent", "alternating", "joint")
RUNS = Path("runs")


@dataclass(frozen=True)
class Settings:
    """Everything that a run's final weights depend on; the defaults suit two CPU cores.

    As published: width 64, size 256, lr 1e-4, 300 epochs, batch size 8.
    """

    data: str = "phantom"
    method: str = "independent"
    epochs: int = 14
    lr: float = 1e-3
    batch_size: int = 8
    width: int = 16
    size: int = 64
    seed: int = 0
    norm: str = "batch"
    group_size: int = 1
    amp: str = "off"
    compile: bool = False
    device: str = "auto"

    def check(self) -> None:
        """Raises an InputError that names the flag, its rule and the value."""
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < float("inf"), "positive"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "width": (self.width >= 1, "at least 1"),
            "size": (self.size >= 32 and self.size % 16 == 0, "a multiple of 16, at least 32"),
            "seed": (0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            "group_size": (1 <= self.group_size <= len(TASKS), f"between 1 and {len(TASKS)}"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise InputError(f"`{_flag(name)}` must be {rule}, got {getattr(self, name)}.")
        try:
            torch.empty(0, device=self.torch_device())
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"`--device` must be one that works here, got {self.device}."
            ) from error

    def torch_device(self) -> torch.device:
        """Resolves "auto" to the GPU where there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class Request(NamedTuple):
    """A run: its settings, its folder, and whether it goes on where it was left."""

    settings: Settings
    out: Path
    resume: bool


def parse(arguments: Sequence[str] | None = None) -> Request:
    """Reads the command line.

    A resumed run keeps its settings; only `--epochs` and `--device` may be given anew.

    Raises:
        InputError: A value breaks its rule, or the run folder does not fit.
    """
    given = vars(_parser().parse_args(arguments))
    out, resume = given.pop("out", None), given.pop("resume", False)
    if given.get("data", "phantom") != "phantom":
        # A run may be resumed from elsewhere.
        given["data"] = str(Path(given["data"]).resolve())
    if resume:
        if out is None:
            raise InputError("`--resume` needs `--out`, the folder of the run to go on with.")
        settings = _resumed(out, given)
    else:
        settings = Settings(**given)
        out = out or _free_folder(settings)
        if (out / "config.json").exists():
            raise InputError(f"{out}: holds a run; give `--resume` to go on with it.")
    settings.check()
    return Request(settings, out, resume)


def _resumed(out: Path, given: dict[str, Any]) -> Settings:
    file = out / "config.json"
    saved = read_json(file)
    names = [each.name for each in fields(Settings)]
    if missing := [name for name in names if name not in saved]:
        raise InputError(f"{file}: `{missing[0]}` is missing.")
    settings = replace(Settings(**{name: saved[name] for name in names}), **given)
    for name in given.keys() - {"epochs", "device"}:
        if given[name] != saved[name]:
            raise InputError(
                f"`{_flag(name)}` must be {saved[name]} as in {file}, got {given[name]}."
            )
    return settings


def _free_folder(settings: Settings) -> Path:
    name = f"{Path(settings.data).resolve().name}-{settings.method}"
    number = 1
    while (out := RUNS / (f"{name}-{number}" if number > 1 else name)).exists():
        number += 1
    return out


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Trains one network for four tasks on fundus photographs.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    default = asdict(Settings())

    def add(name: str, text: str, **options: Any) -> None:
        text = f"{text} (default: {default[name]})"
        parser.add_argument(_flag(name), help=text, **options)

    add("data", "phantom, or a folder with REFUGE as released or re-packed", metavar="DIR")
    add("method", "how the tasks share the network", choices=METHODS)
    add("epochs", "passes over the training pictures", type=int, metavar="N")
    add("lr", "learning rate of Adam", type=float, metavar="X")
    add("batch_size", "pictures in an iteration", type=int, metavar="N")
    add("width", "channels of the first stage", type=int, metavar="N")
    add("size", "side of the network's input in pixels", type=int, metavar="N")
    add(
        "seed", "draws weights, order, dropout, groups and held-out pictures", type=int, metavar="N"
    )
    add("norm", "normalisation after each convolution", choices=NORMS)
    add("group_size", "tasks in an objective, grouped at random once", type=int, metavar="N")
    add("amp", "precision of the forward pass", choices=("off", "bf16", "fp16"))
    add("compile", "compile the network first", action="store_true")
    add("device", "where to train", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: in {RUNS}/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser
