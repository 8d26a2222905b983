"""Backward passes, and a ledger of what became of the gradients that they leave in `.grad`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mtlopt._gradients.arithmetic import Gradients, add, is_sharded, local, norm, norms_of_parts

SECOND_PASS_OF_DDP = ("marked ready only once", "marked as ready twice", "still allreduced by DDP")
"""What torch says of a second backward pass, unless it fails to reduce it in silence."""


def backward(
    loss: Tensor,
    parameters: Sequence[Tensor],
    retain_graph: bool = False,
    inputs: list[Tensor] | None = None,
) -> None:
    """Adds the loss's gradient to `.grad`; parameters it does not depend on keep None."""
    compiled = has_compiled() and is_compiled(loss)
    # Where a gradient is already there, a compiled graph's zeros do no harm.
    without = [p for p in parameters if p.grad is None] if compiled else []
    try:
        loss.backward(retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        explain(error)
    if without:
        drop_zeros(without)


def differentiate(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    parameters_only: bool = False,
    retain_graph: bool = False,
) -> Iterator[Gradients]:
    """Yields the gradient of each loss, from one shared graph, and leaves `.grad` as it was.

    The gradients share no memory with other tensors. With `parameters_only` other leaves get none.
    """
    earlier = pop_grads(parameters)
    last = len(losses) - 1
    try:
        for position, loss in enumerate(losses):
            # Not torch.autograd.grad: its results may share memory, and it passes by FSDP2, whose
            # parameters are not in the graph: https://github.com/meta-pytorch/torchrec/pull/4268.
            inputs = list(parameters) if parameters_only else None
            backward(loss, parameters, retain_graph or position < last, inputs)
            yield pop_grads(parameters)
    finally:
        set_grads(parameters, earlier)


def grad_of(loss: Tensor, tensors: Sequence[Tensor]) -> Gradients:
    """Returns the gradient at some tensors by the passes that these need, and keeps the graph.

    The results may share memory with other tensors.
    """
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not wanted:
        return [None] * len(tensors)
    try:
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        explain(error)
    gradients = dict(zip(map(id, wanted), found, strict=True))
    return [gradients.get(id(tensor)) for tensor in tensors]


def explain(error: RuntimeError) -> NoReturn:
    """Raises a clearer error if torch refused a second backward pass, or else the error itself."""
    if "backward through the graph a second time" in str(error):
        raise RuntimeError(
            "A loss shares its graph with one whose backward pass is over. Run the forward pass "
            "inside `losses(tasks, *batch)`, which is called for every gradient that needs one; "
            "use ready losses for one step only, with `backward(losses, retain_graph=True)` where "
            "another optimizer needs their graph; detach what you carry over from an earlier batch."
        ) from error
    if any(sign in str(error) for sign in SECOND_PASS_OF_DDP):
        # https://github.com/pytorch/pytorch/issues/47260
        raise RuntimeError(
            "A model wrapped in DistributedDataParallel allows one backward pass per forward pass. "
            "A method that combines the tasks' gradients takes several: give it the bare model, "
            "and `process_group=`, or choose `forwards='per-task'`."
        ) from error
    if "donated" in str(error):
        raise RuntimeError(
            "A compiled model allows one backward pass per forward pass: choose "
            "`forwards='per-task'`, or set torch._functorch.config.donated_buffer = False before "
            "compiling it."
        ) from error
    raise error


def pop_grads(parameters: Sequence[Tensor]) -> Gradients:
    """Moves the gradients out of `.grad`."""
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        # DDP's `gradient_as_bucket_view` hands out views, which its next pass overwrites.
        owned = gradient is None or not gradient._is_view()
        gradients.append(gradient if owned or gradient is None else gradient.clone())
        parameter.grad = None
    return gradients


def set_grads(parameters: Sequence[Tensor], gradients: Gradients) -> None:
    """Sets `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add_to_grads(parameters: Sequence[Tensor], gradient: Gradients) -> None:
    """Adds a gradient to `.grad`."""
    set_grads(parameters, add([parameter.grad for parameter in parameters], gradient))


def leaves(losses: Iterable[Tensor]) -> list[Tensor] | None:
    """Lists the leaves of the losses' graphs; None where a custom function may hide some."""
    found = []
    for node in nodes_of(losses):
        if hasattr(node, "variable"):
            found.append(node.variable)
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            return None  # Such as a reentrant checkpoint, which hides the parameters inside.
    return found


# Compiled graphs give zeros for parameters that a loss does not depend on; eager ones give None:
# https://github.com/pytorch/pytorch/pull/186355.


def drop_zeros(parameters: Iterable[Tensor], keep_if_all: bool = False) -> None:
    """Sets zero gradients to None; `keep_if_all` leaves them where all are zero.

    torch.distributed.checkpoint steps on zeros to create the states that it loads into.
    """
    given = [parameter for parameter in parameters if parameter.grad is not None]
    norms = [norm([parameter.grad]) for parameter in given]
    sizes = torch.stack(norms).tolist() if norms else []
    if keep_if_all and not any(sizes):
        return
    for parameter, size in zip(given, sizes, strict=True):
        if size == 0:
            parameter.grad = None


def norms_at(losses: Sequence[Tensor], gradient: Gradients) -> Gradients:
    """Returns each tensor's norm in the gradient of the losses; None where a graph gave zeros."""
    norms = iter(norms_of_parts([g for g in gradient if g is not None]))
    found: Gradients = [g if g is None else next(norms) for g in gradient]
    if has_compiled() and is_compiled(*losses):
        return [n if n is not None and n.item() else None for n in found]
    return found


def has_compiled() -> bool:
    """Returns whether torch has compiled a model in this process; cheap."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["aot_autograd"])


def is_compiled(*outputs: Tensor) -> bool:
    """Returns whether the graph of any of the tensors has a compiled part."""
    return any("CompiledFunction" in node.name() for node in nodes_of(outputs))


def nodes_of(losses: Iterable[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    """Yields the nodes of the losses' graphs, each once."""
    todo, seen = [loss.grad_fn for loss in losses], set()
    while todo:  # Not recursive: graphs can be deeper than Python's stack.
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            yield node


# The ledger.


class Ledger:
    """Records the status of each gradient in `.grad`.

    - "new": nothing is known of it;
    - "made": a method made it, and it is yet to be applied;
    - "applied": a step has applied it, so applying it again would be a mistake;
    - "changed": it was applied and then written to once, by clipping or a backward pass.

    The record is an attribute of the gradient tensor that holds its version: a replaced tensor has
    no record, and one that was written to has an old one. Unscaling by a GradScaler does not count
    as writing. Holding references here instead would keep the memory after `zero_grad`.
    """

    made_last = False
    """Whether a method made the last gradient, even if another tensor was assigned since."""

    def __init__(self) -> None:
        self._stepped = False
        self._watch: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_watch": None}

    def mark(self, parameters: Sequence[Tensor], status: Literal["made", "applied"]) -> None:
        """Records that a method made, or a step applied, the gradients of the parameters."""
        if self._watch is not None:
            self.reset()
        self._stepped, self.made_last = status == "applied", status == "made"
        given = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in [p for p in given if p.requires_grad][:1] if self.made_last else ():
            # A backward pass of the user's from here on, unlike an assignment, calls the hook.
            self._watch = parameter.register_post_accumulate_grad_hook(self._forget_made)
        for parameter in given:
            gradient: Any = parameter.grad
            gradient._mtlopt = status, gradient._version

    def _forget_made(self, parameter: Tensor) -> None:
        self.made_last = False

    def reset(self) -> None:
        """Records that the gradients were cleared, or are no longer of interest."""
        self._stepped = self.made_last = False
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def status(self, parameters: Sequence[Tensor]) -> Literal["new", "made", "applied", "changed"]:
        """Returns the status of the gradients as a whole."""
        given = [parameter.grad for parameter in parameters if parameter.grad is not None]
        records = [getattr(gradient, "_mtlopt", ("new", 0)) for gradient in given]
        if any(status == "made" for status, _ in records):
            return "made"
        if not self._stepped or any(status == "new" for status, _ in records):
            return "new"
        # By version, not by value: comparing values would wait for the device.
        writes = [g._version - version for g, (_, version) in zip(given, records, strict=True)]
        if not any(writes):
            return "applied"
        return "changed" if max(writes) == 1 else "new"

    def has_lost(self, parameter: Tensor) -> bool:
        """Returns whether a gradient that a method made was cleared, and not merely changed.

        A tensor that was assigned in its place, such as a centred gradient, is a change; one that
        a backward pass left after clearing is not.
        """
        gradient = parameter.grad
        status, version = getattr(gradient, "_mtlopt", ("new", 0))
        replaced = status != "made"
        if gradient is None or (replaced and (not self.made_last or is_sharded([gradient]))):
            return True
        return version != gradient._version and not bool(local(gradient).any())

    def copied(self, parameters: Sequence[Tensor]) -> None:
        """Renews the records of copied gradients, whose versions start from zero."""
        for parameter in parameters:
            if (record := getattr(parameter.grad, "_mtlopt", None)) is not None:
                parameter.grad._mtlopt = record[0], parameter.grad._version  # type: ignore[union-attr]
