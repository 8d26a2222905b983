"""Rows: the tasks' gradients that a method combines, over parameters or over features."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mtlopt._distributed import ALONE, Ranks
from mtlopt._gradients import Gradients, combine, gram
from mtlopt._losses import Task
from mtlopt._shards import is_sharded


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
    ranks: Ranks = ALONE
    """Those over whose samples a row goes on."""

    @property
    def in_parts(self) -> bool:
        """Whether no rank has whole rows."""
        return self.ranks is not ALONE or is_sharded(self.tensors)

    def gram(self) -> Tensor:
        """Returns the (T, T) inner products in float64, on the CPU."""
        # Samples that lie on several ranks add up: their features are one long vector.
        return self.ranks.total(gram(list(self.gradients.values()), shared=self.apart))

    def combine(self, coefficients: Sequence[float]) -> Gradients:
        """Returns the sum of the rows, weighted."""
        # All are absent: nothing moves, yet the method has drawn its orders.
        if not self.gradients:
            return [None] * len(self.tensors)
        return combine(list(self.gradients.values()), coefficients, apart=self.apart)
