"""Linear heads that are evaluated together, as fast for forty tasks as for one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearHeads(nn.Module):
    """One parameter per task, its weights and its bias.

    Args:
        width: Size of the features.
        tasks: Names of the tasks.
    """

    def __init__(self, width: int, tasks: Sequence[str]) -> None:
        super().__init__()
        bound = width**-0.5  # As nn.Linear's.
        self.heads = nn.ParameterDict(
            {task: torch.empty(width + 1).uniform_(-bound, bound) for task in tasks}
        )

    def forward(self, features: Tensor, tasks: Sequence[str]) -> Tensor:
        """Returns the outputs (n, tasks) for features (n, width)."""
        weights = torch.stack([self.heads[task] for task in tasks], 1)
        return features @ weights[:-1] + weights[-1]
