"""Starts the processes of a group as copies of one in which torch has been imported."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes

IMPORTED = [
    "pytest",
    "torch._dynamo",  # with the first optimizer
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torchjd.aggregation",
    "mtlopt",
]


def start(work: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Runs `work(rank, *arguments)` in each of the processes, and raises what one of them raised.

    Importing takes a process longer than most of what the tests do in it.
    """
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload(IMPORTED)
    start_processes(work, arguments, nprocs=ranks, start_method=method)
