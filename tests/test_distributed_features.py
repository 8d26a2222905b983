"""`features=` on several processes, each with a batch, as in one process with all batches."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torchjd import aggregation

import mtlopt
from problems import SHARDS, TASKS, Network, assert_equal, batches, make_losses, snapshot
from spawned import start

STEPS = 5
SIZE = 12
METHODS = ("balanced", "pcgrad", "gradnorm", "aggregated")


def make(method: str, model: Network, **keywords: Any) -> Any:
    base = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    keywords["features"] = model.trunk
    if method == "balanced":
        return mtlopt.Balanced(base, TASKS, every=3, **keywords)
    if method == "pcgrad":
        return mtlopt.PCGrad(base, TASKS, **keywords)
    if method == "gradnorm":
        return mtlopt.GradNorm(base, TASKS, **keywords)
    return mtlopt.Aggregated(base, TASKS, aggregation.UPGrad(), **keywords)


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def labelled_losses(model: Network, x: Tensor, y: Any, own: range) -> Callable[..., Any]:
    """Labels task b on the first samples alone, so that one rank lacks it."""
    labelled = {"a": range(SIZE), "b": range(4), "c": range(3, SIZE)}

    def losses(tasks: Any) -> dict[str, Any]:
        outputs = model(x[own.start : own.stop], tasks)
        found: dict[str, Any] = {}
        for task in tasks:
            rows = [i for i in labelled[task] if i in own]
            if rows:
                errors = outputs[task][[i - own.start for i in rows]] - y[task][rows]
                found[task] = ((errors**2).mean(), len(rows))
        return found

    return losses


def train(method: str, own: range, **keywords: Any) -> dict[str, Any]:
    model = network()
    optimizer = make(method, model, **keywords)
    for x, y in batches(STEPS, size=SIZE):
        optimizer.step(labelled_losses(model, x, y, own))
    return {"weights": snapshot(model), "seen": optimizer.diagnostics()}


def train_where_labelled(method: str, labels: bool, **keywords: Any) -> dict[str, Tensor]:
    """Trains two steps; without labels, `losses` does not even call the model."""
    model = network()
    optimizer = make(method, model, **keywords)
    losses = make_losses(model)
    for x, y in batches(2):
        optimizer.step(losses if labels else lambda tasks, x, y: {}, x, y)
    return snapshot(model)


def bytes_sent(own: range) -> list[int]:
    """Counts what each of two steps of PCGrad reduces over the ranks."""
    model = network()
    optimizer = make("pcgrad", model, process_group=dist.group.WORLD)
    sent: list[int] = []
    reduce: Any = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *arguments, **named)

    dist.all_reduce = count
    x, y = batches(1, size=SIZE)[0]
    totals = []
    for _ in range(2):
        optimizer.step(labelled_losses(model, x, y, own))
        totals.append(sum(sent))
        sent.clear()
    dist.all_reduce = reduce
    return totals


def error_of_unequal_micro_batches(rank: int) -> str:
    model = network()
    optimizer = make("pcgrad", model, process_group=dist.group.WORLD)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the same number of `micro_batches`, got") as raised:
        optimizer.step(make_losses(model), micro_batches=batches(1 + rank))
    assert_equal(snapshot(model), before)
    return str(raised.value)


def error_of_copies(rank: int) -> list[str]:
    """Tries prototypes, without a sample dimension, and then the same batch on every rank."""
    found = []
    for kind in ("prototypes", "one batch"):
        model = network()
        prototypes = torch.nn.Linear(4, 5, bias=False, dtype=torch.float64)
        features: Any = [model.trunk, prototypes] if kind == "prototypes" else model.trunk
        base = torch.optim.SGD([*model.parameters(), *prototypes.parameters()], lr=0.1)
        optimizer = mtlopt.PCGrad(base, TASKS, features=features, process_group=dist.group.WORLD)
        before = snapshot(model)
        x, y = batches(1, size=SIZE)[0]
        if kind == "prototypes":
            x, y = x[rank::2], {t: v[rank::2] for t, v in y.items()}
        eye = torch.eye(4, dtype=torch.float64)

        def losses(tasks: Any) -> dict[str, Tensor]:
            close = model.trunk(x) @ prototypes(eye).T
            return {
                t: (close.sum(1, keepdim=True) * i - y[t]).square().mean()
                for i, t in enumerate(tasks)
            }

        with pytest.raises(ValueError, match="`features` must have a sample dimension") as raised:
            optimizer.step(losses)
        assert_equal(snapshot(model), before)
        found.append(str(raised.value))
    return found


def refuse_shards(own: range) -> None:
    model = network()
    fully_shard(model)
    x, y = batches(1, size=SIZE)[0]
    with pytest.raises(ValueError, match=r"`features` must be None .* sharded \(FSDP2\)"):
        make("pcgrad", model).step(labelled_losses(model, x, y, own))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),  # so that a deadlock fails soon
    )
    group: Any = {"process_group": dist.group.WORLD}
    own = range(rank * SIZE // 2, (rank + 1) * SIZE // 2)
    found: dict[str, Any] = {
        "joined": {m: train(m, own, **group) for m in METHODS},
        "unlabelled": {m: train_where_labelled(m, rank == 0, **group) for m in METHODS},
        "sent": bytes_sent(own),
        "unequal": error_of_unequal_micro_batches(rank),
        "copies": error_of_copies(rank),
    }
    if SHARDS:
        refuse_shards(own)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("features")
    start(work, str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_ranks_equal_one_process_on_the_joined_batch(
    method: str, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank["joined"][method] for rank in ranks)
    assert_equal(first["weights"], second["weights"])
    expected = train(method, range(SIZE))
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-10)
    for key, value in expected["seen"].items():
        torch.testing.assert_close(
            first["seen"][key], value, rtol=1e-6, atol=1e-8, equal_nan=True, msg=key
        )


def test_a_step_sends_one_matrix_and_one_gradient(ranks: list[dict[str, Any]]) -> None:
    """And the counts and losses, which parameters have a gradient, and the micro-batches.

    The first step also compares the features.
    """
    gradient = sum(p.numel() for p in Network().parameters()) * 8
    matrix = len(TASKS) ** 2 * 8
    counts = 3 * len(TASKS) * 8
    reached = 5 * 4
    micro_batches = 2 * 8
    compared = 2 * 32 * 4 * 8
    first = gradient + matrix + counts + reached + micro_batches + compared
    assert ranks[0]["sent"] == [first, first - compared]


def test_a_rank_without_labels_need_not_call_the_features(ranks: list[dict[str, Any]]) -> None:
    """No deadlock: the ranks step as one process on the labelled batch."""
    for method in METHODS:
        expected = train_where_labelled(method, labels=True)
        for rank in ranks:
            for name, weight in expected.items():
                found = rank["unlabelled"][method][name]
                torch.testing.assert_close(found, weight, rtol=0, atol=1e-12)


def test_unequal_numbers_of_micro_batches_are_an_error_on_every_rank(
    ranks: list[dict[str, Any]],
) -> None:
    """Never a deadlock; without `features` the numbers may differ."""
    for rank, found in enumerate(ranks):
        assert f"got {1 + rank} on this one of 2 that have 3" in found["unequal"]


def test_features_without_a_sample_dimension_are_refused(ranks: list[dict[str, Any]]) -> None:
    """Their gradients had to be summed first: products of the parts lack those across ranks."""
    for rank in ranks:
        prototypes, one_batch = rank["copies"]
        assert "got output 1 [(4, 5)] with the same numbers on all ranks" in prototypes
        assert "got output 0 [(12, 5)]" in one_batch
        assert "give each rank its own samples" in one_batch
