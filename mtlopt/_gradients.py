"""Per-task gradients as lists beside the parameters; None where a task does not reach one."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = list[Tensor | None]
BLOCK = 2**15
"""Numbers that a processor takes at once: a block of each of several tasks fits its cache."""


def differentiate(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], alone: bool = False
) -> Iterator[Gradients]:
    """Yields each loss's gradient, from one shared graph; leaves `.grad` as it was.

    Args:
        losses: T scalars with a graph.
        parameters: P leaf tensors.
        alone: Whether other leaves are to be left without a gradient.

    Yields:
        T lists of P gradients, none of which shares its memory with another tensor.
    """
    earlier = take(parameters)
    last = len(losses) - 1
    try:
        for position, loss in enumerate(losses):
            # Not torch.autograd.grad, whose results may share memory, and which passes FSDP by.
            inputs = list(parameters) if alone else None
            backward(loss, retain_graph=position < last, inputs=inputs)
            yield take(parameters)
    finally:
        put(parameters, earlier)


def backward(loss: Tensor, retain_graph: bool = False, inputs: list[Tensor] | None = None) -> None:
    """Adds the loss's gradient to `.grad`."""
    loss.backward(retain_graph=retain_graph, inputs=inputs)


def take(parameters: Sequence[Tensor]) -> Gradients:
    """Moves the gradients out of `.grad`."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def put(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Sets `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add(first: Gradients, second: Gradients) -> Gradients:
    """Adds the second gradient to the first, in place where both reach a parameter."""
    return [
        b if a is None else a if b is None else b.add_(a) if a.is_sparse else a.add_(b)
        for a, b in zip(first, second, strict=True)
    ]


def scaled(gradients: Gradients, factor: float) -> Gradients:
    """Multiplies a gradient by a number in place; 1 leaves it as it is, to the last bit."""
    if factor == 1:
        return gradients
    return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]


def norms(gradients: Gradients) -> list[Tensor]:
    """Returns the Euclidean norm of each tensor that is there, in one pass over them."""
    dense = [
        gradient.coalesce().values() if gradient.is_sparse else gradient
        for gradient in gradients
        if gradient is not None
    ]
    return list(torch._foreach_norm(dense)) if dense else []


def reach(gradients: Sequence[Gradients]) -> list[tuple[int, ...]]:
    """Lists for each of the P parameters which of the T tasks reach it."""
    return [
        tuple(k for k, gradient in enumerate(column) if gradient is not None)
        for column in zip(*gradients, strict=True)
    ]


def gram(gradients: Sequence[Gradients]) -> Tensor:
    """Returns the inner products of the tasks' gradients over the parameters that they share.

    Shared is what at least two of the tasks reach; a task that does not reach it counts as zero
    there. The gradients are read once, block by block, and never flattened into one vector.

    Args:
        gradients: T gradients of P tensors, dense or sparse.

    Returns:
        (T, T) in float64, on the gradients' device; sums of float32 products, or of float64 ones.
    """
    products: dict[tuple[int, ...], Tensor] = {}
    for tasks, column in zip(reach(gradients), zip(*gradients, strict=True), strict=True):
        if len(tasks) < 2:
            continue
        for block in _blocks(_vectors([g for g in column if g is not None])):
            rows = torch.stack(block)
            rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
            product = (rows @ rows.mT.conj()).real.double()
            products[tasks] = products[tasks] + product if tasks in products else product
    device = next((p.device for p in products.values()), torch.device("cpu"))
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=device)
    for tasks, product in products.items():
        index = torch.tensor(tasks, device=device)
        total[index[:, None], index] += product.to(device)
    return total


def combine(gradients: Sequence[Gradients], coefficients: Sequence[float]) -> Gradients:
    """Sums the gradients, weighted where they are shared and plainly elsewhere.

    Args:
        gradients: T gradients of P tensors; the memory of the first that reaches a parameter is
            written over and returned.
        coefficients: T numbers, for the parameters that at least two of the tasks reach.

    Returns:
        One gradient.
    """
    combined: Gradients = []
    for tasks, column in zip(reach(gradients), zip(*gradients, strict=True), strict=True):
        own = [gradient for gradient in column if gradient is not None]
        if len(own) < 2:
            combined.append(own[0] if own else None)
        else:
            combined.append(_weighted_sum(own, [coefficients[k] for k in tasks]))
    return combined


def cosines(gram: Tensor) -> Tensor:
    """Returns the (T, T) cosines from the inner products; 0 beside a zero gradient."""
    norms = gram.diagonal().sqrt()
    return (gram / (norms[:, None] * norms)).nan_to_num(nan=0.0)


def conflict_fraction(gram: Tensor) -> Tensor:
    """Returns the share of the pairs of tasks whose inner product is negative, 0 of no pairs."""
    pairs = gram.shape[0] * (gram.shape[0] - 1) / 2
    return (gram < 0).triu(1).sum() / max(pairs, 1)


def _weighted_sum(parts: list[Tensor], weights: list[float]) -> Tensor:
    sparse = [part.is_sparse for part in parts]
    if any(sparse) and not all(sparse):
        parts = [part.to_dense() for part in parts]
    if not any(sparse):
        vectors = _vectors(parts)
        if vectors[0].data_ptr() == parts[0].data_ptr():  # Views, not copies.
            for total, *others in _blocks(vectors):
                total.mul_(weights[0])
                for part, weight in zip(others, weights[1:], strict=True):
                    total.add_(part, alpha=weight)
            return parts[0]
    terms = [part * weight for part, weight in zip(parts, weights, strict=True)]
    return sum(terms[1:], terms[0])


def _vectors(parts: list[Tensor]) -> list[Tensor]:
    """Views gradients of one parameter as vectors, in the order of their memory if it is one."""
    if any(part.is_sparse for part in parts):
        return [part.to_dense().reshape(-1) for part in parts]
    if len({part.stride() for part in parts}) == 1:
        order = sorted(range(parts[0].dim()), key=parts[0].stride, reverse=True)
        parts = [part.permute(order) for part in parts]
    return [part.reshape(-1) for part in parts]


def _blocks(vectors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cuts vectors alike, small enough for a processor's cache; a device takes them whole."""
    size = BLOCK if vectors[0].device.type == "cpu" else max(vectors[0].numel(), 1)
    return zip(*(vector.split(size) for vector in vectors), strict=True)
