"""What is let go is gone at once: the states of T tasks, and the threads of a process group."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization
from torch.optim import Adam

import mtlopt
from problems import TASKS, Network, batches, make_losses

METHODS: dict[str, Callable[[Any], Any]] = {
    "independent": lambda m: mtlopt.IndependentOptimizer(Adam, m.parameters(), TASKS),
    "simultaneous": lambda m: mtlopt.IndependentOptimizer(
        Adam(m.parameters()), TASKS, schedule="simultaneous"
    ),
    "alternating": lambda m: mtlopt.AlternatingOptimizer(Adam(m.parameters()), TASKS),
    "joint": lambda m: mtlopt.JointOptimizer(Adam(m.parameters()), TASKS),
    "pcgrad": lambda m: mtlopt.PCGrad(Adam(m.parameters()), TASKS),
    "pcgrad, features": lambda m: mtlopt.PCGrad(Adam(m.parameters()), TASKS, features=m.trunk),
    "balanced": lambda m: mtlopt.Balanced(Adam(m.parameters()), TASKS),
    "gradnorm": lambda m: mtlopt.GradNorm(Adam(m.parameters()), TASKS, shared=[m.trunk[2].weight]),
    "aggregated": lambda m: mtlopt.Aggregated(
        Adam(m.parameters()), TASKS, torchjd.aggregation.UPGrad()
    ),
    "scalarized": lambda m: mtlopt.Scalarized(
        Adam(m.parameters()), TASKS, torchjd.scalarization.FAMO(3)
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_and_its_states_are_freed_without_the_garbage_collector(method: str) -> None:
    """Otherwise a notebook that makes its optimizer again holds T more states on the device."""
    model: Any = Network()
    Adam(model.parameters())  # The first in a process makes a cycle of torch's own.
    optimizer = METHODS[method](model)
    optimizer.diagnostics()
    optimizer.zero_grad()
    values = optimizer.step(make_losses(model), *batches(1)[0])
    assert len(values) == len(TASKS)
    inner = list(optimizer.values()) if hasattr(optimizer, "values") else [optimizer.base]
    kept = [weakref.ref(optimizer), *map(weakref.ref, inner)]
    kept += [weakref.ref(t) for o in inner for t in o.state[model.trunk[0].weight].values()]
    assert len(kept) >= 4
    gc.collect()
    gc.disable()
    try:
        del optimizer, inner
        assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_a_tasks_optimizer_goes_on_without_the_wrapper() -> None:
    model: Any = Network()
    own = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS, lr=0.1)["a"]
    x, y = batches(1)[0]
    make_losses(model)(["a"], x, y)["a"].backward()
    before = model.trunk[0].weight.detach().clone()
    own.step()
    assert not torch.equal(model.trunk[0].weight, before)


LAST_WORDS = """
import os, time, torch, torch.distributed as dist
import mtlopt
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(2, 1)
optimizer = mtlopt.PCGrad(
    torch.optim.Adam(model.parameters()), ["a", "b"], process_group=dist.group.WORLD
)
def losses(tasks, x):
    y = model(x).mean()
    return {task: y if task == "a" else -2 * y for task in tasks}
optimizer.step(losses, torch.ones(3, 2))
del optimizer
time.sleep(0.2)  # as tests/spawned.py does, and why
dist.destroy_process_group()
tasks = "/proc/self/task"
print([name for t in os.listdir(tasks) if "gloo" in (name := open(f"{tasks}/{t}/comm").read())])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's list of threads")
def test_no_thread_of_a_destroyed_process_group_is_left() -> None:
    """One that still held a tensor when Python ended would abort the process, now and then."""
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
