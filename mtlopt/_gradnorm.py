"""GradNorm: loss weights that balance the tasks' training rates (Chen et al., 2018)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._balance import Balance, Pending
from mtlopt._base import Common
from mtlopt._collect import Forwards, ask
from mtlopt._combining import Batches, CombiningOptimizer
from mtlopt._distributed import ALONE
from mtlopt._gradients import Gradients, norm, numbers_of
from mtlopt._losses import Question, Task, check_parameters, names_of, sum_by_task, sum_tensors
from mtlopt._passes import backward, partial
from mtlopt._rows import Rows
from mtlopt._shards import local

MARK = "_mtlopt_pending"


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
        features: In the place of `shared`, the module or modules whose outputs all tasks share: the
            norms are taken over those, and one backward pass leads through the trunk.

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
        shared: Iterable[Tensor] | None = None,
        alpha: float = 1.5,
        weight_lr: float = 0.025,
        initial_losses: Mapping[Task, float] | None = None,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
        features: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        super().__init__(
            optimizer, tasks, forwards, Common(scaler, check_finite, process_group), features
        )
        self._refuse_closures()
        if (shared is None) == (features is None):
            raise ValueError(
                "GradNorm needs either `shared` (parameters) or `features` (modules), over which "
                "the norms are taken, got both or neither."
            )
        self.shared = [] if shared is None else check_parameters("shared", shared)
        self.alpha, self.weight_lr = alpha, weight_lr
        self._check_options(initial_losses or {})
        self._balance = Balance(self.tasks, alpha, weight_lr, initial_losses or {})
        self._pending: dict[Task, Pending] = {}

    def _check_options(self, initial_losses: Mapping[Task, float]) -> None:
        own = {id(parameter) for parameter in self._parameters if parameter.requires_grad}
        if (self._features is None and not self.shared) or not all(
            id(parameter) in own for parameter in self.shared
        ):
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

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the state of the balance, NaN for a task that was absent from the last step.

        Returns:
            ``weights`` (T,), the ones to be used next; ``norms`` (T,), :math:`G_i` of the weighted
            gradients over `shared`; ``rates`` (T,), :math:`r_i`, mean 1, larger if slower;
            ``skipped``, whether the weights stayed as they were because a norm or a loss was not
            finite. All on the CPU.
        """
        balance, nan = self._balance, torch.tensor(float("nan"))
        last = [balance.rates.get(task, (nan, nan)) for task in self.tasks]
        return {
            "weights": torch.stack(list(balance.weights.values())),
            "norms": torch.stack([norm for norm, _ in last]),
            "rates": torch.stack([rate for _, rate in last]),
            "skipped": torch.tensor(balance.skipped),
        }

    def _add_gradient(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        self._drop_stale()
        if self._features is not None:
            return super()._add_gradient(question, batches, arrived)
        single = len(batches) == 1 and (self.forwards == "joint" or not question.is_function)
        at_once = single and self._ranks is ALONE
        values = (self._add_at_once if at_once else self._add_collected)(question, batches, arrived)
        if (gradient := self.shared[0].grad) is not None:
            setattr(gradient, MARK, gradient._version)
        return values

    def _check_made(self) -> None:
        super()._check_made()
        self._drop_stale()

    def _drop_stale(self) -> None:
        """Forgets what is pending where the gradient that it belongs to has gone from `.grad`."""
        gradient = self.shared[0].grad if self.shared else None
        kept = gradient is not None and hasattr(gradient, MARK)
        if kept and gradient is not None and getattr(gradient, MARK) != gradient._version:
            kept = bool(local(gradient).any())  # Zeros in place are a `zero_grad` too.
        if not kept:
            self._pending.clear()

    def _seen_gradients(self) -> Gradients:
        # DDP does not reduce those that the weights learn from.
        pending = [part for seen in self._pending.values() for part in seen.gradient]
        return [*super()._seen_gradients(), *pending]

    def _add_at_once(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        """One backward pass of the weighted sum; before it each task's, down to `shared` alone."""
        terms, means = ask(question, names_of(*self.tasks), batches[0], ALONE)
        scale: Callable[[Tensor], Tensor] = (lambda loss: loss) if arrived else self._scale
        values = {name: mean.value for name, mean in means.items()}
        weights = self._balance.weights
        totals = sum_by_task(self.tasks, terms)
        weighted = {task: weights[task] * total for task, total in totals.items()}
        # Copies, since results of autograd may share their memory.
        gradients = {
            task: [g if g is None else g.clone() for g in partial(scale(total), self.shared)]
            for task, total in weighted.items()
        }
        self._remember(gradients, values, arrived)
        if weighted:
            backward(scale(sum_tensors(list(weighted.values()))), self._parameters)
        return values

    def _weights(self) -> dict[str, float]:
        return {
            name: weight.item()
            for task, weight in self._balance.weights.items()
            for name in names_of(task)
        }

    def _combine(self, rows: Rows) -> Gradients:
        """Over features: the rows are of weighted losses already, and the sum is plain."""
        # On the device, where rows are whole: they travel to the host with the losses.
        sizes = [norm(own) for own in rows.gradients.values() if rows.tensors]
        if rows.in_parts:
            products = rows.gram()
            sizes = list(products.diagonal().sqrt()) if products.any() else []
        if sizes:  # Frozen features teach the weights nothing.
            found = dict(zip(rows.gradients, sizes, strict=True))
            unit, *norms = self._checked_numbers(found, rows.values, arrived=False)
            for task, size in zip(found, norms, strict=False):
                pending = self._pending.setdefault(task, Pending())
                # Micro-batches are parts of one batch, whose features are their features together.
                pending.norm = math.hypot(pending.norm, size / unit)
        return rows.combine([1.0] * len(rows.gradients))

    def _add_collected(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        parameters = self._parameters
        values, gradients = self._collect(question, batches, arrived)
        position = {id(parameter): i for i, parameter in enumerate(parameters)}
        # The norms need these alone; the rest of each gradient goes into the sum at once.
        places = [position[id(parameter)] for parameter in self.shared]
        shared = {
            task: [p if p is None else p.clone() for p in map(g.__getitem__, places)]
            for task, g in gradients.items()
        }
        self._remember(shared, values, arrived)
        for task in list(gradients):
            self._add(gradients.pop(task))
        return values

    def _remember(
        self, gradients: Mapping[Task, Gradients], values: Mapping[str, Tensor], arrived: bool
    ) -> None:
        """Notes what the weights will learn from: numbers, in one copy from the device."""
        if not gradients:
            return
        sums = {task: self._with_earlier(task, own) for task, own in gradients.items()}
        found = {task: norm([*gradient]) for task, gradient in sums.items()}
        unit, *norms = self._checked_numbers(found, values, arrived)
        for (task, gradient), size in zip(sums.items(), norms, strict=True):
            self._pending[task].gradient, self._pending[task].norm = gradient, size / unit

    def _checked_numbers(
        self, norms: Mapping[Task, Tensor], values: Mapping[str, Tensor], arrived: bool
    ) -> list[float]:
        """Notes the losses, which must be positive; returns the scaler's scale and the norms."""
        # Scaled gradients, and in the imperative form scaled losses too.
        unit = self._scale(torch.ones((), device=self._device))
        scale, *numbers = numbers_of([unit, *norms.values(), *values.values()])
        found = dict(zip(values, numbers[len(norms) :], strict=True))
        seen = {name: loss / scale if arrived else loss for name, loss in found.items()}
        own = {task: {n: seen[n] for n in names_of(task) if n in seen} for task in norms}
        for task, losses in own.items():
            if sum(losses.values()) <= 0:
                raise ValueError(
                    f"The loss of task {task!r} must be positive for GradNorm, got "
                    f"{sum(losses.values())}: choose mtlopt.PCGrad(optimizer, tasks)."
                )
        # Only now, that nothing can raise: an error leaves what is pending as it was.
        for task, losses in own.items():
            pending = self._pending.setdefault(task, Pending())
            for name, loss in losses.items():
                pending.losses.setdefault(name, []).append(loss)
        return [scale, *numbers[: len(norms)]]

    def _with_earlier(self, task: Task, gradient: Gradients) -> list[Tensor]:
        """Adds what earlier calls of `backward` have left of a task."""
        own = [part for part in gradient if part is not None]
        if len(own) < len(gradient):
            raise ValueError(
                f"`shared` must be reached by every task, got parameters that {task!r} does not "
                "reach."
            )
        if task not in self._pending or not self._pending[task].gradient:
            return own
        return [a + b for a, b in zip(self._pending[task].gradient, own, strict=True)]

    def _stepped(self, skipped: Tensor | None) -> None:
        pending = dict(self._pending)
        self._pending.clear()
        if pending and not (skipped is not None and skipped):
            self._balance.update({task: seen.seen() for task, seen in pending.items()})

    def _collect_state(self) -> dict[str, Any]:
        state = super()._collect_state()
        state["mtlopt"] |= self._balance.state_dict()
        return state

    def _restore_state(self, state_dict: dict[str, Any]) -> None:
        super()._restore_state(state_dict)
        if (saved := state_dict.get("mtlopt")) is not None:
            self._balance, self._pending = self._balance.loaded(saved), {}
