"""Builds the network and the optimizer that `--method` names."""

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
    """Builds the network, or four for single-task learning, initialised from the seed.

    Args:
        settings: The run's settings.
        pretrained: Whether to load the weights that `--pretrained` names.

    Raises:
        InputError: The pretrained weights are not available.
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
    """Compiles the network in place; methods may still backpropagate several losses through it."""
    if settings.method not in ("independent", "alternating", "joint", "single"):
        # Later backward passes still need the buffers of the forward pass.
        torch._functorch.config.donated_buffer = False
    network.compile()


def draw_objectives(settings: Settings) -> Sequence[Objective]:
    """Returns the objectives: single tasks, or groups drawn at random once for the whole run."""
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
    """Builds the optimizer that a method's name stands for.

    Args:
        settings: The run's settings.
        network: The network to train.
        scaler: Gradient scaler for float16.
        group: The process group, if several processes train together; sequential methods then
            need a network wrapped in DistributedDataParallel.
        fused: Whether to use Adam's fused implementation.

    Raises:
        InputError: TorchJD lacks the aggregator, or is not installed.
    """
    method, objectives, lr = settings.method, draw_objectives(settings), settings.lr
    parameters = list(network.parameters())
    if method in ("independent", "single"):
        # With "single" each task has its own network, so these are four separate trainings.
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
    if settings.features:
        assert isinstance(network, MultiTaskUNet)
        # Where the heads begin: glaucoma's after the encoder, the others' after the decoder.
        common["features"] = [network.encoder[-1], network.decoder[-1]]
    if method == "pcgrad":
        common["seed"] = settings.seed
    if method in ("balanced", "pcgrad"):
        kind: Any = mtlopt.Balanced if method == "balanced" else mtlopt.PCGrad
        return kind(adam, objectives, **common)  # type: ignore[no-any-return]
    if method == "gradnorm":
        assert isinstance(network, MultiTaskUNet)
        # The last layer that all tasks share: the glaucoma head branches off after the encoder.
        if not settings.features:
            common["shared"] = network.encoder_convolutions()[-1].parameters()
        return mtlopt.GradNorm(adam, objectives, **common)
    aggregator = build_aggregator(method.removeprefix(AGGREGATED))
    return mtlopt.Aggregated(adam, objectives, aggregator, **common)


def check_method(settings: Settings) -> None:
    """Refuses a method that is not available, before photographs are read.

    Raises:
        InputError: TorchJD lacks the aggregator, or is not installed.
    """
    if settings.method.startswith(AGGREGATED):
        build_aggregator(settings.method.removeprefix(AGGREGATED))


def check_annotations(settings: Settings, known: Mapping[str, Tensor]) -> None:
    """Refuses aggregators that would fail at the first batch without some task.

    Args:
        settings: The run's settings.
        known: For each task, whether each training picture is annotated.

    Raises:
        InputError: The aggregator keeps state for every task, and a picture lacks one.
    """
    if not settings.method.startswith(AGGREGATED):
        return
    aggregator = build_aggregator(settings.method.removeprefix(AGGREGATED))
    from torchjd import Stateful  # noqa: PLC0415  # optional

    lacking = {task: int((~each).sum()) for task, each in known.items() if not each.all()}
    if lacking and any(isinstance(part, Stateful) for part in aggregator.modules()):
        task, count = next(iter(lacking.items()))
        raise InputError(
            f"`--method {settings.method}` keeps state for every task and needs all of them on "
            f"every training picture; {task} is not annotated on {count} of {len(known[task])}."
        )


def build_aggregator(name: str) -> nn.Module:
    """Builds one of TorchJD's aggregators with its default arguments.

    Raises:
        InputError: There is no such aggregator, or it needs arguments, or TorchJD is missing.
    """
    try:
        from torchjd import aggregation  # noqa: PLC0415  # optional
    except ImportError as error:
        raise InputError(
            f"`--method torchjd:{name}` needs TorchJD: pip install '.[torchjd]'."
        ) from error
    found = getattr(aggregation, name, None)
    if not (isinstance(found, type) and issubclass(found, aggregation.Aggregator)):
        raise InputError(f"`--method torchjd:NAME` must name an aggregator of TorchJD, got {name}.")
    try:
        aggregator: nn.Module = found()
    except (TypeError, ImportError) as error:
        raise InputError(f"`--method torchjd:{name}` cannot be made: {error}.") from error
    return aggregator
