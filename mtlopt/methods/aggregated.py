"""Aggregated: any aggregator of TorchJD as the combination of the tasks' gradients."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.arithmetic import Gradients, Rows, tasks_by_parameter, with_gaps
from mtlopt._gradients.evaluation import Forwards
from mtlopt._gradients.losses import CheckFinite, Task
from mtlopt.methods._torchjd import (
    check_absent,
    check_rule,
    drawing_from,
    restore,
    states_of,
    vectors,
)


class Aggregated(CombiningOptimizer):
    r"""Combines the tasks' gradients by an aggregator of TorchJD.

    .. math:: w \leftarrow w - \eta \, \mathcal{A}(J), \quad J = (g_1, \dots, g_T)^\top

    The rows of J cover the shared parameters, on which the losses of at least two present tasks
    depend; the others get their plain gradient. For an aggregator that needs only the Gramian
    :math:`J J^\top`, no matrix J is built. Rows of absent tasks are left out, which an aggregator
    with a state or with a vector of length T does not allow.

    The state of an aggregator is saved in the state dict, except for NashMTL's, which belongs to a
    solver and starts from scratch in a resumed run.

    Args:
        optimizer: Optimizer that applies the combined gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one row.
        aggregator: A ``torchjd.aggregation.Aggregator`` (TorchJD 0.18 or later).
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one at a time.
        scaler: Gradient scaler for float16; an overflow skips the step.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.
        features: Modules whose outputs all tasks share, to combine there, as in :class:`PCGrad`.

    Raises:
        ImportError: If TorchJD is not installed.
        TypeError: If `optimizer` or `aggregator` is of another kind.
        ValueError: If `tasks` is empty or repeats a name, or the class needs a closure (LBFGS).

    Example:
        >>> import torch, mtlopt, torchjd.aggregation
        >>> w = torch.zeros(2, requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=1.0)
        >>> optimizer = mtlopt.Aggregated(base, ["a", "b"], torchjd.aggregation.Mean())
        >>> gradients = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0, 1.0])}
        >>> values = optimizer.step({task: w @ g for task, g in gradients.items()})
        >>> w
        tensor([ 0.0000, -0.5000], requires_grad=True)

    References:
        Quinton and Rey, 2024 (arXiv 2406.16232); https://torchjd.org.
    """

    _third = ", torchjd.aggregation.UPGrad()"

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        aggregator: nn.Module,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
        features: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        options = Options(scaler, check_finite, process_group)
        super().__init__(optimizer, tasks, forwards, options, features, takes_closures=False)
        check_rule(aggregator, "aggregation", "Aggregator", self)
        self.aggregator = aggregator
        self._weighting: Any = getattr(aggregator, "gramian_weighting", None)
        # Draws for aggregators that are random, alike on every rank.
        self.generator = torch.Generator("cpu").manual_seed(0)
        self._seen: dict[str, Tensor] = {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns ``coefficients`` (T,) of the last step, NaN where a task was absent.

        Empty before the first step, and for an aggregator that does not weigh by the Gramian.
        """
        return self._seen | self._skipped()

    def _combine(self, rows: Rows) -> Gradients:
        present = [k for k, task in enumerate(self.tasks) if task in rows.gradients]
        if not present:
            return rows.combine([])
        check_absent("aggregator", self.aggregator, self.tasks, rows.gradients)
        drawing = drawing_from(self._common_generator)
        # A caller's autocast, or default device, is not for the aggregation.
        with drawing, torch.autocast(self._device.type, enabled=False), self._input_device:
            if self._weighting is None:
                return self._by_matrix(rows)
            return self._by_gramian(rows, present)

    def _by_gramian(self, rows: Rows, present: list[int]) -> Gradients:
        # One task alone keeps its gradient; many rules would scale it.
        weights = [1.0]
        if len(present) > 1:
            products = rows.gram()
            # NaN takes an overflow to the scaler, where the aggregator might raise.
            lost = rows.is_scaled and not products.isfinite().all()
            products = self._as_preferences(products)
            weights = [float("nan")] * len(present) if lost else self._weighting(products).tolist()
        found = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self._seen["coefficients"] = with_gaps(found, present, len(self.tasks))
        return rows.combine(weights)

    def _by_matrix(self, rows: Rows) -> Gradients:
        gradients, tensors = list(rows.gradients.values()), rows.tensors
        if rows.is_distributed:
            raise ValueError(
                "`aggregator` must work from the Gramian where the ranks hold parts of the "
                f"gradients (FSDP2, or `features` with a `process_group`), got "
                f"{type(self.aggregator).__name__}, which needs whole ones."
            )
        owners = tasks_by_parameter(gradients)
        shared = [i for i, tasks in enumerate(owners) if len(tasks) > 1 or not rows.shared_only]
        combined = [
            None if i in shared or not tasks else gradients[tasks[0]][i]
            for i, tasks in enumerate(owners)
        ]
        if shared:
            sizes = [tensors[i].numel() for i in shared]
            matrix = _stack(gradients, shared, tensors)
            lost = rows.is_scaled and not matrix.isfinite().all()
            matrix = self._as_preferences(matrix)
            vector = matrix[0] * float("nan") if lost else self.aggregator(matrix)
            for i, part in zip(shared, vector.split(sizes), strict=True):
                combined[i] = part.view(tensors[i].shape).to(tensors[i].dtype)
        return combined

    def _as_preferences(self, matrix: Tensor) -> Tensor:
        """Converts what a rule multiplies with a vector of its own to that vector's kind."""
        own = vectors(self.aggregator, len(self.tasks))
        return matrix.to(own[0]) if own else matrix

    def _own_state(self) -> dict[str, Any]:
        return {"aggregator": states_of(self.aggregator)}

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        restore(self.aggregator, saved.get("aggregator", []), self._input_device)

    @property
    def _input_device(self) -> torch.device:
        """Returns where the aggregator's inputs are: Gramians are on the CPU."""
        return self._device if self._weighting is None else torch.device("cpu")


def _stack(rows: list[Gradients], shared: list[int], parameters: Sequence[Tensor]) -> Tensor:
    """Moves the tasks' gradients of the shared parameters into the (T, n) matrix J."""
    sizes = [parameters[i].numel() for i in shared]
    dtype = reduce(torch.promote_types, {parameters[i].dtype for i in shared})
    matrix = parameters[shared[0]].new_zeros(len(rows), sum(sizes), dtype=dtype)
    for i, columns in zip(shared, matrix.split(sizes, dim=1), strict=True):
        for row, own in zip(columns, rows, strict=True):
            gradient, own[i] = own[i], None  # held once, here or in the matrix
            if gradient is not None:
                row.copy_((gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1))
    return matrix
