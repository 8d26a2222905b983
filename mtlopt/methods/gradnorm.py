"""GradNorm: loss weights that balance the tasks' training rates (Chen et al., 2018)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.arithmetic import Gradients, Rows, add, to_numbers
from mtlopt._gradients.evaluation import Evaluation, Forwards
from mtlopt._gradients.losses import CheckFinite, Task, Values, names_of

SMALLEST_WEIGHT = 1e-3
SINGLE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What the weights are learned in, whatever torch's defaults are."""


def weight_gradients(
    weights: Tensor, norms: Tensor, ratios: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    r"""Differentiates GradNorm's loss with respect to the weights, with constant targets.

    .. math:: L_\text{grad} = \sum_i \lvert G_i - \bar G r_i^\alpha \rvert, \quad
              G_i = w_i \lVert \nabla_W L_i \rVert_2, \quad
              \frac{\partial L_\text{grad}}{\partial w_i}
              = \operatorname{sign}(G_i - \bar G r_i^\alpha) \lVert \nabla_W L_i \rVert_2

    No second-order graph is needed: :math:`G_i` is linear in :math:`w_i`.

    Args:
        weights: (T,) positive loss weights :math:`w_i`.
        norms: (T,) norms of the unweighted losses' gradients over the shared parameters.
        ratios: (T,) each loss divided by its initial value.
        alpha: Strength of the balance; 0 makes all gradients equally large.

    Returns:
        (T,) derivatives and (T,) relative inverse training rates :math:`r_i`, whose mean is 1.
    """
    rates = ratios / ratios.mean()
    weighted = weights * norms
    targets = weighted.mean() * rates**alpha
    return torch.sign(weighted - targets) * norms, rates


class GradNorm(CombiningOptimizer):
    r"""Learns loss weights such that the tasks' gradient norms follow their training rates.

    .. math:: w \leftarrow w - \eta \sum_i w_i(t) \, g_i(w)

    A task that trains more slowly than the others gets a larger gradient (:math:`\alpha > 0`).
    After the network's step the weights :math:`w_i` take one step of Adam on the loss
    :math:`\sum_i |w_i \lVert g_i \rVert - \bar G r_i^\alpha|`, with :math:`r_i` the relative
    inverse training rate, are clamped at 1e-3 and rescaled to their sum T. Losses must be positive.

    Args:
        optimizer: Optimizer that applies the weighted gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one weight.
        shared: Parameters W over which the norms are taken, usually the last layer that all tasks
            share; each task's loss must depend on all of them.
        alpha: Strength of the balance, in the paper 0.12 for dense and 1.5 for diverse tasks.
        weight_lr: Learning rate of the weights' Adam.
        initial_losses: Initial loss :math:`L_i(0)` by task (log C for cross-entropy over C
            classes); a task left out takes its loss at its first step that was not skipped.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one at a time.
        scaler: Gradient scaler for float16; an overflow skips the step, weights included.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.
        features: Instead of `shared`, modules whose outputs all tasks share, to take norms there.

    Raises:
        TypeError: If `optimizer` is not an instance of a plain optimizer.
        ValueError: If an option is out of its range, or the class needs a closure (LBFGS).

    Example:
        >>> import torch, mtlopt
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=0.125)
        >>> optimizer = mtlopt.GradNorm(base, ["a", "b"], shared=[w])
        >>> values = optimizer.step({"a": (w**2).sum(), "b": 4 * (w**2).sum()})
        >>> w  # 1 - 0.125 * (2 + 8): the weights were 1
        tensor([-0.2500], requires_grad=True)
        >>> optimizer.diagnostics()["weights"]  # b's gradient is too large
        tensor([1.0250, 0.9750])

    References:
        Chen et al., 2018 (arXiv 1711.02257), section 3 and Algorithm 1.
    """

    _third = ", features=model.trunk"

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        shared: Iterable[Tensor] | None = None,
        alpha: float = 1.5,
        weight_lr: float = 0.025,
        initial_losses: Mapping[Task, float] | None = None,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
        features: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        options = Options(scaler, check_finite, process_group)
        super().__init__(optimizer, tasks, forwards, options, features, takes_closures=False)
        if (shared is None) == (features is None):
            raise ValueError(
                "GradNorm needs either `shared` (parameters) or `features` (modules), over which "
                f"the norms are taken, got {'neither' if shared is None else 'both'}: "
                "GradNorm(optimizer, tasks, features=model.trunk)."
            )
        self.shared = [] if shared is None else self._checked_shared(shared)
        self.alpha, self.weight_lr = alpha, weight_lr
        if not weight_lr > 0:
            raise ValueError(f"`weight_lr` must be positive, got {weight_lr}.")
        for task, loss in (initial_losses or {}).items():
            if task not in self.tasks or not loss > 0:
                raise ValueError(
                    "`initial_losses` must give positive losses of tasks among "
                    f"{list(self.tasks)}, got {loss} for {task!r}."
                )
        self._weights = LossWeights(self.tasks, alpha, weight_lr, initial_losses or {})
        self._losses_are_scaled = False

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the state of the balance, NaN for a task that was absent from the last step.

        Returns:
            ``weights`` (T,), the ones to be used next; ``norms`` (T,), :math:`G_i` of the weighted
            gradients over `shared`; ``rates`` (T,), :math:`r_i`, mean 1, larger if slower;
            ``skipped``, whether the weights stayed as they were because a norm or a loss was not
            finite (with ``check_finite="skip"`` (T,), the tasks left out). All on the CPU.
        """
        nan = torch.full((), float("nan"), **SINGLE)
        last = [self._weights.rates.get(task, (nan, nan)) for task in self.tasks]
        return {
            "weights": torch.stack(list(self._weights.by_task.values())),
            "norms": torch.stack([norm for norm, _ in last]),
            "rates": torch.stack([rate for _, rate in last]),
            "skipped": torch.tensor(self._weights.skipped, device="cpu"),
            **self._skipped(),
        }

    def _make_gradient(self, evaluation: Evaluation) -> Values:
        self._losses_are_scaled = evaluation.prescaled
        by_task = self._weights.by_task.items()
        weights = {name: weight.item() for task, weight in by_task for name in names_of(task)}
        if self._features is not None:
            return evaluation.at_features(self._features, self._observe_features, weights)
        self._forget_cleared_gradients()
        return evaluation.add_measured_sum(self.shared, self._observe_shared, weights)

    def _observe_shared(self, rows: Rows) -> Mapping[Task, float]:
        """Notes the norms over `shared`; the rows are of weighted losses."""
        for task, row in rows.gradients.items():
            if any(part is None for part in row):
                raise ValueError(
                    f"`shared` must be used by every task, got parameters on which the loss of "
                    f"{task!r} does not depend."
                )
            if (seen := self._weights.observed.get(task)) is not None:
                # What earlier calls of `backward` have added is part of the same step.
                rows.gradients[task] = add(row, seen.gradient)
        self._observe(rows)
        return dict.fromkeys(rows.gradients, 1.0)

    def _observe_features(self, rows: Rows) -> Gradients:
        """Notes the norms at the features, and returns the sum of the rows."""
        if rows.tensors or rows.is_distributed:
            self._observe(rows)
        return rows.combine([1.0] * len(rows.gradients))

    def _observe(self, rows: Rows) -> None:
        """Notes what the weights will learn from: numbers, by one copy from the device."""
        values, count = rows.values, len(rows.gradients)
        scale, *numbers = to_numbers([self._scale_of_gradients(), *rows.norms(), *values.values()])
        # A gradient is scaled; in the imperative form, so are the losses.
        unit = scale if self._losses_are_scaled else 1
        norms = {t: size / scale for t, size in zip(rows.gradients, numbers[:count], strict=True)}
        losses = {name: loss / unit for name, loss in zip(values, numbers[count:], strict=True)}
        self._weights.observe(norms, losses, rows.gradients if self.shared else None)

    def _forget_cleared_gradients(self) -> None:
        """Forgets what was observed of gradients that were cleared without a step."""
        if self._weights.observed and self._ledger.has_lost(self.shared[0]):
            self._weights.observed.clear()

    def _check_made(self) -> None:
        super()._check_made()
        if self.shared:
            self._forget_cleared_gradients()

    def _made_gradients(self) -> Gradients:
        # DDP would reduce the first, and not those that the weights learn from.
        observed = self._weights.observed.values()
        return [*super()._made_gradients(), *(g for seen in observed for g in seen.gradient)]

    def _stepped(self, skipped: Tensor | None) -> None:
        if self._weights.observed:
            self._weights.learn(skipped=skipped is not None and bool(skipped))

    def _own_state(self) -> dict[str, Any]:
        return self._weights.state_dict()

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        self._weights = self._weights.loaded(saved)


@dataclass
class Observation:
    """Holds what a task's weight learns from: its weighted gradient's norm, its losses."""

    norm: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    gradient: Gradients = field(default_factory=list)
    """The gradient over `shared`, to which further calls of `backward` add."""


class LossWeights:
    """Learns the weights of the losses (Algorithm 1), on the CPU.

    A group has one weight, and L(0) for each of its names unless `initial_losses` has one for all.
    """

    def __init__(
        self, tasks: Sequence[Task], alpha: float, lr: float, initial_losses: Mapping[Task, float]
    ) -> None:
        self.tasks, self.alpha, self.lr = tasks, alpha, lr
        self.names = names_of(*tasks)
        nan = float("nan")
        self.first = torch.tensor([initial_losses.get(name, nan) for name in self.names], **SINGLE)
        # L(0) of a whole group, where it was given; otherwise each of its names has one.
        self.given = torch.tensor(
            [initial_losses.get(t, nan) if isinstance(t, tuple) else nan for t in tasks], **SINGLE
        )
        self.observed: dict[Task, Observation] = {}
        # Of the last update, for diagnostics only.
        self.rates: dict[Task, tuple[Tensor, Tensor]] = {}
        self.skipped = False
        # A tensor for each, so that Adam leaves an absent task's weight and moments alone.
        self.by_task = {task: torch.ones((), **SINGLE) for task in tasks}
        self._adam = torch.optim.Adam(self.by_task.values(), lr=lr)
        for weight in self.by_task.values():  # torch.distributed loads into existing states.
            names = ("step", "exp_avg", "exp_avg_sq")
            self._adam.state[weight] = {name: torch.zeros((), **SINGLE) for name in names}

    def observe(
        self,
        norms: Mapping[Task, float],
        losses: Mapping[str, float],
        gradients: Mapping[Task, Gradients] | None,
    ) -> None:
        """Notes the norms of the weighted gradients, and the losses, for the next update."""
        own = {t: {n: losses[n] for n in names_of(t) if n in losses} for t in norms}
        for task, found in own.items():
            if sum(found.values()) <= 0:
                raise ValueError(
                    f"The loss of task {task!r} must be positive for GradNorm, got "
                    f"{sum(found.values())}: choose mtlopt.PCGrad(optimizer, tasks)."
                )
        if gradients is None and not any(norms.values()):
            return  # The features are frozen.
        # From here on nothing raises, so an error leaves everything as it was.
        for task, found in own.items():
            seen = self.observed.setdefault(task, Observation())
            for name, loss in found.items():
                seen.losses.setdefault(name, []).append(loss)
            # Micro-batches are parts of one batch, and their features of one long vector.
            seen.norm = math.hypot(seen.norm, norms[task]) if gradients is None else norms[task]
            seen.gradient = [] if gradients is None else gradients[task]

    # Old versions of torch cannot compile tensors made of numbers.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # not typed in torch
    def learn(self, skipped: bool) -> None:
        """Takes one step of the observed tasks' weights, unless a number is not finite."""
        seen = {task: self.observed[task] for task in self.tasks if task in self.observed}
        self.observed.clear()
        if skipped:
            return
        norms = torch.stack([torch.full((), own.norm, **SINGLE) for own in seen.values()])
        losses = {
            task: {name: sum(found) / len(found) for name, found in own.losses.items()}
            for task, own in seen.items()
        }
        totals = [sum(own.values()) for own in losses.values()]
        sums = torch.stack([torch.full((), total, **SINGLE) for total in totals])
        # Once a weight were NaN, every later step would be skipped as an overflow.
        self.skipped = not bool(norms.isfinite().all() and sums.isfinite().all())
        if self.skipped:
            return
        first = torch.stack([self._initial_loss(task, own) for task, own in losses.items()])
        weights = torch.stack([self.by_task[task] for task in seen])
        slopes, rates = weight_gradients(weights, norms / weights, sums / first, self.alpha)
        self.rates = dict(zip(seen, zip(norms, rates, strict=True), strict=True))
        for task, slope in zip(seen, slopes, strict=True):
            self.by_task[task].grad = slope
        self._adam.step()
        self._adam.zero_grad()
        moved = torch.stack([self.by_task[task] for task in seen]).clamp(min=SMALLEST_WEIGHT)
        # All weights sum to T; where tasks are absent, the present ones keep their own sum.
        everyone = len(seen) == len(self.tasks)
        moved *= (len(seen) if everyone else weights.sum()) / moved.sum()
        for task, weight in zip(seen, moved, strict=True):
            self.by_task[task].copy_(weight)

    def _initial_loss(self, task: Task, losses: Mapping[str, float]) -> Tensor:
        """Returns L(0) of the present part of a task, noting losses seen for the first time."""
        for name, loss in losses.items():
            k = self.names.index(name)
            self.first[k] = loss if self.first[k].isnan() else self.first[k]
        given = self.given[self.tasks.index(task)]
        own = self.first[[self.names.index(name) for name in losses]].sum()
        return own if given.isnan() else given

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights, their optimizer's state and the initial losses."""
        return {
            "weights": torch.stack(list(self.by_task.values())),
            "weights_adam": self._adam.state_dict(),
            "initial_losses": self.first.clone(),
            "initial_losses_of_groups": self.given.clone(),
        }

    def loaded(self, state: Mapping[str, Any]) -> "LossWeights":
        """Returns new weights with the saved state."""
        new = LossWeights(self.tasks, self.alpha, self.lr, {})
        for weight, saved in zip(new.by_task.values(), state["weights"], strict=True):
            weight.copy_(saved)
        # A copy, since torch keeps tensors that it need not cast.
        new._adam.load_state_dict(deepcopy(state["weights_adam"]))
        new.first.copy_(state["initial_losses"])
        new.given.copy_(state["initial_losses_of_groups"])
        return new
