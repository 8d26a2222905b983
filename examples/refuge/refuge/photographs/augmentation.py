"""Data augmentation: mirroring, affine transforms, colour."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors  # type: ignore[import-untyped]  # not typed
from torchvision.transforms import v2  # type: ignore[import-untyped]  # not typed

from refuge.photographs.data import Batch

# No more than cameras and operators vary.
CHANGES = (
    v2.RandomAffine(
        degrees=15,
        translate=(0.05, 0.05),
        scale=(0.9, 1.1),
        interpolation=v2.InterpolationMode.BILINEAR,
    ),
    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
)


def augment(batch: Batch, change: v2.Transform | None = None) -> Batch:
    """Transforms each picture at random, together with its masks and its fovea.

    Args:
        batch: The pictures and their ground truth.
        change: The transform; by default all of `CHANGES`. It draws from torch's global generator,
            whose state is part of a checkpoint.
    """
    change = change or v2.Compose(CHANGES)
    size = batch.images.shape[-2:]
    images, discs, cups, points = [], [], [], []
    for row in range(len(batch.images)):
        masks = torch.stack((batch.targets["disc"][row], batch.targets["cup"][row]))
        box = torch.ones(1, 4, device=batch.images.device)
        # Boxes count from the corner of the first pixel, our points from its centre.
        box[0, :2] = batch.targets["fovea"][row].nan_to_num() + 0.5
        image, masks, box = change(
            tv_tensors.Image(batch.images[row]),
            tv_tensors.Mask(masks),
            tv_tensors.BoundingBoxes(box, format="CXCYWH", canvas_size=size),
        )
        images.append(image.as_subclass(Tensor))
        discs.append(masks[0].as_subclass(Tensor))
        cups.append(masks[1].as_subclass(Tensor))
        points.append(box[0, :2].as_subclass(Tensor) - 0.5)
    targets = {
        "disc": torch.stack(discs),
        "cup": torch.stack(cups),
        "fovea": torch.stack(points),
        "glaucoma": batch.targets["glaucoma"],
    }
    return Batch(torch.stack(images), targets, batch.known)


def mirror(batch: Batch) -> Batch:
    """Mirrors each picture with a probability of 1/2, so that left eyes also train right ones.

    Args:
        batch: The pictures and their ground truth; the choice draws from torch's generator.
    """
    chosen = (torch.rand(len(batch.images)) < 0.5).to(batch.images.device, non_blocking=True)

    def flip(values: Tensor) -> Tensor:
        wide = chosen.view(-1, *[1] * (values.dim() - 1))
        return torch.where(wide, values.flip(-1), values)

    points = batch.targets["fovea"].clone()
    points[:, 0] = torch.where(chosen, batch.images.shape[-1] - 1 - points[:, 0], points[:, 0])
    masks = {task: flip(batch.targets[task]) for task in ("disc", "cup")}
    targets = batch.targets | masks | {"fovea": points}
    return Batch(flip(batch.images), targets, batch.known)
