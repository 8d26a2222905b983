"""Two processes with a batch each give what one process with both batches gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import mtlopt
from problems import TASKS, Network, batches, snapshot

pytestmark = pytest.mark.slow
STEPS = 20
# How many of its six samples each rank has labels for, in a cycle of steps: a task is absent on
# one rank, on the other, on both; and the counts differ.
LABELLED: list[dict[str, tuple[int, int]]] = [
    {"a": (6, 6), "b": (6, 2), "c": (0, 6)},
    {"a": (1, 5), "b": (0, 0), "c": (3, 0)},
]


def make(method: str, parameters: Any, **keywords: Any) -> Any:
    if method == "joint":
        return mtlopt.JointOptimizer(torch.optim.Adam(parameters, lr=0.01), TASKS, **keywords)
    if method == "alternating":
        return mtlopt.AlternatingOptimizer(
            torch.optim.Adam(parameters, lr=0.01), TASKS, order="shuffled", **keywords
        )
    schedule: Any = "simultaneous" if method == "simultaneous" else "sequential"
    return mtlopt.IndependentOptimizer(
        torch.optim.Adam, parameters, TASKS, schedule=schedule, lr=0.01, **keywords
    )


def rows(step: int, task: str, rank: int | None) -> Any:
    first, second = LABELLED[step % 2][task]
    both = [*range(first), *range(6, 6 + second)]
    return both if rank is None else [i for i in both if (i >= 6) == rank]


def train(method: str, model: Any, call: Any, rank: int | None, **keywords: Any) -> dict[str, Any]:
    optimizer = make(method, model.parameters(), **keywords)
    values = {}
    for step, (x, y) in enumerate(batches(STEPS, size=12)):

        def losses(tasks: Any, step: int = step, x: Any = x, y: Any = y) -> dict[str, Any]:
            result: dict[str, Any] = {}
            for task in tasks:
                chosen = rows(step, task, rank)
                if chosen:
                    error = (call(x[chosen], (task,))[task] - y[task][chosen]) ** 2
                    result[task] = (error.mean(), len(chosen))
                elif call is not model:  # Under DDP every rank runs every forward pass.
                    result[task] = (call(x[:1], (task,))[task].sum() * 0, 0)
            return result

        values = optimizer.step(losses)
    return values


def work(rank: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # On purpose: the ranks must come to agree.
    torch.set_default_dtype(torch.float64)
    model: Any = Network()
    call = model
    if method in {"alternating", "independent"}:
        call = DistributedDataParallel(model, find_unused_parameters=True)
        # The ranks that DDP reduces over are those that agree, without being named.
        values = train(method, model, call, rank)
    else:
        frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        model.register_parameter("frozen", frozen)
        values = train(method, model, call, rank, process_group=dist.group.WORLD)
    torch.save((snapshot(model), values), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:find_unused_parameters")  # DDP's hint, not ours
@pytest.mark.parametrize("method", ["joint", "simultaneous", "alternating", "independent"])
def test_ranks_with_other_labels_equal_one_process_on_the_joined_batch(
    method: str, tmp_path: Path
) -> None:
    spawn(work, (method, str(tmp_path)), nprocs=2)
    (first, values), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Network()
    expected = train(method, model, model, None)
    for name, parameter in snapshot(model).items():
        torch.testing.assert_close(first[name], parameter, rtol=0, atol=1e-10)
    for task, value in expected.items():
        torch.testing.assert_close(values[task], value, rtol=1e-10, atol=0)
        assert not values[task].requires_grad


def lack(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = Network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make("independent", model.parameters(), process_group=dist.group.WORLD)
    x, _ = batches(1)[0]

    def losses(tasks: Any) -> dict[str, Any]:
        return {t: call(x, (t,))[t].sum() for t in tasks if not (t == "b" and rank)}

    with pytest.raises(ValueError, match=r"'b' on every rank.*`\(outputs.sum\(\) \* 0, 0\)`"):
        optimizer.step(losses)

    torch.manual_seed(rank)
    bare = Network()
    optimizer = make("independent", bare.parameters())

    def alone(tasks: Any) -> dict[str, Any]:
        return {t: bare(x, (t,))[t].sum() for t in tasks}

    with pytest.raises(ValueError, match=r"same on all ranks.*wrap the model in Distributed"):
        optimizer.step(alone)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:find_unused_parameters")  # DDP's hint, not ours
def test_ranks_that_do_not_match_are_an_error_on_all_not_a_deadlock(tmp_path: Path) -> None:
    """A task that one lacks, and a model that nobody wrapped in DDP."""
    spawn(lack, (str(tmp_path),), nprocs=2)
