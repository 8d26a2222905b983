"""Ranks: what averages over samples, on one process or on many."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtlopt._gradients import Gradients, norm
from mtlopt._losses import Loss, average
from mtlopt._shards import is_sharded

if dist.is_available():
    # Imported behind init_process_group, as torch does for the first optimizer, its functions keep
    # the group as an argument's default: its threads outlive it and may abort a process that ends.
    import torch.distributed.nn.functional

BUCKET_BYTES = 25 * 2**20  # The size of a bucket in DistributedDataParallel.


class Ranks:
    """The processes that average together; this, the null form, is one process by itself."""

    @property
    def each_batch(self) -> "Ranks":
        """Those that agree on every micro-batch, before its backward pass."""
        return self

    @property
    def at_the_end(self) -> "Ranks":
        """Those that agree on the micro-batches together, after the last backward pass."""
        return ALONE

    def agree(self, seen: Mapping[str, Sequence[Loss]]) -> dict[str, Loss]:
        """Averages each task's losses by their counts, over batches and ranks.

        Args:
            seen: Each task's losses on this rank; those with a count of 0 count for nothing.

        Returns:
            The averages of the tasks present, each with the count of all its samples.
        """
        # A count of 0 is a task that is absent, whatever its loss is: the mean of nothing is NaN.
        means = {name: average(losses) for name, losses in seen.items() if losses}
        return {name: mean for name, mean in means.items() if mean.samples}

    def share(self, own: int, total: int) -> float | None:
        """Returns what this rank's loss is to be multiplied by; None for no backward pass."""
        return 1.0 if own else None

    def sum(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        """Sums one gradient over the ranks that reduce nothing themselves."""
        return gradients

    def total(self, values: Tensor) -> Tensor:
        """Sums a small tensor over the ranks; it comes back on the CPU."""
        return values

    def check_batches(self, count: int) -> None:
        """Makes sure that ranks which agree on every micro-batch have equally many."""

    def check_alike(self, gradients: Gradients, of: str, remedy: str) -> None:
        """Makes sure that the ranks' gradients are one where that is their business."""
        # Nobody named any ranks, yet there are some: DDP, or a mistake that would stay unseen.
        if (ranks := all_ranks()) is not None and not is_sharded(_given(gradients)):
            _compare(norm(gradients), ranks, of, remedy)


class ReducingRanks(Ranks):
    """Ranks whose gradients arrive averaged, because DDP or FSDP2 reduces them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self._device = _device_of(group, device)

    def agree(self, seen: Mapping[str, Sequence[Loss]]) -> dict[str, Loss]:
        """Averages as one process does; a task that some rank did not bring at all is an error."""
        means, lacking = _agree(seen, self.group, self._device)
        for name in means:
            if lacking[name]:
                raise ValueError(
                    f"`losses` must bring task {name!r} on every rank or on none, got None on "
                    f"{lacking[name]} ranks: the backward passes of the ranks would not match. On "
                    "a rank without labels return `(outputs.sum() * 0, 0)`."
                )
        return means

    def share(self, own: int, total: int) -> float:
        """The mean over ranks becomes the mean over samples; every rank takes the pass."""
        # 0 for a rank without labels, not None: DDP waits for the pass of every rank.
        return own * dist.get_world_size(self.group) / total

    def check_alike(self, gradients: Gradients, of: str, remedy: str) -> None:
        """Shards are each rank's own."""
        if not is_sharded(_given(gradients)):
            _compare(norm(gradients), self.group, of, remedy)


class SummingRanks(Ranks):
    """Ranks of a model that nothing wraps, whose gradients are summed here."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self._device = _device_of(group, device)

    @property
    def each_batch(self) -> Ranks:
        """Nobody: the ranks may hold different numbers of micro-batches."""
        return ALONE

    @property
    def at_the_end(self) -> Ranks:
        """All of them."""
        return self

    def agree(self, seen: Mapping[str, Sequence[Loss]]) -> dict[str, Loss]:
        """Averages as one process does; a task may be absent on some of the ranks."""
        return _agree(seen, self.group, self._device)[0]

    def share(self, own: int, total: int) -> float | None:
        """The sum over ranks becomes the mean over samples."""
        return own / total if own else None

    def sum(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        """Sums in flat buckets of one dtype what some rank has; None where no rank has any."""
        # What a task reaches depends on the batch, so the ranks agree on it first.
        has = torch.tensor([g is not None for g in gradients], dtype=torch.int32)
        has = has.to(self._device)
        dist.all_reduce(has, group=self.group)
        sums: Gradients = [None] * len(gradients)
        for bucket in _buckets([i for i, count in enumerate(has.tolist()) if count], parameters):
            parts = []
            for i in bucket:
                gradient = gradients[i]
                dense = torch.zeros_like(parameters[i]) if gradient is None else gradient
                parts.append((dense.to_dense() if dense.is_sparse else dense).reshape(-1))
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=self.group)
            for i, part in zip(bucket, flat.split([p.numel() for p in parts]), strict=True):
                sums[i] = part.view_as(parameters[i])
        return sums

    def total(self, values: Tensor) -> Tensor:
        """Sums a small tensor over the ranks; it comes back on the CPU."""
        values = values.to(self._device)
        dist.all_reduce(values, group=self.group)
        return values.cpu()

    def check_batches(self, count: int) -> None:
        """Refuses different numbers of micro-batches: the ranks would wait for each other."""
        size = dist.get_world_size(self.group)
        total, squares = self.total(torch.tensor([count, count**2])).tolist()
        if total**2 != size * squares:
            raise ValueError(
                "With `features` every rank must have the same number of `micro_batches`, got "
                f"{count} on this one of {size} that have {total}: take equal numbers, or leave "
                "`features` out."
            )

    def check_alike(self, gradients: Gradients, of: str, remedy: str) -> None:
        """They have been summed."""


ALONE = Ranks()


def choose_ranks(
    parameters: Iterable[Tensor], group: dist.ProcessGroup | None, reduced: bool
) -> Ranks:
    """Returns who averages together.

    Args:
        parameters: The optimizer's; of shards the gradients arrive averaged.
        group: The ranks that the user named, or None.
        reduced: Whether the model's wrapper reduces the gradients of every backward pass.
    """
    every = all_ranks()
    if group is None and every is None:
        return ALONE
    listed = list(parameters)
    device = next((parameter.device for parameter in listed), torch.device("cpu"))
    if reduced or is_sharded(listed):
        ranks = every if group is None else group
        return ALONE if ranks is None else ReducingRanks(ranks, device)
    return ALONE if group is None else SummingRanks(group, device)


def all_ranks() -> dist.ProcessGroup | None:
    """Returns the group of all ranks, if there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def broadcast_parameters(parameters: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Gives every rank the parameters of the group's first rank, as DDP does; shards are apart."""
    if group is None or is_sharded(parameters):
        return
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), source, group=group)


def _given(gradients: Gradients) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def _device_of(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where small tensors travel from: NCCL takes them from the parameters' device alone."""
    return device if "nccl" in dist.get_backend(group) else torch.device("cpu")


def _agree(
    seen: Mapping[str, Sequence[Loss]], group: dist.ProcessGroup, device: torch.device
) -> tuple[dict[str, Loss], dict[str, int]]:
    """Averages over batches and ranks; says too on how many ranks each task was not brought."""
    like = next((loss.value for losses in seen.values() for loss in losses), torch.zeros(()))
    # Sums, counts and absences in one message; float64 holds any count of samples exactly.
    totals = torch.zeros(3, len(seen), dtype=torch.float64, device=device)
    for i, losses in enumerate(seen.values()):
        for loss in losses:
            if loss.samples:
                totals[0, i] += loss.value.detach().to(totals) * loss.samples
        totals[1, i] = sum(loss.samples for loss in losses)
        totals[2, i] = not losses
    dist.all_reduce(totals, group=group)
    counts, lacking = ([round(n) for n in row] for row in totals[1:].tolist())
    values = (totals[0] / totals[1]).to(like).unbind()
    means = {n: Loss(v, c) for n, v, c in zip(seen, values, counts, strict=True) if c}
    return means, dict(zip(seen, lacking, strict=True))


def _compare(size: Tensor, ranks: dist.ProcessGroup, of: str, remedy: str) -> None:
    size = size.to(_device_of(ranks, size.device)).double()
    # One reduction for both ends: the smallest is the largest of the negatives.
    extremes = torch.stack([size, -size])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks)
    largest, smallest = extremes.tolist()
    # An overflow is the scaler's business, and NaN equals nothing.
    if math.isfinite(largest) and largest != -smallest:
        raise ValueError(
            f"The gradients {of} must be the same on all ranks, got norms from {-smallest} to "
            f"{largest}: {remedy} Where each rank trains a model of its own, give it a "
            "`process_group` of its own."
        )


def _buckets(indices: list[int], parameters: Sequence[Tensor]) -> list[list[int]]:
    buckets: list[list[int]] = []
    kind: tuple[torch.dtype, torch.device] | None = None
    size = 0
    for i in indices:
        parameter = parameters[i]
        # In the parameters' order, so that every rank fills the same buckets.
        if kind != (parameter.dtype, parameter.device) or size >= BUCKET_BYTES:
            buckets.append([])
            kind, size = (parameter.dtype, parameter.device), 0
        buckets[-1].append(i)
        size += parameter.numel() * parameter.element_size()
    return buckets
