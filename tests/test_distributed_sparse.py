"""Sparse gradients stay sparse where they are summed over processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mtlopt
from problems import TASKS, Embedded, assert_equal, batches, halves, make_losses, snapshot
from spawned import start

pytestmark = pytest.mark.slow
METHODS: dict[str, Any] = {
    "joint": lambda m, **k: mtlopt.JointOptimizer(adam(m), TASKS, **k),
    "pcgrad": lambda m, **k: mtlopt.PCGrad(adam(m), TASKS, **k),
    "simultaneous": lambda m, **k: mtlopt.IndependentOptimizer(
        adam(m), TASKS, schedule="simultaneous", **k
    ),
}


def adam(model: Embedded) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(list(model.parameters()), lr=0.01)


def train(method: str, parts: Any, **keywords: Any) -> dict[str, Tensor]:
    """Task c has samples in the first half of every batch alone."""
    torch.manual_seed(0)
    model = Embedded()
    optimizer = METHODS[method](model, **keywords)
    plain = make_losses(model)

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Any]:
        tasks = [task for task in tasks if task != "c" or y["first"]]
        return {task: (value, len(x)) for task, value in plain(tasks, x, y).items()}

    for x, y in batches(4):
        own = halves(x, y, 2)
        marked = [(x, y | {"first": i == 0}) for i, (x, y) in enumerate(own)]
        optimizer.step(losses, micro_batches=[marked[i] for i in parts])
    return snapshot(model)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {m: train(m, [rank], process_group=dist.group.WORLD) for m in METHODS}
    torch.save(found, f"{folder}/{rank}.pt")


def test_sparse_gradients_are_summed_over_ranks(tmp_path: Path) -> None:
    """As one process with both parts of the batch; SparseAdam takes no dense gradients."""
    start(work, str(tmp_path), ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for method in METHODS:
        assert_equal(first[method], second[method])
        expected = train(method, [0, 1])
        torch.testing.assert_close(first[method], expected, rtol=1e-10, atol=1e-12)
