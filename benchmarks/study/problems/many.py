"""Forty regressions, their losses spread over eight decades: the best loss of each is known.

A teacher, a random network with one hidden layer, makes the targets; the student is of the same
form, so each target can be met but for its noise. Data are drawn afresh for each batch. Metric: the
share of the noiseless target's variance that is explained, 1 at the best possible loss and 0 where
the mean would do as well or better.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.study.problems.heads import LinearHeads


class Problem:
    """A trunk of 64 units, and a linear head per task."""

    tasks = tuple(f"t{k:02}" for k in range(40))
    single = False  # Forty networks, each with its own search, would take longer than all the rest.
    steps = 200
    left_out = ("Nash-MTL", "CAGrad")  # Their programs take seconds with forty tasks.

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(0)  # one teacher for all seeds
        self.a = 1.5 * torch.randn(8, 16, generator=draw) / 8**0.5
        self.b = torch.randn(16, 40, generator=draw) / 4
        self.scale = 10 ** torch.linspace(-2, 2, 40)[torch.randperm(40, generator=draw)]
        self.x = {split: torch.randn(2000, 8, generator=draw) for split in ("validation", "test")}
        self.draw = torch.Generator().manual_seed(seed)
        self.features = nn.Sequential(nn.Linear(8, 64), nn.Tanh())
        self.heads = LinearHeads(64, self.tasks)
        self.model = nn.ModuleList([self.features, self.heads])
        self.shared = list(self.features.parameters())

    def truth(self, x: Tensor) -> Tensor:
        return self.scale * ((x @ self.a).tanh() @ self.b)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(64, 8, generator=self.draw)
            noise = 0.1 * self.scale * torch.randn(64, 40, generator=self.draw)
            yield x, self.truth(x) + noise

    def losses(self, tasks: Sequence[str], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if len(tasks) < len(self.tasks):
            y = y[:, [int(task[1:]) for task in tasks]]
        errors = (self.heads(self.features(x), tasks) - y).square().mean(0)
        return dict(zip(tasks, errors, strict=True))

    def metrics(self, split: str) -> dict[str, float]:
        x = self.x[split]
        y = self.truth(x)
        left = (self.heads(self.features(x), self.tasks) - y).square().mean(0) / y.var(0)
        return dict(zip(self.tasks, (1 - left).clamp(min=0).tolist(), strict=True))
