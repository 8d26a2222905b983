"""SequentialOptimizer: methods that step through the tasks in turn (eqs. 2 and 3)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._core.closures import make_closure
from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt._core.options import Options
from mtlopt._core.updates import Updates
from mtlopt._gradients.arithmetic import norm
from mtlopt._gradients.autograd import set_grads
from mtlopt._gradients.evaluation import Evaluation
from mtlopt._gradients.losses import Task, Values, names_of

if TYPE_CHECKING:
    from mtlopt._core.panel import Panel
    from mtlopt._core.single import Single

Order: TypeAlias = Literal["fixed", "shuffled"]
Record: TypeAlias = Literal["updates"]
Schedule: TypeAlias = Literal["sequential", "simultaneous"]


_CLOSURE = (
    "`closure` must be None: each task's loss is computed in `losses`. Where a framework passes "
    "one, choose its manual optimization, or subclass mtlopt.lightning.MultiTaskModule."
)


class SequentialOptimizer(MultiTaskOptimizer):
    """Updates the parameters once per task, each time at the weights the previous task left."""

    def __init__(
        self,
        updater: "Single | Panel",
        tasks: Iterable[Task],
        schedule: Schedule,
        order: Order,
        per_step: int | None,
        record: Record | None,
        options: Options,
    ) -> None:
        super().__init__(updater, tasks, options)
        if schedule not in ("sequential", "simultaneous"):
            raise ValueError(
                f"`schedule` must be 'sequential' or 'simultaneous', got {schedule!r}."
            )
        self.schedule = schedule
        if schedule == "sequential":
            # DDP allows one backward pass for each forward pass.
            self._forwards, self._model_is_wrapped = "per-pass", True
        count = len(self.tasks)
        if per_step is not None and per_step not in set(range(1, count + 1)):
            raise ValueError(
                f"`per_step` must be between 1 and {count} (the number of tasks), got {per_step!r}."
            )
        self.per_step = per_step
        if record not in (None, "updates"):
            raise ValueError(f"`record` must be 'updates' or None, got {record!r}.")
        self.record = record
        # The rest of the permutation drawn last, tasks by position.
        self._cycle: list[int] = []
        self._updates = None if record is None else Updates(count)
        if order not in ("fixed", "shuffled"):
            raise ValueError(f"`order` must be 'fixed' or 'shuffled', got {order!r}.")
        self.order = order
        self.generator = torch.Generator("cpu").manual_seed(0)
        # Changed in place, because Lightning's wrapper shares an optimizer's attributes.
        self._seen: dict[Task, tuple[Tensor | None, Tensor | None]] = {}
        self._wants_norms = [False]
        self._compared: set[Task] = set()

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns what the last step on losses saw, for the tasks in order.

        The norms cost a pass over the gradients, so they are taken from the first call on: call it
        once before training to have them from the first step. Every rank must call it where the
        parameters are sharded.

        Returns:
            ``gradient_norms`` (T,), the Euclidean norm of each task's gradient before any hook, NaN
            for an absent task and before the first call; ``skipped`` (T,), whether a task's update
            was skipped. With ``record="updates"`` also what each task's update changed in the
            parameters that several tasks share: ``update_norms`` (T,); ``update_cosines`` (T, T);
            and ``update_shares`` (T,), each task's share of the decaying average (0.99 a step) of
            their squared norms, AdaTask's figure AU summed over the parameters. Empty before the
            first step.
        """
        self._wants_norms[0] = True
        if not self._seen and not self._report.skipped:
            return {}
        zero = torch.zeros((), device=self._device)
        nan, no = torch.full_like(zero, float("nan")), zero > 0
        seen = [self._seen.get(task, (None, None)) for task in self.tasks]
        return {
            "gradient_norms": torch.stack(
                [nan if n is None else n.to(nan.device) for n, _ in seen]
            ),
            "skipped": torch.stack([no if skipped is None else skipped for _, skipped in seen]),
            **self._skipped(),
            **({} if self._updates is None else self._updates.diagnostics()),
        }

    # The step.

    def _take_step(self, evaluation: Evaluation) -> Values:
        values: Values = {}
        self._seen.clear()
        if self._updates is not None:
            self._updates.begin()
        take = self._in_turn if self.schedule == "sequential" else self._at_once
        try:
            for task, present in take(evaluation):
                # Eqs. 2 and 3 differ in whose turn it is: the one optimizer's, or the task's own.
                with self._updater.turn(task) as optimizer:
                    self._update(optimizer, task, evaluation, present)
                values |= present
        finally:
            # Once a step, if any gradient was unscaled.
            if self._scaling is not None and any(s is not None for _, s in self._seen.values()):
                self._scaling.update()
        if self._updates is not None:
            self._updates.finish()
        return values

    def _in_turn(self, evaluation: Evaluation) -> Iterator[tuple[Task, Values]]:
        """Yields the present tasks, each with its gradient where the last update ended."""
        for task in self._turns():
            evaluation.clear_grads()
            present = evaluation.add_sum(names_of(task))
            if present and self.check_finite == "skip" and self._scaling is None:
                gradient = [parameter.grad for parameter in evaluation.parameters]
                if self._report.lost({task: gradient}):
                    evaluation.clear_grads()
                    continue
            if present:
                yield task, present

    def _at_once(self, evaluation: Evaluation) -> Iterator[tuple[Task, Values]]:
        """Yields the present tasks, all with gradients at the weights where the step began."""
        evaluation.clear_grads()
        rows, _ = evaluation.per_task()
        for task in self._turns():
            if task in rows.gradients:
                # Popped, so that an applied gradient is freed before the others are.
                set_grads(evaluation.parameters, rows.gradients.pop(task))
                yield task, {n: rows.values[n] for n in names_of(task) if n in rows.values}

    def _update(
        self, optimizer: Optimizer, task: Task, evaluation: Evaluation, values: Values
    ) -> None:
        """Moves the weights by one task's update; one that overflowed is skipped."""
        parameters = evaluation.parameters
        skipped = self._unscale(optimizer)
        if task not in self._compared:
            self._compared.add(task)
            remedy = (
                "wrap the model in DistributedDataParallel(model, find_unused_parameters=True)."
            )
            if not self._model_is_wrapped:
                remedy = "give a `process_group`."
            gradient = [parameter.grad for parameter in parameters]
            evaluation.ranks.check_alike(gradient, f"of task {task!r}", remedy)
        if all(parameter.grad is None for parameter in parameters):
            self._report.mistakes.append(("unreached", task))
        # Unscaled, and before the hooks, which may clip.
        size = norm([p.grad for p in parameters]) if self._wants_norms[0] else None
        self._seen[task] = size, skipped
        recording: AbstractContextManager[None] = nullcontext()
        if self._updates is not None:
            recording = self._updates.of(self.tasks.index(task), parameters)
        with recording:
            if self._scaling is not None and skipped is not None:
                self._scaling.step(optimizer)
            elif self._needs_closure:

                def again() -> Values:
                    evaluation.clear_grads()
                    return evaluation.add_sum(names_of(task))

                optimizer.step(make_closure(values, again, self._objective, parameters))
            else:
                optimizer.step()

    def _turns(self) -> list[Task]:
        """Takes this step's tasks from permutations that are drawn one after the other."""
        if self.per_step is None and self.order == "fixed":
            return list(self.tasks)
        count, rest = self.per_step or len(self.tasks), self._cycle if self.per_step else []
        if len(rest) < count:
            options: Any = {"generator": self.generator, "device": "cpu"}
            drawn: list[int] = torch.randperm(len(self.tasks), **options).tolist()
            # Those still due come last in the new permutation: no task comes twice in a step.
            rest = rest + sorted(drawn, key=rest.__contains__)
        turns, self._cycle = rest[:count], rest[count:]
        return [self.tasks[i] for i in (sorted(turns) if self.order == "fixed" else turns)]

    # Refusals.

    _without_losses: str
    _with_ready_losses: str

    def _check_losses(self, losses: object, closure: object) -> None:
        if closure is not None:
            raise TypeError(_CLOSURE)
        if self.schedule == "simultaneous":
            return
        if isinstance(losses, Mapping):
            raise TypeError(
                f"`losses` of {type(self).__name__} must be a function losses(tasks, *batch), "
                f"got {type(losses).__name__}: the graphs of ready losses are at the weights "
                "before the first task's update, so later tasks' gradients would be stale. "
                f"{self._with_ready_losses}"
            )
        if not callable(losses):
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch), before the batch, "
                f"got {type(losses).__name__}: optimizer.step(losses, *batch)."
            )

    def _step_on_grads(self, closure: Callable[[], Any] | None) -> Any:
        if closure is not None:
            raise TypeError(_CLOSURE)
        # A left-over `optimizer.step()` is no error.
        if self._was_applied():
            return {}
        raise TypeError(self._without_losses)

    if not TYPE_CHECKING:  # With it, mypy would accept every attribute.

        def __getattr__(self, name: str) -> Any:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name == "backward":
                text += ", because each task has its own backward pass and update: "
                text += "optimizer.step(losses, *batch)."
            raise AttributeError(text, name=name, obj=self)

    # State.

    def _own_state(self) -> dict[str, Any]:
        cycle = {} if self.per_step is None else {"cycle": list(self._cycle)}
        return cycle | ({} if self._updates is None else {"squares": self._updates.squares})

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        self._cycle = list(saved.get("cycle", ()))
        if not set(self._cycle) <= set(range(len(self.tasks))):
            raise ValueError(
                f"`state_dict` must have a `cycle` of {len(self.tasks)} tasks, got {self._cycle}."
            )
        if self._updates is not None:
            self._updates = Updates(len(self.tasks))
            if "squares" in saved:
                self._updates.squares = saved["squares"].clone().cpu()
