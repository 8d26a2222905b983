"""CombiningOptimizer: the methods that make one step of all tasks' gradients."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlopt import _gradients
from mtlopt._classes import repeat
from mtlopt._collect import Forwards, collect
from mtlopt._distributed import all_ranks, check_reduced, is_sharded
from mtlopt._gradients import Gradients
from mtlopt._losses import LossesFunction, ReadyLosses, Task, list_batches, sum_tensors
from mtlopt._wrapper import WrappedOptimizer

Batches = list[tuple[Any, ...]]


def as_it_arrives(loss: Tensor) -> Tensor:
    """The scale of losses in the imperative form, where the user's scaler has been applied."""
    return loss


class CombiningOptimizer(WrappedOptimizer):
    """One update of the wrapped optimizer per step, with a gradient made of all tasks'."""

    def __init__(
        self, optimizer: Optimizer, tasks: Iterable[Task], *, forwards: Forwards, **shared: Any
    ) -> None:
        super().__init__(optimizer, tasks, **shared)
        if forwards not in ("joint", "per-task"):
            raise ValueError(f"`forwards` must be 'joint' or 'per-task', got {forwards!r}.")
        self.forwards = forwards
        self._checked = False
        # Set in place: what Lightning's wrapper assigns in `backward` stays with the wrapper.
        self._combined = [False]
        self._warned = False
        self._broadcast(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer, with the first rank's parameters.

        Args:
            param_group: As torch takes it.
        """
        super().add_param_group(param_group)
        self._broadcast(self.param_groups[-1:])

    def _refuse_closures(self) -> None:
        if self._needs_closure:
            raise ValueError(
                "`optimizer` must not need a closure, whose evaluations would each be combined "
                f"anew, got {type(self.base).__name__}."
            )

    @abstractmethod
    def _add_gradient(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Adds the combined gradient to `.grad`; returns the values of the present tasks.

        `scale` is applied to each loss; with `as_it_arrives` the user's scaler has been already.
        """

    def _objective(self, values: dict[str, Tensor]) -> Tensor:
        """What the gradient is the gradient of, for a class that searches along a line."""
        return sum_tensors(list(values.values()))

    def _stepped(self, skipped: Tensor | None) -> None:
        """Called after each update, or what a scaler skipped of it."""

    def _collect(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
        tasks: Sequence[Task] | None = None,
    ) -> tuple[dict[str, Tensor], dict[Task, Gradients]]:
        return collect(
            losses,
            tasks or self.tasks,
            batches,
            self._parameters,
            check_finite=self.check_finite,
            scale=scale,
            group=self.process_group,
            forwards=self.forwards,
        )

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> dict[str, Tensor]:
        """Takes one step on all tasks that the batch has labels for.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
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
            self._warn_unless_combined()
            self._stepped(None)
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
        self._check_reduced()
        if values:
            self._update(values, gradient)
        return values

    @torch.enable_grad()
    def backward(self, losses: ReadyLosses) -> None:
        """Adds the combined gradient of ready losses to `.grad`, in the place of `.backward()`.

        Args:
            losses: Mapping from task to a scalar loss, (loss, count) or None, of one forward pass.
        """
        self._add_gradient(losses, [()], as_it_arrives)
        self._combined[0] = True

    @torch.enable_grad()
    def _fresh_gradient(
        self, losses: LossesFunction | ReadyLosses, batches: Batches
    ) -> dict[str, Tensor]:
        self.zero_grad()
        values = self._add_gradient(losses, batches, self._scale)
        self._combined[0] = True
        return values

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the wrapped optimizer does.

        Args:
            set_to_none: Whether they become None, or zero.
        """
        super().zero_grad(set_to_none)
        self._cleared()

    def _cleared(self) -> None:
        """Forgets what belonged to the gradients that have been cleared."""
        self._combined[0] = False

    def _is_sum(self) -> bool:
        """Whether the method's gradient is the one that `sum(losses).backward()` makes."""
        return False

    def _warn_unless_combined(self) -> None:
        combined, self._combined[0] = self._combined[0], False
        if combined or self._warned or self._is_sum() or len(self.tasks) == 1:
            return
        given = [p.grad for p in self._parameters if p.grad is not None]
        if any(getattr(gradient, "to_local", lambda g=gradient: g)().any() for gradient in given):
            self._warned = True
            warnings.warn(
                f"`step` of {type(self).__name__} without losses applied gradients that it did "
                "not make: call `optimizer.backward(losses)` in the place of "
                "`sum(losses).backward()`, or `optimizer.step(losses, *batch)`. A framework that "
                "takes the backward pass itself makes the plain sum of every method.",
                stacklevel=3,
            )

    def _check_reduced(self) -> None:
        """Makes sure, at the first step, that the ranks' gradients are one."""
        ranks = None if self._checked or self.process_group is not None else all_ranks()
        self._checked = True
        parameters = self._parameters
        if ranks is None or is_sharded(parameters):
            return
        norms = _gradients.norms(self._seen_gradients())
        norm = torch.stack(norms).norm() if norms else torch.zeros(())
        remedy = "do not wrap the model in DistributedDataParallel, and give a `process_group`."
        check_reduced(norm, ranks, "of all tasks", remedy)

    def _seen_gradients(self) -> Gradients:
        """What must be the same on all ranks before an update."""
        return [parameter.grad for parameter in self._parameters]

    def _add(self, gradient: Gradients) -> None:
        parameters = self._parameters
        earlier = [parameter.grad for parameter in parameters]
        _gradients.put(parameters, _gradients.add(earlier, gradient))

    def _update(self, values: dict[str, Tensor], again: Callable[[], dict[str, Tensor]]) -> None:
        skipped = None
        if self._scaling is not None:
            try:
                # Unscaled before the hooks, which may clip.
                skipped = self._unscale(self.base)
                self._scaling.step(self.base)
            finally:
                self._scaling.update()
        elif self._needs_closure:
            self.base.step(repeat(values, again, self._objective, self._parameters))
        else:
            self.base.step()
        self._stepped(skipped)
