"""What a review found wrong among several processes: views of buckets, meshes, messages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

import mtlopt
from problems import SHARDS, TASKS, Network, batches, make_losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:find_unused_parameters"),  # DDP's hint, not ours
]
RANKS = 4
STEPS = 3
SIZE = 12
GROUPS = (("a", "b"), "c")
LAYOUTS = ("tensor parallel", "replicated", "plain heads")
MESH_METHODS = ("pcgrad", "gradnorm", "independent")


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def whole(value: Tensor) -> Tensor:
    full: Tensor = getattr(value, "full_tensor", lambda: value)().detach().clone()
    return full


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


# Groups of tasks, micro-batches, and gradients that are views of DDP's bucket.


def counted_losses(model: Network, call: Any) -> Callable[..., Any]:
    """The losses of the rows that a rank has, with their number."""

    def losses(tasks: Sequence[str], x: Tensor, y: Any) -> dict[str, Any]:
        outputs = call(x, tasks)
        scales = {"a": 1.0, "b": 3.0, "c": 0.2}
        return {t: (scales[t] * ((outputs[t] - y[t]) ** 2).mean(), len(x)) for t in tasks}

    return losses


def rows(x: Tensor, y: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, Any]:
    return x[start:stop], {t: v[start:stop] for t, v in y.items()}


def on_views(rank: int) -> dict[str, Tensor]:
    """Two micro-batches a rank, of two rows and of one."""
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), GROUPS, lr=0.01)
    for x, y in batches(STEPS, size=SIZE):
        first = 3 * rank
        parts = [rows(x, y, first, first + 2), rows(x, y, first + 2, first + 3)]
        optimizer.step(counted_losses(model, call), micro_batches=parts)
    return weights_of(model)


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Counts what is sent, and what is read from tensors as a list."""
    counts = {"sent": 0, "read": 0}
    names = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce")
    kept = {name: getattr(dist, name) for name in names}
    read = Tensor.tolist

    def counter(what: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            counts[what] += 1
            return function(*arguments, **keywords)

        return call

    for name, function in kept.items():
        setattr(dist, name, counter("sent", function))
    Tensor.tolist = counter("read", read)  # type: ignore[method-assign]  # for a moment
    try:
        yield counts
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
        Tensor.tolist = read  # type: ignore[method-assign]  # as it was


def messages(rank: int) -> dict[str, int]:
    """Of one step on three tasks and two micro-batches, after a first one."""
    model = network()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.01)
    x, y = batches(1)[0]
    losses = counted_losses(model, call)
    optimizer.step(losses, micro_batches=[(x, y), (x, y)])
    with counting() as counts:
        optimizer.step(losses, micro_batches=[(x, y), (x, y)])
    return counts


# Meshes of two dimensions, and parameters of different placements.


def lay_out(model: Network, layout: str) -> None:
    """A trunk over two meshes and heads over one; a replicated matrix; heads that are plain."""
    if layout == "plain heads":
        fully_shard(model.trunk)
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    if layout == "tensor parallel":
        plan: Any = {"trunk.0": ColwiseParallel(), "trunk.2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    else:
        plan = {"trunk.0": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, mesh["tensor"], plan)
        second: Any = model.trunk[2]
        second.weight = nn.Parameter(
            distribute_tensor(second.weight.detach(), mesh["tensor"], [Replicate()])
        )
        second.register_forward_pre_hook(
            lambda _, inputs: (as_replicated(inputs[0], mesh["tensor"]),)
        )
        second.register_forward_hook(lambda _, inputs, output: output.to_local())
    fully_shard(model.trunk, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def as_replicated(x: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(x, mesh, [Replicate()])


def wrapped(method: str, model: Network) -> Any:
    if method == "independent":
        return mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)
    base = SGD(model.parameters(), lr=0.1)
    if method == "pcgrad":
        return mtlopt.PCGrad(base, TASKS)
    return mtlopt.GradNorm(base, TASKS, shared=model.trunk.parameters())


def on_mesh(rank: int, method: str, layout: str) -> dict[str, Any]:
    model = network()
    lay_out(model, layout)
    optimizer = wrapped(method, model)
    optimizer.diagnostics()  # Norms may be taken from the first time on that they are asked for.
    for x, y in batches(STEPS, size=SIZE):
        # Ranks of one row of the mesh share their data; plain heads see the same on every rank.
        half = (x, y) if layout == "plain heads" else rows(x, y, *((0, 6), (6, 12))[rank // 2])
        optimizer.step(make_losses(model), *half)
    return {"weights": weights_of(model), "seen": optimizer.diagnostics()}


def plain(method: str) -> dict[str, Any]:
    """PCGrad, GradNorm and independent optimizers by hand, in one process on the whole batch."""
    model = network()
    losses = make_losses(model)
    trunk, everything = list(model.trunk.parameters()), list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    weights = [torch.ones(()) for _ in TASKS]
    adam = Adam(weights, lr=0.025)
    first: list[Tensor] = []
    seen: dict[str, Tensor] = {}

    def gradients(values: Sequence[Tensor], over: Sequence[Tensor]) -> list[list[Tensor]]:
        return [
            list(
                torch.autograd.grad(
                    value, over, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            )
            for value in values
        ]

    def descend(over: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, part in zip(over, gradient, strict=True):
                parameter -= 0.1 * part  # noqa: PLW2901  # in place

    for x, y in batches(STEPS, size=SIZE):
        if method == "independent":
            norms = []
            for task in TASKS:
                (gradient,) = gradients([losses((task,), x, y)[task]], everything)
                norms.append(torch.cat([g.flatten() for g in gradient]).norm())
                descend(everything, gradient)
            seen = {"gradient_norms": torch.stack(norms)}
            continue
        values = list(losses(TASKS, x, y).values())
        own = gradients(values, trunk)
        flat = [torch.cat([g.flatten() for g in gradient]) for gradient in own]
        plain_sum = [sum(column) for column in zip(*gradients(values, everything), strict=True)]
        if method == "pcgrad":
            total = torch.zeros_like(flat[0])
            orders = [torch.randperm(3, generator=generator).tolist() for _ in TASKS]
            for i, order in enumerate(orders):
                vector = flat[i].clone()
                for j in order:
                    if j != i and vector @ flat[j] < 0:
                        vector -= (vector @ flat[j]) / (flat[j] @ flat[j]) * flat[j]
                total += vector
            sizes = [p.numel() for p in trunk]
            parts = [v.view_as(p) for v, p in zip(total.split(sizes), trunk, strict=True)]
            descend(everything, parts + plain_sum[len(trunk) :])
            unit = torch.stack([v / v.norm() for v in flat])
            seen = {"cosines": unit @ unit.T}
            continue
        first = first or [value.detach() for value in values]
        lengths = torch.stack([vector.norm() for vector in flat])
        leaf = torch.stack(weights).requires_grad_()
        scaled = leaf * lengths.float()
        ratios = torch.stack([v.detach() / f for v, f in zip(values, first, strict=True)]).float()
        target = scaled.mean() * (ratios / ratios.mean()) ** 1.5
        (scaled - target.detach()).abs().sum().backward()
        weighted = [w.double() * v for w, v in zip(weights, values, strict=True)]
        descend(everything, *gradients([sum(weighted[1:], weighted[0])], everything))
        assert leaf.grad is not None
        for weight, slope in zip(weights, leaf.grad, strict=True):
            weight.grad = slope
        adam.step()
        moved = torch.stack(weights).clamp(min=1e-3)
        for weight, value in zip(weights, moved * 3 / moved.sum(), strict=True):
            weight.copy_(value)
        seen = {"weights": torch.stack(weights), "norms": scaled.detach()}
    return {"weights": weights_of(model), "seen": seen}


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a case finds, or how it fails: alike on all ranks, so that the next can be tried."""
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {"views": attempt(on_views, rank), "messages": attempt(messages, rank)}
    for layout in LAYOUTS if SHARDS else ():
        for method in MESH_METHODS:
            found[f"{method}, {layout}"] = attempt(on_mesh, rank, method, layout)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for all cases in one go: starting processes takes long."""
    folder = tmp_path_factory.mktemp("faults")
    spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_gradients_that_are_views_of_ddps_bucket_are_not_written_over(
    ranks: list[dict[str, Any]],
) -> None:
    """The next backward pass writes into the bucket: what is kept of it must be a copy."""
    model = network()
    own = [Adam(model.parameters(), lr=0.01) for _ in GROUPS]
    for x, y in batches(STEPS, size=SIZE):
        for optimizer, group in zip(own, (("a", "b"), ("c",)), strict=True):
            model.zero_grad()
            values = list(make_losses(model)(group, x, y).values())
            sum(values[1:], values[0]).backward()
            optimizer.step()
    expected = weights_of(model)
    for rank in ranks:
        assert isinstance(rank["views"], dict), rank["views"]
        for name, weight in rank["views"].items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-10)


def test_one_message_and_one_reading_are_enough_for_a_task_and_a_micro_batch(
    ranks: list[dict[str, Any]],
) -> None:
    """DDP's own reduction aside: counts and losses travel together, and are read together."""
    for rank in ranks:
        assert isinstance(rank["messages"], dict), rank["messages"]
        assert rank["messages"]["sent"] <= len(TASKS) * 2
        assert rank["messages"]["read"] <= len(TASKS) * 2


@pytest.mark.skipif(not SHARDS, reason="FSDP2 of this torch does not run on a processor")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", MESH_METHODS)
def test_parameters_of_any_placement_are_trained_as_by_one_process(
    method: str, layout: str, ranks: list[dict[str, Any]]
) -> None:
    """Each parameter's numbers are summed over the mesh that it is sharded on, and no other."""
    expected = plain(method)
    first, *others = [rank[f"{method}, {layout}"] for rank in ranks]
    assert isinstance(first, dict), first
    for other in others:
        assert isinstance(other, dict), other
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
        for entry in expected["seen"]:
            assert torch.equal(first["seen"][entry], other["seen"][entry]), entry
    # GradNorm's weights are of float32.
    tolerance = 1e-5 if method == "gradnorm" else 1e-10
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=tolerance)
    for entry, value in expected["seen"].items():
        torch.testing.assert_close(
            first["seen"][entry].to(value), value, rtol=tolerance, atol=tolerance
        )
