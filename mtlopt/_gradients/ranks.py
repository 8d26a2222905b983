"""Averaging over several processes, whether a wrapper reduces their gradients or nobody does."""

import gc
import math
import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from mtlopt._gradients.arithmetic import Gradients, device_of, is_sharded, norm
from mtlopt._gradients.losses import SINGLE_PROCESS, Loss, Ranks

if dist.is_available():
    # torch imports this module for the first optimizer. Imported after init_process_group, its
    # functions hold the group as a default argument: the group's threads outlive
    # destroy_process_group and can abort the exiting process.
    import torch.distributed.nn.functional

BUCKET_BYTES = 25 * 2**20
"""Size of a reduction bucket, as in DistributedDataParallel."""
SILENT = 2**20
"""Stands for a rank that brought no loss at all, in a sum over ranks that lack a task."""
COMPARED = 32
"""How many feature tensors are compared between ranks."""
_WRAPPERS = WeakIdKeyDictionary()
"""For the first parameter of an optimizer a weak reference to the DDP that holds it, if any."""
DENSE = 2**16
"""Counts a rank with a dense gradient, where 1 counts one with a sparse gradient."""


class UnnamedRanks(Ranks):
    """Processes that the user did not name and DDP does not join: they should agree all the same.

    Either another wrapper reduces the gradients, or the model was left unwrapped by mistake.
    """

    per_micro_batch = per_step = SINGLE_PROCESS

    def check_alike(self, gradients: Gradients, of: str, remedy: str) -> None:
        """Checks that the gradients are the same on all processes."""
        if (group := all_ranks()) is not None:
            _compare(gradients, group, of, remedy)


class ReducingRanks(Ranks):
    """Processes whose wrapper (DDP, FSDP2) averages the gradient of every backward pass."""

    wrapped = True
    per_step = SINGLE_PROCESS

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, in_one_pass: bool = False
    ) -> None:
        self.group = group
        self._device = _device_of(group, device)
        self._in_one_pass = in_one_pass

    @property
    def per_micro_batch(self) -> Ranks:  # type: ignore[override]  # no circle through an attribute
        """The processes that agree on each micro-batch: all of them."""
        return self

    def agree(self, seen: Mapping[str, Sequence[Loss]]) -> dict[str, Loss]:
        """Averages as one process does; a task missing on some of the processes is an error."""
        # Without a graph there is no backward pass to join, so it counts as missing.
        seen = {
            name: [loss for loss in losses if loss.samples or loss.value.requires_grad]
            for name, losses in seen.items()
        }
        means, missing = _agree(seen, self.group, self._device)
        for name in means:
            silent, others = divmod(missing[name], SILENT)
            # One pass of the sum of all suffices, if the rank has any of them.
            if silent or (others and not self._in_one_pass):
                raise ValueError(
                    f"`losses` must bring task {name!r} on every rank or on none, got None on "
                    f"{silent + others} ranks: ranks would run different numbers of backward "
                    "passes and hang. On a rank without labels return `(outputs.sum() * 0, 0)`."
                )
        return means

    def share(self, own: int, total: int) -> float:
        """Returns the factor that turns the wrapper's mean over ranks into a mean over samples.

        It is 0, not None, on a rank without samples: DDP waits for every rank's backward pass.
        """
        return own * dist.get_world_size(self.group) / total

    def check_batches(self, count: int) -> None:
        """Refuses `features`: what each rank has combined must not be averaged by the wrapper."""
        raise ValueError(
            "`features` must be None where the model is wrapped in DistributedDataParallel, which "
            "averages the gradients that each rank has combined: give the bare model, and "
            "`process_group=`."
        )

    def check_alike(self, gradients: Gradients, of: str, remedy: str) -> None:
        """Checks that the gradients are the same on all ranks, unless they are shards."""
        _compare(gradients, self.group, of, remedy)


class SummingRanks(Ranks):
    """Processes whose model is not wrapped: per-task gradients are summed over them here."""

    reduces = True
    # Not on each micro-batch, because ranks may have different numbers of them.
    per_micro_batch = SINGLE_PROCESS

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self._device = _device_of(group, device)

    @property
    def per_step(self) -> Ranks:  # type: ignore[override]  # no circle through an attribute
        """The processes that agree once a step: all of them."""
        return self

    def agree(self, seen: Mapping[str, Sequence[Loss]]) -> dict[str, Loss]:
        """Averages as one process does; a task may be absent on some of the ranks."""
        return _agree(seen, self.group, self._device)[0]

    def share(self, own: int, total: int) -> float | None:
        """Returns the factor that turns the sum over ranks into a mean over samples."""
        return own / total if own else None

    def sum(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        """Sums one gradient in flat buckets; None where no rank has a gradient."""
        # Which parameters a task's loss depends on can differ between batches, so the ranks first
        # agree on those that any of them has.
        has = [0 if g is None else 1 if _has_rows(g) else DENSE for g in gradients]
        found = self.total(torch.tensor(has, dtype=torch.int32, device="cpu")).tolist()
        sums: Gradients = [None] * len(gradients)
        # In the same order on every rank.
        for i in [i for i, count in enumerate(found) if 0 < count < DENSE]:
            sums[i] = self._sum_sparse(gradients[i], parameters[i])
        for bucket in _buckets([i for i, count in enumerate(found) if count >= DENSE], parameters):
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

    def _sum_sparse(self, gradient: Tensor | None, parameter: Tensor) -> Tensor:
        """Sums a gradient that has rows on all ranks, an embedding's, by gathering these."""
        if gradient is None:
            values = parameter.new_zeros(0, *parameter.shape[1:])
            indices = values.new_zeros(0, dtype=torch.long)
        else:
            gradient = gradient.coalesce()
            values, indices = gradient.values(), gradient.indices()[0]
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.long, device="cpu")
        sizes[dist.get_rank(self.group)] = len(values)
        counts = self.total(sizes).tolist()
        places, rows = (self._gather(part, counts) for part in (indices, values))
        return torch.sparse_coo_tensor(places[None], rows, parameter.shape).coalesce()

    def _gather(self, own: Tensor, counts: list[int]) -> Tensor:
        """Joins tensors of different lengths; padded, because all ranks must send as much."""
        padded = torch.cat([own, own.new_zeros(max(counts) - len(own), *own.shape[1:])])
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded, self.group)
        return torch.cat([part[:n] for part, n in zip(every, counts, strict=True)])

    def total(self, values: Tensor) -> Tensor:
        """Sums a small tensor over the ranks and returns it on the CPU."""
        values = values.to(self._device)
        dist.all_reduce(values, group=self.group)
        return values.cpu()

    def find_copies(self, tensors: Sequence[Tensor]) -> list[bool] | None:
        """Tells by position which tensors hold the same numbers on all ranks that have any.

        Only the first ones are compared, by their sums. A tensor whose rows are all alike is none:
        of samples it may say so too. None if fewer than two ranks have tensors.
        """
        figures = torch.full((2, COMPARED, 4), -math.inf, dtype=torch.float64)
        for i, tensor in enumerate(tensors[:COMPARED]):
            numbers = tensor.detach().cpu().double()
            unlike = numbers.dim() > 0 and bool((numbers != numbers[:1]).any())
            own = dist.get_rank(self.group)
            found = [numbers.numel() if unlike else own, numbers.sum(), numbers.norm(), own]
            figures[0, i] = torch.tensor(found, dtype=torch.float64)
            figures[1, i] = -figures[0, i]
        figures = figures.to(self._device)
        dist.all_reduce(figures, dist.ReduceOp.MAX, group=self.group)
        largest, smallest = figures[0].cpu(), -figures[1].cpu()
        several = largest[:, 3] > smallest[:, 3]
        copies = several & (largest == smallest)[:, :3].all(1)
        return copies.tolist() if several.any() else None

    def check_batches(self, count: int) -> None:
        """Refuses different numbers of micro-batches, which would leave ranks waiting."""
        size = dist.get_world_size(self.group)
        total, squares = self.total(torch.tensor([count, count**2], device="cpu")).tolist()
        if total**2 != size * squares:
            raise ValueError(
                "With `features` every rank must have the same number of `micro_batches`, got "
                f"{count} on this one of {size} that have {total}: use equal numbers, or remove "
                "`features`."
            )


def choose_ranks(
    parameters: Sequence[Tensor], group: dist.ProcessGroup | None, reduced: bool
) -> Ranks:
    """Returns the processes that average together.

    The user may have named a group. A wrapper averages the gradients of every backward pass if the
    parameters are shards (FSDP2), or if the method expects one (`reduced`).
    """
    every = all_ranks()
    if group is None and every is None:
        return SINGLE_PROCESS
    device = device_of(parameters)
    if reduced or is_sharded(parameters):
        ranks = every if group is None else group
        return SINGLE_PROCESS if ranks is None else ReducingRanks(ranks, device)
    if group is not None:
        return SummingRanks(group, device)
    wrapper = _group_of_ddp(parameters)
    return UnnamedRanks() if wrapper is None else ReducingRanks(wrapper, device, in_one_pass=True)


def _group_of_ddp(parameters: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """Returns the group of the DistributedDataParallel that holds a parameter, if there is one.

    Neither parameters nor graphs know of it, so it is looked for among all objects, once.
    """
    if not parameters:
        return None
    if parameters[0] not in _WRAPPERS:
        own = set(map(id, parameters))
        wrappers = (
            weakref.ref(wrapper)
            for wrapper in gc.get_objects()
            # Not isinstance: some objects, such as lazy modules, act when asked for their class.
            if issubclass(type(wrapper), DistributedDataParallel)
            and not own.isdisjoint(map(id, wrapper.parameters()))
        )
        _WRAPPERS[parameters[0]] = next(wrappers, lambda: None)
    found = _WRAPPERS[parameters[0]]()
    return None if found is None else found.process_group


def all_ranks() -> dist.ProcessGroup | None:
    """Returns the group of all ranks, or None for a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def broadcast_parameters(parameters: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Gives every rank the parameters of the group's first rank, as DDP does; shards stay."""
    if group is None or is_sharded(parameters):
        return
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), source, group=group)


def _has_rows(gradient: Tensor) -> bool:
    return gradient.is_sparse and gradient.sparse_dim() == 1


def _device_of(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Returns the device of small messages; NCCL accepts the parameters' device only."""
    return device if "nccl" in dist.get_backend(group) else torch.device("cpu")


def _agree(
    seen: Mapping[str, Sequence[Loss]], group: dist.ProcessGroup, device: torch.device
) -> tuple[dict[str, Loss], dict[str, int]]:
    """Averages over micro-batches and ranks, and counts the ranks that did not bring a task.

    Every rank sends the same message: for each task the sum over its samples, their number, and
    whether it brought the task at all. From the totals each rank computes the same averages, so
    presence is decided once for all, and no rank takes a backward pass that another does not.
    """
    nothing = torch.zeros((), device="cpu")
    like = next((loss.value for losses in seen.values() for loss in losses), nothing)
    # One message for all; float64 represents any realistic count exactly.
    totals = torch.zeros(3, len(seen), dtype=torch.float64, device=device)
    for i, losses in enumerate(seen.values()):
        for loss in losses:
            if loss.samples:
                totals[0, i] += loss.value.detach().to(totals) * loss.samples
        totals[1, i] = sum(loss.samples for loss in losses)
        totals[2, i] = 0 if losses else 1 if any(seen.values()) else SILENT
    dist.all_reduce(totals, group=group)
    counts, missing = ([round(n) for n in row] for row in totals[1:].tolist())
    values = (totals[0] / totals[1]).to(like).unbind()
    means = {n: Loss(v, c) for n, v, c in zip(seen, values, counts, strict=True) if c}
    return means, dict(zip(seen, missing, strict=True))


def _compare(gradients: Gradients, group: dist.ProcessGroup, of: str, remedy: str) -> None:
    if is_sharded([gradient for gradient in gradients if gradient is not None]):
        return  # Shards differ by design.
    size = norm(gradients)
    size = size.to(_device_of(group, size.device)).double()
    # One reduction gives both ends: the minimum is the negated maximum of the negatives.
    extremes = torch.stack([size, -size])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    # The scaler deals with overflows, and NaN compares equal to nothing.
    if math.isfinite(largest) and largest != -smallest:
        raise ValueError(
            f"The gradients {of} must be the same on all ranks, got norms from {-smallest} to "
            f"{largest}: {remedy} If each rank trains a separate model, give each a "
            "`process_group` that holds that rank alone."
        )


def _buckets(indices: list[int], parameters: Sequence[Tensor]) -> list[list[int]]:
    buckets: list[list[int]] = []
    kind: tuple[torch.dtype, torch.device] | None = None
    size = 0
    for i in indices:
        parameter = parameters[i]
        # Filled in the order of the parameters, so that all ranks have the same buckets.
        if kind != (parameter.dtype, parameter.device) or size >= BUCKET_BYTES:
            buckets.append([])
            kind, size = (parameter.dtype, parameter.device), 0
        buckets[-1].append(i)
        size += parameter.numel() * parameter.element_size()
    return buckets
