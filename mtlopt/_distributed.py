"""What the ranks of a process group agree on, and the sum of their gradients."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # The size of a bucket in DistributedDataParallel.


def broadcast_parameters(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Gives every rank the parameters of the group's first rank, as DDP does."""
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), source, group=group)


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sums a small tensor over the ranks, in place; without a group it is its own sum."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


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
