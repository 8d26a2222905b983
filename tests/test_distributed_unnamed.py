"""A model in DistributedDataParallel and no `process_group=`: exact, or refused by name."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchjd import aggregation, scalarization

import mtlopt
import reference
from problems import TASKS, Network, batches, snapshot
from spawned import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:find_unused_parameters"),  # DDP's hint, not ours
]
RANKS = 2
STEPS = 3
SIZE = 12
WEIGHTS = {"a": 0.5, "c": 2.0}
# Samples with a label: of unequal numbers on the ranks, and of task c on the second rank alone.
LABELLED = {"a": [0, 1, 2, 3, 4, 5, 6], "b": [4, 5, 6, 7, 8, 9, 10, 11], "c": [7, 8, 11]}


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def make_losses(call: Any, own: range, counted: bool = True) -> Callable[..., Any]:
    """Returns the losses of the labelled samples of one rank."""

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Any]:
        outputs = call(x[own.start : own.stop], tasks)
        found: dict[str, Any] = {}
        for task in tasks:
            rows = [i for i in LABELLED[task] if i in own]
            if rows:
                errors = outputs[task][[i - own.start for i in rows]] - y[task][rows]
                mean = (1 + errors**2).mean()
                found[task] = (mean, len(rows)) if counted else mean
        return found

    return losses


def rule() -> Any:
    return scalarization.GeometricMean()


def make(method: str, model: Any, **keywords: Any) -> Any:
    base = sgd(model)
    if method == "joint":
        return mtlopt.JointOptimizer(base, TASKS, WEIGHTS, **keywords)
    if method == "scalarized":
        return mtlopt.Scalarized(base, TASKS, rule(), **keywords)
    if method == "gradnorm":
        return mtlopt.GradNorm(base, TASKS, **keywords)
    if method == "aggregated":
        return mtlopt.Aggregated(base, TASKS, aggregation.UPGrad(), **keywords)
    return mtlopt.PCGrad(base, TASKS, **keywords)


def train(method: str, own: range) -> dict[str, Any]:
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make(method.removesuffix(", imperative"), model)
    losses = make_losses(call, own)
    for x, y in batches(STEPS, size=SIZE):
        if method.endswith("imperative"):
            optimizer.zero_grad()
            optimizer.backward(losses(TASKS, x, y))
            optimizer.step()
        else:
            optimizer.step(losses, x, y)
    return snapshot(model)


def everyone(call: Any) -> Callable[..., Any]:
    """Returns losses that every rank has, so that all take the same number of passes."""
    return lambda tasks, x, y: {t: ((call(x, (t,))[t] - y[t]) ** 2).mean() for t in tasks}


def train_task_by_task(own: range) -> dict[str, Any]:
    """PCGrad with a forward pass per task, which DDP reduces as in an ordinary loop."""
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make("pcgrad", model, forwards="per-task")
    for x, y in batches(STEPS, size=SIZE):
        rows = slice(own.start, own.stop)
        optimizer.step(everyone(call), x[rows], {t: v[rows] for t, v in y.items()})
    return snapshot(model)


def refusals(own: range) -> dict[str, str]:
    """Tries the features; nothing moves."""
    found = {}
    for method in ("pcgrad", "gradnorm", "aggregated"):
        model = network()
        call = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make(method, model, features=model.trunk)
        before = snapshot(model)
        x, y = batches(1, size=SIZE)[0]
        with pytest.raises(ValueError) as raised:  # noqa: PT011  # compared by the test
            optimizer.step(make_losses(call, own), x, y)
        assert all(torch.equal(p, before[n]) for n, p in snapshot(model).items())
        found[method] = str(raised.value)
    return found


def refuse_silence(rank: int) -> str:
    """A rank without any loss would leave the others waiting in their backward pass."""
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    x, y = batches(1)[0]
    losses = everyone(call) if rank else lambda *_: {}
    with pytest.raises(ValueError, match="on every rank or on none") as raised:
        make("joint", model).step(losses, x, y)
    return str(raised.value)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=20),  # so that a deadlock fails soon
    )
    own = range(rank * SIZE // RANKS, (rank + 1) * SIZE // RANKS)
    found: dict[str, Any] = {m: train(m, own) for m in EXACT}
    found["task by task"] = train_task_by_task(own)
    found["refusals"] = refusals(own)
    found["silence"] = refuse_silence(rank)
    torch.save(found, f"{folder}/{rank}.pt")


EXACT = ("joint", "joint, imperative", "scalarized", "scalarized, imperative")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unnamed")
    start(work, str(folder), ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_all_close(ranks: list[dict[str, Any]], key: str, expected: Network) -> None:
    for rank in ranks:
        for name, weight in snapshot(expected).items():
            torch.testing.assert_close(rank[key][name], weight, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", EXACT)
def test_ranks_equal_a_plain_loop_on_the_joined_batch(
    method: str, ranks: list[dict[str, Any]]
) -> None:
    """Each rank has other numbers of labels, and one lacks a task."""
    model = network()
    base = sgd(model)
    losses = make_losses(model, range(SIZE), counted=False)
    for x, y in batches(STEPS, size=SIZE):
        if method.startswith("joint"):
            reference.joint(base, losses, TASKS, x, y, weights=WEIGHTS)
        else:
            reference.scalarized(base, losses, TASKS, x, y, scalarize=rule())
    assert_all_close(ranks, method, model)


def test_pcgrad_with_a_forward_pass_per_task_is_exact(ranks: list[dict[str, Any]]) -> None:
    model = network()
    base, generator = sgd(model), torch.Generator().manual_seed(0)
    shared = list(model.trunk.parameters())
    for x, y in batches(STEPS, size=SIZE):
        reference.pcgrad(base, everyone(model), TASKS, x, y, shared=shared, generator=generator)
    assert_all_close(ranks, "task by task", model)


@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "aggregated"])
def test_features_are_refused(method: str, ranks: list[dict[str, Any]]) -> None:
    """Each rank would combine its own samples' gradients, and DDP average the results."""
    for rank in ranks:
        assert (
            "`features` must be None where the model is wrapped in Distrib"
            in rank["refusals"][method]
        )
        assert "the bare model, and `process_group=`" in rank["refusals"][method]


def test_a_rank_without_any_loss_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    assert all("got None on 1 ranks" in rank["silence"] for rank in ranks)
