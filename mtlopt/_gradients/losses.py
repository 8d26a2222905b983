"""The protocol of `losses`: asking for them, checking them, and averaging them by their counts."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Task: TypeAlias = str | tuple[str, ...]
LossesFunction: TypeAlias = Callable[..., Mapping[str, Tensor | tuple[Tensor, int] | None]]
ReadyLosses: TypeAlias = Mapping[str, Tensor | tuple[Tensor, int] | None]
CheckFinite: TypeAlias = bool | Literal["skip"]
Values: TypeAlias = dict[str, Tensor]
"""Averaged losses by name, without a graph."""


class Loss(NamedTuple):
    """One task's loss on one batch, with its graph, and the number of samples it averages."""

    value: Tensor
    samples: int


def names_of(*tasks: Task) -> tuple[str, ...]:
    """Lists the names in tasks and groups of tasks, in order."""
    return tuple(name for task in tasks for name in (task if isinstance(task, tuple) else (task,)))


def present_tasks(tasks: Iterable[Task], values: Mapping[str, Any]) -> list[Task]:
    """Lists the tasks and groups of which some name has a value."""
    return [task for task in tasks if any(name in values for name in names_of(task))]


def check_tasks(tasks: Iterable[Any]) -> tuple[Task, ...]:
    """Returns the tasks as a tuple, or raises an error that says what is wrong with them."""
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise TypeError(
            f'`tasks` must be an iterable of names, got {tasks!r}: tasks=("left", "right").'
        )
    # Tasks are dictionary keys, and configuration files have lists but no tuples.
    checked = tuple(tuple(task) if isinstance(task, list) else task for task in tasks)
    if not checked:
        raise ValueError("`tasks` must name at least one task, got none.")
    for task in checked:
        if task == () or not all(isinstance(name, str) for name in names_of(task)):
            raise TypeError(
                "`tasks` must hold names or non-empty tuples of names (a group), got "
                f"{'a ' + type(task).__name__ if isinstance(task, Tensor) else repr(task)}."
            )
    names = names_of(*checked)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`tasks` must name each task once, got {repeated} more than once.")
    return checked


def check_parameters(argument: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters as a list, or raises an error that says what was given instead."""
    given: object = parameters
    if not isinstance(given, (Tensor, Mapping)) and isinstance(given, Iterable):
        listed = list(given)
        if all(isinstance(item, Tensor) for item in listed):
            return listed
    raise TypeError(
        f"`{argument}` must be an iterable of parameters, such as `layer.parameters()`, "
        f"got a {type(given).__name__}."
    )


def list_batches(
    losses: object,
    batch: tuple[Any, ...],
    micro_batches: Iterable[Any] | None,
    keywords: Mapping[str, Any],
) -> list[tuple[Any, ...]]:
    """Returns the argument tuples to call `losses` with, one for a plain batch."""
    if keywords:
        raise TypeError(
            "`step` passes the batch on by position: step(losses, batch) for a function "
            f"losses(tasks, batch) that unpacks it, got the keywords {list(keywords)}."
        )
    if isinstance(losses, Mapping) and (batch or micro_batches is not None):
        raise TypeError(
            "`losses` must be a function losses(tasks, *batch) where there is a batch to call it "
            f"on, got {type(losses).__name__}."
        )
    if micro_batches is None:
        return [batch]
    if batch:
        raise TypeError(
            f"`micro_batches` replaces the batch arguments, got both it and {len(batch)} of those."
        )
    # A list, because a line search evaluates all of them several times.
    batches = [
        tuple(item) if isinstance(item, (tuple, list)) else (item,) for item in micro_batches
    ]
    if not batches:
        raise ValueError("`micro_batches` must hold at least one batch, got none.")
    return batches


@dataclass
class LossEvaluator:
    """Asks `losses` for some of the tasks and checks what it returns."""

    losses: Any
    known: Sequence[str]
    """The names that `losses` may return."""
    check_finite: CheckFinite = False
    needs_graph: bool = True

    @property
    def is_function(self) -> bool:
        """Returns whether `losses` is a function, not a mapping of ready losses."""
        return not isinstance(self.losses, Mapping)

    def __call__(self, names: Sequence[str], batch: tuple[Any, ...]) -> dict[str, Loss]:
        """Returns the losses of `names` on one batch, without those of absent tasks.

        A loss with a count of 0 is kept: other processes may have samples of the task.
        """
        found: Any = self.losses
        if not isinstance(found, Mapping):
            if not torch.compiler.is_compiling():
                # A caller's autocast region caches casts of weights that have moved since.
                torch.clear_autocast_cache()
            try:
                found = self.losses(tuple(names), *batch)
            except TypeError as error:
                _explain_call(self.losses, names, batch, error)
                raise
        if not isinstance(found, Mapping):
            raise TypeError(
                "`losses` must return a mapping from task to loss, "
                f"got {type(found).__name__}{mapping_hint(found)}."
            )
        present = {}
        for name in names:
            loss = found.get(name)
            if loss is not None:
                present[name] = self._check(name, loss)
        # A model may compute every task: known tasks that were not asked for are ignored.
        if len(found) > len(present):
            unknown = [name for name in found if name not in self.known]
            if unknown:
                raise ValueError(
                    f"`losses` must name tasks of the optimizer, {list(self.known)}, "
                    f"got {unknown} among {list(found)}."
                )
        return present

    def _check(self, name: str, loss: Any) -> Loss:
        value, count = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, 1)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The loss of task {name!r} must be a tensor, (tensor, count) or None, got "
                f"{loss!r}{': loss, not loss.item().' if isinstance(loss, float) else '.'}"
            )
        # Integers of numpy and torch are fine; a float is likely a sum given by mistake.
        try:
            count = operator.index(count)
        except TypeError:
            raise TypeError(
                f"The count of task {name!r} must be a whole number of samples, got {count!r}: "
                "(loss, int(count))."
            ) from None
        if count < 0:
            raise ValueError(f"The count of task {name!r} must not be negative, got {count}.")
        if value.numel() != 1:
            raise ValueError(
                f"The loss of task {name!r} must be a scalar, got shape {tuple(value.shape)}: "
                "loss.mean()."
            )
        # A loss over no samples says nothing: it may be NaN, and needs no graph.
        if self.needs_graph and count and not value.requires_grad:
            raise ValueError(
                f"The loss of task {name!r} must have a graph to differentiate, got a tensor "
                "without one: it depends on no parameter that requires a gradient, was detached "
                "(remove .detach()), or was computed in `torch.no_grad()`. If the task has "
                "nothing to learn from this batch, leave it out or return None for it."
            )
        # On demand only: reading the number waits for the device.
        if self.check_finite is True and count and not torch.isfinite(value):
            raise ValueError(f"The loss of task {name!r} must be finite, got {value.item()}.")
        return Loss(value.reshape(()) if value.dim() else value, count)


def _explain_call(
    losses: object, names: Sequence[str], batch: tuple[Any, ...], error: TypeError
) -> None:
    """Raises a clearer error if `losses` cannot be called with the batch."""
    if not callable(losses):
        raise TypeError(
            "`losses` must be a function losses(tasks, *batch) or a mapping from task to loss, "
            f"got {type(losses).__name__}{mapping_hint(losses)}. The function comes before its "
            "batch: optimizer.step(losses, *batch)."
        ) from None
    try:
        signature = inspect.signature(losses)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(names, *batch)
    except TypeError:
        raise TypeError(
            "`losses` must take losses(tasks, *batch), here with "
            f"{len(batch)} batch arguments, got a function that takes {signature}: "
            "def losses(tasks, *batch). A closure in torch's sense goes in `closure=`, where "
            "the method has it."
        ) from error


def mapping_hint(losses: object) -> str:
    """Returns the expression that turns losses without names into a mapping."""
    if isinstance(losses, (list, tuple)):
        return ": dict(zip(tasks, losses))"
    return ': {"left": left_loss, "right": right_loss}' if isinstance(losses, Tensor) else ""


# Averages.


class Ranks:
    """Averages by counts over the processes that train together.

    This base class is the null form, one process alone. `mtlopt._gradients.ranks` has the others.
    Terms are *prepared* so that what the processes sum, or average, is the mean over all samples.
    """

    reduces = False
    """Whether gradients have to be summed over the processes after the last backward pass."""
    wrapped = False
    """Whether the model's wrapper (DDP, FSDP2) averages the gradient of every backward pass."""
    per_micro_batch: "Ranks"
    """The processes that agree on each micro-batch, before its backward pass."""
    per_step: "Ranks"
    """The processes that agree once a step, after the last backward pass."""

    def agree(self, seen: Mapping[str, Sequence[Loss]]) -> dict[str, Loss]:
        """Averages each task's losses by their counts, over micro-batches and processes.

        Args:
            seen: Each task's losses on this process.

        Returns:
            The averages of the present tasks, without a graph, each with its total count. A total
            of 0 means absent, so the loss may be NaN: the mean over no samples.
        """
        means = {}
        for name, losses in seen.items():
            present = [loss for loss in losses if loss.samples]
            if len(present) == 1:
                value, samples = present[0]
                # A loss that is a parameter, or a part of one, moves with it.
                shares = value.is_leaf or value._is_view()
                means[name] = Loss(value.detach().clone() if shares else value.detach(), samples)
            elif present:
                total = sum(loss.samples for loss in present)
                parts = [loss.value.detach() * (loss.samples / total) for loss in present]
                means[name] = Loss(sum_tensors(parts), total)
        return means

    def share(self, own: int, total: int) -> float | None:
        """Returns the factor for this process's loss, None if it takes no backward pass."""
        return 1.0 if own else None

    def sum(self, gradients: Any, parameters: Sequence[Tensor]) -> Any:
        """Sums one gradient over processes whose model is not wrapped; no-op on one process."""
        return gradients

    def total(self, values: Tensor) -> Tensor:
        """Sums a small tensor over the processes and returns it on the CPU."""
        return values

    def find_copies(self, tensors: Sequence[Tensor]) -> list[bool] | None:
        """Tells which tensors hold the same numbers on all processes, None where it is unknown."""
        return None

    def check_batches(self, count: int) -> None:
        """Checks that all processes have the same number of micro-batches."""

    def check_alike(self, gradients: Any, of: str, remedy: str) -> None:
        """Checks that the gradients are the same on all processes, where they have to be."""


SINGLE_PROCESS = Ranks()
SINGLE_PROCESS.per_micro_batch = SINGLE_PROCESS.per_step = SINGLE_PROCESS


def weighted(loss: Tensor, weight: float | Tensor) -> Tensor:
    """Multiplies a loss by a number; a weight of 1 leaves it unchanged to the last bit."""
    return loss if isinstance(weight, (int, float)) and weight == 1 else loss * weight


def sum_by_task(tasks: Iterable[Task], values: Mapping[str, Tensor]) -> dict[Task, Tensor]:
    """Returns the losses of the present tasks; a group's loss is the sum over its names."""
    own = {task: [values[name] for name in names_of(task) if name in values] for task in tasks}
    return {task: sum_tensors(losses) for task, losses in own.items() if losses}


def sum_tensors(terms: Sequence[Tensor]) -> Tensor:
    """Adds tensors from left to right, as ``a + b + c`` does."""
    return sum(terms[1:], terms[0])
