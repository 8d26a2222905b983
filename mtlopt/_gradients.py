"""Per-task gradients as lists beside the parameters; None where a task does not reach one."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = list[Tensor | None]
BLOCK = 2**20
"""Numbers that a processor takes at once, of all tasks together: they fit its cache."""
CHUNK = 2**12
"""Numbers per task that one product sums, so that a processor's cores share a long sum."""


def check_parameters(argument: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters as a list, or says what was given in their place."""
    given: object = parameters
    if not isinstance(given, (Tensor, Mapping)) and isinstance(given, Iterable):
        listed = list(given)
        if all(isinstance(item, Tensor) for item in listed):
            return listed
    raise TypeError(
        f"`{argument}` must be an iterable of parameters, such as `layer.parameters()`, "
        f"got a {type(given).__name__}."
    )


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
            backward(loss, parameters, retain_graph=position < last, inputs=inputs)
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
    compiled = _is_compiled(loss)
    without = [p for p in parameters if p.grad is None] if compiled else []
    try:
        loss.backward(retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        explain(error)
        raise
    # A compiled graph gives zeros to the parameters of outputs that the loss does not depend on.
    given = [parameter for parameter in without if parameter.grad is not None]
    if given:
        sizes = torch.stack(norms([parameter.grad for parameter in given])).tolist()
        for parameter, size in zip(given, sizes, strict=True):
            if size == 0:
                parameter.grad = None


def partial(loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Takes a gradient by the passes that these parameters need; keeps the graph.

    The results may share their memory.
    """
    try:
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        explain(error)
        raise


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


def _is_compiled(loss: Tensor) -> bool:
    # Where torch has compiled nothing, which costs no more to know than this, no graph is searched.
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or not dynamo.counters["aot_autograd"]:
        return False
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if "CompiledFunction" in node.name():
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False


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
        for block in _blocks([g for g in column if g is not None]):
            product = _inner_products(torch.stack(block))
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
    shared = [len(tasks) > 1 for tasks in reach(gradients)]
    combined: Gradients = [None] * len(shared)
    for gradient, coefficient in zip(gradients, coefficients, strict=True):
        firsts, totals, terms = [], [], []
        for position, part in enumerate(gradient):
            total = combined[position]
            if part is None:
                continue
            if total is None:
                combined[position] = part
                firsts += [part] if shared[position] else []
                continue
            if total.is_sparse and not part.is_sparse:
                combined[position] = total = total.to_dense()
            totals.append(total)
            terms.append(part)
        if firsts:
            torch._foreach_mul_(firsts, coefficient)
        if terms:
            torch._foreach_add_(totals, terms, alpha=coefficient)
    return combined


def cosines(gram: Tensor) -> Tensor:
    """Returns the (T, T) cosines from the inner products; 0 beside a zero gradient."""
    norms = gram.diagonal().sqrt()
    return (gram / (norms[:, None] * norms)).nan_to_num(nan=0.0)


def conflict_fraction(gram: Tensor) -> Tensor:
    """Returns the share of the pairs of tasks whose inner product is negative, 0 of no pairs."""
    pairs = gram.shape[0] * (gram.shape[0] - 1) / 2
    return (gram < 0).triu(1).sum() / max(pairs, 1)


def _inner_products(rows: Tensor) -> Tensor:
    """Multiplies the rows of a (T, n) matrix by one another."""
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    # Inside a caller's autocast the products would be of half precision.
    with torch.autocast(rows.device.type, enabled=False):
        if rows.shape[1] % CHUNK:
            return (rows @ rows.mT.conj()).real.double()
        chunks = rows.reshape(len(rows), rows.shape[1] // CHUNK, CHUNK).transpose(0, 1)
        return (chunks @ chunks.mT.conj()).real.double().sum(0)


def _blocks(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cuts gradients of one parameter alike, as vectors in the order of their memory if it is one.

    A block fits a processor's cache; a device takes the vectors whole.
    """
    # Of a sharded gradient this rank's part.
    parts = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    if any(part.is_sparse for part in parts):
        parts = [part.to_dense() for part in parts]
    elif len({part.stride() for part in parts}) == 1:
        order = sorted(range(parts[0].dim()), key=parts[0].stride, reverse=True)
        parts = [part.permute(order) for part in parts]
    size = max(parts[0].numel(), 1)
    if parts[0].device.type == "cpu":
        size = max(BLOCK // len(parts) // CHUNK, 1) * CHUNK
    return zip(*(part.reshape(-1).split(size) for part in parts), strict=True)
