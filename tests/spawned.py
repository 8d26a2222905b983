"""Starts the processes of a group as copies of one in which torch has been imported."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import destroy_process_group, is_initialized
from torch.multiprocessing.spawn import start_processes

IMPORTED = [
    "pytest",
    "torch._dynamo",  # with the first optimizer
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torchjd.aggregation",
    "mtlopt",
]
DEADLINE = 300  # seconds


def start(work: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Runs `work(rank, *arguments)` in each of the processes, and raises what one of them raised.

    Importing takes a process longer than most of what the tests do in it. The group that `work`
    makes is destroyed behind it. Ranks that wait for one another for ever are killed at the
    deadline, and the test fails.
    """
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload(IMPORTED)
    context = start_processes(
        _rank, (work, arguments), nprocs=ranks, join=False, start_method=method
    )
    assert context is not None
    end = time.monotonic() + DEADLINE
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{work.__module__}.{work.__name__}: ranks hang")


def _rank(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    work(rank, *arguments)
    if is_initialized():
        destroy_group()


def destroy_group() -> None:
    """Destroys the process group once its threads are idle.

    Up to torch 2.7 the group's destructor keeps the interpreter's lock, and waits for a thread that
    may be waiting for that lock in order to drop the tensors of the last collective:
    https://github.com/pytorch/pytorch/pull/154976
    """
    time.sleep(0.2)
    destroy_process_group()
