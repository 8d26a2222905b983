"""GradNorm: loss weights that balance the tasks' training rates (Chen et al., 2018)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt import _gradients
from mtlopt._collect import Forwards
from mtlopt._combining import Batches, CombiningOptimizer, as_it_arrives
from mtlopt._distributed import is_sharded, norm_over_shards
from mtlopt._losses import LossesFunction, ReadyLosses, Task, evaluate, names_of, sum_tensors

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


class GradNorm(CombiningOptimizer):
    r"""Learns loss weights such that the tasks' gradient norms follow their training rates.

    .. math:: w \leftarrow w - \eta \sum_i w_i(t) \, g_i(w)

    A task that trains more slowly than the others gets a larger gradient (:math:`\alpha > 0`).
    After the network's step the weights :math:`w_i` take one step of Adam on the loss
    :math:`\sum_i |w_i \lVert g_i \rVert - \bar G r_i^\alpha|`, with :math:`r_i` the relative
    inverse training rate, are clamped at 1e-3 and rescaled to their sum T. That loss never reaches
    the network. Losses must be positive.

    Args:
        optimizer: Optimizer that applies the weighted gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one weight.
        shared: Parameters W over which the norms are taken, usually the last layer that all tasks
            share; each task must reach every one of them.
        alpha: Strength of the balance, in the paper 0.12 for dense and 1.5 for diverse tasks.
        weight_lr: Learning rate of the weights' Adam.
        initial_losses: Initial loss :math:`L_i(0)` by task (log C for cross-entropy over C
            classes); a task left out takes its loss at its first step that was not skipped.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one after the other.
        scaler: Gradient scaler for float16; an overflow skips the step, weights included.
        check_finite: Whether a loss that is not finite raises; it costs a synchronisation.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.

    Raises:
        TypeError: If `optimizer` is not an instance of a plain optimizer.
        ValueError: If an option is out of its range, `shared` is empty, or the class needs a
            closure (LBFGS).

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

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        shared: Iterable[Tensor],
        alpha: float = 1.5,
        weight_lr: float = 0.025,
        initial_losses: Mapping[Task, float] | None = None,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            tasks,
            forwards=forwards,
            scaler=scaler,
            check_finite=check_finite,
            process_group=process_group,
        )
        self._refuse_closures()
        self.shared = _gradients.check_parameters("shared", shared)
        self.alpha, self.weight_lr = alpha, weight_lr
        self._check_options(initial_losses or {})
        first = [(initial_losses or {}).get(task, float("nan")) for task in self.tasks]
        self._initial = torch.tensor(first, dtype=torch.float32, device=self.shared[0].device)
        self._set_weights(torch.ones_like(self._initial))
        self._pending: dict[Task, _Seen] = {}
        self._last: dict[Task, tuple[Tensor, Tensor]] = {}

    def _check_options(self, initial_losses: Mapping[Task, float]) -> None:
        own = {id(parameter) for parameter in self._parameters}
        if not self.shared or not all(id(parameter) in own for parameter in self.shared):
            raise ValueError(
                "`shared` must hold at least one parameter, all among the optimizer's that "
                f"require a gradient, got {len(self.shared)} tensors."
            )
        if not self.weight_lr > 0:
            raise ValueError(f"`weight_lr` must be positive, got {self.weight_lr}.")
        for task, loss in initial_losses.items():
            if task not in self.tasks or not loss > 0:
                raise ValueError(
                    "`initial_losses` must give positive losses of tasks among "
                    f"{list(self.tasks)}, got {loss} for {task!r}."
                )

    def _set_weights(self, weights: Tensor) -> None:
        # A tensor each, so that Adam leaves the weight and the moments of an absent task alone.
        self._weights = [weight.detach().clone() for weight in weights]
        self._adam = torch.optim.Adam(self._weights, lr=self.weight_lr)
        for w in self._weights:  # There from the start: torch.distributed loads what it finds.
            zeros = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
            self._adam.state[w] = {"step": torch.zeros(()), **zeros}

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the state of the balance, NaN for a task that was absent from the last step.

        Returns:
            ``weights`` (T,), the ones to be used next; ``norms`` (T,), :math:`G_i` of the weighted
            gradients over `shared`; ``rates`` (T,), :math:`r_i`, mean 1, larger if slower.
        """
        nan = torch.full_like(self._initial[0], float("nan"))
        last = [self._last.get(task, (nan, nan)) for task in self.tasks]
        return {
            "weights": torch.stack(self._weights),
            "norms": torch.stack([norm for norm, _ in last]),
            "rates": torch.stack([rate for _, rate in last]),
        }

    def _cleared(self) -> None:
        super()._cleared()
        self._pending.clear()

    def _add_gradient(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        single = len(batches) == 1 and self.forwards == "joint" and self.process_group is None
        add = self._add_at_once if single and not is_sharded(self.shared) else self._add_collected
        values = add(losses, batches, scale)
        # The weights learn from what is not scaled; losses of the imperative form arrive scaled.
        unit = self._scale(torch.ones_like(self._initial[0]))
        for task, total in self._by_task(values).items():
            seen = self._pending[task]
            seen.losses.append(total / unit if scale is as_it_arrives else total)
            seen.unit = unit
        return values

    def _seen_gradients(self) -> _gradients.Gradients:
        # DDP does not reduce those that the weights learn from.
        return super()._seen_gradients() + [g for s in self._pending.values() for g in s.gradient]

    def _by_task(self, values: Mapping[str, Tensor]) -> dict[Task, Tensor]:
        """Sums the losses of each present task, a group's over its names."""
        own = {task: [values[n] for n in names_of(task) if n in values] for task in self.tasks}
        return {task: sum_tensors(losses) for task, losses in own.items() if losses}

    def _add_at_once(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """One backward pass of the weighted sum; before it each task's, down to `shared` alone."""
        found = evaluate(losses, names_of(*self.tasks), batches[0], self.check_finite)
        present = {name: loss.value for name, loss in found.items() if loss.samples}
        terms = self._by_task(present)
        self._check_positive(terms)
        for task, term in terms.items():
            own = _gradients.partial(scale(term), self.shared)
            # Copies, since results of autograd may share their memory.
            self._remember(task, [None if part is None else part.clone() for part in own])
        if terms:
            weights = dict(zip(self.tasks, self._weights, strict=True))
            weighted = [weights[task] * term for task, term in terms.items()]
            _gradients.backward(scale(sum_tensors(weighted)), self._parameters)
        return {name: value.detach() for name, value in present.items()}

    def _add_collected(
        self,
        losses: LossesFunction | ReadyLosses,
        batches: Batches,
        scale: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        parameters = self._parameters
        values, collected = self._collect(losses, batches, scale)
        self._check_positive(self._by_task(values))
        position = {id(parameter): i for i, parameter in enumerate(parameters)}
        total = [parameter.grad for parameter in parameters]
        for task, weight in zip(self.tasks, self._weights, strict=True):
            if task in collected:
                own = collected.pop(task)
                self._remember(task, [own[position[id(parameter)]] for parameter in self.shared])
                total = _gradients.add(total, [None if g is None else g * weight for g in own])
        _gradients.put(parameters, total)
        return values

    def _check_positive(self, losses: Mapping[Task, Tensor]) -> None:
        values = torch.stack(list(losses.values())).tolist() if losses else []
        for task, value in zip(losses, values, strict=True):
            if value <= 0:
                raise ValueError(
                    f"The loss of task {task!r} must be positive for GradNorm, got {value}."
                )

    def _remember(self, task: Task, gradient: _gradients.Gradients) -> None:
        if any(part is None for part in gradient):
            raise ValueError(
                f"`shared` must be reached by every task, got parameters that {task!r} does not."
            )
        seen = self._pending.setdefault(task, _Seen([None] * len(gradient)))
        seen.gradient = _gradients.add(seen.gradient, gradient)

    def _stepped(self, skipped: Tensor | None) -> None:
        pending, self._pending = self._pending, {}
        if not pending or (skipped is not None and skipped):
            return
        present = [k for k, task in enumerate(self.tasks) if task in pending]
        seen = list(pending.values())
        own = [norm_over_shards(_gradients.norms(s.gradient), self.shared) / s.unit for s in seen]
        norms = torch.stack(own).to(self._initial)
        losses = torch.stack([torch.stack(s.losses).mean() for s in seen]).to(self._initial)
        first = self._initial[present]
        self._initial[present] = first = torch.where(first.isnan(), losses, first)
        weights = torch.stack([self._weights[k] for k in present])
        slopes, rates = weight_gradients(weights, norms, losses / first, self.alpha)
        for k, slope in zip(present, slopes, strict=True):
            self._weights[k].grad = slope
        self._adam.step()
        self._adam.zero_grad()
        moved = torch.stack([self._weights[k] for k in present]).clamp(min=SMALLEST_WEIGHT)
        everyone = len(present) == len(self.tasks)
        moved *= (len(present) if everyone else weights.sum()) / moved.sum()
        for k, weight in zip(present, moved, strict=True):
            self._weights[k].copy_(weight)
        rows = zip(present, weights * norms, rates, strict=True)
        self._last = {self.tasks[k]: (norm, rate) for k, norm, rate in rows}

    def _collect_state(self) -> dict[str, Any]:
        state = super()._collect_state()
        state["mtlopt"] |= {
            "weights": torch.stack(self._weights),
            "weights_adam": self._adam.state_dict(),
            "initial_losses": self._initial.clone(),
        }
        return state

    def _restore_state(self, state_dict: dict[str, Any]) -> None:
        super()._restore_state(state_dict)
        if (saved := state_dict.get("mtlopt")) is not None:
            self._set_weights(saved["weights"].to(self._initial))
            self._adam.load_state_dict(saved["weights_adam"])
            self._initial = saved["initial_losses"].to(self._initial, copy=True)
            self._pending = {}


@dataclass
class _Seen:
    """What a step has seen of a task: its gradient over `shared`, summed, and its losses."""

    gradient: _gradients.Gradients
    losses: list[Tensor] = field(default_factory=list)
    unit: Tensor = field(default_factory=lambda: torch.ones(()))
