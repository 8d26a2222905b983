"""Arithmetic on per-task gradients: lists beside the parameters, None where one is not reached."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from mtlopt._shards import Spread, is_sharded, local, spread, sum_over_shards

Gradients: TypeAlias = list[Tensor | None]
BLOCK = 2**20
"""Numbers that a processor takes at once, of all tasks together: they fit its cache."""
CHUNK = 2**12
"""Numbers per task that one product sums, so that a processor's cores share a long sum."""
HALVES = {torch.float16, torch.bfloat16}
"""Types that may hold a gradient, and not its norm: 65504 is the largest number of float16."""
NO_FLOAT64 = ("mps",)
"""Types of device that have none."""
SMALLEST_SQUARE = 1e-25
"""Squared norm below which products of float32 may have lost digits to underflow."""


def add(first: Gradients, second: Gradients) -> Gradients:
    """Adds the second gradient to the first, in place where both reach a parameter."""
    # A sparse tensor cannot take a dense one in place, a dense one takes either.
    return [
        b if a is None else a if b is None else b.add_(a) if a.is_sparse else a.add_(b)
        for a, b in zip(first, second, strict=True)
    ]


def scaled(gradients: Gradients, factor: float) -> Gradients:
    """Multiplies a gradient by a number in place; 1 leaves it as it is, to the last bit."""
    if factor == 1:
        return gradients
    return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]


def norm(gradients: Gradients) -> Tensor:
    """Returns the Euclidean norm of a gradient, in one pass over it; 0 of nothing."""
    given = [g for g in gradients if g is not None]
    dense = [local(g.coalesce().values() if g.is_sparse else g) for g in given]
    if not dense:
        return torch.zeros(())
    if {g.dtype for g in dense} <= HALVES:
        norms = torch._foreach_norm(dense, 2, torch.float32)
    else:
        norms = torch._foreach_norm([g.float() if g.dtype in HALVES else g for g in dense])
    if not is_sharded(given):
        total: Tensor = torch.stack([n.to(norms[0]) for n in norms]).norm()
        return total
    # A mesh of two parallelisms cuts some tensors twice and copies others: each by its own.
    squares: dict[Spread, list[Tensor]] = {}
    for gradient, own in zip(given, norms, strict=True):
        squares.setdefault(spread(gradient), []).append(own.square())
    return sum_over_shards({c: torch.stack(q).sum() for c, q in squares.items()}).sqrt()


def numbers_of(tensors: Sequence[Tensor]) -> list[float]:
    """Copies scalars to the host, all at once."""
    device = tensors[0].device
    dtype = torch.float32 if device.type in NO_FLOAT64 else torch.float64
    numbers: list[float] = torch.stack([t.to(device, dtype) for t in tensors]).tolist()
    return numbers


def reach(gradients: Sequence[Gradients]) -> list[tuple[int, ...]]:
    """Lists for each of the P parameters which of the T tasks reach it."""
    return [
        tuple(k for k, gradient in enumerate(column) if gradient is not None)
        for column in zip(*gradients, strict=True)
    ]


def gram(gradients: Sequence[Gradients], shared: bool = True) -> Tensor:
    """Returns the inner products of the tasks' gradients over the parameters that they share.

    Shared is what at least two of the tasks reach; a task that does not reach it counts as zero
    there. The gradients are read once, block by block, and never flattened into one vector; once
    more, in float64, where a norm is so large or so small that squares of float32 leave its range.

    Args:
        gradients: T gradients of P tensors, dense or sparse.
        shared: Whether to leave out the parameters that one task alone reaches.

    Returns:
        (T, T) in float64, on the CPU; the one copy from the device.
    """
    columns = [
        (tasks, [g for g in column if g is not None])
        for tasks, column in zip(reach(gradients), zip(*gradients, strict=True), strict=True)
        if len(tasks) > (1 if shared else 0)
    ]
    with _full_precision():
        total = _products(columns, len(gradients), torch.float32)
        # A squared norm out of float32's range tells that products may be: then once more, wider.
        squares = total.diagonal()
        within = squares.isfinite() & (squares >= SMALLEST_SQUARE)
        if not within.all() and any(g.dtype != torch.float64 for _, c in columns for g in c):
            total = _products(columns, len(gradients), torch.float64)
    return total


def combine(
    gradients: Sequence[Gradients], coefficients: Sequence[float], apart: bool = True
) -> Gradients:
    """Sums the gradients, weighted where they are shared and plainly elsewhere.

    Args:
        gradients: T gradients of P tensors; their memory is written over, and that of the first
            that reaches a parameter returned.
        coefficients: T numbers, for the parameters that at least two of the tasks reach.
        apart: Whether the others are summed plainly; if not, they are weighted too.

    Returns:
        One gradient.
    """
    shared = [len(tasks) > 1 or not apart for tasks in reach(gradients)]
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
        # One pass for all tensors of a task: a pass each costs as much again in small calls.
        *before, last = _factors(coefficient)
        for factor in before:
            torch._foreach_mul_(firsts + terms, factor)
        if firsts:
            torch._foreach_mul_(firsts, last)
        if terms:
            torch._foreach_add_(totals, terms, alpha=last)
    return combined


def cosines(gram: Tensor) -> Tensor:
    """Returns the (T, T) cosines from the inner products; 0 beside a zero gradient."""
    norms = gram.diagonal().sqrt()
    return (gram / norms[:, None] / norms).nan_to_num(nan=0.0)


def conflict_fraction(gram: Tensor) -> Tensor:
    """Returns the share of the pairs of tasks whose inner product is negative, 0 of no pairs."""
    pairs = gram.shape[0] * (gram.shape[0] - 1) / 2
    return (gram < 0).triu(1).sum() / max(pairs, 1)


def _factors(coefficient: float) -> list[float]:
    """Splits a number that float32 may not hold; its product with a gradient can be in range."""
    if coefficient == 0 or not (abs(coefficient) > 1e30 or abs(coefficient) < 1e-30):
        return [coefficient]
    # 1e60 times a gradient of 1e-30 is in range, and so is each half of the way.
    root: float = abs(coefficient) ** 0.5
    return [root, root if coefficient > 0 else -root]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keeps the user's choice of a fast, rough matrix product (TF32) out of the inner products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _products(
    columns: Sequence[tuple[tuple[int, ...], list[Tensor]]], count: int, dtype: torch.dtype
) -> Tensor:
    """Sums the inner products over the columns, kept apart by who shares them and how they lie."""
    sums: dict[tuple[tuple[int, ...], Spread], Tensor] = {}
    for tasks, column in columns:
        # Only matrices of one shape and spread can be added before they are put in place.
        key = tasks, spread(column[0])
        for block in _blocks([local(gradient) for gradient in column]):
            product = _inner_products(torch.stack(block), dtype)
            sums[key] = sums[key] + product if key in sums else product
    totals: dict[Spread, Tensor] = {}
    for (tasks, cut), product in sums.items():
        zeros = product.new_zeros(count, count)
        every = slice(tasks[0], tasks[-1] + 1, tasks[1] - tasks[0] if len(tasks) > 1 else 1)
        if tasks == tuple(range(count))[every]:  # A slice, since an index waits for the device.
            zeros[every, every] = product
        else:
            index = torch.tensor(tasks, device=product.device)
            zeros[index[:, None], index] = product
        totals[cut] = totals[cut] + zeros.to(totals[cut]) if cut in totals else zeros
    if not totals:
        return torch.zeros(count, count, dtype=torch.float64)
    return sum_over_shards(totals).cpu().double()


def _inner_products(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies the rows of a (T, n) matrix by one another, in `dtype` or a wider one."""
    wide = torch.float64
    if rows.device.type in NO_FLOAT64:
        rows = rows.cpu() if dtype == wide else rows
        wide = dtype
    rows = rows.to(torch.promote_types(rows.dtype, dtype))
    # Inside a caller's autocast the products would be of half precision.
    with torch.autocast(rows.device.type, enabled=False):
        # A batch of short products runs on all cores, one long product of few rows on one.
        if rows.shape[1] % CHUNK:
            return (rows @ rows.mT.conj()).real.to(wide)
        chunks = rows.reshape(len(rows), rows.shape[1] // CHUNK, CHUNK).transpose(0, 1)
        return (chunks @ chunks.mT.conj()).real.to(wide).sum(0)


def _blocks(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cuts gradients of one parameter alike, as vectors in the order of their memory if it is one.

    A block fits a processor's cache; a device takes the vectors whole.
    """
    if any(part.is_sparse for part in parts):
        parts = [part.to_dense() for part in parts]
    elif len({part.stride() for part in parts}) == 1:  # Channels last would be copied otherwise.
        order = sorted(range(parts[0].dim()), key=parts[0].stride, reverse=True)
        parts = [part.permute(order) for part in parts]
    size = max(parts[0].numel(), 1)
    if parts[0].device.type == "cpu":
        size = max(BLOCK // len(parts) // CHUNK, 1) * CHUNK
    return zip(*(part.reshape(-1).split(size) for part in parts), strict=True)
