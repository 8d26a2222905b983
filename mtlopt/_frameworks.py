"""What the modules for frameworks share: which optimizer it is, and how ranks take part."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtlopt._alternating import AlternatingOptimizer
from mtlopt._base import MultiTaskOptimizer
from mtlopt._independent import IndependentOptimizer


def check_optimizer(optimizer: object, source: str) -> MultiTaskOptimizer:
    """Returns the optimizer of `source`, or says what to return there."""
    if not isinstance(optimizer, MultiTaskOptimizer):
        raise TypeError(
            f"`{source}` must return an optimizer of mtlopt, such as "
            f"mtlopt.PCGrad(optimizer, tasks), got {type(optimizer).__name__}."
        )
    return optimizer


def steps_per_task(optimizer: MultiTaskOptimizer) -> bool:
    """Whether each task has passes and a step of its own, for which DDP reduces the gradients."""
    if isinstance(optimizer, IndependentOptimizer):
        return optimizer.schedule == "sequential"
    return isinstance(optimizer, AlternatingOptimizer)


def reduce_in_the_optimizer(optimizer: MultiTaskOptimizer) -> None:
    """Names the ranks to a method that reduces each task's gradient itself, if none are named."""
    if optimizer.process_group is None:
        optimizer.process_group = dist.group.WORLD


class Losses(nn.Module):
    """A module whose forward pass is the user's `losses`: what DDP can be put around."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tasks: Sequence[str], batch: Any) -> Any:
        """Returns the losses of the tasks that are wanted now."""
        losses: Any = self.module.losses
        return losses(tasks, batch)


def reduce_in_ddp(module: nn.Module, device_ids: Any) -> nn.Module:
    """Wraps `module.losses` in DDP: a task reaches no other task's head."""
    return DistributedDataParallel(
        Losses(module), device_ids=device_ids, find_unused_parameters=True
    )


def sum_losses(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of some losses, or zero."""
    return torch.stack(list(values)).sum() if values else torch.zeros((), device=device)
