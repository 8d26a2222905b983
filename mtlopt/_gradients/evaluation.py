"""Evaluation: turns the losses of one step into gradients, averaged by counts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mtlopt._gradients import autograd
from mtlopt._gradients.arithmetic import Gradients, Rows, add, scaled, tasks_by_parameter, to_floats
from mtlopt._gradients.features import (
    Features,
    backward_from,
    check_counts,
    refuse_shards,
    share_a_graph,
)
from mtlopt._gradients.losses import (
    SINGLE_PROCESS,
    Loss,
    LossEvaluator,
    Ranks,
    Task,
    Values,
    names_of,
    present_tasks,
    sum_tensors,
    weighted,
)
from mtlopt._gradients.report import Report
from mtlopt._gradients.sums import Part, accumulate

Forwards: TypeAlias = Literal["joint", "per-task", "per-pass"]
"""How often `losses` is called: once for all tasks, once a task, or once a backward pass."""
Weights: TypeAlias = Mapping[str, float | Tensor]
"""Loss weights by name; a name left out has weight 1."""


unscaled: Callable[[Tensor], Tensor] = lambda loss: loss  # noqa: E731  # as every scaler


@dataclass
class Evaluation:
    """Turns the losses of one step into gradients, without moving anything."""

    losses: LossEvaluator
    tasks: Sequence[Task]
    """The optimizer's tasks; a group's gradient is the sum over its names."""
    batches: Sequence[tuple[object, ...]]
    """Arguments of `losses`, one tuple per micro-batch."""
    parameters: Sequence[Tensor]
    """P leaf tensors."""
    ranks: Ranks
    report: Report
    forwards: Forwards = "joint"
    prescaled: bool = False
    """Whether the user may have scaled the losses."""
    retain_graph: bool = False
    scale: Callable[[Tensor], Tensor] = unscaled
    """A scaler's, applied to each loss before its backward pass."""
    parameters_only: bool = False
    """Whether leaves other than `parameters` are left without a gradient."""

    @property
    def names(self) -> Part:
        """Returns the names of all tasks."""
        return names_of(*self.tasks)

    @property
    def is_scaled(self) -> bool:
        """Returns whether a scaler may handle overflows."""
        return self.prescaled or self.scale is not unscaled

    @property
    def is_separate(self) -> bool:
        """Returns whether each backward pass has its own call of `losses`."""
        return self.forwards != "joint" and self.losses.is_function

    def clear_grads(self) -> None:
        """Sets `.grad` to None, without `zero_grad`'s profiler scope, which is slow."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.enable_grad()
    def add_sum(
        self, names: Sequence[str], weights: Weights | Callable[[Values], Weights] | None = None
    ) -> Values:
        """Adds the gradient of the weighted sum of some losses to `.grad`: eq. 1.

        With one batch that is one backward pass straight into `.grad`, as in a plain loop. The
        weights may be a function of the averaged losses, which are returned.
        """
        rule: Any = weights if callable(weights) else None
        fixed: Any = None if rule else weights
        separate = self.forwards == "per-task" and self.losses.is_function
        if len(self.batches) > 1 or (rule and separate):
            return self._add_averaged_sum(names, weights)
        values: Values = {}
        for asked in [(name,) for name in names] if separate else [names]:
            terms, means, _ = self.ask(asked, self.batches[0], self.ranks)
            if self.forwards != "per-pass" and terms.keys() - self.report.searched:
                self.report.search(terms, self.parameters)
            present = {name: mean.value for name, mean in means.items()}
            own: Weights = (rule(present) if rule else fixed) or {}
            self._add_pass([weighted(term, own.get(name, 1.0)) for name, term in terms.items()])
            values |= present
        return values

    @torch.enable_grad()
    def per_task(
        self, at: Features | None = None, weights: Weights | None = None
    ) -> tuple[Rows, dict[Task, Gradients]]:
        """Returns the averaged gradient of each present task, and that at the outputs of `at`.

        `.grad` stays as it is.
        """
        # Names in a group need separate gradients only where their counts can differ.
        whole = len(self.batches) == 1 and self.ranks.per_micro_batch is self.ranks.per_step
        parts = {t: [names_of(t)] if whole else [(n,) for n in names_of(t)] for t in self.tasks}
        sums = accumulate(self, [part for own in parts.values() for part in own], at, weights)
        gradients: dict[Task, Gradients] = {}
        at_outputs: dict[Task, Gradients] = {}
        for task, own in parts.items():
            present = [part for part in own if any(name in sums.values for name in part)]
            if not present:
                continue
            total: Gradients = [None] * len(self.parameters)
            there: Gradients = []
            for part in present:
                factor = next(sums.corrections[name] for name in part if name in sums.values)
                found = scaled(sums.at_outputs.pop(part, []), factor)
                there = add(there, found) if there and found else there or found
                if part in sums.gradients:
                    total = add(total, scaled(sums.gradients.pop(part), factor))
            if self.ranks.reduces:
                total = self.ranks.sum(total, self.parameters)
            gradients[task] = total
            at_outputs[task] = there
        if self.losses.check_finite == "skip" and not self.is_scaled:
            self.report.drop_lost(gradients, at_outputs, sums.values)
        return Rows(gradients, self.parameters, sums.values, self.is_scaled), at_outputs

    @torch.enable_grad()
    def add_measured_sum(
        self,
        at: Sequence[Tensor] | Features,
        weigh: Callable[[Rows], Mapping[Task, float | Tensor]],
        weights: Weights | None = None,
        norms_of: Collection[Task] | None = None,
    ) -> Values:
        """Adds the weighted sum's gradient, and shows each task's gradient at some tensors.

        With one batch each task takes a pass down to these tensors alone, before the backward pass
        of the sum. Otherwise it takes a whole one: the weights depend on all micro-batches.

        Args:
            at: Parameters, or modules whose outputs are meant.
            weigh: Returns the weights by task, given the rows of gradients there.
            weights: Weights that are known before; those of `weigh` multiply them.
            norms_of: The only tasks to show, whose rows may hold each tensor's norm instead of it.
        """
        if len(self.batches) > 1 or self.ranks.wrapped or self.is_separate:
            return self._add_measured_passes(at, weigh, weights or {}, norms_of)
        modules = at if isinstance(at, Features) else None
        terms, means, outputs = self.ask(self.names, self.batches[0], self.ranks, at=modules)
        tensors: Any = at if modules is None else outputs
        # Rows at features are of this process's samples, those at parameters are summed here.
        ranks = SINGLE_PROCESS if modules is None else self.ranks
        values = {name: mean.value for name, mean in means.items()}
        terms = {n: weighted(term, (weights or {}).get(n, 1.0)) for n, term in terms.items()}
        rows: dict[Task, Gradients] = {}
        shown = [task for task in self.tasks if norms_of is None or task in norms_of]
        for task in present_tasks(shown, values):
            row: Gradients = [None] * len(tensors)  # A rank may lack a task that another one has.
            if own := [terms[name] for name in names_of(task) if name in terms]:
                row = autograd.grad_of(self.scale(sum_tensors(own)), tensors)
            # Copies, because results of autograd may share memory.
            if modules is None and self.ranks.reduces:
                row = self.ranks.sum(row, tensors)
            elif norms_of is None:
                row = [g if g is None else g.clone() for g in row]
            rows[task] = row if norms_of is None else autograd.norms_at(own, row)
        if self.losses.check_finite == "skip" and modules is None and not self.is_scaled:
            self.report.drop_lost(rows, {}, values)
            terms = {name: term for name, term in terms.items() if name in values}
        found = weigh(Rows(rows, tensors, values, self.is_scaled, ranks=ranks))
        by_name = {name: weight for task, weight in found.items() for name in names_of(task)}
        self._add_pass([weighted(term, by_name[name]) for name, term in terms.items()])
        return values

    @torch.enable_grad()
    def at_features(
        self,
        features: Features,
        combine: Callable[[Rows], Gradients],
        weights: Weights | None = None,
    ) -> Values:
        """Adds a gradient that is combined at features, and takes one pass through the trunk.

        T passes lead from the losses to the features, and give the parameters behind them their
        plain gradient. The pass through the trunk is linear, so the trunk's gradient is the sum of
        the tasks' with the coefficients chosen at the features. Micro-batches are combined one by
        one: to combine them together would keep all their graphs.
        """
        refuse_shards(self.parameters)
        seen: dict[str, list[Loss]] = {}
        count = len(self.batches)
        self.ranks.check_batches(count)
        for position, batch in enumerate(self.batches):
            with features.cutting() as cuts:
                terms, means, _ = self.ask(self.names, batch, self.ranks)
            features.check(cuts, self.ranks, bool(terms))
            for name, mean in means.items():
                seen.setdefault(name, []).append(mean)
            check_counts(seen, position == count - 1, count)
            terms = {n: weighted(t, (weights or {}).get(n, 1.0) / count) for n, t in terms.items()}
            losses = self.join(terms, [names_of(task) for task in self.tasks])
            at = [leaf for cut in cuts for leaf in cut.leaves]
            outputs = [output for cut in cuts for output in cut.outputs]
            # Heads and trunk can share a part of the graph, such as a stem's skip connection.
            keep = share_a_graph(losses.values(), outputs, [*self.parameters, *at])
            compiled = autograd.has_compiled() and autograd.is_compiled(*losses.values(), *outputs)
            passes = autograd.differentiate(list(losses.values()), at, retain_graph=keep)
            found = dict(zip(losses, passes, strict=True))
            if at and losses:
                # By how many tasks each tensor is used.
                used = max(map(len, tasks_by_parameter(list(found.values()))))
                if used < min(len(losses), 2):
                    self.report.mistakes.append(("unshared" if used else "uncut", None))
            values = {name: mean.value for name, mean in means.items()}
            # Present on some rank, so present here: without a loss its row is zero.
            present = present_tasks(self.tasks, values)
            rows = {task: found.get(names_of(task), [None] * len(at)) for task in present}
            combined = combine(Rows(rows, at, values, self.is_scaled, False, self.ranks))
            backward_from(cuts, combined)
            if compiled:
                autograd.drop_zeros(self.parameters)
        if seen and self.ranks.reduces:
            # The heads' and the trunk's gradients of this rank's samples, in one reduction.
            own = autograd.pop_grads(self.parameters)
            autograd.set_grads(self.parameters, self.ranks.sum(own, self.parameters))
        return {name: mean.value for name, mean in SINGLE_PROCESS.agree(seen).items()}

    # Asking.

    def ask(
        self,
        names: Sequence[str],
        batch: tuple[object, ...],
        ranks: Ranks,
        final: bool = True,
        at: Features | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Loss], list[Tensor]]:
        """Asks for losses on one batch; their averages are `final` if no other batch adds to them.

        Returns:
            The terms to differentiate here, each loss times this process's share of the samples;
            the averages over all processes, without a graph; and the outputs of the modules `at`.
        """
        alone = self.forwards != "per-task" and len(self.batches) == 1
        evaluate = self.losses if alone else self._evaluate_apart
        calls: Sequence[Any] = ()
        if at is None:
            present = evaluate(names, batch)
        else:
            with at.recording() as calls:
                present = evaluate(names, batch)
        # Absent tasks are reported too: another process may have samples of them.
        means = ranks.agree({name: [present[name]] if name in present else [] for name in names})
        if final and self.losses.check_finite == "skip":
            means = self.report.finite(means)
        terms = {}
        for name, loss in present.items():
            if name in means:
                share = ranks.share(loss.samples, means[name].samples)
                if share is not None:
                    terms[name] = weighted(loss.value, share)
        if at is not None:
            at.check(calls, self.ranks, bool(terms))
        return terms, means, [output for call in calls for output in call.outputs]

    def _evaluate_apart(self, names: Sequence[str], batch: tuple[object, ...]) -> dict[str, Loss]:
        # `losses` may clear the gradients, to which an earlier call has contributed.
        earlier = autograd.pop_grads(self.parameters)
        try:
            return self.losses(names, batch)
        finally:
            autograd.add_to_grads(self.parameters, earlier)

    def join(self, terms: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[Part, Tensor]:
        """Returns the scaled sums of the terms of each part that has any."""
        own = {part: [terms[name] for name in part if name in terms] for part in parts}
        return {part: self.scale(sum_tensors(found)) for part, found in own.items() if found}

    # Passes.

    def _add_pass(self, terms: Sequence[Tensor]) -> None:
        """Adds the gradient of a sum to `.grad` by one backward pass."""
        losses = [self.scale(sum_tensors(terms))] if terms else []
        if not self.ranks.reduces:
            for loss in losses:  # Straight into `.grad`, as in a plain loop.
                autograd.backward(loss, self.parameters, self.retain_graph)
            return
        # Only this gradient is summed over the ranks, an earlier one in `.grad` has been. A rank
        # without a loss takes part, since another may have one.
        own: Gradients = [None] * len(self.parameters)
        keep = self.retain_graph
        for found in autograd.differentiate(losses, self.parameters, retain_graph=keep):
            own = found
        autograd.add_to_grads(self.parameters, self.ranks.sum(own, self.parameters))

    def _add_averaged_sum(
        self, names: Sequence[str], weights: Weights | Callable[[Values], Weights] | None
    ) -> Values:
        """Adds up averaged gradients, since the losses were not averaged before their passes."""
        # Weights that are known multiply the losses, so that parameters of other optimizers, whose
        # gradients go straight into `.grad`, are weighted too.
        known: Any = None if callable(weights) else weights
        sums = accumulate(self, [(name,) for name in names], weights=known)
        rule = weights(sums.values) if callable(weights) else {}
        factors = to_floats({name: rule.get(name, 1.0) for name in sums.values})
        total: Gradients = [None] * len(self.parameters)
        for name, correction in sums.corrections.items():
            if (found := sums.gradients.pop((name,), None)) is not None:
                total = add(total, scaled(found, correction * factors[name]))
        if sums.values:
            autograd.add_to_grads(self.parameters, self.ranks.per_step.sum(total, self.parameters))
        return sums.values

    def _add_measured_passes(
        self,
        at: Sequence[Tensor] | Features,
        weigh: Callable[[Rows], Mapping[Task, float | Tensor]],
        weights: Weights,
        norms_of: Collection[Task] | None,
    ) -> Values:
        """Weights whole gradients, by rows that are a part of them or were recorded with them."""
        whole, at_outputs = self.per_task(at if isinstance(at, Features) else None, weights)
        if isinstance(at, Features):
            rows = replace(whole, gradients=at_outputs, tensors=[], ranks=self.ranks)
        else:
            position = {id(parameter): i for i, parameter in enumerate(self.parameters)}
            parts: dict[Task, Gradients] = {}
            for task, gradient in whole.gradients.items():
                own = [gradient[position[id(tensor)]] for tensor in at]
                # Copies, but for norms, which are taken before the gradient changes.
                parts[task] = own if norms_of else [g if g is None else g.clone() for g in own]
            rows = replace(whole, gradients=parts, tensors=at)
        for task in rows.gradients.keys() - (rows.gradients if norms_of is None else norms_of):
            del rows.gradients[task]
        found = weigh(rows)
        for task, factor in to_floats({t: found[t] for t in whole.gradients}).items():
            autograd.add_to_grads(self.parameters, scaled(whole.gradients.pop(task), factor))
        return whole.values
