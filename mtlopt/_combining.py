"""CombiningOptimizer: the methods that make one step of all tasks' gradients."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._base import repeat
from mtlopt._collect import Forwards
from mtlopt._distributed import broadcast_parameters
from mtlopt._losses import LossesFunction, ReadyLosses, Task, list_batches
from mtlopt._wrapper import WrappedOptimizer

Batches = list[tuple[Any, ...]]


class CombiningOptimizer(WrappedOptimizer):
    """One update of the wrapped optimizer per step, with a gradient made of all tasks'."""

    def __init__(
        self, optimizer: Optimizer, tasks: Iterable[Task], *, forwards: Forwards, **shared: Any
    ) -> None:
        super().__init__(optimizer, tasks, **shared)
        if forwards not in ("joint", "per-task"):
            raise ValueError(f"`forwards` must be 'joint' or 'per-task', got {forwards!r}.")
        self.forwards = forwards
        if self.process_group is not None:
            broadcast_parameters(self._parameters, self.process_group)

    @abstractmethod
    def _add_gradient(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Adds the combined gradient to `.grad`; returns the values of the present tasks."""

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> dict[str, Tensor]:
        """Takes one step on all tasks that the batch has labels for.

        Args:
            losses: Function losses(tasks, *batch) that returns a mapping from task to a scalar
                loss, (loss, count) or None; or that mapping itself, from one forward pass. None:
                apply the gradients in `.grad`, as torch's `step` does.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: Without `losses`, what torch's `step` takes.

        Returns:
            The present tasks' losses, detached scalars. Without `losses`, what the wrapped
            optimizer returns.

        Raises:
            TypeError: If the arguments do not go together.
            ValueError: If a loss is not a scalar with a graph, or was not asked for. Nothing has
                moved then.
        """
        if losses is None:
            if batch or micro_batches is not None:
                raise TypeError("`losses` must be given with a batch, got None.")
            result: Any = self.base.step() if closure is None else self.base.step(closure)
            return result  # type: ignore[no-any-return]  # torch's form returns torch's value
        if closure is not None:
            raise TypeError("`closure` must be None beside `losses`: they say the same.")
        batches = list_batches(losses, batch, micro_batches)
        if isinstance(losses, Mapping) and self._needs_closure:
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch) for a class that evaluates it "
                f"several times, {type(self.base).__name__}, got {type(losses).__name__}."
            )
        self._note_step()
        gradient = partial(self._fresh_gradient, losses, batches)
        values = gradient()
        if values:
            self._update(values, gradient)
        return values

    @torch.enable_grad()
    def backward(self, losses: ReadyLosses) -> None:
        """Adds the combined gradient of ready losses to `.grad`, in the place of `.backward()`.

        Args:
            losses: Mapping from task to a scalar loss, (loss, count) or None, of one forward pass.
        """
        self._add_gradient(losses, [()], lambda loss: loss)

    @torch.enable_grad()
    def _fresh_gradient(
        self, losses: LossesFunction | ReadyLosses, batches: Batches
    ) -> dict[str, Tensor]:
        self.zero_grad()
        return self._add_gradient(losses, batches, self._scale)

    def _update(self, values: dict[str, Tensor], again: Callable[[], dict[str, Tensor]]) -> None:
        if self._scaling is not None:
            try:
                # Unscaled before the hooks, which may clip.
                self._scaling.unscale_(self.base)
                self._scaling.step(self.base)
            finally:
                self._scaling.update()
        elif self._needs_closure:
            self.base.step(repeat(values, again))
        else:
            self.base.step()
