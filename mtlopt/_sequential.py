"""SequentialOptimizer: the methods that step through the tasks in turn."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._base import Common, MultiTaskOptimizer
from mtlopt._classes import repeat
from mtlopt._collect import ask, collect
from mtlopt._distributed import choose_ranks
from mtlopt._gradients import norm
from mtlopt._losses import Question, Task, names_of, sum_tensors
from mtlopt._passes import backward, put
from mtlopt._updates import Updates

Order: TypeAlias = Literal["fixed", "shuffled"]
Record: TypeAlias = Literal["updates"]


class SequentialOptimizer(MultiTaskOptimizer):
    """A step per task, each at the weights that the previous task left."""

    def __init__(
        self,
        tasks: Iterable[Task],
        inner: Optimizer,
        order: Order,
        per_step: int | None,
        record: Record | None,
        common: Common,
    ) -> None:
        super().__init__(tasks, inner, common)
        count = len(self.tasks)
        if per_step is not None and per_step not in set(range(1, count + 1)):
            raise ValueError(
                f"`per_step` must be between 1 and {count} (the number of tasks), got {per_step!r}."
            )
        self.per_step = per_step
        if record not in (None, "updates"):
            raise ValueError(f"`record` must be 'updates' or None, got {record!r}.")
        self.record = record
        # Tasks by position: what is left of the permutation that was drawn last.
        self._cycle: list[int] = []
        self._updates = None if record is None else Updates(count)
        if order not in ("fixed", "shuffled"):
            raise ValueError(f"`order` must be 'fixed' or 'shuffled', got {order!r}.")
        self.order = order
        self.generator = torch.Generator().manual_seed(0)
        self._seen: dict[Task, tuple[Tensor | None, Tensor | None]] = {}
        self._wants_norms = [False]  # In place, as the watch.
        self._compared: set[Task] = set()

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns, for the tasks in order, what the last step on losses saw.

        The norms cost a pass over the gradients, so they are taken from the first call on: call it
        once before training to have them from the first step.

        Returns:
            ``gradient_norms`` (T,), the Euclidean norm of each task's gradient before any hook, NaN
            for an absent task and before the first call; ``skipped`` (T,), whether the task's own
            step was left out because its gradient overflowed. With ``record="updates"`` too, of
            what each task's step has moved of the parameters that several tasks reach:
            ``update_norms`` (T,); ``update_cosines`` (T, T) between the tasks' updates, NaN for an
            absent task; and ``update_shares`` (T,), of the run so far, each task's part of the
            decaying average (0.99 a step) of their squared norms, which is AdaTask's figure AU
            summed over the parameters. Empty before the first step. With sharded parameters every
            rank must ask.
        """
        self._wants_norms[0] = True
        if not self._seen:
            return {}
        zero = torch.zeros((), device=self._device)
        nan, no = torch.full_like(zero, float("nan")), zero > 0
        seen = [self._seen.get(task, (None, None)) for task in self.tasks]
        return {
            "gradient_norms": torch.stack(
                [nan if n is None else n.to(nan.device) for n, _ in seen]
            ),
            "skipped": torch.stack([no if skipped is None else skipped for _, skipped in seen]),
            **({} if self._updates is None else self._updates.diagnostics()),
        }

    def _batches(
        self, losses: object, batch: tuple[Any, ...], micro_batches: Iterable[Any] | None
    ) -> list[tuple[Any, ...]]:
        self._seen = {}
        if self._updates is not None:
            self._updates.begin()
        return super()._batches(losses, batch, micro_batches)

    def _turns(self) -> list[Task]:
        """This step's tasks in their order."""
        self._note_step()
        if self.per_step is not None:
            drawn = self._next_of_cycle(self.per_step)
        elif self.order == "fixed":
            return list(self.tasks)
        else:
            drawn = self._permutation()
        return [self.tasks[i] for i in drawn]

    def _next_of_cycle(self, count: int) -> list[int]:
        """Takes the next tasks of permutations that are drawn one after the other."""
        rest = self._cycle
        if len(rest) < count:
            # Those still to come stand last in the new permutation: no task twice in a step.
            rest = rest + sorted(self._permutation(), key=rest.__contains__)
        drawn, self._cycle = rest[:count], rest[count:]
        return sorted(drawn) if self.order == "fixed" else drawn

    def _permutation(self) -> list[int]:
        drawn: list[int] = torch.randperm(len(self.tasks), generator=self.generator).tolist()
        return drawn

    def _check_function(self, losses: object) -> None:
        if losses is None:
            raise TypeError(self._without_losses)
        if isinstance(losses, Mapping):
            raise TypeError(
                f"`losses` of {type(self).__name__} must be a function losses(tasks, *batch), "
                f"got {type(losses).__name__}: ready losses have their graphs at the weights "
                "before the first task's step, so the later tasks' gradients would be stale. "
                f"{self._with_ready_losses}"
            )
        if not callable(losses):
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch), before the batch, "
                f"got {type(losses).__name__}: optimizer.step(losses, *batch)."
            )

    _without_losses: str
    _with_ready_losses: str

    if not TYPE_CHECKING:  # Or every attribute would pass for one.

        def __getattr__(self, name: str) -> Any:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name == "backward":
                text += ", since each task has a backward pass and a step of its own: "
                text += "optimizer.step(losses, *batch)."
            raise AttributeError(text, name=name, obj=self)

    @torch.enable_grad()
    def _backward(
        self, question: Question, task: Task, batches: list[tuple[Any, ...]]
    ) -> dict[str, Tensor]:
        """Leaves the gradient of one task's loss in `.grad`; returns the values, {} if absent."""
        self._clear()
        ranks = choose_ranks(self._walk(), self.process_group, reduced=True)
        if len(batches) > 1:
            parameters = self._parameters
            # Each name has forward passes of its own: DDP allows one backward pass to each.
            values, collected = collect(
                question,
                (task,),
                batches,
                parameters,
                ranks,
                scale=self._scale,
                forwards="per-task",
                watch=self._watch,
            )
            if collected:
                # As one backward pass would have left it.
                put(parameters, collected[task])
            return values
        terms, means = ask(question, names_of(task), batches[0], ranks)
        # A rank without labels has a term too, times 0: DDP waits for its pass.
        if terms:
            backward(self._scale(sum_tensors(list(terms.values()))), self._walk())
        return {name: mean.value for name, mean in means.items()}

    def _update_scaler(self) -> None:
        """Updates the scaler once after the turns, if a gradient was unscaled in any."""
        if self._scaling is not None and any(s is not None for _, s in self._seen.values()):
            self._scaling.update()

    def _update(
        self,
        optimizer: Optimizer,
        task: Task,
        values: dict[str, Tensor],
        again: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        """Moves the weights by one task's step; a gradient that overflowed is skipped."""
        self._watch.in_turn = True
        skipped = self._unscale(optimizer)
        if task not in self._compared:
            self._compare_ranks(task)
        if all(p.grad is None for p in self._walk()):
            self._watch.unreached(task)
        # Unscaled, and before the hooks, which may clip.
        wanted = self._wants_norms[0]
        self._seen[task] = (norm([p.grad for p in self._walk()]) if wanted else None, skipped)
        recording: AbstractContextManager[None] = nullcontext()
        if self._updates is not None:
            recording = self._updates.of(self.tasks.index(task), self._parameters)
        with recording:
            if self._scaling is not None and skipped is not None:
                self._scaling.step(optimizer)
            elif self._needs_closure and again is not None:
                optimizer.step(repeat(values, again, _total, self._parameters))
            else:
                optimizer.step()

    def _finish(self, values: Mapping[str, Tensor]) -> None:
        super()._finish(values)
        if self._updates is not None:
            self._updates.finish()

    def _own_state(self) -> dict[str, Any]:
        cycle = {} if self.per_step is None else {"cycle": list(self._cycle)}
        return cycle | ({} if self._updates is None else {"squares": self._updates.squares})

    def _restore_own_state(self, own: dict[str, Any]) -> None:
        self._cycle = list(own.get("cycle", ()))
        if not set(self._cycle) <= set(range(len(self.tasks))):
            raise ValueError(
                f"`state_dict` must have a `cycle` of {len(self.tasks)} tasks, got {self._cycle}."
            )
        if self._updates is not None:
            self._updates = Updates(len(self.tasks))
            if "squares" in own:
                self._updates.squares = own["squares"].clone().cpu()

    def _compare_ranks(self, task: Task) -> None:
        """Makes sure, once for each task, that the ranks' gradients are one."""
        parameters = self._parameters
        remedy = "wrap the model in DistributedDataParallel(model, find_unused_parameters=True)."
        ranks = choose_ranks(parameters, self.process_group, reduced=True)
        ranks.check_alike([p.grad for p in parameters], f"of task {task!r}", remedy)
        self._compared.add(task)


def refuse_closure(closure: object) -> None:
    """Says why a step per task takes none, and who may have passed one."""
    if closure is not None:
        raise TypeError(
            "`closure` must be None: each task has a loss of its own in `losses`. Where a "
            "framework passes one, choose its manual optimization, or subclass "
            "mtlopt.lightning.MultiTaskModule."
        )


def _total(values: dict[str, Tensor]) -> Tensor:
    return sum_tensors(list(values.values()))
