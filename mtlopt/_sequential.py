"""SequentialOptimizer: the methods that step through the tasks in turn."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt import _gradients
from mtlopt._base import MultiTaskOptimizer, repeat
from mtlopt._distributed import sum_over_ranks
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

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns, for the tasks in order, what the last step on losses saw.

        Returns:
            ``gradient_norms`` (T,): Euclidean norm of each task's gradient before any hook, NaN
            for an absent task. ``skipped`` (T,): whether the task's own step was left out because
            its gradient overflowed. Empty before the first step.
        """
        if not self._seen:
            return {}
        zero = self._parameters[0].detach().new_zeros(())
        nan, no = zero / zero, zero > 0
        seen = [self._seen.get(task, ([nan], None)) for task in self.tasks]
        return {
            "gradient_norms": torch.stack(
                [torch.linalg.vector_norm(torch.stack([zero, *norms])) for norms, _ in seen]
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
        if not callable(losses):
            raise TypeError(
                f"`losses` of {type(self).__name__} must be a function losses(tasks, *batch), "
                f"got {type(losses).__name__}: ready losses have their graphs at the weights "
                "before the first task's step, so the later tasks' gradients would be stale."
            )
        return list_batches(losses, batch, micro_batches)

    _without_losses: str

    @torch.enable_grad()
    def _backward(self, losses: LossesFunction, task: Task, batches: Batches) -> dict[str, Tensor]:
        """Leaves the gradient of one task's loss in `.grad`; returns the values, {} if absent."""
        self.zero_grad()
        if len(batches) > 1:
            return self._accumulate(losses, names_of(task), batches)
        present = evaluate(losses, names_of(task), batches[0], self.check_finite)
        counts = self._total_counts(present, names_of(task))
        terms = [
            weighted(loss.value, self._share(loss.samples, counts[name]))
            for name, loss in present.items()
            if counts[name]
        ]
        if terms:
            _gradients.backward(self._scale(sum_tensors(terms)))
        return {name: loss.value.detach() for name, loss in present.items() if counts[name]}

    def _accumulate(
        self, losses: LossesFunction, names: tuple[str, ...], batches: Batches
    ) -> dict[str, Tensor]:
        """Sums the gradients over micro-batches, each task's averaged by its own count."""
        parameters = self._parameters
        values: dict[str, Tensor] = {}
        gradients: _gradients.Gradients = [None] * len(parameters)
        for name in names:
            seen: list[Loss] = []
            total = 0
            for batch in batches:
                present = evaluate(losses, (name,), batch, self.check_finite)
                count = self._total_counts(present, (name,))[name]
                if count:
                    loss = present[name]
                    weight = self._share(loss.samples, count) * count
                    _gradients.backward(self._scale(weighted(loss.value, weight)))
                    seen.append(Loss(loss.value.detach(), loss.samples))
                    total += count
            if total:
                values[name] = mean(seen)
                own = _gradients.scaled(_gradients.take(parameters), 1 / total)
                gradients = _gradients.add(gradients, own)
        _gradients.put(parameters, gradients)
        return values

    def _total_counts(self, present: dict[str, Loss], names: tuple[str, ...]) -> dict[str, int]:
        """The tasks' counts over all ranks; 0 is absent."""
        counts = [present[name].samples if name in present else 0 for name in names]
        if self.process_group is None:
            return dict(zip(names, counts, strict=True))
        missing = [name not in present for name in names]
        agreed = torch.tensor([counts, missing], device=self._parameters[0].device)
        totals, lacking = sum_over_ranks(agreed, self.process_group).tolist()
        for name, total, without in zip(names, totals, lacking, strict=True):
            if total and without:
                raise ValueError(
                    f"`losses` must bring task {name!r} on every rank or on none, got None on "
                    f"{without} ranks: the backward passes of the ranks would not match. On a "
                    "rank without labels return `(outputs.sum() * 0, 0)`."
                )
        return dict(zip(names, totals, strict=True))

    def _share(self, count: int, total: int) -> float:
        """A rank's weight, such that the mean over ranks is the mean over samples."""
        if self.process_group is None:
            return 1.0
        return count * dist.get_world_size(self.process_group) / total

    @contextmanager
    def _scaler_updated(self) -> Iterator[None]:
        """Updates the scaler once after the turns, if a gradient was unscaled in any."""
        try:
            yield
        finally:
            if self._scaling is not None and self._seen:
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
        self._seen[task] = (_gradients.norms([p.grad for p in self._parameters]), skipped)
        if self._scaling is not None:
            self._scaling.step(optimizer)
        elif self._needs_closure and again is not None:
            optimizer.step(repeat(values, again))
        else:
            optimizer.step()
