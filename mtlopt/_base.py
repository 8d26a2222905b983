"""MultiTaskOptimizer: what every method shares, in one contract with torch."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._classes import needs_closure
from mtlopt._losses import (
    LossesFunction,
    Question,
    ReadyLosses,
    Task,
    check_tasks,
    list_batches,
    names_of,
)
from mtlopt._saved import Saved
from mtlopt._watch import Watch


class Common(NamedTuple):
    """The options that every method has."""

    scaler: torch.amp.GradScaler | None = None
    check_finite: bool = False
    process_group: dist.ProcessGroup | None = None


class MultiTaskOptimizer(Saved):
    """Base of all methods: a `torch.optim.Optimizer` that steps on the losses of several tasks.

    Not to be instantiated; it fixes the protocol, :meth:`step`, and keeps torch's promises about
    state dicts, copies and pickles for the methods. It is the type of "any method".

    Example:
        >>> import torch, mtlopt
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> def losses(tasks):
        ...     return {task: (w**2).sum() for task in tasks}
        >>> def decrease(optimizer: mtlopt.MultiTaskOptimizer) -> bool:
        ...     return sum(optimizer.step(losses).values()) > sum(optimizer.step(losses).values())
        >>> base = torch.optim.SGD([w], lr=0.125)
        >>> decrease(mtlopt.PCGrad(base, ["a", "b"])), decrease(mtlopt.JointOptimizer(base, ["a"]))
        (tensor(True), tensor(True))

    References:
        The closure of :meth:`torch.optim.Optimizer.step`, which :meth:`step` generalises.
    """

    warn_of_repeated_step: bool = True
    """Whether `step()` after `step(losses)`, which does nothing, says so once."""

    def __init__(self, tasks: Iterable[Task], inner: Optimizer, common: Common) -> None:
        self._tasks = check_tasks(tasks)
        self.generator = None
        self.scaler, self.check_finite, self.process_group = common
        if self.scaler is not None and not isinstance(self.scaler, torch.amp.GradScaler):
            raise TypeError(
                f"`scaler` must be a torch.amp.GradScaler, got {self.scaler!r}: "
                "scaler=torch.amp.GradScaler()."
            )
        # Sets up torch's tables of hooks; parameters are the methods' own business.
        Optimizer.__setstate__(self, {})
        self._watch = Watch()
        self._needs_closure = needs_closure(inner)
        if self._needs_closure and (common.scaler is not None or common.process_group is not None):
            raise ValueError(
                "`scaler` and `process_group` must be None for a class that needs a closure, "
                f"got {type(inner).__name__}."
            )

    def _patch_step_function(self) -> None:
        # torch would fire the step hooks around `step`, before any gradient is there. Here they
        # fire around each parameter update, which is a step of a plain optimizer inside.
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order given; a tuple among them is a group."""
        return self._tasks

    @abstractmethod
    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Any = None,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """Takes one step on every task that the batch has labels for.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None. Called without losses right after a step on losses,
                `step` does nothing, and warns once: the gradients have been applied.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: For torch's signature.
            **keywords: None: a batch goes by position.

        Returns:
            The present tasks' losses, detached scalars.
        """

    @abstractmethod
    def diagnostics(self) -> dict[str, Tensor]:
        """Returns what the last step saw, as tensors ready for a logger."""

    @property
    def _parameters(self) -> list[Tensor]:
        # Frozen ones too: `losses` may freeze and unfreeze between its tasks.
        return list(dict.fromkeys(self._walk()))

    def _walk(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    @property
    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self._walk()), torch.device("cpu"))

    def _question(self, losses: object) -> Question:
        return Question(losses, names_of(*self.tasks), self.check_finite)

    def _batches(
        self, losses: object, batch: tuple[Any, ...], micro_batches: Iterable[Any] | None
    ) -> list[tuple[Any, ...]]:
        """The argument tuples for `losses`; whatever lay in `.grad` before is cleared."""
        batches = list_batches(losses, batch, micro_batches)
        self._watch.changed()
        return batches

    def _clear(self) -> None:
        # What `zero_grad` does, without its profiler's scope, which costs more than a small step.
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _finish(self, values: Mapping[str, Tensor]) -> None:
        """Notes a step on losses; a left-over `step()` is to do nothing."""
        self._watch.stepped(self._parameters, values, self.tasks)

    def _is_repeated(self) -> bool:
        """Whether `step()` is called on gradients that `step(losses)` has applied."""
        return self._watch.is_applied(self._parameters, self.warn_of_repeated_step)

    def _note_step(self) -> None:
        # A scheduler on an inner optimizer asks whether a step came first. It did, even where the
        # batch lacked the labels.
        for inner in self._inner_optimizers():
            inner._opt_called = True  # type: ignore[attr-defined]  # torch sets it from outside

    # Mixed precision.

    @property
    def _scaling(self) -> torch.amp.GradScaler | None:
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self._scaling is None else self._scaling.scale(loss)

    def _unscale(self, optimizer: Optimizer) -> Tensor | None:
        """Unscales the gradients; returns whether any overflowed, on their device."""
        if self._scaling is None:
            return None
        self._scaling.unscale_(optimizer)
        # The scaler's own record, not public: asking for it forces no synchronisation.
        found = self._scaling._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        flags = list(found.values())
        if not flags:  # No gradient of the optimizer's parameters.
            return None
        return torch.stack([flag.to(flags[0].device) for flag in flags]).sum() > 0
