"""The network of Pascal et al. (2022): a U-Net whose encoder four tasks share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TASKS = ("disc", "cup", "fovea", "glaucoma")
NORMS = ("batch", "group", "running")
PRIOR = 0.01  # probability of a pixel before training, as Lin et al. (2017) start from


class MultiTaskUNet(nn.Module):
    """Segments disc and cup, finds the fovea and classifies glaucoma, in whatever part is asked.

    It has only the parts that its tasks need: a network for glaucoma alone is an encoder.

    Args:
        tasks: Which of `TASKS` it can do.
        width: Channels of the first stage; 64 as published.
        norm: "batch" uses the statistics of the batch at hand, at evaluation too, as published;
            "running" averages them for evaluation; "group" is group normalisation.
        dropout: Probability in front of the glaucoma head.
    """

    def __init__(
        self,
        tasks: Sequence[str] = TASKS,
        *,
        width: int = 64,
        norm: str = "batch",
        dropout: float = 0.8,
    ) -> None:
        super().__init__()
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"`tasks` must be a non-empty subset of {TASKS}, got {tuple(tasks)}.")
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {NORMS}, got {norm!r}.")
        self.tasks = tuple(tasks)
        channels = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.encoder = nn.ModuleList(
            _double_convolution(inside, out, out, norm)
            for inside, out in zip([3, *channels], channels, strict=False)
        )
        self.decoder = nn.ModuleList()
        self.heads = nn.ModuleDict()
        if "glaucoma" in tasks:
            self.dropout = nn.Dropout(dropout)
            self.heads["glaucoma"] = nn.Linear(channels[-1], 1)
        dense = [task for task in tasks if task != "glaucoma"]
        if dense:
            for skip, out in zip(channels[3::-1], (*channels[2::-1], width), strict=True):
                self.decoder.append(_double_convolution(2 * skip, skip, out, norm))
            self.heads.update({task: _dense_head(width) for task in dense})

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits of the tasks asked, and nothing that they do not need.

        Args:
            images: (n, 3, size, size) in [0, 1], the size a multiple of 16.
            tasks: Which tasks; all of the network's by default.

        Returns:
            For each task asked, in that order, its logits: (n, size, size), or (n,) for glaucoma.
        """
        tasks = self.tasks if tasks is None else tasks
        features = [self.encoder[0](images)]
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


def count_parameters(model: nn.Module) -> int:
    """Counts the trainable numbers of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _dense_head(width: int) -> nn.Conv2d:
    """Starts from a mostly empty picture, which to learn first would take hundreds of steps."""
    head = nn.Conv2d(width, 1, kernel_size=1)
    if head.bias is not None:
        nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def _double_convolution(inside: int, middle: int, out: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((inside, middle), (middle, out)):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), _normalise(after, norm)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _normalise(channels: int, norm: str) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.BatchNorm2d(channels, track_running_stats=norm == "running")
