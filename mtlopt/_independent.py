"""IndependentOptimizer: a step per task, each with its own optimizer state (eq. 3)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt import _gradients
from mtlopt._collect import collect
from mtlopt._losses import LossesFunction, ReadyLosses, Task, check_tasks, list_batches, names_of
from mtlopt._panel import Panel
from mtlopt._sequential import Order, refuse_closure

Schedule: TypeAlias = Literal["sequential", "simultaneous"]


class IndependentOptimizer(Panel):
    r"""Steps through the tasks in turn, each with its own optimizer and so its own state.

    For :math:`k = 1, \dots, T`:

    .. math:: w \leftarrow w - \eta \, \hat m^{(k)}\!\left(g^{(k)}(w)\right)

    Each gradient is taken at the weights that the previous task's step left, and
    :math:`\hat m^{(k)}` is the update rule (Adam's, momentum's, any class's) with task k's own
    moments. T optimizers hold T times one optimizer's state for the parameters that all tasks
    reach; a parameter that task k does not reach gets no state in optimizer k.

    ``param_groups`` is the control panel: a scheduler on it, or a value set in it, reaches every
    task before its next update. ``optimizer[task]`` is the task's own optimizer; what is set in
    its ``param_groups`` stays with that task until :meth:`reset_overrides`.

    Args:
        optimizer_class: Class of optimizer, or a factory with the same call shape.
        params: Parameters as torch takes them: tensors, groups or named parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one state.
        schedule: "sequential" is eq. 3; "simultaneous" takes all gradients at the same weights,
            from one forward pass (holding T gradients), then applies the T steps in turn.
        order: "fixed" keeps the order of `tasks`, "shuffled" draws it anew each step from
            ``self.generator`` (seed 0; saved in the state dict).
        scaler: Gradient scaler for float16; a task whose gradient overflows skips its own step.
        check_finite: Whether a loss that is not finite raises; it costs a synchronisation.
        process_group: Ranks that agree on the tasks' counts. "sequential" wants a model wrapped
            in DDP, "simultaneous" one that is not.
        **options: Passed on to `optimizer_class`.

    Raises:
        TypeError: If `optimizer_class` makes something other than a plain optimizer.
        ValueError: If `tasks` is empty or repeats a name, if `params` is empty, or if the class
            swaps the parameters for evaluation (schedule-free) and there are several tasks.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = mtlopt.IndependentOptimizer(torch.optim.SGD, [w], ["a", "b"], lr=0.5)
        >>> def losses(tasks):
        ...     return {task: (w**2).sum() / 2 for task in tasks}
        >>> optimizer.step(losses)  # 1 -> 0.5 -> 0.25
        {'a': tensor(0.5000), 'b': tensor(0.1250)}
        >>> w
        tensor([0.2500], requires_grad=True)

        In a loop that owns the backward pass, ``optimizer[task]`` is a plain optimizer:

        >>> optimizer.zero_grad()
        >>> (w**2).sum().backward()
        >>> optimizer["a"].step()

    References:
        Pascal et al., 2021 (arXiv 2109.11678); Pascal et al., Scientific Reports 12:12361, 2022.
    """

    _without_losses = (
        "`step` of IndependentOptimizer needs `losses`: one gradient cannot serve several tasks. "
        "In a loop that owns the backward pass call each task's own: "
        "optimizer.zero_grad(); loss.backward(); optimizer[task].step()."
    )

    def __init__(
        self,
        optimizer_class: Callable[..., Optimizer],
        params: Iterable[Any],
        tasks: Iterable[Task],
        *,
        schedule: Schedule = "sequential",
        order: Order = "fixed",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if schedule not in ("sequential", "simultaneous"):
            raise ValueError(
                f"`schedule` must be 'sequential' or 'simultaneous', got {schedule!r}."
            )
        self.schedule = schedule
        super().__init__(
            optimizer_class,
            params,
            tasks,
            options,
            order=order,
            scaler=scaler,
            check_finite=check_finite,
            process_group=process_group,
        )
        if self._needs_closure and schedule == "simultaneous":
            raise ValueError(
                "`schedule` must be 'sequential' for a class that needs a closure, "
                f"got 'simultaneous' for {type(self[self.tasks[0]]).__name__}."
            )
        if schedule == "simultaneous":
            self._broadcast(self.param_groups)

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Any = None,
    ) -> dict[str, Tensor]:
        """Takes a step for every task that the batch has labels for, each with its own state.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None; "sequential" calls it once per task, "simultaneous"
                once for all, and also takes the mapping itself.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: Not taken; here for torch's signature.

        Returns:
            The present tasks' losses, detached scalars.

        Raises:
            TypeError: Without losses, or for ready losses with "sequential".
            ValueError: If a loss is not a scalar with a graph, or was not asked for. With
                "sequential" the earlier tasks have stepped then.
        """
        refuse_closure(closure)
        if self.schedule == "simultaneous" and losses is not None:
            return self._step_simultaneously(losses, list_batches(losses, batch, micro_batches))
        batches = self._batches(losses, batch, micro_batches)
        function = cast(LossesFunction, losses)
        values: dict[str, Tensor] = {}
        with self._scaler_updated():
            for task in self._turns():
                # Eq. 3: task k's gradient where the previous task's step ended, its own moments.
                gradient = partial(self._backward, function, task, batches)
                if present := gradient():
                    self._update(self[task], task, present, gradient)
                values |= present
        return values

    def _step_simultaneously(
        self, losses: LossesFunction | ReadyLosses, batches: Sequence[tuple[Any, ...]]
    ) -> dict[str, Tensor]:
        self.zero_grad()
        parameters = self._parameters
        values, gradients = collect(
            losses,
            self.tasks,
            batches,
            parameters,
            check_finite=self.check_finite,
            scale=self._scale,
            group=self.process_group,
        )
        with self._scaler_updated():
            for task in self._turns():
                if task in gradients:
                    _gradients.put(parameters, gradients.pop(task))
                    self._update(self[task], task, values)
        return values


def random_groups(
    tasks: Iterable[str], size: int, generator: torch.Generator | None = None
) -> tuple[tuple[str, ...], ...]:
    """Draws a partition of the tasks into groups (random task grouping).

    Args:
        tasks: Names of the tasks.
        size: How many tasks a group has; the last group holds the rest.
        generator: What to draw from; torch's default generator if None.

    Returns:
        Groups of names, ready for the `tasks` of any method. The authors draw them once per run.

    Raises:
        ValueError: If `size` is not between 1 and the number of tasks.

    Example:
        >>> groups = random_groups(["a", "b", "c"], 2, torch.Generator().manual_seed(0))
        >>> [len(group) for group in groups]
        [2, 1]

    References:
        Pascal et al., 2021 (arXiv 2109.11678).
    """
    names = names_of(*check_tasks(tasks))
    if not 1 <= size <= len(names):
        raise ValueError(
            f"`size` must be between 1 and {len(names)} (the number of tasks), got {size}."
        )
    drawn = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    return tuple(tuple(drawn[i : i + size]) for i in range(0, len(drawn), size))
