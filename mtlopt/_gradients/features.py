"""Features: the module outputs that all tasks share, where the graph is cut or watched."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from mtlopt._gradients.arithmetic import Gradients, add, is_sharded
from mtlopt._gradients.autograd import explain, nodes_of
from mtlopt._gradients.losses import Loss, Ranks

OPAQUE = (nn.Module, type, FunctionType, MethodType, ModuleType)
"""Objects in an output that are not searched for tensors."""
DEPTH = 3
"""How deep objects in an output are searched for tensors."""
BEFORE = (
    "`losses` must not differentiate with respect to what lies before `features`, where the graph "
    "is cut: "
)


class Call(NamedTuple):
    """One call of a module: its outputs that need a gradient, and the leaves that replace them."""

    module: nn.Module
    outputs: list[Tensor]
    leaves: list[Tensor]


class Features:
    """Modules whose outputs the tasks share; each call in a forward pass counts separately."""

    def __init__(self, modules: nn.Module | Iterable[nn.Module]) -> None:
        given = [modules] if isinstance(modules, nn.Module) else list(modules)
        if not given or not all(isinstance(module, nn.Module) for module in given):
            raise TypeError(
                "`features` must be a module or several, whose outputs all tasks share, got "
                f"{[type(module).__name__ for module in given]}."
            )
        self.modules = given
        self._compared = False

    @contextmanager
    def cutting(self) -> Iterator[list[Call]]:
        """Cuts the graph at the modules' outputs; the list fills as they are called."""
        try:
            with self.recording(_cut) as calls:
                yield calls
        except RuntimeError as error:
            if "to not have been used in the graph" in str(error):
                raise RuntimeError(f"{BEFORE}remove `features`.") from error
            if "leaf Variable" in str(error):
                raise RuntimeError(
                    "A head changes the output of `features` in place, which the trunk's backward "
                    "pass cannot undo: use an out-of-place operation, nn.ReLU(inplace=False)."
                ) from error
            raise

    @contextmanager
    def recording(self, hook: Callable[..., Any] | None = None) -> Iterator[list[Call]]:
        """Records the modules' outputs, and leaves the graph whole unless the hook cuts it."""
        calls: list[Call] = []
        thread = threading.get_ident()

        def own_thread(*arguments: Any) -> Any:
            own = threading.get_ident() == thread
            return (hook or _record)(calls, handles, *arguments) if own else None

        # The first of the module's hooks: one that stores the output must store the new leaf.
        handles = [
            module.register_forward_hook(own_thread, prepend=True, with_kwargs=True)
            for module in self.modules
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def check(self, calls: Sequence[Call], ranks: Ranks, needed: bool) -> None:
        """Refuses trainable modules that were not called, or had no output with a gradient.

        Once it also refuses outputs that are the same on all ranks, whose gradients would have to
        be summed before they are multiplied. A process without losses need not call the modules,
        but it must call this.
        """
        outputs = [z for call in calls for z in call.outputs]
        if ranks.reduces and not self._compared:
            copies = ranks.find_copies(outputs)
            self._compared = copies is not None
            if copies and any(copies):
                position = copies.index(True)
                shapes = [tuple(z.shape) for z in outputs[position : position + 1]]
                raise ValueError(
                    "`features` must have a sample dimension where there is a `process_group`, got "
                    f"output {position} {shapes} with the same numbers on all ranks: choose "
                    "modules without it, remove `features`, or give each rank its own samples."
                )
        if not needed:
            return
        missed = [
            module
            for module in self.modules
            if (own := [call for call in calls if call.module is module])
            and not any(call.outputs for call in own)
            and any(parameter.requires_grad for parameter in module.parameters())
        ]
        if missed or not calls:
            names = [type(module).__name__ for module in missed or self.modules]
            raise ValueError(
                f"`features` must be called by `losses`, got {names} without a call whose output "
                "needs a gradient: give the modules that the model itself calls, compile the trunk "
                "and not the whole model, and choose `use_reentrant=False` in checkpoints."
            )


def backward_from(cuts: Sequence[Call], gradients: Gradients) -> None:
    """Takes the one pass through everything before the cuts, the last call first."""
    rest = list(gradients)
    for position, cut in reversed(list(enumerate(cuts))):
        own, rest = rest[len(rest) - len(cut.leaves) :], rest[: len(rest) - len(cut.leaves)]
        # In a chain of modules, later calls have sent a gradient to these leaves too.
        total = add([leaf.grad for leaf in cut.leaves], own)
        pairs = [(z, g) for z, g in zip(cut.outputs, total, strict=True) if g is not None]
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            try:
                # Calls can share what lies before them, so the graph is kept until the first.
                torch.autograd.backward(outputs, grads, retain_graph=position > 0)
            except RuntimeError as error:
                explain(error)


def refuse_shards(parameters: Sequence[Tensor]) -> None:
    """Refuses to work at features of a model under FSDP2."""
    if is_sharded(parameters):
        raise ValueError(
            "`features` must be None where the parameters are sharded (FSDP2), whose wrapper "
            "needs whole backward passes."
        )


def check_counts(seen: Mapping[str, Sequence[Loss]], whole: bool, batches: int) -> None:
    """Refuses micro-batches of unequal counts, whose combined gradients cannot be averaged."""
    for name, losses in seen.items():
        counts = [loss.samples for loss in losses]
        if len(set(counts)) > 1 or (whole and len(counts) < batches):
            raise ValueError(
                f"With `features` each of the {batches} micro-batches is combined by itself, so "
                f"they must have equal counts, got {counts} for task {name!r}: use equal ones, or "
                "remove `features`."
            )


def share_a_graph(
    losses: Iterable[Tensor], outputs: Iterable[Tensor], known: Iterable[Tensor]
) -> bool:
    """Returns whether the losses use what lies before the outputs, by a path past the cuts.

    Refuses leaves there that are not known and no parameters: losses can differentiate by them.
    """
    own = set(map(id, known))
    before = set(nodes_of(outputs))
    for node in before:
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise ValueError(
                f"{BEFORE}got a tensor of shape {tuple(leaf.shape)} there that requires a gradient "
                "and is no parameter, such as coordinates: remove `features`, or detach it."
            )
    return any(node in before and not hasattr(node, "variable") for node in nodes_of(losses))


def _record(calls: list[Call], handles: Any, module: nn.Module, *arguments: Any) -> None:
    found = {id(z): z for z in tensors_in(arguments[-1]) if z.requires_grad}
    calls.append(Call(module, list(found.values()), []))


def _cut(
    calls: list[Call],
    handles: list[RemovableHandle],
    module: nn.Module,
    arguments: Any,
    keywords: Any,
    output: Any,
) -> Any:
    """Returns the output with its tensors replaced by leaves."""
    if (
        module._backward_hooks
        or module._backward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    ):
        raise ValueError(
            f"`features` must have no backward hooks, which would see each task's gradient and not "
            f"the combined one, got some on {type(module).__name__}: register them on the modules "
            "inside it."
        )
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        # One leaf for a tensor that the output contains twice.
        leaf = tensor.detach().requires_grad_()
        return leaves.setdefault(id(tensor), (tensor, leaf))[1]

    def refuse(gradient: Tensor) -> None:
        raise ValueError(f"{BEFORE}remove `features`.")

    changed = tree_map(partial(_replaced, replace, DEPTH), output)
    outputs = [tensor for tensor, _ in leaves.values()]
    calls.append(Call(module, outputs, [leaf for _, leaf in leaves.values()]))
    # While `losses` runs, nothing has a reason to send a gradient to the module's arguments.
    for given in tree_leaves((arguments, keywords)):
        if isinstance(given, Tensor) and given.requires_grad and not given.is_leaf:
            handles.append(given.register_hook(refuse))
    return changed


def tensors_in(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """Yields the tensors in nested containers, also in objects that torch does not know as such."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth:
            yield from tensors_in([part for _, part in _parts(leaf)], depth - 1)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """Lists the names, keys or indices of what an object holds."""
    if isinstance(value, OPAQUE):
        return []
    if isinstance(value, dict):  # A subclass, as below, is a leaf for torch.
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    slots = {n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())}
    named = {n: getattr(value, n) for n in slots - {"__dict__"} if hasattr(value, n)}
    return list((named | getattr(value, "__dict__", {})).items())


def _replaced(replace: Callable[[Tensor], Tensor], depth: int, leaf: Any) -> Any:
    """Returns a leaf of a nested container, a copy if it holds tensors that are replaced."""
    if isinstance(leaf, Tensor):
        return replace(leaf)
    if not any(tensor.requires_grad for tensor in tensors_in(leaf, depth)):
        return leaf
    inner = partial(_replaced, replace, depth - 1)
    parts = {name: tree_map(inner, part) for name, part in _parts(leaf)}
    if isinstance(leaf, tuple):
        return tuple.__new__(type(leaf), parts.values())
    duplicate = copy(leaf)
    for name, part in parts.items():
        if isinstance(leaf, (dict, list)):
            duplicate[name] = part
        else:
            object.__setattr__(duplicate, name, part)  # It may be frozen.
    return duplicate
