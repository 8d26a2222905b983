"""What a resumed run needs to go on as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mtlopt
from checkpoint import load_checkpoint, save_checkpoint
from errors import InputError
from network import MultiTaskUNet


@dataclass
class TrainingState:
    """Everything that changes while a network is trained.

    Attributes:
        model: The network.
        optimizer: Updates it.
        scaler: Scales the loss in half precision; None otherwise.
        shuffle: Draws the order of the pictures.
        epoch: Passes over the pictures so far.
        seconds: Time spent in them.
        best: Highest validation score so far; None before the first.
        history: A row per epoch.
    """

    model: MultiTaskUNet
    optimizer: mtlopt.MultiTaskOptimizer
    scaler: torch.amp.GradScaler | None
    shuffle: torch.Generator
    epoch: int = 0
    seconds: float = 0.0
    best: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def is_best(self, score: float | None) -> bool:
        """Notes a validation score and tells whether none before was higher or as high."""
        if score is not None and self.best is not None and score <= self.best:
            return False
        self.best = score
        return True

    def save(self, file: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        save_checkpoint(
            file,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler and self.scaler.state_dict(),
                "shuffle": self.shuffle.get_state(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all(),
                "epoch": self.epoch,
                "seconds": self.seconds,
                "best": self.best,
                "history": self.history,
            },
        )

    def load(self, file: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            InputError: The file is no checkpoint of such a run.
        """
        state = load_checkpoint(file)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            self.shuffle.set_state(state["shuffle"])
            torch.set_rng_state(state["rng"])
            if len(state["cuda_rng"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            for name in ("epoch", "seconds", "best", "history"):
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{file}: not a checkpoint of this run ({reason}).") from error
