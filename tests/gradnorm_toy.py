"""The toy problem of Chen et al. (2018), section 4: related regressions of different scale.

Task i learns f_i(x) = s_i tanh((B + E_i) x). The matrices B, which all tasks share, and E_i have
normal elements of variance 10 and 3.5. A trunk of four layers of 100 rectified units is shared.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mtlopt


class GradNormToy:
    """A test and a figure use it.

    Args:
        count: Number of tasks; their scales s_i go from 1 to 100 in equal ratios.
    """

    def __init__(self, count: int) -> None:
        torch.manual_seed(0)
        self.tasks = [f"f{i}" for i in range(count)]
        self.scales = torch.logspace(0, 2, count)
        self.common = torch.randn(100, 250) * math.sqrt(10)
        self.own = torch.randn(count, 100, 250) * math.sqrt(3.5)

    def network(self) -> nn.ModuleDict:
        torch.manual_seed(2)
        trunk: list[nn.Module] = [nn.Linear(250, 100), nn.ReLU()]
        trunk += [module for _ in range(3) for module in (nn.Linear(100, 100), nn.ReLU())]
        heads = nn.ModuleList([nn.Linear(100, 100) for _ in self.tasks])
        return nn.ModuleDict({"trunk": nn.Sequential(*trunk), "heads": heads})

    def losses(self, model: Any, x: Tensor) -> dict[str, Tensor]:
        features = model["trunk"](x)
        result = {}
        for i, task in enumerate(self.tasks):
            # Divided by 250, the size of x: else tanh is ±1 nearly everywhere.
            truth = self.scales[i] * torch.tanh((self.common + self.own[i]) @ x.T / 250).T
            result[task] = ((model["heads"][i](features) - truth) ** 2).mean()
        return result

    def train(
        self, method: str, steps: int, every: int
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Trains with "equal" weights or with "gradnorm".

        Args:
            method: Which of the two.
            steps: Number of steps.
            every: How many steps from one yield to the next.

        Yields:
            The step, each task's test loss relative to its initial one, GradNorm's weights.
        """
        model: Any = self.network()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        optimizer: mtlopt.MultiTaskOptimizer = mtlopt.JointOptimizer(adam, self.tasks)
        if method == "gradnorm":
            shared = model["trunk"][-2].parameters()
            optimizer = mtlopt.GradNorm(adam, self.tasks, shared, alpha=0.12)
        draws = torch.Generator().manual_seed(1)
        test = torch.randn(500, 250, generator=draws)
        with torch.no_grad():
            first = torch.stack(list(self.losses(model, test).values()))
        for step in range(steps + 1):
            if step % every == 0:
                with torch.no_grad():
                    now = torch.stack(list(self.losses(model, test).values()))
                yield step, now / first, optimizer.diagnostics().get("weights")
            x = torch.randn(100, 250, generator=draws)
            optimizer.step(self.losses(model, x))
