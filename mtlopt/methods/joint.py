"""JointOptimizer: the weighted sum of the losses (eq. 1)."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.evaluation import Evaluation, Forwards
from mtlopt._gradients.losses import CheckFinite, Task, Values, names_of


class JointOptimizer(CombiningOptimizer):
    r"""Takes one step on the weighted sum of the losses, the ordinary baseline.

    .. math:: w \leftarrow w - \eta \sum_k c^{(k)} g^{(k)}(w)

    A tuned weighted sum is a strong baseline (Kurin et al., 2022; Xin et al., 2022). A step is one
    forward and one backward pass. With several micro-batches each task is differentiated
    separately, because the sum's gradient could not be averaged by each task's own counts.

    Args:
        optimizer: Optimizer that applies the gradient; it owns the parameters.
        tasks: Names of the tasks.
        weights: Weight :math:`c^{(k)}` by task; a task left out has weight 1. They are available by
            name as ``self.weights``, may be changed between steps, and are not saved.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one at a time.
        scaler: Gradient scaler for float16; an overflow skips the step.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.

    Raises:
        TypeError: If `optimizer` is not an instance of a plain optimizer.
        ValueError: If `tasks` is empty or repeats a name, or `weights` names an unknown task.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=0.25)
        >>> optimizer = mtlopt.JointOptimizer(base, ["a", "b"], weights={"b": 2.0})
        >>> def losses(tasks):
        ...     return {task: (w**2).sum() / 2 for task in tasks}
        >>> optimizer.step(losses)
        {'a': tensor(0.5000), 'b': tensor(0.5000)}
        >>> w  # 1 - 0.25 * (1 + 2)
        tensor([0.2500], requires_grad=True)

    References:
        Kurin et al., 2022 (arXiv 2201.04122); Xin et al., 2022 (arXiv 2209.11379).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        weights: Mapping[str, float] | None = None,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(optimizer, tasks, forwards, Options(scaler, check_finite, process_group))
        names = names_of(*self.tasks)
        given: Any = {} if weights is None else weights
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`weights` must be a mapping from task to number, got {weights!r}: "
                "weights=dict(zip(tasks, weights))."
            )
        by_name = {name: weight for task, weight in given.items() for name in names_of(task)}
        unknown = [name for name in by_name if name not in names]
        if unknown:
            raise ValueError(f"`weights` must name tasks among {list(names)}, got {unknown} too.")
        self.weights: dict[str, float] = {name: by_name.get(name, 1.0) for name in names}
        self._weights_by_name()

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns ``skipped`` alone: the backward pass of a sum does not separate the tasks."""
        return self._skipped()

    def _make_gradient(self, evaluation: Evaluation) -> Values:
        # Eq. 1, over the present tasks.
        return evaluation.add_sum(evaluation.names, self._weights_by_name())

    def _weights_by_name(self) -> dict[str, float]:
        # At every step, because the user may change them between steps.
        for name, weight in self.weights.items():
            value: Any = weight
            if not isinstance(value, (Real, Tensor)):
                raise TypeError(
                    "`weights` must be a mapping from task to number, "
                    f"got {value!r} for task {name!r}."
                )
            if isinstance(value, Tensor) and value.requires_grad:
                raise TypeError(
                    "`weights` must not require a gradient, since the network's step does not "
                    f"learn them, got such a tensor for task {name!r}: detach it."
                )
        return self.weights

    def _is_sum(self) -> bool:
        return all(isinstance(w, Real) and w == 1 for w in self.weights.values())
