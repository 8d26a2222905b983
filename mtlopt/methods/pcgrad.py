"""PCGrad: project conflicting gradients (Yu et al., 2020)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.arithmetic import Gradients, Rows, conflict_fraction, cosines, with_gaps
from mtlopt._gradients.evaluation import Forwards
from mtlopt._gradients.losses import CheckFinite, Task

Reduction = Literal["sum", "mean"]


# Old versions of torch cannot compile `torch.tensor` of numbers from tensors.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # not typed in torch
def project_conflicts(
    gram: Sequence[Sequence[float]], orders: Sequence[Sequence[int]]
) -> list[float]:
    r"""Computes PCGrad from the gradients' inner products alone.

    Every projected gradient is a linear combination of the original ones, so the inner products
    that decide on the next projection follow from those of the originals: no vector is needed.

    Args:
        gram: (T, T) inner products :math:`K_{ij} = g_i \cdot g_j` of the original gradients.
        orders: For each task i the others in the order of their projections.

    Returns:
        T coefficients: the sum of the projected gradients is :math:`\sum_j c_j g_j`.

    Example:
        >>> # g_1 = (1, 0) and g_2 = (-1, √3)
        >>> project_conflicts([[1.0, -1.0], [-1.0, 4.0]], [[1], [0]])
        [2.0, 1.25]
    """
    products = torch.tensor(gram, dtype=torch.float64, device="cpu")
    others = torch.tensor(orders, dtype=torch.long, device="cpu").view(len(gram), -1)
    # A zero gradient conflicts with none, even if rounding says so.
    squares = products.diagonal().clone().masked_fill_(products.diagonal() <= 0, math.inf)[others]
    # Row i holds the coefficients of task i's gradient; all tasks take a projection at once.
    own = torch.eye(len(gram), dtype=torch.float64, device="cpu")
    for other, square in zip(others.unbind(1), squares.unbind(1), strict=True):
        inner = (own * products.index_select(0, other)).sum(1)
        own.scatter_(1, other[:, None], -(inner.clamp(max=0) / square)[:, None])
    total: list[float] = own.sum(0).tolist()
    return total


class PCGrad(CombiningOptimizer):
    r"""Removes from each task's gradient its conflict with every other task's, and sums.

    .. math:: g_i \leftarrow g_i - \frac{g_i \cdot g_j}{\lVert g_j \rVert^2} g_j
              \quad \text{if } g_i \cdot g_j < 0

    For each task i the others come in a fresh random order, and :math:`g_j` is always the original
    gradient (Algorithm 1 of the paper). Inner products run over the *shared* parameters, those
    that the losses of at least two present tasks depend on; the others get their plain gradient.

    Args:
        optimizer: Optimizer that applies the combined gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one gradient.
        reduction: "sum" as in the paper; "mean" divides the shared part by the number of present
            tasks.
        seed: Seed of the random orders; ``self.generator`` is saved in the state dict.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one at a time.
        scaler: Gradient scaler for float16; an overflow skips the step.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.
        features: Module or modules whose outputs all tasks share, usually the trunk: gradients are
            combined there, and one backward pass carries the result through the trunk.

    Raises:
        TypeError: If `optimizer` is not an instance of a plain optimizer.
        ValueError: If `tasks` is empty or repeats a name, or the class needs a closure (LBFGS).

    Example:
        >>> import torch, mtlopt
        >>> w = torch.zeros(2, requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=1.0)
        >>> optimizer = mtlopt.PCGrad(base, ["a", "b"])
        >>> gradients = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0, 1.0])}
        >>> values = optimizer.step({task: w @ g for task, g in gradients.items()})
        >>> w  # a without its part along b is (0.5, 0.5); b without its part along a is (0, 1)
        tensor([-0.5000, -1.5000], requires_grad=True)

    References:
        Yu et al., 2020 (arXiv 2001.06782).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        reduction: Reduction = "sum",
        seed: int = 0,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
        features: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        options = Options(scaler, check_finite, process_group)
        super().__init__(optimizer, tasks, forwards, options, features, takes_closures=False)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
        self.reduction = reduction
        self.generator = torch.Generator("cpu").manual_seed(seed)
        # Of the last step: products, coefficients and positions of the present tasks.
        self._seen: list[tuple[Tensor, list[float], list[int]]] = []

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns figures of the last step, NaN for an absent task.

        Returns:
            ``cosines`` (T, T) between the tasks' gradients over the shared parameters;
            ``coefficients`` (T,) of the original gradients in the shared part of the result;
            ``conflict_fraction``, the fraction of pairs of present tasks with a negative inner
            product. Empty before the first step.
        """
        if not self._seen:
            return self._skipped()
        products, coefficients, present = self._seen[-1]
        weights, count = products.new_tensor(coefficients), len(self.tasks)
        return {
            "cosines": with_gaps(cosines(products), present, count),
            "coefficients": with_gaps(weights, present, count),
            "conflict_fraction": conflict_fraction(products),
            **self._skipped(),
        }

    def _combine(self, rows: Rows) -> Gradients:
        # T draws at every step, so that later orders do not depend on absent tasks.
        tasks = self.tasks
        options: Any = {"generator": self.generator, "device": "cpu"}
        drawn = [torch.randperm(len(tasks), **options).tolist() for _ in tasks]
        present = [k for k, task in enumerate(tasks) if task in rows.gradients]
        if not present:
            return rows.combine([])
        products = rows.gram()
        row = {k: i for i, k in enumerate(present)}
        orders = [[row[j] for j in drawn[i] if j in row and j != i] for i in present]
        coefficients = project_conflicts(products.tolist(), orders)
        if not products.isfinite().all():  # A scaler must see it, also in finite gradients.
            coefficients = [float("nan")] * len(present)
        # For the shared part only: `combine` leaves other parameters their plain gradient.
        if self.reduction == "mean":
            coefficients = [c / len(present) for c in coefficients]
        self._seen[:] = [(products, coefficients, present)]
        return rows.combine(coefficients)
