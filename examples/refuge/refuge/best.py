"""The weights that validated best: `best.pt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from refuge.errors import InputError
from refuge.files import load_checkpoint, save_checkpoint
from refuge.measurement.diagnosis import RatioClassifier
from refuge.measurement.evaluation import Trained
from refuge.methods import Network, build_network
from refuge.network import TASKS
from refuge.photographs.data import Photographs, load_splits
from refuge.photographs.repacked import SPLITS
from refuge.settings import Settings, compare, read_settings

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BEST = "best.pt"


def autocast(settings: Settings) -> AbstractContextManager[object]:
    """Returns the autocast context of a forward pass."""
    device, dtype = settings.torch_device().type, PRECISIONS[settings.amp]
    return torch.autocast(device, dtype, enabled=settings.amp != "off")


def load_photographs(
    settings: Settings, cache: Path, wanted: Sequence[str] = SPLITS
) -> dict[str, Photographs]:
    """Loads the photographs that a run's settings name.

    Args:
        settings: The run's settings.
        cache: Folder for decoded tensors.
        wanted: The splits to load.
    """
    return load_splits(
        settings.data,
        settings.size,
        settings.seed,
        cache,
        wanted,
        fold=settings.folds(),
        second_pass=settings.second_pass,
        crop=settings.crop == "on",
    )


def parts(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Returns the parts whose best epoch is chosen separately: one, or each task's own network.

    Returns:
        The tasks of each part, by the prefix of its weights' names.
    """
    if settings.method == "single":
        return {f"networks.{task}.": (task,) for task in TASKS}
    return {"": TASKS}


def save_best(
    folder: Path, epoch: int, improved: Sequence[str], trained: Trained, settings: Settings
) -> None:
    """Saves the weights of the parts that improved; the saved weights of the others stay.

    Args:
        folder: The run folder.
        epoch: Number of the epoch.
        improved: Prefixes of the parts that improved.
        trained: The network with the weights of this epoch.
        settings: The run's settings.
    """
    file = folder / BEST
    before: Mapping[str, Any] = {"model": {}, "epochs": {}}
    if file.exists() and "" not in improved:
        before = load_checkpoint(file)
    weights = trained.network.state_dict()
    own = {k: v for k, v in weights.items() if k.startswith(tuple(improved))}
    save_checkpoint(
        file,
        {
            "model": before["model"] | own,
            "epochs": before["epochs"] | dict.fromkeys(improved, epoch),
            "tasks": tuple(trained.tasks),
            "classifier": trained.classifier and tuple(trained.classifier),
            "settings": asdict(settings),
        },
    )


def load_best(folder: Path, network: Network, settings: Settings) -> tuple[Trained, dict[str, int]]:
    """Loads the best weights into a network; returns it with their epochs, by part.

    Raises:
        InputError: There are none, or not for this network.
    """
    file = folder / BEST
    state = load_checkpoint(file)
    try:
        if difference := compare(state["settings"], settings):
            raise InputError(f"{file}: not the weights of this run ({difference}).")
        network.load_state_dict(state["model"])
        classifier = state["classifier"] and RatioClassifier(*state["classifier"])
        device = settings.torch_device()
        trained = Trained(
            network,
            state["tasks"],
            classifier,
            partial(autocast, settings),
            device,
            settings.second_pass,
            settings.crop == "on",
        )
        epochs: dict[str, int] = state["epochs"]
    except (LookupError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file}: not the weights of this run ({reason}).") from error
    return trained, epochs


def open_run(folder: Path, device: str = "auto") -> tuple[Trained, Settings]:
    """Builds the network of a run folder, with its best weights.

    Args:
        folder: A folder written by `train.py`.
        device: The device for the network.

    Raises:
        InputError: The folder contains no run, or none that has been validated yet.
    """
    settings = replace(read_settings(folder), device=device)
    settings.check()
    if not (folder / BEST).exists():
        raise InputError(f"{folder}: has no {BEST} yet; the run must be validated once.")
    if difference := compare(load_checkpoint(folder / BEST).get("settings", {}), settings):
        raise InputError(f"{folder / BEST}: not the weights of this run ({difference}).")
    network = build_network(settings, pretrained=False).to(settings.torch_device())
    return load_best(folder, network, settings)[0], settings
