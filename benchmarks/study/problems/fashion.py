"""Multi-Fashion: two garments on a picture, one at the top left, one at the bottom right.

The construction of MultiMNIST (Sabour et al., 2017; Sener and Koltun, 2018) with the garments of
Fashion-MNIST (Lin et al., 2019), at half its resolution (18 x 18 pixels, means of four), and a
LeNet of that size. Accuracy.
"""

import gzip
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torchvision.datasets import FashionMNIST  # type: ignore[import-untyped]  # not typed

FOLDER = Path(os.environ.get("MTLOPT_DATA", "data"))


def read(name: str, skipped: int) -> Tensor:
    """Reads one of the four packed files, behind its header; downloads them where they lack."""
    path = FOLDER / "FashionMNIST" / "raw" / f"{name}-ubyte.gz"
    if not path.exists():
        FashionMNIST(str(FOLDER), download=True)
    return torch.frombuffer(
        bytearray(gzip.decompress(path.read_bytes())[skipped:]), dtype=torch.uint8
    )


@lru_cache
def load() -> dict[str, tuple[Tensor, Tensor]]:
    """Draws the pairs, once for all seeds: pictures (n, 1, 18, 18) and labels (n, 2)."""
    draw = torch.Generator().manual_seed(0)
    splits = {}
    for part, counts in (("train", {"train": 20000, "validation": 1000}), ("t10k", {"test": 2000})):
        garments = read(f"{part}-images-idx3", 16).view(-1, 28, 28)
        labels = read(f"{part}-labels-idx1", 8).long()
        order = torch.randperm(len(labels), generator=draw)
        for name, count in counts.items():
            pairs, order = order[: 2 * count].view(count, 2), order[2 * count :]
            pictures = torch.zeros(count, 1, 36, 36, dtype=torch.uint8)
            pictures[:, 0, :28, :28] = garments[pairs[:, 0]]
            corner = pictures[:, 0, 8:, 8:]
            corner.copy_(torch.maximum(corner, garments[pairs[:, 1]]))
            splits[name] = avg_pool2d(pictures / 255, 2), labels[pairs]
    return splits


class Problem:
    """An epoch of batches of 32 is 625 steps."""

    tasks = ("left", "right")
    steps = 150
    doublings = 2

    def __init__(self, seed: int) -> None:
        self.splits = load()
        self.draw = torch.Generator().manual_seed(seed)
        trunk = nn.Sequential(
            *(nn.Conv2d(1, 10, 3), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(10, 20, 3), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(20 * 3 * 3, 50), nn.ReLU()),
        )
        heads = {
            t: nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10)) for t in self.tasks
        }
        self.features, self.heads = trunk, nn.ModuleDict(heads)
        self.model = nn.ModuleList([trunk, self.heads])
        self.shared = list(trunk[7].parameters())

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        pictures, labels = self.splits["train"]
        while True:
            for rows in torch.randperm(len(labels), generator=self.draw).split(32)[:-1]:
                yield pictures[rows], labels[rows]

    def losses(self, tasks: Sequence[str], pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.features(pictures)
        return {
            task: cross_entropy(self.heads[task](z), labels[:, k])
            for k, task in enumerate(self.tasks)
            if task in tasks
        }

    def metrics(self, split: str) -> dict[str, float]:
        pictures, labels = self.splits[split]
        z = torch.cat([self.features(part) for part in pictures.split(500)])
        return {
            task: (self.heads[task](z).argmax(1) == labels[:, k]).float().mean().item()
            for k, task in enumerate(self.tasks)
        }
