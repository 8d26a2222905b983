"""JointOptimizer: the weighted sum of the losses (eq. 1)."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt import _gradients
from mtlopt._collect import Forwards
from mtlopt._combining import Batches, CombiningOptimizer
from mtlopt._distributed import agree, all_ranks, is_sharded, sum_gradients
from mtlopt._losses import (
    LossesFunction,
    ReadyLosses,
    Task,
    evaluate,
    names_of,
    sum_tensors,
    weighted,
)


class JointOptimizer(CombiningOptimizer):
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
        super().__init__(
            optimizer,
            tasks,
            forwards=forwards,
            scaler=scaler,
            check_finite=check_finite,
            process_group=process_group,
        )
        names = names_of(*self.tasks)
        given: Any = {} if weights is None else weights
        if not isinstance(given, Mapping) or not all(map(_is_number, given.values())):
            raise TypeError(f"`weights` must be a mapping from task to number, got {weights!r}.")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"`weights` must name tasks among {list(names)}, got {unknown} beside them."
            )
        self.weights: dict[str, float] = {name: given.get(name, 1.0) for name in names}

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns nothing: one backward pass of the sum tells no task from another."""
        return {}

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    def _is_sum(self) -> bool:
        return all(weight == 1 for weight in self.weights.values())

    def _objective(self, values: dict[str, Tensor]) -> Tensor:
        return sum_tensors([weighted(value, self._weight(k)) for k, value in values.items()])

    def _add_gradient(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        names = names_of(*self.tasks)
        if self.forwards == "per-task" and callable(losses):
            values: dict[str, Tensor] = {}
            for name in names:
                values |= self._add_collected(losses, (name,), batches, scale)
            return values
        if len(batches) > 1:
            return self._add_collected(losses, names, batches, scale)
        present = evaluate(losses, names, batches[0], self.check_finite)
        parameters = self._parameters
        sharded = is_sharded(parameters)
        group = all_ranks() if sharded and self.process_group is None else self.process_group
        counts, values = agree(
            {name: [present[name]] if name in present else [] for name in names},
            group,
            on_every_rank=sharded,
        )
        ranks = dist.get_world_size(group) if sharded and group is not None else 1
        # Eq. 1: one backward pass of the weighted sum, over the tasks present.
        terms = [
            weighted(loss.value, self._weight(name) * (loss.samples * ranks / counts[name]))
            for name, loss in present.items()
            if (counts[name] if sharded else loss.samples)
        ]
        total = [scale(sum_tensors(terms))] if terms else []
        if self.process_group is None or sharded:
            for loss in total:
                _gradients.backward(loss, parameters)
        elif values:
            own = list(_gradients.differentiate(total, parameters))
            self._add(
                sum_gradients(
                    own[0] if own else [None] * len(parameters), parameters, self.process_group
                )
            )
        return values

    def _add_collected(
        self,
        losses: LossesFunction | ReadyLosses,
        names: tuple[str, ...],
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        values, collected = self._collect(losses, batches, scale, names)
        for name in values:
            self._add(_gradients.scaled(collected.pop(name), self._weight(name)))
        return values


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Tensor))
