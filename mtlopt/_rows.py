"""Rows: the tasks' gradients that a method combines, over parameters or over features."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mtlopt._distributed import Ranks
from mtlopt._gradients import Gradients, combine, gram
from mtlopt._losses import Task


@dataclass
class Rows:
    """One gradient for each present task, in the order of the tasks; none where all are absent."""

    gradients: dict[Task, Gradients]
    """P tensors or None for each task, to be written over."""
    tensors: Sequence[Tensor]
    """The P tensors that they are the gradients of: parameters, or features."""
    values: dict[str, Tensor]
    """The losses by name."""
    scaled: bool
    """Whether a scaler waits for an overflow, which is not to raise."""
    apart: bool = True
    """Whether what one task alone reaches keeps its plain gradient, as parameters do."""
    ranks: Ranks | None = None
    """Those over whose samples a row goes on; None where each rank has whole rows."""

    def gram(self) -> Tensor:
        """Returns the (T, T) inner products in float64, on the CPU."""
        products = gram(list(self.gradients.values()), shared=self.apart)
        return products if self.ranks is None else self.ranks.total(products)

    def combine(self, coefficients: Sequence[float]) -> Gradients:
        """Returns the sum of the rows, weighted."""
        if not self.gradients:
            return [None] * len(self.tensors)
        return combine(list(self.gradients.values()), coefficients, apart=self.apart)
