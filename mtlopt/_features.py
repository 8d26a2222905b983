"""Features: gradients are combined where all tasks meet, and go back through the trunk once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mtlopt._collect import ask
from mtlopt._distributed import Ranks
from mtlopt._gradients import Gradients, add
from mtlopt._losses import Loss, Question, Task, average, names_of, sum_tensors, weighted
from mtlopt._passes import differentiate, drop_zeros, explain, is_compiled, share_a_graph
from mtlopt._rows import Rows
from mtlopt._watch import Watch


class Cut(NamedTuple):
    """What one call of a module gave, and the leaves that took its place behind it."""

    module: nn.Module
    outputs: list[Tensor]
    leaves: list[Tensor]


class Features:
    """Modules whose outputs the tasks share; while `losses` runs the graph is cut at them.

    Args:
        modules: One or several; each call of each in a forward pass is a cut of its own.
    """

    def __init__(self, modules: nn.Module | Iterable[nn.Module]) -> None:
        given = [modules] if isinstance(modules, nn.Module) else list(modules)
        if not given or not all(isinstance(module, nn.Module) for module in given):
            raise TypeError(
                "`features` must be a module or several, whose outputs all tasks share, got "
                f"{[type(module).__name__ for module in given]}."
            )
        self.modules = given

    @contextmanager
    def cutting(self) -> Iterator[list[Cut]]:
        """Cuts the graph at the modules' outputs; the list fills as they are called."""
        cuts: list[Cut] = []
        # First of its hooks: one that keeps the output for the heads is to keep the leaf.
        handles = [
            module.register_forward_hook(partial(_cut, cuts), prepend=True)
            for module in self.modules
        ]
        try:
            yield cuts
        except RuntimeError as error:
            if "leaf Variable" in str(error):
                raise RuntimeError(
                    "A head changes the output of `features` in place, which cannot be undone for "
                    "the trunk's backward pass: take it out of place, nn.ReLU(inplace=False)."
                ) from error
            raise
        finally:
            for handle in handles:
                handle.remove()

    def check(self, cuts: Sequence[Cut]) -> None:
        """Refuses modules that were not called, or whose output was not cut; frozen ones may be."""
        uncut = [
            module
            for module in self.modules
            if (own := [cut for cut in cuts if cut.module is module])
            and not any(cut.leaves for cut in own)
            and any(parameter.requires_grad for parameter in module.parameters())
        ]
        if uncut or not cuts:
            names = [type(module).__name__ for module in uncut or self.modules]
            raise ValueError(
                f"`features` must be called by `losses`, got {names} without a call whose output "
                "needs a gradient: give the modules that the model itself calls, compile the trunk "
                "and not the whole model, and choose `use_reentrant=False` in checkpoints."
            )


def combine_through(
    features: Features,
    question: Question,
    tasks: Sequence[Task],
    batches: Sequence[tuple[object, ...]],
    parameters: Sequence[Tensor],
    ranks: Ranks,
    *,
    combine: Callable[[Rows], Gradients],
    weights: Mapping[str, float] | None,
    scale: Callable[[Tensor], Tensor],
    scaled: bool,
    watch: Watch,
) -> dict[str, Tensor]:
    """Adds to `.grad` the combined gradient, with rows and coefficients of feature space.

    T passes lead from the losses to the features; in them the parameters behind get their plain
    gradient. One pass, which is linear, leads from there through the trunk: its gradient is the sum
    of the tasks' with the same coefficients. Each micro-batch is combined by itself, for together
    they would have to keep all their graphs, and counts for its share of them.

    Returns:
        The present tasks' values by name.
    """
    names = names_of(*tasks)
    seen: dict[str, list[Loss]] = {}
    ranks.check_batches(len(batches))
    for position, batch in enumerate(batches):
        with features.cutting() as cuts:
            terms, means = ask(question, names, batch, ranks)
        if terms:  # A batch, or a rank, without labels need not call the trunk.
            features.check(cuts)
        for name, mean in means.items():
            seen.setdefault(name, []).append(mean)
        _check_counts(seen, position == len(batches) - 1, len(batches))
        leaves = [leaf for cut in cuts for leaf in cut.leaves]
        rows: dict[Task, Gradients] = {}
        losses: dict[Task, Tensor] = {}
        for task in tasks:
            own = [name for name in names_of(task) if name in means]
            if own:  # Present on some rank: without a term here its row is zero here.
                rows[task] = [None] * len(leaves)
            parts = [
                weighted(terms[name], (weights or {}).get(name, 1.0) / len(batches))
                for name in own
                if name in terms
            ]
            if parts:
                losses[task] = scale(sum_tensors(parts))
        outputs = [output for cut in cuts for output in cut.outputs]
        # What heads and trunk have in common: a stem's connection that skips the trunk.
        keep = share_a_graph(losses.values(), outputs)
        compiled = is_compiled(*losses.values(), *outputs)
        passes = differentiate(list(losses.values()), leaves, keep=keep)
        rows |= zip(losses, passes, strict=True)
        if leaves and losses and all(g is None for task in losses for g in rows[task]):
            watch.once(
                "uncut",
                "No loss depends on what `features` gave, so no gradients are combined: give the "
                "modules whose outputs the heads are called with.",
            )
        values = {name: mean.value for name, mean in means.items()}
        backward_from(cuts, combine(Rows(rows, leaves, values, scaled, apart=False, ranks=ranks)))
        if compiled:
            drop_zeros(parameters)
    return {name: average(losses).value for name, losses in seen.items()}


def backward_from(cuts: Sequence[Cut], gradients: Gradients) -> None:
    """Takes the one pass through what lies before the cuts, last call first."""
    rest = list(gradients)
    for position, cut in reversed(list(enumerate(cuts))):
        own, rest = rest[len(rest) - len(cut.leaves) :], rest[: len(rest) - len(cut.leaves)]
        # What a later call of a chain has sent back to these leaves comes on top.
        total = add([leaf.grad for leaf in cut.leaves], own)
        pairs = [(z, g) for z, g in zip(cut.outputs, total, strict=True) if g is not None]
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            try:
                # Calls may share what lies before them: their graph lasts until the first call's.
                torch.autograd.backward(outputs, grads, retain_graph=position > 0)
            except RuntimeError as error:
                explain(error)
                raise


def _cut(cuts: list[Cut], module: nn.Module, arguments: Any, output: Any) -> Any:
    """The hook: returns the output with leaves in the place of its tensors."""
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        # One leaf for a tensor that the output holds twice.
        leaf = tensor.detach().requires_grad_()
        return leaves.setdefault(id(tensor), (tensor, leaf))[1]

    changed = tree_map_only(Tensor, replace, output)
    outputs = [tensor for tensor, _ in leaves.values()]
    cuts.append(Cut(module, outputs, [leaf for _, leaf in leaves.values()]))
    return changed


def _check_counts(seen: Mapping[str, Sequence[Loss]], whole: bool, batches: int) -> None:
    """Refuses unequal micro-batches: a combined gradient cannot be weighed task by task."""
    for name, losses in seen.items():
        counts = [loss.samples for loss in losses]
        if len(set(counts)) > 1 or (whole and len(counts) < batches):
            raise ValueError(
                f"With `features` each of the {batches} micro-batches is combined by itself, so "
                f"they must have equal counts, got {counts} for task {name!r}: take equal ones, or "
                "leave `features` out."
            )
