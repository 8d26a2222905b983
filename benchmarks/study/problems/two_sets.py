"""Two data sets with one trunk: handwritten digits, and garments; each task brings its batches.

The 1,797 digits that come with scikit-learn, and 6,000 pictures of Fashion-MNIST at their size, 8 x
8 pixels. A forward pass of one task's batch says nothing of the other, so all methods take one pass
per task, and independent optimizers cost one more Adam update than the sum. Accuracy.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from benchmarks.study.problems.fashion import read

Split = tuple[Tensor, Tensor]
"""Pictures (n, 64) and labels (n,)."""
COUNTS = {
    "digits": {"train": 997, "validation": 400, "test": 400},
    "garments": {"train": 4000, "validation": 1000, "test": 1000},
}


@lru_cache
def load() -> dict[str, dict[str, Split]]:
    """Reads both, by task and split; every seed has the same splits."""
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    pictures = read("train-images-idx3", 16).view(-1, 1, 28, 28)[:6000] / 255
    labels = read("train-labels-idx1", 8).long()[:6000]
    small = interpolate(pictures, size=8, mode="area").flatten(1)
    data = {"digits": (x.float() / 16, y.long()), "garments": (small, labels)}
    splits: dict[str, dict[str, Split]] = {}
    for task, (inputs, targets) in data.items():
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        parts = order.split(list(COUNTS[task].values()))
        rows = zip(COUNTS[task], parts, strict=True)
        splits[task] = {name: (inputs[each], targets[each]) for name, each in rows}
    return splits


class Problem:
    """Batches of 32 of each; an epoch of the garments is 125 steps."""

    tasks = ("digits", "garments")
    steps = 100
    doublings = 2

    def __init__(self, seed: int) -> None:
        self.splits = load()
        self.draw = torch.Generator().manual_seed(seed)
        self.trunk = nn.Sequential(*(nn.Linear(64, 64), nn.ReLU()), *(nn.Linear(64, 64), nn.ReLU()))
        self.heads = nn.ModuleDict({task: nn.Linear(64, 10) for task in self.tasks})
        self.model = nn.ModuleList([self.trunk, self.heads])
        self.shared = list(self.trunk[2].parameters())

    def batches(self) -> Iterator[tuple[dict[str, Split]]]:
        while True:
            batch = {}
            for task in self.tasks:
                x, y = self.splits[task]["train"]
                rows = torch.randint(len(y), (32,), generator=self.draw)
                batch[task] = x[rows], y[rows]
            yield (batch,)

    def losses(self, tasks: Sequence[str], batches: dict[str, Split]) -> dict[str, Tensor]:
        losses = {}
        for task in tasks:
            x, y = batches[task]
            losses[task] = cross_entropy(self.heads[task](self.trunk(x)), y)
        return losses

    def metrics(self, split: str) -> dict[str, float]:
        found = {}
        for task in self.tasks:
            x, y = self.splits[task][split]
            found[task] = (self.heads[task](self.trunk(x)).argmax(1) == y).float().mean().item()
        return found
