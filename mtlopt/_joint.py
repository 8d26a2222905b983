"""JointOptimizer: the weighted sum of the losses (eq. 1)."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._base import Common
from mtlopt._collect import Forwards, ask
from mtlopt._combining import Batches
from mtlopt._losses import Question, Task, names_of, sum_tensors, weighted
from mtlopt._one_pass import OnePassOptimizer


class JointOptimizer(OnePassOptimizer):
    r"""Takes one step on the weighted sum of the losses, the ordinary baseline.

    .. math:: w \leftarrow w - \eta \sum_k c^{(k)} g^{(k)}(w)

    A tuned weighted sum is a strong baseline (Kurin et al., 2022; Xin et al., 2022). One forward
    and one backward pass make a step; with several micro-batches each task is differentiated
    apart, since a sum over tasks could not be averaged by each task's own count afterwards.

    Args:
        optimizer: Optimizer that applies the gradient; it owns the parameters.
        tasks: Names of the tasks.
        weights: Weight :math:`c^{(k)}` by name of task; a task left out has weight 1. They stand
            in ``self.weights``, may be set there between steps, and are not saved.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one after the other.
        scaler: Gradient scaler for float16; an overflow skips the step.
        check_finite: Whether a loss that is not finite raises; it costs a synchronisation.
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
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(optimizer, tasks, forwards, Common(scaler, check_finite, process_group))
        names = names_of(*self.tasks)
        given: Any = {} if weights is None else weights
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`weights` must be a mapping from task to number, got {weights!r}: "
                "weights=dict(zip(tasks, weights))."
            )
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"`weights` must name tasks among {list(names)}, got {unknown} beside them."
            )
        self.weights: dict[str, float] = {name: given.get(name, 1.0) for name in names}
        for name in names:
            self._weight(name)

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns nothing: one backward pass of the sum tells no task from another."""
        return {}

    def _weight(self, name: str) -> float:
        weight: Any = self.weights.get(name, 1.0)
        if not isinstance(weight, (Real, Tensor)):
            raise TypeError(
                "`weights` must be a mapping from task to number, "
                f"got {weight!r} for task {name!r}."
            )
        if isinstance(weight, Tensor) and weight.requires_grad:
            raise TypeError(
                "`weights` must not require a gradient, since a step of the network does not learn "
                f"them, got such a tensor for task {name!r}: detach it."
            )
        return weight  # type: ignore[return-value]  # a number, or a tensor that acts as one

    def _weights(self) -> dict[str, float]:
        # Read at every step, as the user may set them between steps.
        return {name: self._weight(name) for name in names_of(*self.tasks)}

    def _is_sum(self) -> bool:
        return all(isinstance(w, Real) and w == 1 for w in self.weights.values())

    def _objective(self, values: dict[str, Tensor]) -> Tensor:
        return sum_tensors([weighted(value, self._weight(k)) for k, value in values.items()])

    def _add_gradient(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        names, ranks = names_of(*self.tasks), self._ranks
        if len(batches) > 1:  # All tasks are one group then, each averaged by its own counts.
            values, gradients = self._collect(question, batches, arrived, [names])
            for gradient in gradients.values():
                self._add(gradient)
            return values
        weights = self._weights()
        scale = None if arrived else self._scale
        apart = self.forwards == "per-task" and question.is_function
        values = {}
        for asked in [(name,) for name in names] if apart else [names]:
            terms, means = ask(question, asked, batches[0], ranks)
            self._note_reach(terms)
            # Eq. 1: the gradient of the weighted sum of the losses, over the tasks present.
            total = [weighted(term, weights[name]) for name, term in terms.items()]
            self._pass(sum_tensors(total) if total else None, scale, ranks, bool(means))
            values |= {name: mean.value for name, mean in means.items()}
        return values
