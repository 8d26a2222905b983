"""Forty regressions, their losses spread over eight decades: the best loss of each is known.

A teacher, a random network with one hidden layer, makes the targets; the student is of the same
form, so each target can be met but for its noise. Data are drawn afresh for each batch. Metric: the
share of the noiseless target's variance that is explained, 1 at the best reachable loss and 0 where
the mean would do as well or better.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Problem:
    """A trunk of 64 units, and a linear head per task."""

    tasks = tuple(f"t{k:02}" for k in range(40))
    steps = 200

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(0)  # one teacher for all seeds
        self.a = 1.5 * torch.randn(8, 16, generator=draw) / 8**0.5
        self.b = torch.randn(16, 40, generator=draw) / 4
        self.scale = 10 ** torch.linspace(-2, 2, 40)[torch.randperm(40, generator=draw)]
        self.x = {split: torch.randn(2000, 8, generator=draw) for split in ("validation", "test")}
        self.draw = torch.Generator().manual_seed(seed)
        trunk = nn.Sequential(nn.Linear(8, 64), nn.Tanh())
        heads = nn.ModuleDict({task: nn.Linear(64, 1) for task in self.tasks})
        self.model = nn.ModuleDict({"trunk": trunk, "heads": heads})
        self.features, self.heads = trunk, heads
        self.shared = list(trunk.parameters())

    def truth(self, x: Tensor) -> Tensor:
        return self.scale * ((x @ self.a).tanh() @ self.b)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(64, 8, generator=self.draw)
            noise = 0.1 * self.scale * torch.randn(64, 40, generator=self.draw)
            yield x, self.truth(x) + noise

    def losses(self, tasks: Sequence[str], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.features(x)
        return {t: (self.heads[t](z)[:, 0] - y[:, int(t[1:])]).square().mean() for t in tasks}

    def metrics(self, split: str) -> dict[str, float]:
        x = self.x[split]
        y, z = self.truth(x), self.features(x)
        output = torch.cat([self.heads[task](z) for task in self.tasks], 1)
        left = (output - y).square().mean(0) / y.var(0)
        return dict(zip(self.tasks, (1 - left).clamp(min=0).tolist(), strict=True))
