"""T optimizers' states off the device: FSDP2's offloading works, torchao's optimizer is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.optim import Adam, Optimizer

import mtlopt
from problems import SHARDS, TASKS, Network, batches, make_losses
from spawned import start

RANKS = 2
STEPS = 3


def adam(model: Network) -> Adam:
    return Adam(model.parameters(), lr=0.01)


def aggregated(model: Network) -> mtlopt.Aggregated:
    from torchjd.aggregation import UPGrad

    return mtlopt.Aggregated(adam(model), TASKS, UPGrad())


def scalarized(model: Network) -> mtlopt.Scalarized:
    from torchjd.scalarization import UW

    return mtlopt.Scalarized(adam(model), TASKS, UW(3).double())


METHODS: dict[str, Callable[[Network], Any]] = {
    "joint": lambda model: mtlopt.JointOptimizer(adam(model), TASKS),
    "alternating": lambda model: mtlopt.AlternatingOptimizer(adam(model), TASKS),
    "independent": lambda model: mtlopt.IndependentOptimizer(adam(model), TASKS),
    "independent, two a step": lambda model: mtlopt.IndependentOptimizer(
        adam(model), TASKS, per_step=2, order="shuffled", record="updates"
    ),
    "independent, simultaneous": lambda model: mtlopt.IndependentOptimizer(
        adam(model), TASKS, schedule="simultaneous"
    ),
    "pcgrad": lambda model: mtlopt.PCGrad(adam(model), TASKS),
    "gradnorm": lambda model: mtlopt.GradNorm(adam(model), TASKS, model.trunk[2].parameters()),
    "aggregated": aggregated,
    "scalarized": scalarized,
}


def counted(model: Network) -> Callable[..., Any]:
    plain = make_losses(model)

    def losses(tasks: Sequence[str], x: Tensor, y: Any) -> dict[str, Any]:
        return {task: (loss, len(x)) for task, loss in plain(tasks, x, y).items()}

    return losses


def train(method: str, model: Any, own: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the weights and the figures, whole."""
    optimizer = METHODS[method](model)
    for x, y in batches(STEPS):
        optimizer.step(counted(model), x[own], {task: t[own] for task, t in y.items()})
    weights = {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in model.named_parameters()
    }
    return weights, {n: v for n, v in optimizer.diagnostics().items() if n.startswith("update")}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for method in METHODS:
        torch.manual_seed(1)
        model = Network()
        policy = CPUOffloadPolicy(pin_memory=False)
        for part in (*model.heads.values(), model.trunk, model):
            fully_shard(part, mesh=mesh, offload_policy=policy)
        own = slice(0, 2) if rank == 0 else slice(2, 6)
        found[method] = train(method, model, own)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(not SHARDS, reason="FSDP2 wants a device's streams in this torch")
def test_under_fsdp2_with_states_on_the_processor_a_step_is_the_step(tmp_path: Path) -> None:
    """Every method, on shards of unequal batches, as one process on the joined one."""
    start(work, str(tmp_path), ranks=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for method in METHODS:
        torch.manual_seed(1)
        weights, figures = train(method, Network(), slice(None))
        for rank in ranks:
            own, seen = rank[method]
            # Sums over shards, in another order; then Adam's division.
            torch.testing.assert_close(own, weights, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(seen, figures, rtol=1e-8, atol=1e-10, equal_nan=True)


def torchaos() -> Any:
    """An instance as it is before its constructor has asked for an accelerator."""
    try:
        from torchao.optim import CPUOffloadOptimizer
    except AttributeError as error:
        pytest.skip(f"torchao wants a newer torch: {error!r}")
    optimizer: Optimizer = CPUOffloadOptimizer.__new__(CPUOffloadOptimizer)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: mtlopt.IndependentOptimizer(torchaos(), TASKS),
        lambda: mtlopt.IndependentOptimizer(lambda _: torchaos(), [torch.ones(1)], TASKS),
        lambda: mtlopt.JointOptimizer(torchaos(), TASKS),
        lambda: mtlopt.PCGrad(torchaos(), TASKS),
    ],
)
def test_torchaos_optimizer_with_hooks_is_refused_with_what_to_take(make: Any) -> None:
    """Every task's backward pass would fill the queue of every task's optimizer."""
    with pytest.raises(ValueError, match=r"CPUOffloadOptimizer, whose hooks.*CPUOffloadPolicy"):
        make()
