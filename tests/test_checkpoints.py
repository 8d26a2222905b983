"""Checkpoints that torch.distributed writes: from two ranks, to one and to four."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import mtlopt
from problems import SHARDS, TASKS, Network, batches, make_losses
from spawned import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARDS, reason="FSDP2 of this torch does not run on a processor"),
    # Torch's own, of checkpoints without a process group and of typed storage.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage"),
]
dcp: Any = checkpoint  # its names are not exported for type checkers
METHODS = ("balanced", "pcgrad", "gradnorm", "independent")


def make(method: str, ranks: int) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model: Any = Network()
    if ranks > 1:
        fully_shard(model)
    if method == "independent":
        optimizer: Any = mtlopt.IndependentOptimizer(
            torch.optim.Adam, model.parameters(), TASKS, lr=0.01, order="shuffled"
        )
        optimizer["b"].param_groups[0]["lr"] = 0.03
    else:
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        shared = [model.trunk[2].weight]
        methods: dict[str, Any] = {
            "balanced": partial(mtlopt.Balanced, every=3),
            "pcgrad": mtlopt.PCGrad,
            "gradnorm": partial(mtlopt.GradNorm, shared=shared),
        }
        optimizer = methods[method](base, TASKS)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def plain(optimizer: Any) -> list[torch.optim.Optimizer]:
    independent = isinstance(optimizer, mtlopt.IndependentOptimizer)
    return list(optimizer.values()) if independent else [optimizer.base]


def collect(model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """What a checkpoint holds: the plain optimizers in torch's form, and the rest beside."""
    state = optimizer.state_dict()
    return {
        "model": get_model_state_dict(model),
        "optimizers": {
            str(k): get_optimizer_state_dict(model, o) for k, o in enumerate(plain(optimizer))
        },
        "param_groups": state["param_groups"],
        "mtlopt": {k: v for k, v in state["mtlopt"].items() if k != "optimizers"},
        "scheduler": scheduler.state_dict(),
    }


def restore(saved: dict[str, Any], model: Any, optimizer: Any, scheduler: Any) -> None:
    set_model_state_dict(model, saved["model"])
    for k, own in enumerate(plain(optimizer)):
        set_optimizer_state_dict(model, own, saved["optimizers"][str(k)])
    state = optimizer.state_dict()
    state["param_groups"] = saved["param_groups"]
    state["mtlopt"] |= saved["mtlopt"]
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(saved["scheduler"])


def train(model: Any, optimizer: Any, scheduler: Any, start: int, stop: int) -> None:
    losses = make_losses(model)
    for x, y in batches(stop, size=12)[start:]:
        optimizer.step(losses, x, y)
        scheduler.step()


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in model.named_parameters()
    }


def work(rank: int, folder: str, ranks: int, save: bool) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        store = f"file://{folder}/store-{ranks}"
        dist.init_process_group("gloo", store, rank=rank, world_size=ranks)
    results = {}
    for method in METHODS:
        model, optimizer, scheduler = make(method, ranks)
        if save:
            train(model, optimizer, scheduler, 0, 3)
            dcp.save(collect(model, optimizer, scheduler), checkpoint_id=f"{folder}/{method}")
        else:
            state = collect(model, optimizer, scheduler)
            # A task's optimizer holds nothing of the other tasks' heads; torch prepares for all.
            partly = dcp.DefaultLoadPlanner(allow_partial_load=True)
            dcp.load(state, checkpoint_id=f"{folder}/{method}", planner=partly)
            restore(state, model, optimizer, scheduler)
        train(model, optimizer, scheduler, 3, 6)
        rates = [group["lr"] for own in plain(optimizer) for group in own.param_groups]
        results[method] = (whole(model), rates)
    if rank == 0:
        torch.save(results, f"{folder}/{'saved' if save else ranks}.pt")


def test_a_run_on_two_ranks_goes_on_with_one_and_with_four(tmp_path: Path) -> None:
    """Weights, moments, schedules, learned weights, random orders and overrides."""
    start(work, str(tmp_path), 2, True, ranks=2)
    work(0, str(tmp_path), 1, False)
    start(work, str(tmp_path), 4, False, ranks=4)
    expected = torch.load(tmp_path / "saved.pt")
    for ranks in (1, 4):
        results = torch.load(tmp_path / f"{ranks}.pt")
        for method in METHODS:
            weights, rates = results[method]
            for name, weight in expected[method][0].items():
                torch.testing.assert_close(
                    weights[name],
                    weight,
                    rtol=0,
                    atol=1e-10,
                    msg=lambda m: f"{ranks}, {method}, {name}: {m}",
                )
            assert rates == expected[method][1]
    assert expected["independent"][1][1] == 0.03
