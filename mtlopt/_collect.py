"""collect(): every task's gradient at the same weights, averaged over batches and ranks."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mtlopt._distributed import sum_gradients, sum_over_ranks
from mtlopt._gradients import Gradients, add, differentiate, scaled
from mtlopt._losses import (
    Loss,
    LossesFunction,
    ReadyLosses,
    Task,
    evaluate,
    mean,
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
) -> tuple[dict[str, Tensor], dict[Task, Gradients]]:
    """Takes the gradients of all present tasks without moving anything.

    Args:
        losses: The function of the protocol, or its result on the only batch.
        tasks: Tasks and groups; a group's gradient is the sum of its tasks' gradients.
        batches: Arguments of `losses`, one tuple per micro-batch.
        parameters: P tensors that require a gradient.
        check_finite: Whether a loss that is not finite is an error.
        scale: Applied to each loss before it is differentiated.
        group: Ranks to average over.
        forwards: "joint" asks for all tasks at once, "per-task" for one task after the other.

    Returns:
        The present tasks' values by name, and the present tasks' gradients, scaled.
    """
    # Tasks of a group are differentiated apart only where their counts can differ.
    alone = len(batches) == 1 and group is None
    parts = [names_of(task) for task in tasks] if alone else [(n,) for n in names_of(*tasks)]
    sums: dict[tuple[str, ...], Gradients] = {}
    seen: dict[str, list[Loss]] = {name: [] for name in names_of(*tasks)}
    for batch in batches:
        for asked in parts if forwards == "per-task" else [names_of(*tasks)]:
            present = {
                name: loss
                for name, loss in evaluate(losses, asked, batch, check_finite).items()
                if loss.samples
            }
            live = [part for part in parts if any(name in present for name in part)]
            terms = [
                sum_tensors(
                    [
                        weighted(present[name].value, 1 if alone else present[name].samples)
                        for name in part
                        if name in present
                    ]
                )
                for part in live
            ]
            gradients = differentiate([scale(term) for term in terms], parameters)
            for part, gradient in zip(live, gradients, strict=True):
                sums[part] = add(sums[part], gradient) if part in sums else gradient
            for name, loss in present.items():
                seen[name].append(Loss(loss.value.detach(), loss.samples))
    counts, values = agree(seen, parameters[0].device, group)
    collected: dict[Task, Gradients] = {}
    nothing: Gradients = [None] * len(parameters)
    for task in tasks:
        names = [name for name in names_of(task) if name in values]
        if not names:
            continue
        gradient = sums[names_of(task)] if alone else nothing
        for name in [] if alone else names:
            own = scaled(sums.get((name,), nothing), 1 / counts[name])
            gradient = add(gradient, own)
        collected[task] = gradient if group is None else sum_gradients(gradient, parameters, group)
    return values, collected


def agree(
    seen: dict[str, list[Loss]], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Returns the tasks' counts and, for those present, values over all batches and ranks."""
    counts = {name: sum(loss.samples for loss in losses) for name, losses in seen.items()}
    if group is None:
        return counts, {name: mean(losses) for name, losses in seen.items() if counts[name]}
    sums = torch.zeros(len(seen), 2, dtype=torch.float64, device=device)
    for i, losses in enumerate(seen.values()):
        for loss in losses:
            sums[i, 0] += loss.value.double() * loss.samples
            sums[i, 1] += loss.samples
    totals = sum_over_ranks(sums, group)
    counts = dict(zip(seen, map(int, totals[:, 1].tolist()), strict=True))
    present = [name for name in seen if counts[name]]
    rows = dict(zip(seen, totals, strict=True))
    return counts, {
        name: (rows[name][0] / rows[name][1]).to(torch.get_default_dtype()) for name in present
    }
