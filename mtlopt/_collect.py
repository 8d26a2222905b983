"""What averages: ask() on one batch, collect() every task's gradient over several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mtlopt._distributed import Ranks
from mtlopt._gradients import Gradients, add, scaled
from mtlopt._losses import Loss, Question, Task, names_of, sum_tensors, weighted
from mtlopt._passes import differentiate, leaves
from mtlopt._watch import Watch

Forwards: TypeAlias = Literal["joint", "per-task"]


class Collected(NamedTuple):
    """The present tasks' losses by name, and their gradients by task."""

    values: dict[str, Tensor]
    gradients: dict[Task, Gradients]


def ask(
    question: Question, names: Sequence[str], batch: tuple[object, ...], ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Loss]]:
    """Asks for losses on one batch.

    Returns:
        What this rank is to differentiate, each loss times the rank's share of the samples; and
        the averages of the present tasks, without a graph, with the samples of all ranks.
    """
    present = question(names, batch)
    # An absent task goes to the ranks too: whether it is absent is theirs to say.
    means = ranks.agree({name: [present[name]] if name in present else [] for name in names})
    terms = {}
    for name, loss in present.items():
        if name in means:
            share = ranks.share(loss.samples, means[name].samples)
            if share is not None:
                terms[name] = weighted(loss.value, share)
    return terms, means


@torch.enable_grad()
def collect(
    question: Question,
    tasks: Sequence[Task],
    batches: Sequence[tuple[object, ...]],
    parameters: Sequence[Tensor],
    ranks: Ranks,
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
    forwards: Forwards = "joint",
    alone: bool = False,
    weights: Mapping[str, float] | None = None,
    watch: Watch | None = None,
) -> Collected:
    """Takes the gradients of all present tasks without moving anything.

    A loss on one of M micro-batches is divided by M before its backward pass, and by the count of
    its task's first micro-batch; what the true counts make of that is mended in the gradient. So
    equal counts need no mending, and large ones do not overflow a float16 gradient.

    Args:
        question: What `losses` is asked through.
        tasks: Tasks and groups; a group's gradient is the sum of its tasks' gradients.
        batches: Arguments of `losses`, one tuple per micro-batch.
        parameters: P leaf tensors.
        ranks: Who averages.
        scale: Applied to each loss before it is differentiated.
        forwards: "joint" asks for all tasks at once, "per-task" for one task after the other.
        alone: Whether leaves other than `parameters` are to be left without a gradient.
        weights: What each loss is multiplied by; 1 where none are given.
        watch: Told of what is likely to be a mistake.

    Returns:
        Values, and gradients that are still scaled.
    """
    names = names_of(*tasks)
    # Tasks of a group are differentiated apart only where their counts can differ.
    whole = len(batches) == 1 and ranks.each_batch is ranks.at_the_end
    # Otherwise each name has a gradient of its own until its samples are counted.
    parts = [names_of(task) for task in tasks] if whole else [(name,) for name in names]
    sums: dict[tuple[str, ...], Gradients] = {}
    seen: dict[str, list[Loss]] = {name: [] for name in names}
    first_terms: list[Tensor] = []
    for batch in batches:
        for asked in parts if question.is_function and forwards == "per-task" else [names]:
            terms, means = ask(question, asked, batch, ranks.each_batch)
            # Kept for their graphs' shape alone, whose buffers the backward pass frees.
            first_terms += list(terms.values()) if batch is batches[0] and not whole else []
            factors = _factors(means, seen, len(batches), weights or {})
            terms = {name: weighted(term, factors[name]) for name, term in terms.items()}
            joined = {part: _join(terms, part, scale) for part in parts if terms.keys() & {*part}}
            passes = differentiate(list(joined.values()), parameters, alone)
            for part, gradient in zip(joined, passes, strict=True):
                sums[part] = add(sums[part], gradient) if part in sums else gradient
    for part, gradient in sums.items():
        if watch is not None and all(piece is None for piece in gradient):
            watch.unreached(part if len(part) > 1 else part[0])
    averages = ranks.at_the_end.agree(seen)
    if whole:
        gradients = {task: sums[names_of(task)] for task in tasks if names_of(task) in sums}
        return Collected({name: mean.value for name, mean in averages.items()}, gradients)
    # What remains of the counts, now that all of them are known.
    mends = {n: _mend(seen[n], averages[n].samples, len(batches)) for n in averages}
    if watch is not None and any(m != 1 for m in mends.values()) and len(batches) > 1:
        _warn_of_others(first_terms, parameters, watch)
    collected: dict[Task, Gradients] = {}
    for task in tasks:
        present = [name for name in names_of(task) if name in averages]
        total: Gradients = [None] * len(parameters)
        for name in present:
            # A rank may lack what another brought; it takes part in the sum all the same.
            own = sums.pop((name,), [None] * len(parameters))
            total = add(total, scaled(own, mends[name]))
        if present:
            collected[task] = ranks.at_the_end.sum(total, parameters)
    return Collected({name: mean.value for name, mean in averages.items()}, collected)


def _factors(
    means: Mapping[str, Loss],
    seen: dict[str, list[Loss]],
    batches: int,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Notes what was seen of each task; returns its factor as if all counts were the first."""
    factors = {}
    for name, mean in means.items():
        seen[name].append(mean)
        factors[name] = mean.samples / (seen[name][0].samples * batches) * weights.get(name, 1.0)
    return factors


def _join(
    terms: Mapping[str, Tensor], part: tuple[str, ...], scale: Callable[[Tensor], Tensor] | None
) -> Tensor:
    total = sum_tensors([terms[name] for name in part if name in terms])
    return total if scale is None else scale(total)


def _mend(seen: Sequence[Loss], total: int, batches: int) -> float:
    """What is left to multiply a sum of gradients by: 1 where all micro-batches count alike."""
    return seen[0].samples * batches / total if seen else 1.0


def _warn_of_others(terms: Sequence[Tensor], parameters: Sequence[Tensor], watch: Watch) -> None:
    # By identity: tensors compare element by element.
    own = {id(parameter) for parameter in parameters}
    if any(id(leaf) not in own for leaf in leaves(terms) or ()):
        watch.once(
            "others",
            "`losses` reaches parameters that are not this optimizer's, and its tasks' counts "
            "differ between the `micro_batches`: their gradients are averaged as if the counts "
            "were equal. Give them to this optimizer, or take micro-batches with equal counts.",
        )
