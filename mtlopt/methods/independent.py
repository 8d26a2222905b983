"""IndependentOptimizer: an update per task, each with its own optimizer state (eq. 3)."""

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any, overload

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from mtlopt._core.options import Options
from mtlopt._core.panel import Panel
from mtlopt._core.replicas import make_replicas
from mtlopt._core.sequential import Order, Record, Schedule, SequentialOptimizer
from mtlopt._gradients.losses import CheckFinite, Task, check_tasks, names_of
from mtlopt._gradients.ranks import broadcast_parameters


class IndependentOptimizer(SequentialOptimizer):
    r"""Steps through the tasks in turn, each with its own optimizer and so its own state.

    For :math:`k = 1, \dots, T`:

    .. math:: w \leftarrow w - \eta \, \hat m^{(k)}\!\left(g^{(k)}(w)\right)

    Each gradient is taken at the weights that the previous task's update left, and
    :math:`\hat m^{(k)}` is the update rule (Adam's, momentum's, any class's) with task k's own
    moments. T optimizers hold T times one optimizer's state for parameters that all tasks share; a
    parameter that task k's loss does not depend on gets no state in optimizer k.

    With ``schedule="simultaneous"`` and Adam, AdaGrad or RMSprop this is AdaTask. (AdamW decays
    the weights in each task's update.)

    ``IndependentOptimizer(optimizer, tasks)`` makes T optimizers of an instance's class, groups,
    options and state; the instance itself is not used afterwards.

    ``param_groups`` is the control panel: a scheduler on it, or a value set in it, takes effect for
    every task before its next update. ``optimizer[task]`` is the task's own optimizer; a value set
    in its ``param_groups`` stays with that task until :meth:`reset_overrides`.

    Args:
        optimizer_class: An optimizer, or a class of optimizer, or a factory with the same call
            shape.
        params: With a class, parameters as torch takes them: tensors, groups or named parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one state.
        schedule: "sequential" is eq. 3; "simultaneous" takes all gradients at the same weights,
            from one forward pass (holding T gradients), then applies the T steps in turn.
        order: "fixed" keeps the order of `tasks`, "shuffled" draws it at every step.
        per_step: How many of the T tasks a step visits, as in :class:`AlternatingOptimizer`;
            "simultaneous" takes all.
        record: "updates" has :meth:`diagnostics` say what each task's step moves; while a step
            lasts it costs T copies of the shared parameters.
        scaler: Gradient scaler for float16; a task whose gradient overflows skips its own step.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks that agree on the tasks' counts. "sequential" expects a model
            wrapped in DDP, "simultaneous" one that is not.
        **options: Passed on to `optimizer_class`.

    Raises:
        TypeError: If `optimizer_class` makes something other than a plain optimizer.
        ValueError: If an option is out of its range, if the class swaps the parameters for
            evaluation (schedule-free) and there are several tasks, or if a scheduler or a hook is
            attached to an instance.

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

    _takes_class = True
    _updater: Panel

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
        check_finite: CheckFinite = False,
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
        check_finite: CheckFinite = False,
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
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        panel = Panel(make_replicas(optimizer_class, params, tasks, options))
        shared_options = Options(scaler, check_finite, process_group)
        tasks = panel.optimizers
        super().__init__(panel, tasks, schedule, order, per_step, record, shared_options)
        if schedule == "sequential":
            return
        if self._needs_closure:
            raise ValueError(
                "`schedule` must be 'sequential' for a class that needs a closure, "
                f"got 'simultaneous' for {type(panel.inner[0]).__name__}."
            )
        if per_step is not None:
            raise ValueError(
                "`per_step` must be None with schedule='simultaneous', whose one forward pass "
                f"serves all tasks, got {per_step}."
            )
        broadcast_parameters(self._parameters, process_group)

    # The tasks' optimizers. Not a `Mapping`: frameworks rebuild those from their items.

    def __getitem__(self, task: Task) -> Optimizer:
        """Returns the task's own optimizer."""
        if task not in self._updater.optimizers:
            raise KeyError(f"{task!r} is not among the tasks {list(self.tasks)}")
        return self._updater.optimizers[task]

    def __contains__(self, task: object) -> bool:
        return task in self._updater.optimizers

    def __iter__(self) -> Iterator[Task]:
        return iter(self._updater.optimizers)

    def __len__(self) -> int:
        return len(self._updater.optimizers)

    def keys(self) -> KeysView[Task]:
        """Returns the tasks."""
        return self._updater.optimizers.keys()

    def values(self) -> ValuesView[Optimizer]:
        """Returns the tasks' optimizers."""
        return self._updater.optimizers.values()

    def items(self) -> ItemsView[Task, Optimizer]:
        """Returns pairs of a task and its optimizer."""
        return self._updater.optimizers.items()

    def get(self, task: Task, default: Any = None) -> Any:
        """Returns the task's own optimizer, or else the default.

        Args:
            task: One of the tasks.
            default: What to return for any other name.
        """
        return self._updater.optimizers.get(task, default)

    def pin(self, task: Task, *names: str) -> None:
        """Keeps a task's hyper-parameters at their present values, even if the panel changes.

        A value set on ``optimizer[task].param_groups`` is kept without this, unless it equals the
        panel's: then nothing shows that it was set.

        Args:
            task: One of the tasks.
            *names: Hyper-parameters of the class, such as "lr"; all of them if none is named.
        """
        self[task]
        self._updater.pin(task, names)

    def reset_overrides(self, task: Task) -> None:
        """Lets a task follow the panel again in every hyper-parameter, pinned ones too.

        Args:
            task: One of the tasks.
        """
        self[task]
        self._updater.reset(task)


def random_groups(
    tasks: Iterable[str], size: int, generator: torch.Generator | None = None
) -> tuple[tuple[str, ...], ...]:
    """Draws a partition of the tasks into groups (random task grouping).

    Args:
        tasks: Names of the tasks.
        size: How many tasks a group has; the last group holds the rest.
        generator: Source of random numbers; torch's default generator if None.

    Returns:
        Groups of names, ready for the `tasks` of any method. The authors draw them once per run.

    Raises:
        ValueError: If `size` is out of its range.

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
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(len(names), generator=generator, device=device).tolist()
    drawn = [names[i] for i in order]
    return tuple(tuple(drawn[i : i + size]) for i in range(0, len(drawn), size))
