"""The processes that torchrun started to train one network together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from refuge.errors import InputError

T = TypeVar("T")
WAIT = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process's rank and the number of processes; by default a single process."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and prints."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of all processes; None for a single process."""
        return dist.group.WORLD if self.count > 1 else None

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, on every process; waits for all."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # filled now

    def from_first(self, make: Callable[[], T]) -> T:
        """Calls a function on the first process and returns the result on all.

        Raises:
            InputError: On all processes, if the call raised it.
        """
        made: tuple[T | None, str] = (None, "")
        if self.first:
            try:
                made = (make(), "")
            except InputError as error:
                made = (None, str(error))
        value, reason = self.gather(made)[0]
        if reason:
            raise InputError(reason)
        return value  # type: ignore[return-value]  # None only with a reason


ONE_PROCESS = Processes()


@contextmanager
def start_processes(device: torch.device) -> Iterator[Processes]:
    """Initialises the process group if torchrun started this process, with one GPU each."""
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    if device.type == "cuda":
        if (rank := int(os.environ["LOCAL_RANK"])) >= (count := torch.cuda.device_count()):
            raise InputError(f"`--nproc-per-node` must be at most {count}, the number of GPUs.")
        torch.cuda.set_device(rank)
    # The others wait for the one that reads the photographs.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
