"""Sharded parameters: meshes of two dimensions, and parameters of different placements."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, Adam

import mtlopt
import reference
from problems import (
    SHARDS,
    TASKS,
    Network,
    batches,
    halves,
    make_losses,
    snapshot,
    with_counts,
)
from spawned import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARDS, reason="FSDP2 of this torch does not run on a processor"),
]
RANKS = 4
STEPS = 3
SIZE = 12
LAYOUTS = ("tensor parallel", "replicated", "plain heads")
METHODS = ("pcgrad", "gradnorm", "independent")


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in model.named_parameters()
    }


def shard(model: Network, layout: str) -> None:
    """Shards the trunk over two dimensions and the heads over one, or leaves some whole."""
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


def make(method: str, model: Network) -> Any:
    if method == "independent":
        return mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)
    base = SGD(model.parameters(), lr=0.1)
    if method == "pcgrad":
        return mtlopt.PCGrad(base, TASKS)
    return mtlopt.GradNorm(base, TASKS, shared=model.trunk.parameters())


def train_on_mesh(rank: int, method: str, layout: str) -> dict[str, Any]:
    model = network()
    shard(model, layout)
    optimizer = make(method, model)
    optimizer.diagnostics()  # Norms may be taken only once they have been asked for.
    for x, y in batches(STEPS, size=SIZE):
        # Ranks of one row of the mesh share their data; plain heads need the same on every rank.
        half = slice(0, 6) if rank < 2 else slice(6, 12)
        own = slice(None) if layout == "plain heads" else half
        optimizer.step(make_losses(model), x[own], {t: v[own] for t, v in y.items()})
    return {"weights": whole_weights(model), "seen": optimizer.diagnostics()}


def train_plainly(method: str) -> dict[str, Any]:
    """Trains in one process on the whole batches, and works out what `diagnostics` should say."""
    model = network()
    losses, trunk = make_losses(model), list(model.trunk.parameters())
    plain = SGD(model.parameters(), lr=0.1)
    norms: list[Tensor] = []
    plain.register_step_post_hook(
        lambda *_: norms.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        )
    )
    generator = torch.Generator().manual_seed(0)
    weights = {task: torch.ones((), requires_grad=True) for task in TASKS}
    balance = Adam(weights.values(), lr=0.025)
    initial: dict[str, Tensor] = {}
    for x, y in batches(STEPS, size=SIZE):
        norms.clear()
        before = torch.stack([w.detach() for w in weights.values()])
        values = losses(TASKS, x, y).values()
        jacobian = torch.stack([reference.gradient_vector(value, trunk) for value in values])
        if method == "independent":
            reference.independent(dict.fromkeys(TASKS, plain), losses, TASKS, x, y)
        elif method == "pcgrad":
            reference.pcgrad(plain, losses, TASKS, x, y, shared=trunk, generator=generator)
        else:
            reference.gradnorm(
                plain,
                losses,
                TASKS,
                x,
                y,
                shared=trunk,
                weights=weights,
                weight_optimizer=balance,
                initial=initial,
            )
    lengths = jacobian.norm(dim=1)
    units = jacobian / lengths[:, None]
    after = torch.stack([w.detach() for w in weights.values()])
    seen = {
        "independent": {"gradient_norms": torch.stack(norms)},
        "pcgrad": {"cosines": units @ units.T},
        "gradnorm": {"weights": after, "norms": before * lengths},
    }
    return {"weights": snapshot(model), "seen": seen[method]}


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the error where a case fails, on all ranks alike, so that the next one can run."""
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def warnings_of_unequal_micro_batches(rank: int) -> list[str]:
    """Trains one step on two micro-batches of unequal counts; all parameters are known."""
    model = network()
    fully_shard(model)
    base = SGD(model.parameters(), lr=0.1)
    optimizer = mtlopt.JointOptimizer(base, TASKS, forwards="per-task")
    x, y = batches(1, size=SIZE)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(with_counts(make_losses(model)), micro_batches=halves(x, y, 8))
    return [str(warning.message) for warning in caught]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {
        f"{method}, {layout}": attempt(train_on_mesh, rank, method, layout)
        for layout in LAYOUTS
        for method in METHODS
    }
    found["warnings"] = attempt(warnings_of_unequal_micro_batches, rank)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns what each rank found in all cases: starting processes takes long."""
    folder = tmp_path_factory.mktemp("meshes")
    start(work, str(folder), ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_any_placement_train_as_in_one_process(
    method: str, layout: str, ranks: list[dict[str, Any]]
) -> None:
    """Inner products are summed over the mesh a parameter is sharded on, and over no other."""
    expected = train_plainly(method)
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


def test_sharded_micro_batches_of_unequal_counts_do_not_warn(ranks: list[dict[str, Any]]) -> None:
    """The graphs hold whole parameters, which are not the optimizer's but are gathered from it."""
    assert all(rank["warnings"] == [] for rank in ranks)
