"""Shards: tensors whose numbers are spread over the ranks (FSDP2, tensor parallelism)."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Spread: TypeAlias = tuple[Any, tuple[int, ...]] | None
"""A device mesh and those of its dimensions over which a tensor's numbers are cut into shards."""


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a DTensor."""
    return any(hasattr(tensor, "to_local") for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part; a plain tensor whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def spread(tensor: Tensor) -> Spread:
    """Returns over what a tensor is cut, None where every rank has all of it."""
    sharded: Any = tensor if hasattr(tensor, "to_local") else None
    if sharded is None:
        return None
    # Not `is_shard`, which says no to the strided shards of two parallelisms in one mesh.
    cut = tuple(d for d, p in enumerate(sharded.placements) if not p.is_replicate())
    return (sharded.device_mesh, cut) if cut else None


def sum_over_shards(values: Mapping[Spread, Tensor]) -> Tensor:
    """Sums what each rank computed from its parts, each kind of spread over its own ranks."""
    for cut, value in values.items():
        # In the same order on every rank: the keys come in the order of the parameters.
        for dimension in () if cut is None else cut[1]:
            assert cut is not None
            dist.all_reduce(value, group=cut[0].get_group(dimension))
    return torch.stack(list(values.values())).sum(0)
