"""What the ranks of a process group agree on, and the sum of their gradients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtlopt._losses import Loss, mean

BUCKET_BYTES = 25 * 2**20  # The size of a bucket in DistributedDataParallel.


def broadcast_parameters(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Gives every rank the parameters of the group's first rank, as DDP does."""
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), source, group=group)


def all_ranks() -> dist.ProcessGroup | None:
    """Returns the group of all ranks, if there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def is_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether the ranks hold shards of the parameters (FSDP2), whose gradients arrive summed."""
    return any(hasattr(parameter, "to_local") for parameter in parameters)


def sum_over_shards(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Sums what each rank computed from its shards, in place; without shards it is the sum."""
    sharded: Any = next((p for p in parameters if hasattr(p, "to_local")), None)
    for dimension, placement in enumerate(sharded.placements if sharded is not None else ()):
        if placement.is_shard():
            dist.all_reduce(values, group=sharded.device_mesh.get_group(dimension))
    return values


def norm_over_shards(norms: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of a gradient from those of its tensors."""
    if is_sharded(parameters):
        own = torch.stack([n.to_local() if hasattr(n, "to_local") else n for n in norms])
        total = sum_over_shards(own.square().sum(), parameters).sqrt()
    else:
        total = torch.stack(list(norms)).norm()
    return total


def share(samples: int, total: int, ranks: dist.ProcessGroup | None) -> float:
    """A rank's weight, such that the mean over ranks is the mean over samples."""
    return 1.0 if ranks is None else samples * dist.get_world_size(ranks) / total


def check_reduced(norm: Tensor, ranks: dist.ProcessGroup, of: str, remedy: str) -> None:
    """Makes sure that the ranks' gradients are one."""
    norm = norm.double()
    extremes = torch.stack([norm, -norm])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks)
    largest, smallest = extremes.tolist()
    if math.isfinite(largest) and largest != -smallest:
        raise ValueError(
            f"The gradients {of} must be the same on all ranks, got norms from {-smallest} to "
            f"{largest}: {remedy} Where each rank trains a model of its own, give it a "
            "`process_group` of its own."
        )


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sums a small tensor over the ranks, in place; without a group it is its own sum."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def agree(
    seen: Mapping[str, Sequence[Loss]],
    group: dist.ProcessGroup | None,
    on_every_rank: bool = False,
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Adds up the tasks' counts and averages their losses, over batches and ranks.

    Args:
        seen: Each task's losses on this rank; those with a count of 0 count for nothing.
        group: The ranks, or None for this process alone.
        on_every_rank: Whether each rank must have brought a present task, if with a count of 0.

    Returns:
        The counts by name, and the averages of the tasks present.
    """
    counts = {name: sum(loss.samples for loss in losses) for name, losses in seen.items()}
    if group is None:
        return counts, {name: mean(losses) for name, losses in seen.items() if counts[name]}
    like = next((loss.value for losses in seen.values() for loss in losses), torch.zeros(()))
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    totals = torch.zeros(3, len(seen), dtype=torch.float64, device=device)
    for i, (name, losses) in enumerate(seen.items()):
        for loss in losses:
            if loss.samples:
                totals[0, i] += loss.value.detach().to(totals) * loss.samples
        totals[1, i] = counts[name]
        totals[2, i] = not losses
    sums, all_counts, lacking = sum_over_ranks(totals, group)
    counts = dict(zip(seen, map(int, all_counts.tolist()), strict=True))
    for name, ranks in zip(seen, lacking.tolist(), strict=True):
        if on_every_rank and counts[name] and ranks:
            raise ValueError(
                f"`losses` must bring task {name!r} on every rank or on none, got None on "
                f"{ranks:.0f} ranks: the backward passes of the ranks would not match. On a "
                "rank without labels return `(outputs.sum() * 0, 0)`."
            )
    averages = zip(seen, (sums / all_counts).to(like), strict=True)
    return counts, {name: average for name, average in averages if counts[name]}


def sum_gradients(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    group: dist.ProcessGroup,
) -> list[Tensor | None]:
    """Sums one gradient over the ranks; None where no rank has one.

    Gradients travel in flat buckets of one dtype, and only those that some rank has.
    """
    has = torch.tensor([g is not None for g in gradients], dtype=torch.int32)
    reached = sum_over_ranks(has.to(parameters[0].device), group).tolist()
    sums: list[Tensor | None] = [None] * len(gradients)
    for bucket in _buckets([i for i, count in enumerate(reached) if count], parameters):
        parts = []
        for i in bucket:
            gradient = gradients[i]
            dense = torch.zeros_like(parameters[i]) if gradient is None else gradient
            if dense.is_sparse:
                dense = dense.to_dense()
            parts.append(dense.reshape(-1))
        flat = torch.cat(parts)
        dist.all_reduce(flat, group=group)
        for i, part in zip(bucket, torch.split(flat, [p.numel() for p in parts]), strict=True):
            sums[i] = part.view_as(parameters[i])
    return sums


def _buckets(indices: list[int], parameters: Sequence[Tensor]) -> list[list[int]]:
    buckets: list[list[int]] = []
    kind: tuple[torch.dtype, torch.device] | None = None
    size = 0
    for i in indices:
        parameter = parameters[i]
        if kind != (parameter.dtype, parameter.device) or size >= BUCKET_BYTES:
            buckets.append([])
            kind, size = (parameter.dtype, parameter.device), 0
        buckets[-1].append(i)
        size += parameter.numel() * parameter.element_size()
    return buckets
