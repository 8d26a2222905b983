"""Loss weightings that TorchJD does not have, as scalarizers of TorchJD."""

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer


class SumOfLogarithms(Scalarizer):
    """Adds the logarithms of the losses, so that no loss's unit matters."""

    def forward(self, values: Tensor, /) -> Tensor:
        return values.log().sum()


class NormalisedSTCH(Scalarizer, Stateful):
    r"""Smooth Tchebycheff scalarization as its authors train with it (Lin et al., 2024).

    A sum of logarithms warms up; after that

    .. math:: T \mu \log \sum_k \exp \left(\frac{\log (L_k / \bar L_k)}{\mu}\right),

    with :math:`\bar L_k` the mean loss of the warm-up. The authors warm up for four epochs of a
    hundred or more; here `step()`, which ends an epoch, is called ten times in a run, and the first
    call ends the warm-up.

    Args:
        count: Number of tasks.
        mu: Smoothing; small values approach the maximum.
    """

    def __init__(self, count: int, mu: float = 1.0) -> None:
        super().__init__()
        self.count, self.mu = count, mu
        self.reset()

    def reset(self) -> None:
        self.total, self.calls = torch.zeros(self.count), 0
        self.nadir: Tensor | None = None

    def step(self) -> None:
        """Ends the warm-up at the first call."""
        if self.nadir is None and self.calls:
            self.nadir = self.total / self.calls

    def forward(self, values: Tensor, /) -> Tensor:
        if self.nadir is None:
            self.total, self.calls = self.total + values.detach(), self.calls + 1
            return values.log().sum()
        return self.count * self.mu * ((values / self.nadir).log() / self.mu).logsumexp(0)
