"""What each `--method` stands for: a network, and an optimizer around Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mtlopt
from refuge.errors import InputError
from refuge.network import TASKS, MultiTaskUNet, SingleTaskNetworks
from refuge.pretrained import load_pretrained
from refuge.settings import AGGREGATED, Settings

Network = MultiTaskUNet | SingleTaskNetworks
Objective = str | tuple[str, ...]


def build_network(settings: Settings, pretrained: bool = True) -> Network:
    """Makes the network, four of them for single-task learning, from the seed.

    Args:
        settings: Of the run.
        pretrained: Whether to load the weights that `--pretrained` names.

    Raises:
        InputError: The pretrained weights cannot be had.
    """
    torch.manual_seed(settings.seed)
    build = SingleTaskNetworks if settings.method == "single" else MultiTaskUNet
    network = build(
        width=settings.width,
        encoder=settings.encoder,
        norm=settings.norm,
        dropout=settings.dropout,
    )
    if pretrained and settings.pretrained != "none":
        for each in network.modules():
            if isinstance(each, MultiTaskUNet):
                load_pretrained(each, settings.pretrained, settings.encoder)
    return network


def compile_network(network: Network, settings: Settings) -> None:
    """Compiles the network in place, so that a method may differentiate several losses of it."""
    if settings.method not in ("independent", "alternating", "joint", "single"):
        # The buffers of a forward pass must outlive its first backward pass.
        torch._functorch.config.donated_buffer = False
    network.compile()


def draw_objectives(settings: Settings) -> Sequence[Objective]:
    """Groups the tasks at random, once for the whole run."""
    if settings.group_size == 1:
        return TASKS
    generator = torch.Generator().manual_seed(settings.seed)
    return list(mtlopt.random_groups(TASKS, settings.group_size, generator=generator))


def build_optimizer(
    settings: Settings,
    network: Network,
    scaler: torch.amp.GradScaler | None,
    group: dist.ProcessGroup | None = None,
    fused: bool = False,
) -> mtlopt.MultiTaskOptimizer:
    """Makes the optimizer that a method's name stands for.

    Args:
        settings: Of the run.
        network: What it trains.
        scaler: For float16.
        group: The processes, where several train together; the sequential methods then want a
            network that is wrapped in DistributedDataParallel.
        fused: Whether Adam is one kernel.

    Raises:
        InputError: TorchJD lacks the aggregator, or is not installed.
    """
    method, objectives, lr = settings.method, draw_objectives(settings), settings.lr
    parameters = list(network.parameters())
    if method in ("independent", "single"):
        # Of four networks each task reaches its own: four Adams that have nothing in common.
        return mtlopt.IndependentOptimizer(
            torch.optim.Adam, parameters, objectives, lr=lr, fused=fused or None, scaler=scaler
        )
    adam = torch.optim.Adam(parameters, lr=lr, fused=fused or None)
    if method == "alternating":
        return mtlopt.AlternatingOptimizer(adam, objectives, scaler=scaler)
    common: dict[str, Any] = {"scaler": scaler, "process_group": group}
    if method == "joint":
        weights = settings.loss_weights() if settings.weights else None
        return mtlopt.JointOptimizer(adam, objectives, weights, **common)
    if method == "pcgrad":
        return mtlopt.PCGrad(adam, objectives, seed=settings.seed, **common)
    if method == "gradnorm":
        assert isinstance(network, MultiTaskUNet)
        # The last layer that all four tasks share: glaucoma branches off after the encoder.
        shared = network.encoder_convolutions()[-1].parameters()
        return mtlopt.GradNorm(adam, objectives, shared=shared, **common)
    aggregator = build_aggregator(method.removeprefix(AGGREGATED))
    return mtlopt.Aggregated(adam, objectives, aggregator, **common)


def check_annotations(settings: Settings, known: Mapping[str, Tensor]) -> None:
    """Refuses what would end in the middle of an epoch, in a batch that lacks a task.

    Args:
        settings: Of the run.
        known: For each task, whether each training picture is annotated.

    Raises:
        InputError: The aggregator keeps a state of every task, and a picture lacks one.
    """
    if not settings.method.startswith(AGGREGATED):
        return
    aggregator = build_aggregator(settings.method.removeprefix(AGGREGATED))
    from torchjd import Stateful  # noqa: PLC0415  # optional

    lacking = {task: int((~each).sum()) for task, each in known.items() if not each.all()}
    if lacking and any(isinstance(part, Stateful) for part in aggregator.modules()):
        task, count = next(iter(lacking.items()))
        raise InputError(
            f"`--method {settings.method}` keeps a state of every task and needs all of them on "
            f"every training picture; {task} is not annotated on {count} of {len(known[task])}."
        )


def build_aggregator(name: str) -> nn.Module:
    """Makes one of TorchJD's aggregators, as it is without arguments.

    Raises:
        InputError: There is none of this name, or it needs arguments, or TorchJD is missing.
    """
    try:
        from torchjd import aggregation  # noqa: PLC0415  # optional
    except ImportError as error:
        raise InputError(
            f"`--method torchjd:{name}` needs TorchJD: pip install 'mtlopt[torchjd]'."
        ) from error
    found = getattr(aggregation, name, None)
    if not (isinstance(found, type) and issubclass(found, aggregation.Aggregator)):
        raise InputError(f"`--method torchjd:NAME` must name an aggregator of TorchJD, got {name}.")
    try:
        aggregator: nn.Module = found()
    except (TypeError, ImportError) as error:
        raise InputError(f"`--method torchjd:{name}` cannot be made: {error}.") from error
    return aggregator
