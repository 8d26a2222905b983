"""Options: what every method accepts."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from mtlopt._gradients.losses import CheckFinite


class Options(NamedTuple):
    """The options of every method."""

    scaler: torch.amp.GradScaler | None = None
    check_finite: CheckFinite = False
    process_group: dist.ProcessGroup | None = None

    def check(self, optimizer: Optimizer, needs_closure: bool) -> None:
        """Refuses values out of range, or that do not fit the class of optimizer."""
        if self.check_finite not in (False, True, "skip"):
            raise ValueError(
                f"`check_finite` must be False, True or 'skip', got {self.check_finite!r}."
            )
        if self.scaler is not None and not isinstance(self.scaler, torch.amp.GradScaler):
            raise TypeError(
                f"`scaler` must be a torch.amp.GradScaler, got {self.scaler!r}: "
                "scaler=torch.amp.GradScaler()."
            )
        if needs_closure and (self.scaler is not None or self.process_group is not None):
            raise ValueError(
                "`scaler` and `process_group` must be None for a class that needs a closure, "
                f"got {type(optimizer).__name__}."
            )
