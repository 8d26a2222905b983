"""Adult with a multi-gate mixture of experts (MMoE; Ma et al., 2018) as the shared bottom."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.study.problems import adult


class Experts(nn.Module):
    """Four experts on the embedded inputs; also passes those on, for the gates."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        width = len(adult.NUMBERS) + 4 * len(sizes)
        self.hidden = nn.Linear(width, 4 * 32)
        self.last = nn.Linear(32, 4 * 32)

    def forward(self, numbers: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        embedded = [each(words[:, i]) for i, each in enumerate(self.words)]
        x = torch.cat([numbers, *embedded], 1)
        hidden = self.hidden(x).relu().unflatten(1, (4, 32))
        weights, bias = self.last.weight.unflatten(0, (4, 32)), self.last.bias.unflatten(0, (4, 32))
        return x, (torch.einsum("nei,eoi->neo", hidden, weights) + bias).relu()


class Network(nn.Module):
    """A gate and a tower per task."""

    def __init__(self, sizes: Sequence[int], tasks: Sequence[str]) -> None:
        super().__init__()
        self.shared = Experts(sizes)
        self.last = self.shared.last
        self.gates = nn.ModuleDict(
            {task: nn.Linear(self.shared.hidden.in_features, 4) for task in tasks}
        )
        self.towers = nn.ModuleDict({task: nn.Linear(32, 1) for task in tasks})

    def forward(self, tasks: Sequence[str], numbers: Tensor, words: Tensor) -> dict[str, Tensor]:
        x, experts = self.shared(numbers, words)
        mixed = {task: self.gates[task](x).softmax(1)[:, None] @ experts for task in tasks}
        return {task: self.towers[task](z[:, 0])[:, 0] for task, z in mixed.items()}


class Problem(adult.Problem):
    """The same data and losses."""

    network = Network
