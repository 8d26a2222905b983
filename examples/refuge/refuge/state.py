"""The state of a training run, saved so that it resumes bit for bit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtlopt
from refuge.errors import InputError
from refuge.files import load_checkpoint, save_checkpoint, write_csv
from refuge.methods import Network
from refuge.network import TASKS
from refuge.processes import Processes
from refuge.settings import Settings, compare

LAST = "last.pt"


@dataclass
class TrainingState:
    """Everything that changes during training.

    Attributes:
        network: The network.
        optimizer: Its optimizer.
        scaler: Gradient scaler for float16; None otherwise.
        shuffle: Generator of the order of the pictures.
        epoch: Number of epochs completed.
        seconds: Time spent in them.
        best: Highest validation score so far, by part of the network.
        stale: Validations since the last improvement.
        history: A row per epoch.
    """

    network: Network
    optimizer: mtlopt.MultiTaskOptimizer
    scaler: torch.amp.GradScaler | None
    shuffle: torch.Generator
    epoch: int = 0
    seconds: float = 0.0
    best: dict[str, float | None] = field(default_factory=dict)
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    _begun: float = 0.0
    _losses: list[Mapping[str, Tensor]] = field(default_factory=list)

    def begin_epoch(self) -> None:
        """Starts an epoch's clock."""
        self._begun, self._losses = time.perf_counter(), []

    def note(self, losses: Mapping[str, Tensor]) -> None:
        """Records an iteration's losses."""
        self._losses.append(losses)

    def end_epoch(self) -> None:
        """Counts the epoch and averages its losses; None for a task without any."""
        self.epoch += 1
        row: dict[str, Any] = {"epoch": self.epoch}
        for task in TASKS:
            seen = [each[task] for each in self._losses if task in each]
            row[f"loss_{task}"] = torch.stack(seen).mean().item() if seen else None
        self.seconds += time.perf_counter() - self._begun
        self.history.append(row)

    def improved(self, scores: Mapping[str, float | None]) -> list[str]:
        """Records the parts' validation scores; returns the parts with a new highest score."""
        names = []
        for name, score in scores.items():
            best = self.best.get(name)
            if best is None or (score is not None and score > best):
                self.best[name] = score
                names.append(name)
        self.stale = 0 if names else self.stale + 1
        return names

    def ended(self, epochs: int, patience: int) -> bool:
        """Tells whether all epochs are done, or `patience` validations brought no improvement."""
        return self.epoch >= epochs or 0 < patience <= self.stale

    def save(self, folder: Path, processes: Processes, settings: Settings) -> None:
        """Writes `last.pt` and `history.csv` on the first process; the others wait."""
        rngs = processes.gather((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
        if not processes.first:
            return
        save_checkpoint(
            folder / LAST,
            {
                "model": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler and self.scaler.state_dict(),
                "shuffle": self.shuffle.get_state(),
                "rngs": rngs,
                "epoch": self.epoch,
                "seconds": self.seconds,
                "best": self.best,
                "stale": self.stale,
                "history": self.history,
                "settings": asdict(settings),
            },
        )
        columns = list(dict.fromkeys(column for row in self.history for column in row))
        rows = [[row.get(column) for column in columns] for row in self.history]
        write_csv(folder / "history.csv", columns, rows)

    def load(self, file: Path, processes: Processes, settings: Settings) -> None:
        """Restores a checkpoint, including each process's random generators.

        Raises:
            InputError: The file is not a checkpoint of such a run.
        """
        state = load_checkpoint(file)
        try:
            if difference := compare(state["settings"], settings):
                raise ValueError(difference)
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            self.shuffle.set_state(state["shuffle"])
            rng, cuda_rngs = state["rngs"][processes.rank]
            torch.set_rng_state(rng)
            if len(cuda_rngs) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(cuda_rngs)
            for name in ("epoch", "seconds", "best", "stale", "history"):
                setattr(self, name, state[name])
        except (LookupError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{file}: not a checkpoint of this run ({reason}).") from error
