"""collect(): every task's gradient at the same weights, averaged over batches and ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mtlopt._distributed import agree, all_ranks, is_sharded, share, sum_gradients
from mtlopt._gradients import Gradients, add, differentiate, scaled
from mtlopt._losses import (
    Loss,
    LossesFunction,
    ReadyLosses,
    Task,
    evaluate,
    names_of,
    sum_tensors,
    weighted,
)

Forwards: TypeAlias = Literal["joint", "per-task"]


@torch.enable_grad()
def collect(
    losses: LossesFunction | ReadyLosses,
    tasks: Sequence[Task],
    batches: Sequence[tuple[Any, ...]],
    parameters: Sequence[Tensor],
    *,
    check_finite: bool,
    scale: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup | None,
    forwards: Forwards = "joint",
    alone: bool = False,
) -> tuple[dict[str, Tensor], dict[Task, Gradients]]:
    """Takes the gradients of all present tasks without moving anything.

    Args:
        losses: The function of the protocol, or its result on the only batch.
        tasks: Tasks and groups; a group's gradient is the sum of its tasks' gradients.
        batches: Arguments of `losses`, one tuple per micro-batch.
        parameters: P tensors that require a gradient.
        check_finite: Whether a loss that is not finite is an error.
        scale: Applied to each loss before it is differentiated.
        group: Ranks to average over; with sharded parameters all there are, if None.
        forwards: "joint" asks for all tasks at once, "per-task" for one task after the other.
        alone: Whether leaves other than `parameters` are to be left without a gradient.

    Returns:
        The present tasks' values by name, and the present tasks' gradients, scaled.
    """
    # Gradients of shards arrive averaged over the ranks, as FSDP has it.
    sharded = is_sharded(parameters)
    ranks = (all_ranks() if group is None else group) if sharded else None
    # Tasks of a group are differentiated apart only where their counts can differ.
    whole = len(batches) == 1 and group is None and not sharded
    everything = names_of(*tasks)
    parts = [names_of(task) for task in tasks] if whole else [(name,) for name in everything]
    one_by_one = forwards == "per-task" and not isinstance(losses, Mapping)
    sums: dict[tuple[str, ...], Gradients] = {}
    seen: dict[str, list[Loss]] = {name: [] for name in everything}
    for batch in batches:
        for asked in parts if one_by_one else [everything]:
            present = evaluate(losses, asked, batch, check_finite)
            found = {name: [present[name]] if name in present else [] for name in asked}
            counts, averages = agree(found, ranks, on_every_rank=True)
            for name, loss in present.items():
                value = averages.get(name, loss.value)
                seen[name].append(Loss(value.detach(), counts[name]))
            terms = {}
            for part in parts:
                values = [
                    # Counts relative to the first one: a float16 gradient would overflow.
                    weighted(
                        present[name].value,
                        share(present[name].samples, counts[name], ranks)
                        * (counts[name] / _first(seen[name])),
                    )
                    for name in part
                    if name in present and counts[name]
                ]
                if values:
                    terms[part] = scale(sum_tensors(values))
            gradients = differentiate(list(terms.values()), parameters, alone)
            for part, gradient in zip(terms, gradients, strict=True):
                sums[part] = add(sums[part], gradient) if part in sums else gradient
    group = None if sharded else group
    counts, averages = agree(seen, group)
    collected: dict[Task, Gradients] = {}
    nothing: Gradients = [None] * len(parameters)
    for task in tasks:
        names = [name for name in names_of(task) if name in averages]
        if not names:
            continue
        gradient = sums.pop(names_of(task)) if whole else nothing
        for name in [] if whole else names:
            own = sums.pop((name,), nothing)
            gradient = add(gradient, scaled(own, _first(seen[name]) / counts[name]))
        collected[task] = gradient if group is None else sum_gradients(gradient, parameters, group)
    return averages, collected


def _first(losses: Sequence[Loss]) -> int:
    """The first count that is not 0."""
    return next((loss.samples for loss in losses if loss.samples), 0)
