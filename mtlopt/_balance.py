"""Balance: GradNorm's loss weights and how they learn (Chen et al., 2018, Algorithm 1)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlopt._losses import Task, names_of

SMALLEST_WEIGHT = 1e-3


def weight_gradients(
    weights: Tensor, norms: Tensor, ratios: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    r"""Differentiates GradNorm's loss with respect to the weights, the targets held constant.

    .. math:: L_\text{grad} = \sum_i \lvert G_i - \bar G r_i^\alpha \rvert, \quad
              G_i = w_i \lVert \nabla_W L_i \rVert_2, \quad
              \frac{\partial L_\text{grad}}{\partial w_i}
              = \operatorname{sign}(G_i - \bar G r_i^\alpha) \lVert \nabla_W L_i \rVert_2

    No second-order graph is needed: :math:`G_i` is linear in :math:`w_i`.

    Args:
        weights: (T,) positive loss weights :math:`w_i`.
        norms: (T,) norms of the unweighted losses' gradients over the shared parameters.
        ratios: (T,) each loss divided by its initial value.
        alpha: Strength of the balance :math:`\alpha`; 0 makes all gradients equally large.

    Returns:
        (T,) derivatives and (T,) relative inverse training rates :math:`r_i`, whose mean is 1.
    """
    rates = ratios / ratios.mean()
    weighted = weights * norms
    targets = weighted.mean() * rates**alpha
    return torch.sign(weighted - targets) * norms, rates


class Seen(NamedTuple):
    """What a step has seen of a task: the norm G of its weighted gradient, its losses by name."""

    norm: float
    losses: dict[str, float]


@dataclass
class Pending:
    """What awaits the step: a task's gradient over `shared`, its norm, its losses by name."""

    gradient: list[Tensor] = field(default_factory=list)
    norm: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)

    def seen(self) -> Seen:
        """The mean of each name's losses over the calls of `backward`."""
        return Seen(self.norm, {name: sum(own) / len(own) for name, own in self.losses.items()})


class Balance:
    """The weights of the tasks' losses, on the CPU: T numbers, and T tiny optimizer states.

    Args:
        tasks: Tasks and groups; a group has one weight, and L(0) for each of its names.
        alpha: Strength of the balance.
        lr: Learning rate of the weights' Adam.
        initial_losses: L(0) by task, where it is not to be the first loss seen.
    """

    def __init__(
        self, tasks: Sequence[Task], alpha: float, lr: float, initial_losses: Mapping[Task, float]
    ) -> None:
        self.tasks, self.alpha, self.lr = tasks, alpha, lr
        self.names = names_of(*tasks)
        nan = float("nan")
        self.first = torch.tensor([initial_losses.get(name, nan) for name in self.names])
        # L(0) of a whole group, where it was given; else its names have their own.
        self.given = torch.tensor(
            [initial_losses.get(t, nan) if isinstance(t, tuple) else nan for t in tasks]
        )
        # Of the last update, for the diagnosis alone.
        self.rates: dict[Task, tuple[Tensor, Tensor]] = {}
        self.skipped = False
        # A tensor each, so that Adam leaves the weight and the moments of an absent task alone.
        self.weights = {task: torch.ones(()) for task in tasks}
        self._adam = torch.optim.Adam(self.weights.values(), lr=lr)
        for weight in self.weights.values():  # torch.distributed loads into what it finds.
            zeros = {name: torch.zeros(()) for name in ("exp_avg", "exp_avg_sq")}
            self._adam.state[weight] = {"step": torch.zeros(()), **zeros}

    def update(self, seen: Mapping[Task, Seen]) -> None:
        """Takes one step of the weights of the tasks seen; none where a number is not finite."""
        present = [task for task in self.tasks if task in seen]
        # Not torch.tensor, which an old torch cannot compile of numbers that came from tensors.
        norms = torch.stack([torch.full((), seen[task].norm) for task in present])  # w_i ‖∇_W L_i‖
        losses = torch.stack([torch.full((), sum(seen[t].losses.values())) for t in present])
        # Once a NaN were in the weights, every later step would be skipped as an overflow.
        self.skipped = not bool(norms.isfinite().all() and losses.isfinite().all())
        if self.skipped:
            return
        first = torch.stack([self._initial_loss(task, seen[task].losses) for task in present])
        weights = torch.stack([self.weights[task] for task in present])
        slopes, rates = weight_gradients(weights, norms / weights, losses / first, self.alpha)
        self.rates = {
            task: (norm, rate) for task, norm, rate in zip(present, norms, rates, strict=True)
        }
        for task, slope in zip(present, slopes, strict=True):
            self.weights[task].grad = slope
        self._adam.step()
        self._adam.zero_grad()
        moved = torch.stack([self.weights[task] for task in present]).clamp(min=SMALLEST_WEIGHT)
        # The whole sums to T by definition; a part keeps the sum it had, the rest stays as it is.
        everyone = len(present) == len(self.tasks)
        moved *= (len(present) if everyone else weights.sum()) / moved.sum()
        for task, weight in zip(present, moved, strict=True):
            self.weights[task].copy_(weight)

    def _initial_loss(self, task: Task, losses: Mapping[str, float]) -> Tensor:
        """L(0) of what is present of a task: given, or the first loss of each of its names."""
        for name, loss in losses.items():
            k = self.names.index(name)
            self.first[k] = loss if self.first[k].isnan() else self.first[k]
        given = self.given[self.tasks.index(task)]
        own = self.first[[self.names.index(name) for name in losses]].sum()
        return own if given.isnan() else given

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights, their optimizer's state and the initial losses."""
        return {
            "weights": torch.stack(list(self.weights.values())),
            "weights_adam": self._adam.state_dict(),
            "initial_losses": self.first.clone(),
            "initial_losses_of_groups": self.given.clone(),
        }

    def loaded(self, state: Mapping[str, Any]) -> "Balance":
        """Returns a balance with the state that was saved."""
        # An older state has one L(0) for each task, also for a group.
        older = "initial_losses_of_groups" not in state
        initial = state["initial_losses"].tolist() if older else ()
        new = Balance(self.tasks, self.alpha, self.lr, dict(zip(self.tasks, initial, strict=older)))
        for weight, saved in zip(new.weights.values(), state["weights"], strict=True):
            weight.copy_(saved)
        # A copy, since torch keeps tensors that it need not cast.
        new._adam.load_state_dict(deepcopy(state["weights_adam"]))
        if not older:
            new.first.copy_(state["initial_losses"])
            new.given.copy_(state["initial_losses_of_groups"])
        return new
