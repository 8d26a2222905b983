"""Prepares a training run, from the beginning or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from refuge.best import autocast, load_photographs
from refuge.errors import InputError
from refuge.files import write_json
from refuge.measurement.diagnosis import fit_ratio_classifier
from refuge.measurement.evaluation import Trained
from refuge.measurement.figures import draw_pictures
from refuge.methods import (
    build_network,
    build_optimizer,
    check_annotations,
    compile_network,
    draw_objectives,
)
from refuge.network import TASKS, count_parameters
from refuge.photographs.augmentation import augment, mirror
from refuge.photographs.checks import find_warnings
from refuge.photographs.data import Batch, Photographs, describe
from refuge.processes import ONE_PROCESS, Processes
from refuge.settings import Settings
from refuge.state import LAST, TrainingState

VALIDATE_EVERY = 5


@dataclass(frozen=True)
class Run:
    """A training run and the data it works on.

    Attributes:
        settings: Everything the final weights depend on.
        out: The run folder.
        processes: The processes that train together.
        source: Name of the photographs.
        splits: The photographs for training, validation and test.
        state: Everything that changes during training.
        model: The network, wrapped in DistributedDataParallel where the method needs it.
        trained: The network with the settings for evaluation.
        notes: Annotations that the training photographs lack.
    """

    settings: Settings
    out: Path
    processes: Processes
    source: str
    splits: dict[str, Photographs]
    state: TrainingState
    model: nn.Module
    trained: Trained
    notes: list[str]

    @property
    def iterations(self) -> int:
        """Number of batches per epoch; the last incomplete one is dropped."""
        return len(self.splits["train"]) // (self.settings.batch_size * self.processes.count)

    def batches(self) -> Iterator[Batch]:
        """Yields this process's share of each batch of an epoch, in a new random order."""
        pictures, size = self.splits["train"], self.settings.batch_size
        order = torch.randperm(len(pictures), generator=self.state.shuffle)
        used = order[: self.iterations * self.processes.count * size]
        for rows in used.view(self.iterations, -1, size):
            batch = pictures[rows[self.processes.rank]].to(self.trained.device)
            if self.settings.augment:
                batch = augment(batch)
            yield mirror(batch) if self.settings.mirror == "on" else batch

    def progress(self) -> tqdm[Any]:
        """Returns a progress bar over the iterations of the whole run."""
        total, done = (n * self.iterations for n in (self.settings.epochs, self.state.epoch))
        quiet = None if self.processes.first else True
        return tqdm(total=total, initial=done, desc="training", unit="it", disable=quiet)


def prepare(settings: Settings, out: Path, resume: bool, processes: Processes = ONE_PROCESS) -> Run:
    """Reads the photographs, builds or restores network and optimizer, starts the run folder.

    Args:
        settings: Everything the final weights depend on.
        out: The run folder, which must exist.
        resume: Whether to continue from `last.pt` if there is one.
        processes: The processes that train together.

    Raises:
        InputError: The photographs, the settings or the checkpoint cannot be used.
    """
    cache = out.parent / ".cache"
    splits = processes.from_first(lambda: load_photographs(settings, cache))
    pictures = splits["train"]
    if settings.batch_size * processes.count > len(pictures):
        raise InputError(
            f"`--batch-size` must be at most {len(pictures) // processes.count} (the training "
            f"pictures of a process), got {settings.batch_size}."
        )
    check_annotations(settings, pictures.known)
    learned = pictures.tasks()
    classifier, reason = fit_ratio_classifier(pictures.ratios.numpy(), pictures.labels.numpy())
    notes = [f"no training picture is annotated for {t}." for t in TASKS if t not in learned]
    notes += [reason] if reason else []
    notes += find_warnings(splits, settings.mirror == "on") if processes.first else []

    file = out / LAST
    state = build_state(settings, processes, file if resume and file.exists() else None)
    device = settings.torch_device()
    trained = Trained(
        state.network,
        learned,
        classifier,
        partial(autocast, settings),
        device,
        settings.second_pass,
        settings.crop == "on",
    )
    model, source = wrap(settings, state.network, processes), describe(settings.data)
    run = Run(settings, out, processes, source, splits, state, model, trained, notes)
    if processes.first:
        _begin_folder(run)
    for split in splits.values():
        split.keep_on(device)
    return run


def build_state(settings: Settings, processes: Processes, file: Path | None) -> TrainingState:
    """Builds network and optimizer, and restores them from a checkpoint if one is given."""
    device = settings.torch_device()
    network = build_network(settings, pretrained=file is None).to(device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_network(network, settings)
    scaler = torch.amp.GradScaler(device.type) if settings.amp == "fp16" else None
    fused = device.type == "cuda"
    optimizer = build_optimizer(settings, network, scaler, processes.group, fused)
    if not processes.first:
        torch.manual_seed(settings.seed + processes.rank)  # Independent dropout.
    shuffle = torch.Generator().manual_seed(settings.seed)
    state = TrainingState(network, optimizer, scaler, shuffle)
    if file:
        state.load(file, processes, settings)
    return state


def wrap(settings: Settings, network: nn.Module, processes: Processes) -> nn.Module:
    """Wraps the network in DDP, which averages gradients, for methods that step once per task.

    The other methods average each task's gradient themselves before combining them.
    """
    if processes.count == 1 or settings.method not in ("independent", "alternating", "single"):
        return network
    return DistributedDataParallel(network, find_unused_parameters=True)


def _begin_folder(run: Run) -> None:
    """Writes `config.json` and a figure of some training photographs."""
    if not run.state.ended(run.settings.epochs, run.settings.patience):
        (run.out / "metrics.json").unlink(missing_ok=True)  # It was measured after fewer epochs.
    facts = {
        "source": run.source,
        "pictures": {split: len(each) for split, each in run.splits.items()},
        "objectives": list(draw_objectives(run.settings)),
        "parameters": count_parameters(run.state.network),
        "validate_every": VALIDATE_EVERY,
        "torch": torch.__version__,
    }
    write_json(run.out / "config.json", asdict(run.settings) | facts)
    (run.out / "figures").mkdir(exist_ok=True)
    draw_pictures(run.out / "figures" / "pictures.png", run.splits["train"])
    for note in run.notes:
        tqdm.write(f"note: {note}")
