"""Sums: gradients accumulated over micro-batches, and averaged by counts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from torch import Tensor

from mtlopt._gradients.arithmetic import Gradients, add
from mtlopt._gradients.autograd import differentiate
from mtlopt._gradients.features import Features
from mtlopt._gradients.losses import Loss, Values, weighted

if TYPE_CHECKING:
    from mtlopt._gradients.evaluation import Evaluation

Part: TypeAlias = tuple[str, ...]
"""Names whose losses are differentiated together."""


class Sums(NamedTuple):
    """Gradients summed over micro-batches."""

    gradients: dict[Part, Gradients]
    at_outputs: dict[Part, Gradients]
    """The gradients at recorded outputs, of all micro-batches one after the other."""
    values: Values
    """The averaged losses of the present tasks."""
    corrections: dict[str, float]
    """The factors that turn each name's sum into its average."""


def accumulate(
    evaluation: "Evaluation",
    parts: Sequence[Part],
    at: Features | None = None,
    weights: Mapping[str, float | Tensor] | None = None,
) -> Sums:
    """Sums the gradients of parts over the micro-batches, and those at outputs of modules.

    Averages are by count: of n samples in all, a micro-batch (or a process) with m of them
    contributes m/n of a task's gradient. The counts of later micro-batches are unknown at the time
    of a backward pass, so each loss is first weighted as if all counts were the first one's, and
    the sum of gradients is corrected at the end. With equal counts the correction is exactly 1,
    and large counts do not overflow a float16 gradient.
    """
    seen: dict[str, list[Loss]] = {name: [] for part in parts for name in part}
    sums = Sums({}, {}, {}, {})
    count, size = len(evaluation.batches), len(evaluation.parameters)
    final = count == 1 and not evaluation.ranks.reduces
    first_terms: list[Tensor] = []
    for batch in evaluation.batches:
        for asked in parts if evaluation.is_separate else [tuple(seen)]:
            ranks = evaluation.ranks.per_micro_batch
            terms, means, outputs = evaluation.ask(asked, batch, ranks, final, at)
            for output in outputs:
                output.retain_grad()  # A pass leaves a gradient here, as with the parameters.
            first_terms += terms.values() if batch is evaluation.batches[0] else ()
            for name, mean in means.items():
                seen[name].append(mean)
                factor = mean.samples / (seen[name][0].samples * count)
                weight = 1.0 if weights is None else weights.get(name, 1.0)
                if name in terms:
                    terms[name] = weighted(terms[name], factor * weight)
            losses = evaluation.join(terms, parts)
            tensors = [*evaluation.parameters, *outputs]
            only, keep = evaluation.parameters_only, evaluation.retain_graph
            passes = differentiate(list(losses.values()), tensors, only, keep)
            for part, gradient in zip(losses, passes, strict=True):
                sums.at_outputs.setdefault(part, []).extend(gradient[size:])
                del gradient[size:]
                known = sums.gradients.get(part)
                sums.gradients[part] = gradient if known is None else add(known, gradient)
    _report(evaluation, sums, seen, first_terms)
    agreed = evaluation.ranks.per_step.agree(seen)
    skips = evaluation.losses.check_finite == "skip"
    for name, mean in (evaluation.report.finite(agreed) if skips else agreed).items():
        sums.values[name] = mean.value
        # A rank without samples of the task has no sum to correct.
        first = seen[name][0].samples if seen[name] else 0
        sums.corrections[name] = first * count / mean.samples if first else 1.0
    return sums


def average_losses(evaluation: "Evaluation") -> Values:
    """Asks for all losses and returns their averages, without gradients."""
    seen: dict[str, list[Loss]] = {name: [] for name in evaluation.names}
    ranks = evaluation.ranks
    for batch in evaluation.batches:
        for asked in [(name,) for name in seen] if evaluation.is_separate else [tuple(seen)]:
            _, means, _ = evaluation.ask(asked, batch, ranks.per_micro_batch, final=False)
            for name, mean in means.items():
                seen[name].append(mean)
    return {name: mean.value for name, mean in ranks.per_step.agree(seen).items()}


def _report(
    evaluation: "Evaluation",
    sums: Sums,
    seen: Mapping[str, Sequence[Loss]],
    first_terms: Sequence[Tensor],
) -> None:
    """Reports tasks that train nothing, and gradients that cannot be corrected."""
    for part, gradient in sums.gradients.items():
        if all(piece is None for piece in gradient):
            task = part if len(part) > 1 else part[0]
            evaluation.report.mistakes.append(("unreached", task))
    if any(len({loss.samples for loss in losses}) > 1 for losses in seen.values()):
        evaluation.report.search_for_others(first_terms, evaluation.parameters)
