"""Shared by the three programs: network, data, losses and the optimizer of each method."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import default_collate

import mtlopt

METHODS = ("independent", "joint", "balanced", "pcgrad", "gradnorm")
TASKS = ("price", "days", "sold")
Batch = Mapping[str, Tensor]


class Network(nn.Module):
    """A trunk so narrow that the tasks interfere, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(2, 1) for task in TASKS})

    def forward(self, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: self.heads[task](features).squeeze(1) for task in tasks}


def make_data(count: int) -> Any:
    """Samples items for sale, and three targets that differ in kind and in scale."""
    inputs = torch.randn(count, 8)
    cost, rarity, demand = (inputs @ torch.randn(8, 3) / 8**0.5).T
    sold = (demand > cost).float()
    columns = (inputs, 4 * cost, torch.tanh(rarity - cost), sold)
    return [dict(zip(("inputs", *TASKS), row, strict=True)) for row in zip(*columns, strict=True)]


def evaluate(model: nn.Module, tasks: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """Returns the losses of `tasks`, and no others."""
    outputs = model(batch["inputs"], tasks)
    criteria: dict[str, Any] = dict.fromkeys(TASKS, mse_loss)
    criteria["sold"] = binary_cross_entropy_with_logits
    return {task: criteria[task](outputs[task], batch[task]) for task in tasks}


def wrap(
    method: str, network: Network, adam: torch.optim.Optimizer, **options: Any
) -> mtlopt.MultiTaskOptimizer:
    """Wraps Adam in the optimizer of a method: the one line that differs between methods."""
    if method == "independent":
        return mtlopt.IndependentOptimizer(adam, TASKS, **options)
    if method == "joint":
        return mtlopt.JointOptimizer(adam, TASKS, **options)
    if method == "balanced":
        return mtlopt.Balanced(adam, TASKS, **options)
    if method == "pcgrad":
        return mtlopt.PCGrad(adam, TASKS, **options)
    return mtlopt.GradNorm(adam, TASKS, shared=network.trunk[-2].parameters(), **options)


class Report:
    """Prints every task's loss before and after training."""

    def __init__(self, network: Network, data: Any) -> None:
        self.network, self.data = network, default_collate(data)
        self.before = evaluate(network, TASKS, self.data)

    def show(self, heading: str) -> None:
        after = evaluate(self.network, TASKS, self.data)
        print(f"{heading}\ntask    before    after")
        for task in TASKS:
            print(f"{task:6} {self.before[task].item():7.3f}  {after[task].item():7.3f}")
