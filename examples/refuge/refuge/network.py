"""The network of Pascal et al. (2022): a U-Net whose encoder four tasks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TASKS = ("disc", "cup", "fovea", "glaucoma")
NORMS = ("batch", "group", "running")
ENCODERS = {"vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3)}  # convolutions in each stage
PRIOR = 0.01  # probability of a pixel before training, as Lin et al. (2017) start from


class MultiTaskUNet(nn.Module):
    """Segments disc and cup, locates the fovea and classifies glaucoma.

    Only the parts that its tasks need are built and run: a network for glaucoma is an encoder.

    Args:
        tasks: Subset of `TASKS`.
        width: Channels of the first stage; 64 as published.
        encoder: One of `ENCODERS`; "vgg13" has the published number of parameters.
        norm: "batch" uses batch statistics, at evaluation too, as published; "running" keeps
            running averages for evaluation; "group" is group normalisation.
        dropout: Dropout probability before the glaucoma head.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tasks: Sequence[str] = TASKS,
        *,
        width: int = 64,
        encoder: str = "vgg13",
        norm: str = "batch",
        dropout: float = 0.8,
    ) -> None:
        super().__init__()
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"`tasks` must be a non-empty subset of {TASKS}, got {tuple(tasks)}.")
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {NORMS}, got {norm!r}.")
        if encoder not in ENCODERS:
            raise ValueError(f"`encoder` must be one of {tuple(ENCODERS)}, got {encoder!r}.")
        self.tasks = tuple(tasks)
        # The normalisation of the input belongs to the weights, so it is saved with them.
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        channels = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        stages = zip([3, *channels], channels, ENCODERS[encoder], strict=False)
        self.encoder = nn.ModuleList(
            _convolutions([inside] + [out] * depth, norm) for inside, out, depth in stages
        )
        self.decoder = nn.ModuleList()
        self.heads = nn.ModuleDict()
        if "glaucoma" in tasks:
            self.dropout = nn.Dropout(dropout)
            self.heads["glaucoma"] = nn.Linear(channels[-1], 1)
        dense = [task for task in tasks if task != "glaucoma"]
        if dense:
            for skip, out in zip(channels[3::-1], (*channels[2::-1], width), strict=True):
                self.decoder.append(_convolutions([2 * skip, skip, out], norm))
            self.heads.update({task: _dense_head(width) for task in dense})

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits of the given tasks, and nothing that they do not need.

        Args:
            images: (n, 3, size, size) in [0, 1], the size a multiple of 16.
            tasks: The tasks to compute; all of the network's by default.

        Returns:
            Logits by task, in the given order: (n, size, size), or (n,) for glaucoma.
        """
        tasks = self.tasks if tasks is None else tasks
        features = [self.encoder[0]((images - self.mean) / self.std)]
        for stage in self.encoder[1:]:
            features.append(stage(F.max_pool2d(features[-1], 2)))
        logits = {}
        if "glaucoma" in tasks:
            pooled = F.adaptive_max_pool2d(features[-1], 1).flatten(1)
            logits["glaucoma"] = self.heads["glaucoma"](self.dropout(pooled)).squeeze(1)
        dense = [task for task in tasks if task != "glaucoma"]
        if dense:
            x = features.pop()
            for stage in self.decoder:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
                x = stage(torch.cat((features.pop(), x), dim=1))
            logits |= {task: self.heads[task](x).squeeze(1) for task in dense}
        return {task: logits[task] for task in tasks}

    def encoder_convolutions(self) -> list[nn.Conv2d]:
        """Returns the encoder's convolutions; the last one is the last layer all tasks share."""
        return [layer for layer in self.encoder.modules() if isinstance(layer, nn.Conv2d)]


class SingleTaskNetworks(nn.Module):
    """Single-task learning: a separate network for each task, behind the interface of one.

    Args:
        tasks: Subset of `TASKS`.
        **options: Passed to each `MultiTaskUNet`.
    """

    def __init__(self, tasks: Sequence[str] = TASKS, **options: Any) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.networks = nn.ModuleDict({task: MultiTaskUNet((task,), **options) for task in tasks})

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits of the given tasks; see `MultiTaskUNet.forward`."""
        tasks = self.tasks if tasks is None else tasks
        return {task: self.networks[task](images, (task,))[task] for task in tasks}


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _dense_head(width: int) -> nn.Conv2d:
    """Builds a head whose bias predicts `PRIOR`: learning that would take hundreds of steps."""
    head = nn.Conv2d(width, 1, kernel_size=1)
    if head.bias is not None:
        nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def _convolutions(channels: Sequence[int], norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), _normalise(after, norm)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _normalise(channels: int, norm: str) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.BatchNorm2d(channels, track_running_stats=norm == "running")
