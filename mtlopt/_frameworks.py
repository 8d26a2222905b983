"""Shared by the modules for frameworks: checks the optimizer and connects it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtlopt._core.optimizer import MultiTaskOptimizer


def check_optimizer(optimizer: object, source: str) -> MultiTaskOptimizer:
    """Returns the optimizer that `source` made, or raises an error that says what to return."""
    if not isinstance(optimizer, MultiTaskOptimizer):
        raise TypeError(
            f"`{source}` must return an optimizer of mtlopt, such as "
            f"mtlopt.PCGrad(optimizer, tasks), got {type(optimizer).__name__}."
        )
    return optimizer


def connect(optimizer: MultiTaskOptimizer, scaler: Any, before_update: Any, ranks: int) -> None:
    """Gives the optimizer the framework's scaler, hook and ranks, unless it has its own."""
    optimizer.scaler = optimizer.scaler or scaler
    optimizer.register_step_pre_hook(before_update)
    reduces = not optimizer._model_is_wrapped  # Otherwise DDP reduces each task's gradient.
    if ranks > 1 and reduces and optimizer.process_group is None:
        optimizer.process_group = dist.group.WORLD


class Losses(nn.Module):
    """Calls the user's `losses` in its forward pass, so that DDP can wrap it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tasks: Sequence[str], batch: Any) -> Any:
        """Returns the losses of the requested tasks."""
        losses: Any = self.module.losses
        return losses(tasks, batch)


def reduce_in_ddp(module: nn.Module, device_ids: Any) -> nn.Module:
    """Wraps `module.losses` in DDP; a task leaves the other tasks' heads unused."""
    return DistributedDataParallel(
        Losses(module), device_ids=device_ids, find_unused_parameters=True
    )


def sum_losses(values: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Returns the sum of the losses, zero if there are none."""
    return torch.stack([*values.values()]).sum() if values else torch.zeros((), device=device)
