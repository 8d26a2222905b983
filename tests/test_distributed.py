"""Several processes with a batch each give what one process with all the batches gives."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mtlopt
from problems import SHARDS, TASKS, Network, batches
from spawned import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:find_unused_parameters"),  # DDP's hint, not ours
]
STEPS = 20
SIZE = 12
# Which samples have labels, in a cycle of steps: a task is absent on one rank, on all of them, on
# none; and the counts differ.
LABELLED: list[dict[str, tuple[int, ...]]] = [
    {"a": tuple(range(12)), "b": (0, 1, 2, 3, 4, 5, 6, 7), "c": (6, 7, 8, 9, 10, 11)},
    {"a": (0, 6, 7, 8, 9, 10), "b": (), "c": (0, 1, 2)},
]
METHODS = (
    "joint",
    "balanced",
    "pcgrad",
    "gradnorm",
    "aggregated",
    "simultaneous",
    "alternating",
    "independent",
)
SEQUENTIAL = ("alternating", "independent")


def make(method: str, model: Any, **keywords: Any) -> Any:
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    if method == "joint":
        return mtlopt.JointOptimizer(base, TASKS, {"a": 2.0}, **keywords)
    if method in ("balanced", "pcgrad"):
        own = {"every": 3} if method == "balanced" else {}
        found = {"balanced": mtlopt.Balanced, "pcgrad": mtlopt.PCGrad}[method]
        return found(base, TASKS, **own, **keywords)
    if method == "gradnorm":
        shared = [p for name, p in model.named_parameters() if name.endswith("trunk.2.weight")]
        return mtlopt.GradNorm(base, TASKS, shared=shared, **keywords)
    if method == "aggregated":
        from torchjd.aggregation import UPGrad

        return mtlopt.Aggregated(base, TASKS, UPGrad(), **keywords)
    if method == "alternating":
        return mtlopt.AlternatingOptimizer(base, TASKS, order="shuffled", **keywords)
    schedule: Any = "simultaneous" if method == "simultaneous" else "sequential"
    return mtlopt.IndependentOptimizer(
        torch.optim.Adam, model.parameters(), TASKS, schedule=schedule, lr=0.01, **keywords
    )


def make_losses(call: Any, step: int, own: range, everywhere: bool) -> Callable[..., Any]:
    """Returns the protocol's function of the samples that a rank has."""

    def losses(tasks: Any, x: Tensor, y: dict[str, Tensor]) -> dict[str, Any]:
        outputs = call(x[own.start : own.stop], tasks)
        result: dict[str, Any] = {}
        for task in tasks:
            rows = [i for i in LABELLED[step % 2][task] if i in own]
            if rows:
                errors = outputs[task][[i - own.start for i in rows]] - y[task][rows]
                result[task] = ((errors**2).mean(), len(rows))
            elif everywhere:
                result[task] = (outputs[task].sum() * 0, 0)
        return result

    return losses


def train(method: str, model: Any, call: Any, own: range, **keywords: Any) -> dict[str, Any]:
    """Trains 20 steps and returns all that the ranks should have in common."""
    everywhere = dist.is_initialized() and "process_group" not in keywords
    optimizer = make(method, model, **keywords)
    optimizer.diagnostics()  # From here on it takes norms.
    values = {}
    for step, (x, y) in enumerate(batches(STEPS, size=SIZE)):
        values = optimizer.step(make_losses(call, step, own, everywhere), x, y)
    weights = {
        name.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in model.named_parameters()
    }
    return {"weights": weights, "values": values, "seen": optimizer.diagnostics()}


def bytes_sent(method: str, model: Any, own: range) -> int:
    """Counts what one step with all labels reduces over the ranks."""
    optimizer = make(method, model, process_group=dist.group.WORLD)
    sent = []
    reduce: Any = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *arguments, **keywords)

    dist.all_reduce = count
    x, y = batches(1, size=SIZE)[0]
    optimizer.step(make_losses(model, 0, own, everywhere=True), x, y)
    dist.all_reduce = reduce
    return sum(sent)


def work(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    own = range(rank * SIZE // ranks, (rank + 1) * SIZE // ranks)
    found: dict[str, Any] = {}
    for method in METHODS:
        torch.manual_seed(rank)  # On purpose: the ranks must come to agree.
        model: Any = Network()
        if method in SEQUENTIAL:
            call = DistributedDataParallel(model, find_unused_parameters=True)
            # The ranks that DDP reduces over are those that agree, without being named.
            found[method] = train(method, model, call, own)
        else:
            model.register_parameter("frozen", torch.nn.Parameter(torch.randn(3), False))
            found[method] = train(method, model, model, own, process_group=dist.group.WORLD)
        if not SHARDS:
            continue
        torch.manual_seed(0)
        model = Network()
        fully_shard(model.trunk)
        fully_shard(model)
        found[f"{method}, sharded"] = train(method, model, model, own)
    found["bytes"] = {m: bytes_sent(m, Network(), own) for m in ("joint", "pcgrad", "gradnorm")}
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for all methods in one go."""
    folder = tmp_path_factory.mktemp("ranks")
    start(work, str(folder), request.param, ranks=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["", ", sharded"])
@pytest.mark.usefixtures("double")
def test_ranks_equal_one_another_and_one_process_on_the_joined_batch(
    method: str, form: str, ranks: list[dict[str, Any]]
) -> None:
    """Weights bit for bit among the ranks; losses, learned weights and coefficients too."""
    if form and not SHARDS:
        pytest.skip("FSDP2 of this torch does not run on a processor")
    first, *others = [rank[method + form] for rank in ranks]
    for other in others:
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
        for entry, value in first["seen"].items():
            torch.testing.assert_close(value, other["seen"][entry], rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(0)
    model = Network()
    expected = train(method, model, model, range(SIZE))
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-10)
    assert first["values"].keys() == expected["values"].keys()
    for task, value in expected["values"].items():
        torch.testing.assert_close(first["values"][task], value, rtol=1e-10, atol=0)
        assert not first["values"][task].requires_grad
    for entry, value in expected["seen"].items():
        torch.testing.assert_close(
            first["seen"][entry], value, rtol=1e-8, atol=1e-10, equal_nan=True
        )


def test_no_more_than_each_tasks_gradient_travels(ranks: list[dict[str, Any]]) -> None:
    """Beside it less than two hundred bytes: counts, losses and which parameters are reached."""
    model = Network()
    shared = sum(p.numel() for p in model.trunk.parameters()) * 8
    heads = sum(p.numel() for p in model.heads.parameters()) * 8
    last = model.get_parameter("trunk.2.weight").numel() * 8
    least = {"joint": shared + heads, "pcgrad": 3 * shared + heads}
    least["gradnorm"] = least["joint"] + 3 * last
    for method, sent in ranks[0]["bytes"].items():
        assert least[method] <= sent < least[method] + 200


def lack(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = Network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make("independent", model, process_group=dist.group.WORLD)
    x, _ = batches(1)[0]

    def losses(tasks: Any) -> dict[str, Any]:
        return {t: call(x, (t,))[t].sum() for t in tasks if not (t == "b" and rank)}

    with pytest.raises(ValueError, match=r"'b' on every rank.*`\(outputs.sum\(\) \* 0, 0\)`"):
        optimizer.step(losses)

    torch.manual_seed(rank)
    bare = Network()

    def alone(tasks: Any) -> dict[str, Any]:
        return {t: (bare(x, (t,))[t] ** 2).sum() for t in tasks}

    with pytest.raises(ValueError, match=r"same on all ranks.*wrap the model in Distributed"):
        make("independent", bare).step(alone)
    for method in ("joint", "pcgrad", "gradnorm"):
        with pytest.raises(ValueError, match=r"same on all ranks.*give a `process_group`"):
            make(method, bare).step(alone)
    own = [dist.new_group([i]) for i in range(2)][rank]
    make("pcgrad", bare, process_group=own).step(alone)

    # Several backward passes through one forward of DDP: torch reduces the first alone.
    call = DistributedDataParallel(Network(), find_unused_parameters=True)
    data = torch.randn_like(x)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"same on all ranks|give it the bare model"
    ):
        make("pcgrad", call).step(
            lambda tasks: {t: (o**2).mean() for t, o in call(data, tasks).items()}
        )

    # The network's gradient is reduced then; those that GradNorm's weights learn from are not.
    with pytest.raises(
        (ValueError, RuntimeError), match=r"same on all ranks|give it the bare model"
    ):
        make("gradnorm", call.module).step(
            lambda tasks: {t: (o**2).mean() for t, o in call(data, tasks).items()}
        )

    if SHARDS:
        sharded = Network()
        fully_shard(sharded)
        from torchjd.aggregation import PCGrad, TrimmedMean

        torch.manual_seed(rank)  # Shards must be combined alike, whatever each rank would draw.
        drawn = torch.zeros(())

        def draw(*_: Any) -> None:
            drawn.copy_(torch.rand(()))

        aggregator = PCGrad()
        aggregator.gramian_weighting.register_forward_hook(draw)
        random = mtlopt.Aggregated(torch.optim.SGD(sharded.parameters()), TASKS, aggregator)
        random.step(lambda tasks: {t: o.sum() for t, o in sharded(x, tasks).items()})
        others = drawn.clone()
        dist.broadcast(others, 0)
        assert torch.equal(drawn, others)
        assert drawn > 0

        whole = mtlopt.Aggregated(torch.optim.SGD(sharded.parameters()), TASKS, TrimmedMean(1))
        with pytest.raises(ValueError, match="must work from the Gramian"):
            whole.step(lambda tasks: {t: o.sum() for t, o in sharded(x, tasks).items()})


def grow(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for method in ("pcgrad", "simultaneous"):
        optimizer = make(method, Network(), process_group=dist.group.WORLD)
        added = torch.full((2,), float(rank), requires_grad=True)
        optimizer.add_param_group({"params": [added]})
        assert not added.any(), method


def test_an_added_group_has_the_first_ranks_values(tmp_path: Path) -> None:
    """As all parameters have that are given to the constructor."""
    start(grow, str(tmp_path), ranks=2)


def test_ranks_that_do_not_match_are_an_error_on_all_not_a_deadlock(tmp_path: Path) -> None:
    """A task that one lacks, a model that nobody wrapped, and one that is wrapped wrongly."""
    start(lack, str(tmp_path), ranks=2)
