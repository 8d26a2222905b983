"""SequentialOptimizer: the methods that step through the tasks in turn."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt import _gradients
from mtlopt._base import MultiTaskOptimizer
from mtlopt._classes import repeat
from mtlopt._distributed import (
    agree,
    all_ranks,
    check_reduced,
    is_sharded,
    norm_over_shards,
    share,
)
from mtlopt._losses import (
    Loss,
    LossesFunction,
    Task,
    evaluate,
    list_batches,
    mean,
    names_of,
    sum_tensors,
    weighted,
)

Order: TypeAlias = Literal["fixed", "shuffled"]
Batches: TypeAlias = list[tuple[Any, ...]]


class SequentialOptimizer(MultiTaskOptimizer):
    """A step per task, each at the weights that the previous task left."""

    def __init__(self, tasks: Iterable[Task], *, order: Order, **shared: Any) -> None:
        super().__init__(tasks, **shared)
        if order not in ("fixed", "shuffled"):
            raise ValueError(f"`order` must be 'fixed' or 'shuffled', got {order!r}.")
        self.order = order
        self.generator = torch.Generator().manual_seed(0)
        self._seen: dict[Task, tuple[list[Tensor], Tensor | None]] = {}
        self._reduced: set[Task] = set()

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns, for the tasks in order, what the last step on losses saw.

        Returns:
            ``gradient_norms`` (T,), the Euclidean norm of each task's gradient before any hook, NaN
            for an absent task; ``skipped`` (T,), whether the task's own step was left out because
            its gradient overflowed. Empty before the first step. With sharded parameters every
            rank must ask.
        """
        if not self._seen:
            return {}
        zero = torch.zeros((), device=self._device)
        nan, no = torch.full_like(zero, float("nan")), zero > 0
        seen = [self._seen.get(task, ([nan], None)) for task in self.tasks]
        parameters = self._parameters
        return {
            "gradient_norms": torch.stack(
                [norm_over_shards(norms, parameters) if norms else zero for norms, _ in seen]
            ),
            "skipped": torch.stack([no if flag is None else flag for _, flag in seen]),
        }

    def _turns(self) -> list[Task]:
        """The tasks in this step's order."""
        self._seen = {}
        self._note_step()
        if self.order == "fixed":
            return list(self.tasks)
        drawn = torch.randperm(len(self.tasks), generator=self.generator)
        return [self.tasks[i] for i in drawn.tolist()]

    def _batches(
        self, losses: object, batch: tuple[Any, ...], micro_batches: Iterable[Any] | None
    ) -> Batches:
        if losses is None:
            raise TypeError(self._without_losses)
        if isinstance(losses, Mapping):
            raise TypeError(
                f"`losses` of {type(self).__name__} must be a function losses(tasks, *batch), "
                f"got {type(losses).__name__}: ready losses have their graphs at the weights "
                "before the first task's step, so the later tasks' gradients would be stale."
            )
        if not callable(losses):
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch), before the batch, "
                f"got {type(losses).__name__}."
            )
        return list_batches(losses, batch, micro_batches)

    _without_losses: str

    @torch.enable_grad()
    def _backward(self, losses: LossesFunction, task: Task, batches: Batches) -> dict[str, Tensor]:
        """Leaves the gradient of one task's loss in `.grad`; returns the values, {} if absent."""
        self.zero_grad()
        names, ranks = names_of(task), self._ranks
        if len(batches) > 1:
            return self._accumulate(losses, names, batches)
        present = evaluate(losses, names, batches[0], self.check_finite)
        counts, values = _agree(present, names, ranks)
        terms = [
            weighted(loss.value, share(loss.samples, counts[name], ranks))
            for name, loss in present.items()
            if counts[name]
        ]
        if terms:
            _gradients.backward(self._scale(sum_tensors(terms)), self._walk())
        return values

    def _accumulate(
        self, losses: LossesFunction, names: tuple[str, ...], batches: Batches
    ) -> dict[str, Tensor]:
        """Sums the gradients over micro-batches, each task's averaged by its own count.

        Each name has forward passes of its own: under DDP one forward allows one backward pass.
        """
        parameters, ranks = self._parameters, self._ranks
        values: dict[str, Tensor] = {}
        gradients: _gradients.Gradients = [None] * len(parameters)
        for name in names:
            seen: list[Loss] = []
            for batch in batches:
                present = evaluate(losses, (name,), batch, self.check_finite)
                counts, averages = _agree(present, (name,), ranks)
                if averages:
                    seen.append(Loss(averages[name], counts[name]))
                    loss = present[name]
                    # Counts relative to the first one: a float16 gradient would overflow.
                    weight = share(loss.samples, counts[name], ranks)
                    weight *= counts[name] / seen[0].samples
                    scaled = self._scale(weighted(loss.value, weight))
                    _gradients.backward(scaled, parameters)
            if seen:
                values[name] = mean(seen)
                factor = seen[0].samples / sum(part.samples for part in seen)
                own = _gradients.scaled(_gradients.take(parameters), factor)
                gradients = _gradients.add(gradients, own)
        _gradients.put(parameters, gradients)
        return values

    def _walk(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    @property
    def _ranks(self) -> dist.ProcessGroup | None:
        """The ranks that agree on counts; all there are, if none were named."""
        return all_ranks() if self.process_group is None else self.process_group

    def _check_reduced(self, task: Task, norms: list[Tensor]) -> None:
        """Makes sure, once for each task, that the ranks' gradients are one."""
        if task in self._reduced:
            return
        if (ranks := self._ranks) is not None and not is_sharded(norms):
            norm = torch.stack(norms).norm() if norms else torch.zeros(())
            remedy = (
                "wrap the model in DistributedDataParallel(model, find_unused_parameters=True)."
            )
            check_reduced(norm, ranks, f"of task {task!r}", remedy)
        self._reduced.add(task)

    @contextmanager
    def _scaler_updated(self) -> Iterator[None]:
        """Updates the scaler once after the turns, if a gradient was unscaled in any."""
        try:
            yield
        finally:
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
        skipped = self._unscale(optimizer)
        norms = _gradients.norms([parameter.grad for parameter in self._walk()])
        self._check_reduced(task, norms)
        self._seen[task] = (norms, skipped)
        if self._scaling is not None and skipped is not None:
            self._scaling.step(optimizer)
        elif self._needs_closure and again is not None:
            optimizer.step(repeat(values, again, _total, self._parameters))
        else:
            optimizer.step()


def refuse_closure(closure: object) -> None:
    """Says why a step per task takes none, and who may have passed one."""
    if closure is not None:
        raise TypeError(
            "`closure` must be None: each task has a loss of its own in `losses`. Where a "
            "framework passes one, choose its manual optimization."
        )


def _agree(
    present: dict[str, Loss], names: tuple[str, ...], ranks: dist.ProcessGroup | None
) -> tuple[dict[str, int], dict[str, Tensor]]:
    seen = {name: [present[name]] if name in present else [] for name in names}
    return agree(seen, ranks, on_every_rank=True)


def _total(values: dict[str, Tensor]) -> Tensor:
    return sum_tensors(list(values.values()))
