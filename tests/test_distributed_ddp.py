"""DistributedDataParallel: gradients that are views of its buckets, and messages per step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

import mtlopt
import reference
from problems import TASKS, Network, batches, make_losses, snapshot, with_counts
from spawned import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:find_unused_parameters"),  # DDP's hint, not ours
]
RANKS = 4
STEPS = 3
SIZE = 12
GROUPS = (("a", "b"), "c")


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def counted_losses(call: Any) -> Callable[..., Any]:
    return with_counts(make_losses(call))


def rows(x: Tensor, y: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, Any]:
    return x[start:stop], {t: v[start:stop] for t, v in y.items()}


def train_on_bucket_views(rank: int) -> dict[str, Tensor]:
    """Trains on two micro-batches a rank, of two rows and of one."""
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), GROUPS, lr=0.01)
    for x, y in batches(STEPS, size=SIZE):
        first = 3 * rank
        parts = [rows(x, y, first, first + 2), rows(x, y, first + 2, first + 3)]
        optimizer.step(counted_losses(call), micro_batches=parts)
    return snapshot(model)


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Counts the collectives, and the tensors that are read as lists."""
    counts = {"sent": 0, "read": 0}
    names = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce")
    original = {name: getattr(dist, name) for name in names}
    read = Tensor.tolist

    def counter(what: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            counts[what] += 1
            return function(*arguments, **keywords)

        return call

    for name, function in original.items():
        setattr(dist, name, counter("sent", function))
    Tensor.tolist = counter("read", read)  # type: ignore[method-assign]  # for a moment
    try:
        yield counts
    finally:
        for name, function in original.items():
            setattr(dist, name, function)
        Tensor.tolist = read  # type: ignore[method-assign]  # as it was


def count_messages(rank: int) -> dict[str, int]:
    """Counts those of a second step, on three tasks and two micro-batches."""
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.01)
    x, y = batches(1)[0]
    losses = counted_losses(call)
    optimizer.step(losses, micro_batches=[(x, y), (x, y)])
    with counting() as counts:
        optimizer.step(losses, micro_batches=[(x, y), (x, y)])
    return counts


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {"weights": train_on_bucket_views(rank), "messages": count_messages(rank)}
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    start(work, str(folder), ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_gradients_that_are_views_of_ddps_buckets_are_copied(ranks: list[dict[str, Any]]) -> None:
    """The next backward pass overwrites the bucket."""
    model = network()
    losses = make_losses(model)
    own = {group: Adam(model.parameters(), lr=0.01) for group in ("ab", "c")}
    for x, y in batches(STEPS, size=SIZE):
        for group, optimizer in own.items():
            reference.step(optimizer, lambda: reference.weighted_sum(losses(tuple(group), x, y)))
    for rank in ranks:
        for name, weight in snapshot(model).items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-10)


def test_a_task_sends_and_reads_once_for_each_micro_batch(ranks: list[dict[str, Any]]) -> None:
    """DDP's own reduction aside: counts and losses are sent, and read, together."""
    for rank in ranks:
        assert rank["messages"]["sent"] <= len(TASKS) * 2
        assert rank["messages"]["read"] <= len(TASKS) * 2
