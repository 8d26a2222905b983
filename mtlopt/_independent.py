"""IndependentOptimizer: a step per task, each with its own optimizer state (eq. 3)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeAlias, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._base import Common
from mtlopt._build import make
from mtlopt._collect import collect
from mtlopt._distributed import broadcast_parameters, choose_ranks
from mtlopt._losses import (
    LossesFunction,
    Question,
    ReadyLosses,
    Task,
    check_tasks,
    names_of,
    refuse_keywords,
)
from mtlopt._panel import Panel
from mtlopt._passes import put
from mtlopt._sequential import Order, Record, SequentialOptimizer, refuse_closure

Schedule: TypeAlias = Literal["sequential", "simultaneous"]


class IndependentOptimizer(Panel, SequentialOptimizer):
    r"""Steps through the tasks in turn, each with its own optimizer and so its own state.

    For :math:`k = 1, \dots, T`:

    .. math:: w \leftarrow w - \eta \, \hat m^{(k)}\!\left(g^{(k)}(w)\right)

    Each gradient is taken at the weights that the previous task's step left, and
    :math:`\hat m^{(k)}` is the update rule (Adam's, momentum's, any class's) with task k's own
    moments. T optimizers hold T times one optimizer's state for the parameters that all tasks
    reach; a parameter that task k does not reach gets no state in optimizer k.

    With ``schedule="simultaneous"`` and Adam, AdaGrad or RMSprop this is AdaTask: moments of each
    task's own, all gradients from one forward pass. (AdamW decays the weights in each task's step.)

    ``IndependentOptimizer(optimizer, tasks)`` makes T optimizers of an instance's class, groups,
    options and state; the instance itself is not used afterwards. ``IndependentOptimizer(
    torch.optim.Adam, params, tasks, lr=1e-3)`` calls the class T times.

    ``param_groups`` is the control panel: a scheduler on it, or a value set in it, reaches every
    task before its next update. ``optimizer[task]`` is the task's own optimizer; what is set in
    its ``param_groups`` stays with that task until :meth:`reset_overrides`.

    Args:
        optimizer_class: An optimizer, or a class of optimizer, or a factory with the same call
            shape.
        params: With a class, parameters as torch takes them: tensors, groups or named parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one state.
        schedule: "sequential" is eq. 3; "simultaneous" takes all gradients at the same weights,
            from one forward pass (holding T gradients), then applies the T steps in turn.
        order: "fixed" keeps the order of `tasks`, "shuffled" draws it anew each step from
            ``self.generator`` (seed 0; saved in the state dict).
        per_step: How many of the T tasks a step visits, so that it costs as many passes: all of
            them if None. They come from a shuffled cycle, each equally often; one that is absent
            from its batch has had its turn. "simultaneous" takes all.
        record: "updates" has :meth:`diagnostics` say what each task's step moves; while a step
            lasts it costs T copies of the parameters that several tasks reach.
        scaler: Gradient scaler for float16; a task whose gradient overflows skips its own step.
        check_finite: Whether a loss that is not finite raises; it costs a synchronisation.
        process_group: Ranks that agree on the tasks' counts. "sequential" wants a model wrapped
            in DDP, "simultaneous" one that is not.
        **options: Passed on to `optimizer_class`.

    Raises:
        TypeError: If `optimizer_class` makes something other than a plain optimizer.
        ValueError: If `tasks` is empty or repeats a name, if `params` is empty, if `per_step` is
            out of its range, if the class swaps the parameters for evaluation (schedule-free) and
            there are several tasks, or if a scheduler or a hook is attached to an instance.

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
        Pascal et al., 2021 (arXiv 2109.11678); Pascal et al., Scientific Reports 12:12361, 2022;
        AdaTask: Yang et al., AAAI 2023 (arXiv 2211.15055).
    """

    _without_losses = (
        "`step` of IndependentOptimizer needs `losses`: one gradient cannot serve several tasks. "
        "In a loop that owns the backward pass call each task's own: "
        "optimizer.zero_grad(); loss.backward(); optimizer[task].step()."
    )

    _with_ready_losses = (
        'schedule="simultaneous" takes ready losses: all gradients at the same weights.'
    )

    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        /,
        tasks: Iterable[Task],
        *,
        schedule: Schedule = "sequential",
        order: Order = "fixed",
        per_step: int | None = None,
        record: Record | None = None,
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        optimizer_class: Callable[..., Optimizer],
        params: Iterable[Any],
        tasks: Iterable[Task],
        *,
        schedule: Schedule = "sequential",
        order: Order = "fixed",
        per_step: int | None = None,
        record: Record | None = None,
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None: ...

    def __init__(  # type: ignore[misc]  # `tasks` is second or third
        self,
        optimizer_class: Callable[..., Optimizer] | Optimizer,
        params: Iterable[Any] | None = None,
        tasks: Iterable[Task] | None = None,
        *,
        schedule: Schedule = "sequential",
        order: Order = "fixed",
        per_step: int | None = None,
        record: Record | None = None,
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
        optimizers = make(optimizer_class, params, tasks, options)
        self._lay_out(optimizers)
        first = next(iter(optimizers.values()))
        common = Common(scaler, check_finite, process_group)
        super().__init__(optimizers, first, order, per_step, record, common)
        if self._needs_closure and schedule == "simultaneous":
            raise ValueError(
                "`schedule` must be 'sequential' for a class that needs a closure, "
                f"got 'simultaneous' for {type(first).__name__}."
            )
        if schedule == "simultaneous" and per_step is not None:
            raise ValueError(
                "`per_step` must be None with schedule='simultaneous', whose one forward pass is "
                f"of all tasks, got {per_step}."
            )
        if schedule == "simultaneous":
            broadcast_parameters(self._parameters, process_group)

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Any = None,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """Takes a step for every task, or `per_step` of them, each with its own state.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None; "sequential" calls it once per task, "simultaneous"
                once for all, and also takes the mapping itself.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: Not taken; here for torch's signature.
            **keywords: None: a batch goes by position.

        Returns:
            The present tasks' losses, detached scalars.

        Raises:
            TypeError: Without losses, or for ready losses with "sequential".
            ValueError: If a loss is not a scalar with a graph, or was not asked for. With
                "sequential" the earlier tasks have stepped then.
        """
        refuse_keywords(keywords)
        refuse_closure(closure)
        if losses is None and self._is_repeated():
            return {}
        simultaneous = self.schedule == "simultaneous" and losses is not None
        if not simultaneous:
            self._check_function(losses)
        batches = self._batches(losses, batch, micro_batches)
        question = self._question(losses)
        values: dict[str, Tensor] = {}
        try:
            if simultaneous:
                values = self._step_simultaneously(question, batches)
            for task in () if simultaneous else self._turns():
                # Eq. 3: task k's gradient where the previous task's step ended, its own moments.
                gradient = partial(self._backward, question, task, batches)
                if present := gradient():
                    self._update(self[task], task, present, gradient)
                values |= present
        finally:
            self._update_scaler()
        self._finish(values)
        return values

    def _step_simultaneously(
        self, question: Question, batches: list[tuple[Any, ...]]
    ) -> dict[str, Tensor]:
        """Eq. 3 with every g^(k) at the weights where the step began: AdaTask's, with Adam."""
        self._clear()
        parameters = self._parameters
        ranks = choose_ranks(parameters, self.process_group, reduced=False)
        values, gradients = collect(
            question,
            self.tasks,
            batches,
            parameters,
            ranks,
            scale=self._scale,
            watch=self._watch,
        )
        for task in self._turns():
            if task in gradients:
                # Popped: a gradient that has been applied need not wait for the others.
                put(parameters, gradients.pop(task))
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
