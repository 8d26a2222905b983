"""Balanced: a weighted sum whose weights follow the norms of the tasks' gradients."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.arithmetic import Rows, norm, tasks_by_parameter, to_numbers
from mtlopt._gradients.autograd import add_to_grads
from mtlopt._gradients.evaluation import Evaluation, Forwards
from mtlopt._gradients.features import refuse_shards
from mtlopt._gradients.losses import (
    CheckFinite,
    Task,
    Values,
    names_of,
    sum_by_task,
    sum_tensors,
)

By: TypeAlias = Literal["gradients", "losses"]


class Balanced(CombiningOptimizer):
    r"""Takes one step on a weighted sum in which every task has its share of the gradient.

    .. math:: w \leftarrow w - \eta \sum_k c_k \, g_k(w), \quad
              c_k = \frac{a_k}{\bar a} \frac{\bar N}{N_k}, \quad
              N_k^2 \leftarrow \beta N_k^2 + (1 - \beta) \lVert g_k \rVert^2

    The weights follow the norms of the tasks' gradients, so losses may have any units: multiplying
    one by a constant changes nothing (with Adam). There is nothing to tune; :math:`a_k` are the
    shares that the tasks' gradients should have of the whole, equal by default.

    Norms are measured at the first step and then at every `every`-th one, which takes T further
    backward passes: with `features` through the heads alone, with `shared` down to these
    parameters, otherwise whole ones. A step between measurements is one forward and one backward
    pass, exactly that of :class:`JointOptimizer` with the same weights. A task that appears for the
    first time between measurements is measured at its next step.

    The rule is not new. It is the fixed point of GradNorm with :math:`\alpha = 0`, reached
    directly; at the features it is EnCodec's balancer; Wang et al. balance physics-informed
    networks in this way, and the second half of DB-MTL scales gradients to the largest norm.

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
        check_finite: Whether a loss that is not finite raises; it costs a synchronisation.
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
        EnCodec, section 3.4; Wang et al., 2021 (arXiv 2001.04536); Lin et al., 2023 (arXiv
        2308.12029), DB-MTL.
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
        # Moving averages of squared norms, or of losses, of the tasks measured so far.
        self._averages: dict[Task, float] = {}
        self._latest: dict[Task, float] = {}
        self._steps = 0
        # Tasks that were measured, if only as zero, and present ones that were not.
        self._met: set[Task] = set()
        self._late: set[Task] = set()
        # The averages and sets before this step's measurement, which an overflow takes back.
        self._earlier: tuple[dict[Task, float], set[Task], set[Task]] | None = None

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
        root = 0.5 if self.by == "gradients" else 1.0
        sizes = {task: average**root for task, average in self._averages.items()}
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
            each task's weighted gradient had of the sum of all norms at the last measurement, NaN
            for a task that was absent.
        """
        root, weights = 0.5 if self.by == "gradients" else 1.0, self.weights
        found = {task: weights[task] * size**root for task, size in self._latest.items()}
        total, nan = sum(found.values()), float("nan")
        columns = {
            "weights": [weights[task] for task in self.tasks],
            "norms": [self._averages.get(task, nan) ** root for task in self.tasks],
            "shares": [found[task] / total if task in found else nan for task in self.tasks],
        }
        return {name: torch.tensor(own, dtype=torch.float64) for name, own in columns.items()}

    def _make_gradient(self, evaluation: Evaluation) -> Values:
        if self._features is not None:
            refuse_shards(evaluation.parameters)
        if self.by == "losses":
            scaled = evaluation.prescaled
            return evaluation.add_sum(evaluation.names, lambda v: self._note_losses(v, scaled))
        on_time = self._steps % self.every == 0
        if self._earlier is not None or not (on_time or self._late):
            values = evaluation.add_sum(evaluation.names, self._by_name())
            if len(self._met) < len(self.tasks):
                self._late |= sum_by_task(self.tasks, values).keys() - self._met
            return values
        place = self._features if self._features is not None else self.shared
        if place is not None:
            return evaluation.add_measured_sum(
                place,
                lambda rows: self._note(rows, dict(zip(rows.gradients, rows.norms(), strict=True))),
            )
        rows, _ = evaluation.per_task()
        shared = [len(tasks) > 1 for tasks in tasks_by_parameter([*rows.gradients.values()])]
        norms = {
            task: norm([g for g, both in zip(gradient, shared, strict=True) if both])
            for task, gradient in rows.gradients.items()
        }
        weights = self._note(rows, norms)
        rows.shared_only = False
        add_to_grads(rows.tensors, rows.combine([weights[task] for task in rows.gradients]))
        return rows.values

    def _note(self, rows: Rows, norms: Mapping[Task, Tensor]) -> Mapping[Task, float]:
        """Notes the norms of the tasks' gradients, and returns the weights in force."""
        if norms:
            unit = self._scale_of_gradients()
            scale, *numbers = to_numbers([unit, *norms.values()])
            found = {t: (size / scale) ** 2 for t, size in zip(norms, numbers, strict=True)}
            self._average(found, only=None if self._steps % self.every == 0 else self._late)
        return self.weights

    def _note_losses(self, values: Values, scaled: bool) -> Mapping[str, float]:
        """Notes the losses themselves, once a step, and returns the weights by name."""
        present = sum_by_task(self.tasks, values)
        if present and self._earlier is None:
            scale, *numbers = to_numbers([self._scale_of_gradients(), *present.values()])
            found = {
                task: loss / (scale if scaled else 1.0)
                for task, loss in zip(present, numbers, strict=True)
            }
            for task, loss in found.items():
                if loss <= 0:
                    raise ValueError(
                        f"The loss of task {task!r} must be positive with by='losses', got "
                        f"{loss}: choose by='gradients'."
                    )
            self._average(found, only=None)
        return self._by_name()

    def _average(self, found: Mapping[Task, float], only: set[Task] | None) -> None:
        """Moves the averages of the tasks found, or only of those that are late."""
        self._earlier = dict(self._averages), set(self._met), set(self._late)
        self._latest.clear()
        for task, new in found.items():
            self._latest[task] = new
            if (only is None or task in only) and 0 < new < float("inf"):
                old = self._averages.get(task, new)
                self._averages[task] = self.decay * old + (1 - self.decay) * new
        self._met |= found.keys()
        self._late -= found.keys()

    def _stepped(self, skipped: Tensor | None) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier is not None and skipped is not None and skipped:
            averages, self._met, self._late = earlier
            self._averages.clear()
            self._averages.update(averages)
            return  # The next step measures again.
        self._steps += 1

    def _scale_of_gradients(self) -> Tensor:
        one = torch.ones((), device=self._device)
        return one if self._scaling is None else self._scaling.scale(one)

    def _by_name(self) -> dict[str, float]:
        return {name: w for task, w in self.weights.items() for name in names_of(task)}

    def _objective(self, values: Values) -> Tensor:
        weights = self._by_name()
        return sum_tensors([value * weights[name] for name, value in values.items()])

    def _own_state(self) -> dict[str, Any]:
        averages = [self._averages.get(task, float("nan")) for task in self.tasks]
        return {
            "averages": torch.tensor(averages, dtype=torch.float64),
            "met": [task in self._met for task in self.tasks],
            "late": [task in self._late for task in self.tasks],
            "steps": self._steps,
        }

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        averages = dict(zip(self.tasks, saved["averages"].tolist(), strict=True))
        self._averages = {task: own for task, own in averages.items() if not math.isnan(own)}
        self._met = {task for task, own in zip(self.tasks, saved["met"], strict=True) if own}
        self._late = {task for task, own in zip(self.tasks, saved["late"], strict=True) if own}
        self._steps, self._earlier, self._latest = saved["steps"], None, {}
