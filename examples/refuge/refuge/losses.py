"""One loss per task, from logits, over the pictures that are labelled for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss  # type: ignore[import-untyped]  # not typed

if TYPE_CHECKING:
    from refuge.photographs.data import Batch


def task_losses(logits: Mapping[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, int]]:
    """Computes each task's loss and how many pictures it is the mean of.

    Args:
        logits: The network's output for each task, over the whole batch.
        batch: The ground truth, and which pictures have it.

    Returns:
        For each task `(loss, count)`. Without a labelled picture both are 0, but the loss still has
        a graph, so that every process runs the same backward passes.
    """
    losses = {}
    for task in logits:
        # Half precision would round the small losses of a nearly solved task to zero.
        rows, target, output = batch.labelled(task), batch.targets[task], logits[task].float()
        if len(rows) == 0:
            losses[task] = (output.sum() * 0, 0)
            continue
        if len(rows) < len(output):
            there = rows.to(output.device, non_blocking=True)
            output, target = output[there], target[there]
        losses[task] = (LOSSES[task](output, target), len(rows))
    return losses


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Returns the binary cross-entropy, averaged over pixels."""
    return F.binary_cross_entropy_with_logits(logits, masks.float())


def fovea_loss(logits: Tensor, points: Tensor) -> Tensor:
    """Returns the mean absolute difference between predicted and true saliency maps."""
    return F.l1_loss(logits.sigmoid(), saliency_maps(points, logits.shape[-1]))


def glaucoma_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the focal loss (Lin et al., 2017) with gamma 2 and no alpha."""
    loss: Tensor = sigmoid_focal_loss(logits, labels.float(), alpha=-1, gamma=2, reduction="mean")
    # Keeps the loss of a perfectly confident batch above zero: GradNorm divides by it.
    return loss + torch.finfo(loss.dtype).tiny


def saliency_maps(points: Tensor, size: int) -> Tensor:
    """Draws an isotropic normal density around each point, scaled to a maximum of 1.

    Args:
        points: (n, 2), x and y in pixels, (0, 0) the centre of the first pixel.
        size: Side of the map; the variance is 50 (size / 256)^2 square pixels.

    Returns:
        (n, size, size).
    """
    variance = 50 * (size / 256) ** 2
    line = torch.arange(size, dtype=points.dtype, device=points.device)
    across = torch.exp(-((line - points[:, 0:1]) ** 2) / (2 * variance))
    down = torch.exp(-((line - points[:, 1:2]) ** 2) / (2 * variance))
    return down[:, :, None] * across[:, None, :]


LOSSES = {
    "disc": segmentation_loss,
    "cup": segmentation_loss,
    "fovea": fovea_loss,
    "glaucoma": glaucoma_loss,
}
