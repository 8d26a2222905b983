"""Per-task gradients as lists beside the parameters; None where a task does not reach one."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = list[Tensor | None]


def differentiate(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Gradients]:
    """Returns each loss's gradient, from one shared graph; leaves `.grad` as it was.

    Args:
        losses: T scalars with a graph.
        parameters: P leaf tensors.

    Returns:
        T lists of P gradients, none of which shares its memory with another tensor.
    """
    earlier = take(parameters)
    gradients = []
    last = len(losses) - 1
    try:
        for position, loss in enumerate(losses):
            # Not torch.autograd.grad, whose results may share memory, and which passes FSDP by.
            backward(loss, retain_graph=position < last)
            gradients.append(take(parameters))
    finally:
        put(parameters, earlier)
    return gradients


def backward(loss: Tensor, retain_graph: bool = False) -> None:
    """Adds the loss's gradient to `.grad`."""
    loss.backward(retain_graph=retain_graph)


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
    """Adds two gradients; one that only one of them has is taken over as it is."""
    return [
        b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)
    ]


def scaled(gradients: Gradients, factor: float) -> Gradients:
    """Multiplies a gradient by a number; 1 leaves it as it is, to the last bit."""
    if factor == 1:
        return gradients
    return [None if gradient is None else gradient * factor for gradient in gradients]


def norms(gradients: Gradients) -> list[Tensor]:
    """Returns the Euclidean norm of each tensor that is there, in one pass over them."""
    dense = [
        gradient.coalesce().values() if gradient.is_sparse else gradient
        for gradient in gradients
        if gradient is not None
    ]
    return list(torch._foreach_norm(dense)) if dense else []
