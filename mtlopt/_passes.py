"""Backward passes that leave a gradient with the parameters that a loss reaches, and no others."""

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mtlopt._gradients import Gradients, norm


def differentiate(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    alone: bool = False,
    keep: bool = False,
) -> Iterator[Gradients]:
    """Yields each loss's gradient, from one shared graph; leaves `.grad` as it was.

    Args:
        losses: T scalars with a graph.
        parameters: P leaf tensors.
        alone: Whether other leaves are to be left without a gradient.
        keep: Whether the graph is needed after the last pass.

    Yields:
        T lists of P gradients, none of which shares its memory with another tensor.
    """
    earlier = take(parameters)
    last = len(losses) - 1
    try:
        for position, loss in enumerate(losses):
            # Not torch.autograd.grad, whose results may share memory, and which passes FSDP by.
            inputs = list(parameters) if alone else None
            retain_graph = keep or position < last
            backward(loss, parameters, retain_graph=retain_graph, inputs=inputs)
            yield take(parameters)
    finally:
        put(parameters, earlier)


def backward(
    loss: Tensor,
    parameters: Iterable[Tensor],
    retain_graph: bool = False,
    inputs: list[Tensor] | None = None,
) -> None:
    """Adds the loss's gradient to `.grad` of the parameters that it reaches, and of no others."""
    # Those that have a gradient already keep it: zeros add nothing.
    compiled = is_compiled(loss)
    without = [p for p in parameters if p.grad is None] if compiled else []
    try:
        loss.backward(retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        explain(error)
        raise
    if without:
        drop_zeros(without)


def drop_zeros(parameters: Iterable[Tensor], but_not_all: bool = False) -> None:
    """Drops the zeros that a compiled graph gives for outputs that a loss does not depend on.

    `but_not_all` keeps them where there is nothing else: torch's own functions step on zeros, to
    make the states that a checkpoint is loaded into.
    """
    given = [parameter for parameter in parameters if parameter.grad is not None]
    norms = [norm([parameter.grad]) for parameter in given]
    sizes = torch.stack(norms).tolist() if norms else []
    if but_not_all and not any(sizes):
        return
    for parameter, size in zip(given, sizes, strict=True):
        if size == 0:
            parameter.grad = None


def partial(loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Takes a gradient by the passes that these parameters need; keeps the graph.

    The results may share their memory.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        explain(error)
        raise
    gradients = dict(zip(map(id, wanted), found, strict=True))
    return [gradients.get(id(parameter)) for parameter in parameters]


def explain(error: RuntimeError) -> None:
    """Says what to do where torch refused a second backward pass through a graph."""
    if "backward through the graph a second time" in str(error):
        raise RuntimeError(
            "A loss shares a graph with one whose backward pass has been taken. The forward pass "
            "belongs inside `losses(tasks, *batch)`, which is called anew for every gradient that "
            "needs one; ready losses are good for one step; what is carried over from an earlier "
            "batch must be detached."
        ) from error
    if "marked ready only once" in str(error) or "marked as ready twice" in str(error):
        raise RuntimeError(
            "A model wrapped in DistributedDataParallel takes one backward pass per forward pass. "
            "A method that combines the tasks' gradients takes several: it wants the bare model, "
            "and `process_group=`."
        ) from error
    if "donated" in str(error):
        raise RuntimeError(
            "A compiled model takes one backward pass per forward pass: choose "
            "`forwards='per-task'`, or set torch._functorch.config.donated_buffer = False before "
            "it is compiled."
        ) from error


def take(parameters: Sequence[Tensor]) -> Gradients:
    """Moves the gradients out of `.grad`."""
    gradients = [_owned(parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def put(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Sets `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def leaves(losses: Iterable[Tensor]) -> list[Tensor] | None:
    """Lists the leaves that losses reach; None where a function of the user's hides some."""
    found = []
    for node in _nodes(losses):
        if hasattr(node, "variable"):
            found.append(node.variable)
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            return None  # Such as a reentrant checkpoint, whose parameters do not show.
    return found


def share_a_graph(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether some node other than a leaf lies before both: its buffers are needed twice."""
    nodes = set(_nodes(first))
    return any(node in nodes and not hasattr(node, "variable") for node in _nodes(second))


def _owned(gradient: Tensor | None) -> Tensor | None:
    # DDP's `gradient_as_bucket_view` hands out parts of its bucket, which its next pass overwrites.
    return gradient.clone() if gradient is not None and gradient._is_view() else gradient


def has_compiled() -> bool:
    """Whether torch has compiled a model in this process; asking costs next to nothing."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["aot_autograd"])


def is_compiled(*outputs: Tensor) -> bool:
    """Whether a compiled graph lies before any of the tensors."""
    return has_compiled() and any("CompiledFunction" in node.name() for node in _nodes(outputs))


def _nodes(losses: Iterable[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    todo, seen = [loss.grad_fn for loss in losses], set()
    while todo:  # Not recursive: graphs are deeper than Python's stack.
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            yield node
