"""Balanced: a weighted sum whose weights follow the norms of the tasks' gradients."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.arithmetic import Gradients, Rows, norm, to_numbers
from mtlopt._gradients.evaluation import Evaluation, Forwards
from mtlopt._gradients.features import refuse_shards
from mtlopt._gradients.losses import CheckFinite, Task, Values, names_of, sum_by_task

By: TypeAlias = Literal["gradients", "losses"]


class Balanced(CombiningOptimizer):
    r"""Takes one step on a weighted sum in which every task has its share of the gradient.

    .. math:: w \leftarrow w - \eta \sum_k c_k \, g_k(w), \quad
              c_k = \frac{a_k}{\bar a} \frac{\bar N}{N_k}, \quad
              N_k^2 \leftarrow \beta N_k^2 + (1 - \beta) \lVert g_k \rVert^2

    The weights follow the norms of the tasks' gradients, so losses may have any units. There is
    nothing to tune; :math:`a_k` are the shares that the tasks' gradients should have of the whole,
    equal by default.

    Norms are measured at the first step and then at every `every`-th one, which takes T further
    backward passes: with `features` through the heads alone, with `shared` down to these
    parameters, otherwise whole ones. All steps are exactly those of :class:`JointOptimizer` with
    the weights in force. A task that is absent at a measurement keeps its average; one that has
    none is measured when it comes. If `backward` is called several times before a step, a task's
    first call measures it.

    The rule is not new: its weights are the fixed point of GradNorm with :math:`\alpha = 0`, and
    at the features those of EnCodec's balancer. Wang et al. (2023) weight the terms of
    physics-informed networks in this way, and DB-MTL scales moving averages of gradients.

    Args:
        optimizer: Optimizer that applies the gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one weight.
        shares: Share :math:`a_k` by task, not negative; a task left out has 1.
        by: "gradients", or "losses" for moving averages of the losses themselves instead of the
            norms: no further pass at all, for positive losses.
        features: Module or modules at whose outputs the norms are taken, usually the trunk.
        shared: Parameters over which the norms are taken, usually the last layer that all tasks
            share. Without either: all parameters that at least two tasks share.
        every: Number of steps from one measurement to the next.
        decay: Decay :math:`\beta` of the moving averages, per measurement.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one at a time.
        scaler: Gradient scaler for float16; an overflow skips the step and is not noted.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.

    Raises:
        TypeError: If `optimizer` is not an instance of a plain optimizer.
        ValueError: If an option is out of its range, or options do not go together.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.ones(2, requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=0.25)
        >>> optimizer = mtlopt.Balanced(base, ["a", "b"])
        >>> values = optimizer.step({"a": w[0], "b": 3 * w[1]})
        >>> optimizer.weights  # norms 1 and 3, mean 2
        {'a': 2.0, 'b': 0.6666666666666666}
        >>> w  # both gradients have norm 2
        tensor([0.5000, 0.5000], requires_grad=True)

    References:
        Chen et al., 2018 (arXiv 1711.02257), GradNorm; Défossez et al., 2022 (arXiv 2210.13438),
        EnCodec, section 3.4; Wang et al., 2021 (arXiv 2001.04536) and 2023 (arXiv 2308.08468);
        Lin et al., 2023 (arXiv 2308.12029), DB-MTL.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        shares: Mapping[Task, float] | None = None,
        *,
        by: By = "gradients",
        features: nn.Module | Iterable[nn.Module] | None = None,
        shared: Iterable[Tensor] | None = None,
        every: int = 10,
        decay: float = 0.9,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(scaler, check_finite, process_group)
        super().__init__(optimizer, tasks, forwards, options, features)
        self._check_place(by, features, shared, every)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay!r}.")
        self.by, self.every, self.decay = by, every, decay
        self.shared = None if shared is None else self._checked_shared(shared)
        self.shares = self._checked_shares({} if shares is None else shares)
        self._averages = Averages(self.tasks, 1 if by == "losses" else every, decay)

    @staticmethod
    def _check_place(by: object, features: object, shared: object, every: object) -> None:
        if by not in ("gradients", "losses"):
            raise ValueError(f"`by` must be 'gradients' or 'losses', got {by!r}.")
        if features is not None and shared is not None:
            raise ValueError("`features` and `shared` must not go together: give one place.")
        if by == "losses" and not (features is None and shared is None and every == 10):
            raise ValueError(
                "`features`, `shared` and `every` must be left out with by='losses', which needs "
                "no gradients and notes every loss."
            )
        if type(every) is not int or every < 1:
            raise ValueError(f"`every` must be a whole number of steps, at least 1, got {every!r}.")

    def _checked_shares(self, shares: Mapping[Task, float]) -> dict[Task, float]:
        if not isinstance(shares, Mapping):
            raise TypeError(f"`shares` must be a mapping from task to number, got {shares!r}.")
        unknown = [task for task in shares if task not in self.tasks]
        if unknown:
            raise ValueError(f"`shares` must name tasks among {list(self.tasks)}, got {unknown}.")
        checked = {task: float(shares.get(task, 1.0)) for task in self.tasks}
        if min(checked.values()) < 0 or not 0 < sum(checked.values()) < float("inf"):
            raise ValueError(
                f"`shares` must be finite, not negative, and not all zero, got {dict(shares)}."
            )
        return checked

    @property
    def weights(self) -> dict[Task, float]:
        """The weights in force, by task; ready for ``JointOptimizer(..., weights=...)``."""
        sizes = {task: self._root(own) for task, own in self._averages.by_task.items()}
        mean = sum(sizes.values()) / max(len(sizes), 1)
        unit = sum(self.shares.values()) / len(self.shares)
        return {
            task: share / unit * (mean / sizes[task] if task in sizes else 1.0)
            for task, share in self.shares.items()
        }

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the state of the balance, for the tasks in order, in float64 on the CPU.

        Returns:
            ``weights`` (T,), in force; ``norms`` (T,), the averages :math:`N_k` (of the losses
            with ``by="losses"``), NaN before a task's first measurement; ``shares`` (T,), what
            each task's weighted gradient had of the sum of all norms, each as measured last.
        """
        columns = [
            list(self.weights.values()),
            [self._root(self._averages.by_task.get(task, math.nan)) for task in self.tasks],
            [self._root(self._averages.latest.get(task, math.nan)) for task in self.tasks],
        ]
        weights, norms, latest = torch.tensor(columns, dtype=torch.float64, device="cpu")
        sizes = weights * latest
        found = {"weights": weights, "norms": norms, "shares": sizes / sizes.nansum()}
        return found | self._skipped()

    def _root(self, average: float) -> float:
        return average**0.5 if self.by == "gradients" else average

    # The step.

    def _take_step(self, evaluation: Evaluation) -> Values:
        self._averages.undo()  # What was noted of gradients that no step has applied.
        return super()._take_step(evaluation)

    def _make_gradient(self, evaluation: Evaluation) -> Values:
        values = self._add_weighted_sum(evaluation)
        self._averages.began |= bool(values)
        return values

    def _add_weighted_sum(self, evaluation: Evaluation) -> Values:
        averages, parameters = self._averages, evaluation.parameters
        if self._features is not None:
            refuse_shards(parameters)
        began = averages.began or averages.earlier is not None
        again = began and evaluation.prescaled and not self._needs_closure
        if again and all(self._ledger.has_lost(parameter) for parameter in parameters):
            averages.undo()  # Its gradients were cleared without a step, as after an overflow.
        averages.begin()
        if self.by == "losses":
            scaled = evaluation.prescaled
            return evaluation.add_sum(evaluation.names, lambda v: self._note_losses(v, scaled))
        if not averages.due:
            return evaluation.add_sum(evaluation.names, self._weights_by_name())
        place = self._features if self._features is not None else self.shared or parameters
        return evaluation.add_measured_sum(place, self._note, norms_of=averages.due)

    def _note(self, rows: Rows) -> Mapping[Task, float]:
        """Notes the norms of the tasks' gradients, and returns the weights in force."""
        # Nothing to note of features that are frozen: the tasks stay due.
        if any(rows.gradients.values()) or (rows.gradients and rows.is_distributed):
            norms = self._norms(rows)
            scale, *numbers = to_numbers([self._scale_of_gradients(), *norms.values()])
            found = zip(norms, numbers, strict=True)
            self._averages.note({task: (size / scale) ** 2 for task, size in found})
        return self.weights

    def _norms(self, rows: Rows) -> dict[Task, Tensor]:
        if self._features is None and self.shared is None:
            shared = self._averages.note_shared(rows.gradients)
            return {
                task: norm([part for part, both in zip(row, shared, strict=True) if both])
                for task, row in rows.gradients.items()
            }
        lacking = [t for t, row in rows.gradients.items() if all(part is None for part in row)]
        if self.shared is not None and lacking:
            raise ValueError(
                f"`shared` must be used by every task, got parameters on which the loss of "
                f"{lacking[0]!r} does not depend."
            )
        if len(lacking) == len(rows.gradients) and not rows.is_distributed:
            self._report.mistakes.append(("uncut", None))
        return dict(zip(rows.gradients, rows.norms(), strict=True))

    def _note_losses(self, values: Values, scaled: bool) -> Mapping[str, float]:
        """Notes the losses themselves, and returns the weights by name."""
        own = sum_by_task(self.tasks, values)
        due = {task: loss for task, loss in own.items() if task in self._averages.due}
        if due:
            scale, *numbers = to_numbers([self._scale_of_gradients(), *due.values()])
            unit = scale if scaled else 1.0
            found = {task: loss / unit for task, loss in zip(due, numbers, strict=True)}
            for task, loss in found.items():
                if loss <= 0:
                    raise ValueError(
                        f"The loss of task {task!r} must be positive with by='losses', got "
                        f"{loss}: choose by='gradients'."
                    )
            self._averages.note(found)
        return self._weights_by_name()

    def _stepped(self, skipped: Tensor | None) -> None:
        if self._averages.earlier is not None and skipped is not None and skipped:
            self._averages.undo()  # The next step measures again.
        else:
            self._averages.finish()

    def _weights_by_name(self) -> dict[str, float]:
        return {name: w for task, w in self.weights.items() for name in names_of(task)}

    def _own_state(self) -> dict[str, Any]:
        return self._averages.state_dict()

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        self._averages.load(saved)


class Averages:
    """Moving averages of squared norms or of losses, and which tasks are due to be measured."""

    def __init__(self, tasks: Sequence[Task], every: int, decay: float) -> None:
        self.tasks, self.every, self.decay = tasks, every, decay
        self.steps = 0
        self.by_task: dict[Task, float] = {}
        self.latest: dict[Task, float] = {}
        # A task that has never been measured stays due until it comes.
        self.due: set[Task] = set()
        # The tasks whose losses have depended on each parameter: absent ones count as well.
        self.reached: list[set[Task]] = []
        # Whether any task was present since the last step.
        self.began = False
        # Averages and due tasks before this step's measurement.
        self.earlier: tuple[dict[Task, float], set[Task]] | None = None

    def begin(self) -> None:
        """Begins a step, unless it has begun: with a first call of `backward`, or evaluation."""
        if self.earlier is None:
            before = set(self.due)
            if self.steps % self.every == 0 and len(self.tasks) > 1:
                self.due.update(self.tasks)
            else:  # An absent task keeps its average until the next measurement.
                self.due.difference_update(self.by_task)
            if self.due:
                self.earlier = dict(self.by_task), before

    def note(self, found: Mapping[Task, float]) -> None:
        """Moves the averages of the tasks found; a number must be positive and finite."""
        self.latest.update(found)
        for task, new in found.items():
            if 0 < new < math.inf:
                old = self.by_task.get(task, new)
                self.by_task[task] = self.decay * old + (1 - self.decay) * new
        self.due.difference_update(found)

    def note_shared(self, gradients: Mapping[Task, Gradients]) -> list[bool]:
        """Returns for each parameter whether at least two tasks have had a gradient for it."""
        count = max(map(len, gradients.values()))
        self.reached += [set() for _ in range(count - len(self.reached))]
        for task, gradient in gradients.items():
            for tasks, part in zip(self.reached, gradient, strict=False):
                if part is not None:
                    tasks.add(task)
        return [len(tasks) > 1 for tasks in self.reached[:count]]

    def finish(self) -> None:
        """Ends a step that was taken."""
        self.steps += self.began
        self.earlier, self.began = None, False

    def undo(self) -> None:
        """Forgets a step that was not taken, and its measurement."""
        self.began = False
        if self.earlier is not None:
            (self.by_task, self.due), self.earlier = self.earlier, None

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the latest measurement, which is for diagnostics alone."""
        # Gradients are not saved, so a step that has only begun is not either.
        by_task, due = self.earlier or (self.by_task, self.due)
        averages = [by_task.get(task, math.nan) for task in self.tasks]
        return {
            "averages": torch.tensor(averages, dtype=torch.float64, device="cpu"),
            "due": [task in due for task in self.tasks],
            "reached": [[t in own for t in self.tasks] for own in self.reached],
            "steps": self.steps,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""

        def chosen(flags: Iterable[bool]) -> set[Task]:
            return {task for task, own in zip(self.tasks, flags, strict=True) if own}

        numbers = zip(self.tasks, saved["averages"].tolist(), strict=True)
        self.by_task = {task: own for task, own in numbers if not math.isnan(own)}
        self.due, self.earlier, self.steps = chosen(saved["due"]), None, saved["steps"]
        self.reached = [chosen(flags) for flags in saved["reached"]]
        self.latest = {}
