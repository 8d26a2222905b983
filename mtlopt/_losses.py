"""The protocol of `losses`: what a step accepts, asked for and checked before anything moves."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Task: TypeAlias = str | tuple[str, ...]
LossesFunction: TypeAlias = Callable[..., Mapping[str, Tensor | tuple[Tensor, int] | None]]
ReadyLosses: TypeAlias = Mapping[str, Tensor | tuple[Tensor, int] | None]


class Loss(NamedTuple):
    """A task's loss on one batch, with its graph, and how many samples it is the mean of."""

    value: Tensor
    samples: int


def names_of(*tasks: Task) -> tuple[str, ...]:
    """Lists the names of tasks and of groups of tasks in order."""
    return tuple(name for task in tasks for name in (task if isinstance(task, tuple) else (task,)))


def check_tasks(tasks: Iterable[Any]) -> tuple[Task, ...]:
    """Returns the tasks as a tuple, or says what is wrong with them."""
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise TypeError(
            f'`tasks` must be an iterable of names, got {tasks!r}: tasks=("left", "right").'
        )
    # Lists become tuples: tasks are keys, and a configuration file knows no tuples.
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
    """Returns the parameters as a list, or says what was given in their place."""
    given: object = parameters
    if not isinstance(given, (Tensor, Mapping)) and isinstance(given, Iterable):
        listed = list(given)
        if all(isinstance(item, Tensor) for item in listed):
            return listed
    raise TypeError(
        f"`{argument}` must be an iterable of parameters, such as `layer.parameters()`, "
        f"got a {type(given).__name__}."
    )


def refuse_keywords(keywords: Mapping[str, Any]) -> None:
    """Says how a batch travels to `losses`."""
    if keywords:
        raise TypeError(
            "`step` hands the batch on by position: step(losses, batch) for a function "
            f"losses(tasks, batch) that takes it apart, got the keywords {list(keywords)}."
        )


def list_batches(
    losses: object, batch: tuple[Any, ...], micro_batches: Iterable[Any] | None
) -> list[tuple[Any, ...]]:
    """Returns the argument tuples that `losses` is to be called with, one for a plain batch."""
    if isinstance(losses, Mapping) and (batch or micro_batches is not None):
        raise TypeError(
            "`losses` must be a function losses(tasks, *batch) where there is a batch to call it "
            f"on, got {type(losses).__name__}."
        )
    # Materialised: a closure class asks for all of them again.
    if micro_batches is None:
        return [batch]
    if batch:
        raise TypeError(
            "`micro_batches` takes the place of the batch arguments, "
            f"got both it and {len(batch)} of those."
        )
    batches = [
        tuple(item) if isinstance(item, (tuple, list)) else (item,) for item in micro_batches
    ]
    if not batches:
        raise ValueError("`micro_batches` must hold at least one batch, got none.")
    return batches


class Question:
    """Asks `losses` for some of the tasks, and checks the answer."""

    def __init__(
        self, losses: object, known: Sequence[str], check_finite: bool, graph: bool = True
    ) -> None:
        self._losses = losses
        self._known = known
        self._check_finite = check_finite
        self._graph = graph
        self.is_function = not isinstance(losses, Mapping)

    def without_graph(self) -> "Question":
        """Asks for the values alone."""
        return Question(self._losses, self._known, self._check_finite, graph=False)

    def __call__(self, names: Sequence[str], batch: tuple[Any, ...]) -> dict[str, Loss]:
        """Returns the losses of `names` on one batch; absent tasks are left out.

        A count of 0 is kept here: other ranks may bring samples.
        """
        found: Any = self._losses
        if self.is_function:
            if not torch.compiler.is_compiling():
                # Inside a caller's autocast there may be casts of weights that have moved since.
                torch.clear_autocast_cache()
            found = _call(self._losses, tuple(names), batch)
        if not isinstance(found, Mapping):
            raise TypeError(
                "`losses` must return a mapping from task to loss, "
                f"got {type(found).__name__}{remedy(found)}."
            )
        present = {}
        for name in names:
            loss = found.get(name)
            if loss is not None:
                present[name] = _check_loss(name, loss, self._check_finite, self._graph)
        # What was not asked for now is ignored: a model may compute everything.
        if len(found) > len(present):
            unknown = [name for name in found if name not in self._known]
            if unknown:
                raise ValueError(
                    f"`losses` must name tasks of the optimizer, {list(self._known)}, "
                    f"got {unknown} among {list(found)}."
                )
        return present


def weighted(loss: Tensor, weight: float | Tensor) -> Tensor:
    """Multiplies a loss by a number; 1 leaves it as it is, to the last bit."""
    return loss if isinstance(weight, (int, float)) and weight == 1 else loss * weight


def average(losses: Sequence[Loss]) -> Loss:
    """Averages the losses of one task over batches, by count, without their graphs."""
    if len(losses) == 1:
        return Loss(losses[0].value.detach(), losses[0].samples)
    total = sum(loss.samples for loss in losses)
    terms = [loss.value.detach() * (loss.samples / max(total, 1)) for loss in losses]
    return Loss(sum_tensors(terms), total)


def sum_by_task(tasks: Iterable[Task], values: Mapping[str, Tensor]) -> dict[Task, Tensor]:
    """Returns the losses of the present tasks, a group's the sum of those of its names."""
    own = {task: [values[name] for name in names_of(task) if name in values] for task in tasks}
    return {task: sum_tensors(losses) for task, losses in own.items() if losses}


def sum_tensors(terms: Sequence[Tensor]) -> Tensor:
    """Adds tensors from left to right, as ``a + b + c`` does."""
    return sum(terms[1:], terms[0])


def remedy(losses: object) -> str:
    """What to write where losses came without their names."""
    if isinstance(losses, (list, tuple)):
        return ": dict(zip(tasks, losses))"
    return ': {"left": left_loss, "right": right_loss}' if isinstance(losses, Tensor) else ""


def _call(losses: object, names: tuple[str, ...], batch: tuple[Any, ...]) -> Any:
    if not callable(losses):
        raise TypeError(
            "`losses` must be a function losses(tasks, *batch) or a mapping from task to loss, "
            f"got {type(losses).__name__}{remedy(losses)}. A function goes before its batch: "
            "optimizer.step(losses, *batch)."
        )
    # Called first and understood afterwards: only who made the mistake pays for the signature.
    try:
        return losses(names, *batch)
    except TypeError as error:
        try:
            signature = inspect.signature(losses)
        except (TypeError, ValueError):
            raise error from None
        try:
            signature.bind(names, *batch)
        except TypeError:
            raise TypeError(
                "`losses` must take losses(tasks, *batch), here with "
                f"{len(batch)} batch arguments, got a function that takes {signature}: "
                "def losses(tasks, *batch). A closure in torch's sense goes in `closure=`, where "
                "the method has it."
            ) from error
        raise


def _check_loss(name: str, loss: Any, check_finite: bool, graph: bool) -> Loss:
    value, count = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, 1)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"The loss of task {name!r} must be a tensor, (tensor, count) or None, got {loss!r}"
            + (": loss, not loss.item()." if isinstance(loss, float) else ".")
        )
    # Integers of numpy and torch count too; a float is likely a sum in the wrong place.
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
    if graph and not value.requires_grad:
        raise ValueError(
            f"The loss of task {name!r} must have a graph to differentiate, got a tensor without "
            "one: it depends on no parameter that requires a gradient, was detached (leave out "
            ".detach()), or was computed in `torch.no_grad()`."
        )
    # Only on demand: to look at the number waits for the device.
    if check_finite and count and not torch.isfinite(value):
        raise ValueError(f"The loss of task {name!r} must be finite, got {value.item()}.")
    return Loss(value.reshape(()) if value.dim() else value, count)
