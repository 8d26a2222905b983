"""Arithmetic on per-task gradients, sharded ones included.

A gradient is a list parallel to the parameters, with None where the loss does not depend on one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mtlopt._gradients.losses import SINGLE_PROCESS, Ranks, Task, Values

Gradients: TypeAlias = list[Tensor | None]
Spread: TypeAlias = tuple[Any, tuple[int, ...]] | None
"""A device mesh and the dimensions of it over which a tensor is sharded; None for a whole one."""
BLOCK = 2**20
"""Numbers of all tasks that the CPU multiplies at once: they fit its cache."""
CHUNK = 2**12
"""Numbers per task summed by one product, so that the cores of a CPU share a long sum."""
HALVES = {torch.float16, torch.bfloat16}
"""Types that can hold a gradient but not its norm: float16 ends at 65504."""
NO_FLOAT64 = ("mps",)
"""Types of device without float64."""
SMALLEST_SQUARE = 1e-25
"""Squared norm below which float32 products may have lost digits to underflow."""


def add(first: Gradients, second: Gradients) -> Gradients:
    """Adds the second gradient to the first, in place where both have one for a parameter."""
    # Adding a dense tensor to a sparse one in place fails; the other way round works.
    return [
        b if a is None else a if b is None else b.add_(a) if a.is_sparse else a.add_(b)
        for a, b in zip(first, second, strict=True)
    ]


def scaled(gradients: Gradients, factor: float) -> Gradients:
    """Multiplies a gradient by a number in place; 1 leaves it unchanged to the last bit."""
    if factor == 1:
        return gradients
    return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]


def norm(gradients: Gradients) -> Tensor:
    """Returns the Euclidean norm of a gradient in one pass over it; 0 if it is all None."""
    given = [g for g in gradients if g is not None]
    norms = norms_of_parts(given)
    if not norms:
        return torch.zeros((), device="cpu")
    if not is_sharded(given):
        total: Tensor = torch.stack([n.to(norms[0]) for n in norms]).norm()
        return total
    # A mesh for two kinds of parallelism shards some tensors twice and replicates others.
    squares: dict[Spread, list[Tensor]] = {}
    for gradient, own in zip(given, norms, strict=True):
        squares.setdefault(spread(gradient), []).append(own.square())
    return sum_over_shards({c: torch.stack(q).sum() for c, q in squares.items()}).sqrt()


def device_of(parameters: Sequence[Tensor]) -> torch.device:
    """Returns the device of the first parameter that is on one; "meta" holds no numbers."""
    devices = [parameter.device for parameter in parameters] or [torch.device("cpu")]
    return next((device for device in devices if device.type != "meta"), devices[0])


def is_finite(gradients: Gradients) -> Tensor:
    """Returns whether all numbers of a gradient are finite."""
    given = [g for g in gradients if g is not None]
    if not given or is_sharded(given):  # The norm's ranks agree.
        return norm(gradients).isfinite()
    flags = [(g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in given]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()


def norms_of_parts(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns the norm of each tensor, or of this process's shard of it."""
    dense = [local(g.coalesce().values() if g.is_sparse else g) for g in gradients]
    if dense and {g.dtype for g in dense} <= HALVES:
        return list(torch._foreach_norm(dense, 2, torch.float32))
    wide = [g.float() if g.dtype in HALVES else g for g in dense]
    return list(torch._foreach_norm(wide)) if wide else []


def to_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Copies scalars to the host, all at once."""
    device = tensors[0].device
    dtype = torch.float32 if device.type in NO_FLOAT64 else torch.float64
    numbers: list[float] = torch.stack([t.to(device, dtype) for t in tensors]).tolist()
    return numbers


def to_floats(weights: Mapping[Any, float | Tensor]) -> dict[Any, float]:
    """Copies weights to the host, all at once."""
    tensors = [weight for weight in weights.values() if isinstance(weight, Tensor)]
    numbers = iter(to_numbers(tensors) if tensors else ())
    return {k: next(numbers) if isinstance(w, Tensor) else w for k, w in weights.items()}


def tasks_by_parameter(gradients: Sequence[Gradients]) -> list[tuple[int, ...]]:
    """Lists for each of the P parameters which of the T tasks have a gradient for it."""
    return [
        tuple(k for k, gradient in enumerate(column) if gradient is not None)
        for column in zip(*gradients, strict=True)
    ]


def gram(gradients: Sequence[Gradients], shared: bool = True) -> Tensor:
    """Returns the inner products of the tasks' gradients over the shared parameters.

    A parameter is shared if at least two tasks have a gradient for it; a task without one counts
    as zero there. The gradients are read once, block by block, and never flattened into one
    vector. They are read again in float64 if a squared norm leaves the range of float32.

    Args:
        gradients: T gradients of P tensors, dense or sparse.
        shared: False counts parameters for which only one task has a gradient too.

    Returns:
        (T, T) in float64, on the CPU, by one copy from the device.
    """
    columns = [
        (tasks, [g for g in column if g is not None])
        for tasks, column in zip(
            tasks_by_parameter(gradients), zip(*gradients, strict=True), strict=True
        )
        if len(tasks) > (1 if shared else 0)
    ]
    # The user may allow rough products of float32 (TF32); that setting is shared by all threads.
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # Set for one backend: https://github.com/pytorch/pytorch/issues/179445.
        exact = False
    total = _products(columns, len(gradients), torch.float32 if exact else torch.float64)
    squares = total.diagonal()
    within = squares.isfinite() & (squares >= SMALLEST_SQUARE)
    if not within.all() and any(g.dtype != torch.float64 for _, c in columns for g in c):
        total = _products(columns, len(gradients), torch.float64)
    return total


def combine(
    gradients: Sequence[Gradients], coefficients: Sequence[float], shared_only: bool = True
) -> Gradients:
    """Returns the sum of the T gradients weighted by the coefficients, in the gradients' memory.

    With `shared_only` a parameter for which only one task has a gradient keeps that as it is.
    """
    shared = [len(tasks) > 1 or not shared_only for tasks in tasks_by_parameter(gradients)]
    combined: Gradients = [None] * len(shared)
    for gradient, coefficient in zip(gradients, coefficients, strict=True):
        firsts, totals, terms = [], [], []
        for position, part in enumerate(gradient):
            total = combined[position]
            if part is None:
                continue
            if total is None:
                combined[position] = part
                firsts += [local(part)] if shared[position] else []
                continue
            if total.is_sparse and not part.is_sparse:
                combined[position] = total = total.to_dense()
            totals.append(local(total))
            terms.append(local(part))
        # One fused pass over all tensors of a task: a call for each costs twice as much.
        *before, last = _factors(coefficient)
        for factor in before:
            torch._foreach_mul_(firsts + terms, factor)
        if firsts:
            torch._foreach_mul_(firsts, last)
        if terms:
            torch._foreach_add_(totals, terms, alpha=last)
    return combined


@dataclass
class Rows:
    """The gradients that a method combines: one for each present task, in the tasks' order."""

    gradients: dict[Task, Gradients]
    """P tensors or None for each task, which may be overwritten."""
    tensors: Sequence[Tensor]
    """The P tensors that the gradients belong to: parameters or features."""
    values: Values
    """The losses by name."""
    is_scaled: bool = False
    """Whether a scaler may handle overflows, so that they must not raise."""
    shared_only: bool = True
    """Whether to combine only where at least two tasks have a gradient, as for parameters."""
    ranks: Ranks = SINGLE_PROCESS
    """Processes that hold the features of other samples."""

    @property
    def is_distributed(self) -> bool:
        """Returns whether each process holds only a part of every row."""
        return self.ranks.reduces or is_sharded(self.tensors)

    def gram(self) -> Tensor:
        """Returns the (T, T) inner products in float64, on the CPU."""
        # The features of the samples on all ranks form one long vector: products add up.
        products = gram(list(self.gradients.values()), shared=self.shared_only)
        return self.ranks.total(products) if self.ranks.reduces else products

    def norms(self) -> list[Tensor]:
        """Returns the norm of each row."""
        norms = [norm(row) for row in self.gradients.values()]
        if not self.ranks.reduces or not norms:
            return norms
        squares = torch.stack([own.cpu().double() ** 2 for own in norms])
        return list(self.ranks.total(squares).sqrt())

    def combine(self, coefficients: Sequence[float]) -> Gradients:
        """Returns the weighted sum of the rows."""
        if not self.gradients:
            return [None] * len(self.tensors)
        return combine(list(self.gradients.values()), coefficients, self.shared_only)


def with_gaps(figures: Tensor, present: Sequence[int], count: int) -> Tensor:
    """Returns the present tasks' (n,) or (n, n) figures in the places of all, NaN elsewhere."""
    index = torch.tensor(present, dtype=torch.long, device="cpu")
    all_figures = figures.new_full((count,) * figures.dim(), float("nan"))
    all_figures[index if figures.dim() == 1 else (index[:, None], index)] = figures
    return all_figures


def cosines(gram: Tensor) -> Tensor:
    """Returns the (T, T) cosines from the inner products; 0 for a zero gradient."""
    norms = gram.diagonal().sqrt()
    return (gram / norms[:, None] / norms).nan_to_num(nan=0.0)


def conflict_fraction(gram: Tensor) -> Tensor:
    """Returns the fraction of pairs of tasks with a negative inner product; 0 without pairs."""
    pairs = gram.shape[0] * (gram.shape[0] - 1) / 2
    return (gram < 0).triu(1).sum() / max(pairs, 1)


def _factors(coefficient: float) -> list[float]:
    """Splits a number out of float32's range whose product with a gradient may be within it."""
    if coefficient == 0 or not (abs(coefficient) > 1e30 or abs(coefficient) < 1e-30):
        return [coefficient]
    # 1e60 times a gradient of 1e-30 is in range, if multiplied in two steps of 1e30.
    root: float = abs(coefficient) ** 0.5
    return [root, root if coefficient > 0 else -root]


def _products(
    columns: Sequence[tuple[tuple[int, ...], list[Tensor]]], count: int, dtype: torch.dtype
) -> Tensor:
    """Sums the inner products over the columns, by the tasks that share them and their shards."""
    sums: dict[tuple[tuple[int, ...], Spread], Tensor] = {}
    for tasks, column in columns:
        # Matrices of the same tasks and shards are added before they are put in place.
        key = tasks, spread(column[0])
        for block in _blocks([local(gradient) for gradient in column]):
            product = _inner_products(torch.stack(block), dtype)
            sums[key] = sums[key] + product if key in sums else product
    totals: dict[Spread, Tensor] = {}
    for (tasks, cut), product in sums.items():
        zeros = product.new_zeros(count, count)
        every = slice(tasks[0], tasks[-1] + 1, tasks[1] - tasks[0] if len(tasks) > 1 else 1)
        if tasks == tuple(range(count))[every]:  # An index tensor would wait for the device.
            zeros[every, every] = product
        else:
            index = torch.tensor(tasks, device=product.device)
            zeros[index[:, None], index] = product
        totals[cut] = totals[cut] + zeros.to(totals[cut]) if cut in totals else zeros
    if not totals:
        return torch.zeros(count, count, dtype=torch.float64, device="cpu")
    return sum_over_shards(totals).cpu().double()


def _inner_products(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies the rows of a (T, n) matrix with each other, in `dtype` or a wider type."""
    wide = torch.float64
    if rows.device.type in NO_FLOAT64:
        rows = rows.cpu() if dtype == wide else rows
        wide = dtype
    rows = rows.to(torch.promote_types(rows.dtype, dtype))
    # A caller's autocast would compute them in half precision.
    with torch.autocast(rows.device.type, enabled=False):
        # A batch of short products uses all cores, one long product of few rows only one.
        if rows.shape[1] % CHUNK:
            return (rows @ rows.mT.conj()).real.to(wide)
        chunks = rows.reshape(len(rows), rows.shape[1] // CHUNK, CHUNK).transpose(0, 1)
        return (chunks @ chunks.mT.conj()).real.to(wide).sum(0)


def _blocks(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Splits the tasks' gradients of one parameter into equal blocks that fit the CPU's cache.

    They are flattened in memory order where they share one; other devices get whole vectors.
    """
    if any(part.is_sparse for part in parts):
        parts = _on_common_rows(parts)
    elif len({part.stride() for part in parts}) == 1:  # No copy for channels-last tensors.
        order = sorted(range(parts[0].dim()), key=parts[0].stride, reverse=True)
        parts = [part.permute(order) for part in parts]
    size = max(parts[0].numel(), 1)
    if parts[0].device.type == "cpu":
        size = max(BLOCK // len(parts) // CHUNK, 1) * CHUNK
    return zip(*(part.reshape(-1).split(size) for part in parts), strict=True)


def _on_common_rows(parts: Sequence[Tensor]) -> list[Tensor]:
    """Returns sparse gradients as dense ones of the rows that any has; whole, if one is dense."""
    if not all(part.is_sparse and part.sparse_dim() == 1 for part in parts):
        return [part.to_dense() for part in parts]
    parts = [part.coalesce() for part in parts]
    indices = [part.indices()[0] for part in parts]
    common, positions = torch.cat(indices).unique(return_inverse=True)
    return [
        part.values().new_zeros(len(common), *part.shape[1:]).index_copy_(0, own, part.values())
        for part, own in zip(parts, positions.split([len(i) for i in indices]), strict=True)
    ]


# Shards (FSDP2, tensor parallelism).


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Returns whether any of the tensors is a DTensor."""
    return any(hasattr(tensor, "to_local") for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard, or a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def spread(tensor: Tensor) -> Spread:
    """Returns the mesh and its dimensions over which a tensor is sharded, None if whole."""
    sharded: Any = tensor if hasattr(tensor, "to_local") else None
    if sharded is None:
        return None
    # Not `is_shard`, which is False for the strided shards of two parallelisms in one mesh.
    cut = tuple(d for d, p in enumerate(sharded.placements) if not p.is_replicate())
    return (sharded.device_mesh, cut) if cut else None


def sum_over_shards(values: Mapping[Spread, Tensor]) -> Tensor:
    """Sums what each rank computed from its shards, over the ranks that hold the others."""
    for cut, value in values.items():
        # In the same order on every rank: the keys follow the order of the parameters.
        for dimension in () if cut is None else cut[1]:
            assert cut is not None
            dist.all_reduce(value, group=cut[0].get_group(dimension))
    return torch.stack(list(values.values())).sum(0)
