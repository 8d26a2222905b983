"""Burgers' equation by a physics-informed network (Raissi et al., 2019): three losses, one error.

u_t + u u_x = (0.01 / pi) u_xx on x in [-1, 1], t in [0, 1], with u(0, x) = -sin(pi x) and u = 0 at
the ends. The reference is Cole and Hopf's formula (Basdevant et al., 1986). Relative L2 error.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

NU = 0.01 / math.pi


def solution(t: Tensor, x: Tensor) -> Tensor:
    """Cole and Hopf's formula by Gauss and Hermite's quadrature, for t > 0."""
    nodes, weights = map(torch.tensor, np.polynomial.hermite.hermgauss(100))
    s = x.double()[:, None] - 2 * (NU * t.double()[:, None]).sqrt() * nodes
    # The factor exp(-1/(2 pi nu)) keeps the exponential in range; it cancels.
    kernel = weights * torch.exp(-(torch.cos(math.pi * s) + 1) / (2 * math.pi * NU))
    return (-(torch.sin(math.pi * s) * kernel).sum(1) / kernel.sum(1)).float()


@lru_cache
def grids() -> dict[str, tuple[Tensor, Tensor]]:
    """Points (n, 2) with the solution (n,): validation and test lie at different times."""
    splits = {}
    for name, times in (
        ("validation", torch.arange(0.1, 1, 0.2)),
        ("test", torch.arange(0.2, 1.01, 0.2)),
    ):
        t, x = (
            part.flatten()
            for part in torch.meshgrid(times, torch.linspace(-1, 1, 257), indexing="ij")
        )
        splits[name] = torch.stack([t, x], 1), solution(t, x)
    return splits


class Network(nn.Sequential):
    """Four hidden layers of 20 units, and the derivatives that the equation needs."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Linear(2, 20)]
        for _ in range(3):
            layers += [nn.Tanh(), nn.Linear(20, 20)]
        super().__init__(*layers, nn.Tanh(), nn.Linear(20, 1))

    def derivatives(self, points: Tensor) -> Tensor:
        """Returns u, u_t, u_x and u_xx, (4, n), at points (n, 2) by the chain rule.

        The same as two calls of `torch.autograd.grad`, in a third of the time.
        """
        directions = points.new_tensor([[1, 0], [0, 1], [0, 0]])[:, None].expand(3, len(points), 2)
        parts = torch.cat([points[None], directions])
        for layer in self:
            if isinstance(layer, nn.Linear):
                parts = torch.cat([layer(parts[:1]), parts[1:] @ layer.weight.T])
            else:
                z, z_t, z_x, z_xx = parts
                value = z.tanh()
                slope = 1 - value.square()
                curved = slope * (z_xx - 2 * value * z_x.square())
                parts = torch.stack([value, slope * z_t, slope * z_x, curved])
        return parts[..., 0]


class Problem:
    """Points are drawn afresh for each step."""

    tasks = ("equation", "boundary", "initial")
    lower_is_better = ("error",)
    single = False
    steps = 300
    doublings = 2

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.model = Network()
        self.shared = list(self.model[-1].parameters())

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            inside, ends, start = (torch.rand(n, 2, generator=self.draw) for n in (400, 50, 50))
            inside[:, 1] = 2 * inside[:, 1] - 1
            ends[:, 1] = ends[:, 1].round() * 2 - 1
            start = torch.stack([torch.zeros(50), 2 * start[:, 1] - 1], 1)
            yield inside, ends, start

    def losses(
        self, tasks: Sequence[str], inside: Tensor, ends: Tensor, start: Tensor
    ) -> dict[str, Tensor]:
        losses = {}
        if "equation" in tasks:
            losses["equation"] = self.residual(inside).square().mean()
        if "boundary" in tasks:
            losses["boundary"] = self.model(ends).square().mean()
        if "initial" in tasks:
            target = -torch.sin(math.pi * start[:, 1:])
            losses["initial"] = (self.model(start) - target).square().mean()
        return losses

    def residual(self, points: Tensor) -> Tensor:
        u, u_t, u_x, u_xx = self.model.derivatives(points)
        residual: Tensor = u_t + u * u_x - NU * u_xx
        return residual

    def metrics(self, split: str) -> dict[str, float]:
        points, truth = grids()[split]
        error = (self.model(points)[:, 0] - truth).norm() / truth.norm()
        return {"error": error.item()}
