"""The processes that train one network together, where torchrun started several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How many there are, and which one this is; by default it is alone."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of all; None for a process that is alone."""
        return dist.group.WORLD if self.count > 1 else None

    def gather(self, value: T) -> list[T]:
        """Collects a value from every process, on every process; waits for all."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # filled now

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Lets the first process go first, so that the others find what it has cached."""
        if not self.first:
            self.gather(None)
        yield
        if self.first:
            self.gather(None)


@contextmanager
def start_processes(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started, each with a GPU of its own where they use any."""
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
