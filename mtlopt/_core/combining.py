"""CombiningOptimizer: methods that make one update from all tasks."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.closures import make_closure
from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt._core.options import Options
from mtlopt._core.single import Single
from mtlopt._gradients.arithmetic import Gradients, Rows, local
from mtlopt._gradients.autograd import add_to_grads
from mtlopt._gradients.evaluation import Evaluation, Forwards
from mtlopt._gradients.features import Features
from mtlopt._gradients.losses import ReadyLosses, Task, Values, check_parameters
from mtlopt._gradients.ranks import broadcast_parameters


class CombiningOptimizer(MultiTaskOptimizer):
    """Updates the parameters once a step, by a gradient made from all tasks.

    A method implements :meth:`_combine`, if it works on the tasks' gradients, or else
    :meth:`_make_gradient`.
    """

    _updater: Single

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        forwards: Forwards,
        options: Options,
        features: nn.Module | Iterable[nn.Module] | None = None,
        *,
        takes_closures: bool = True,
    ) -> None:
        super().__init__(Single(optimizer, type(self).__name__), tasks, options)
        name = type(self).__name__
        if self._needs_closure and not takes_closures:
            raise ValueError(
                f"{name} does not support optimizers that require a closure, "
                f"got {type(optimizer).__name__}."
            )
        if forwards not in ("joint", "per-task"):
            raise ValueError(f"`forwards` must be 'joint' or 'per-task', got {forwards!r}.")
        self.forwards = self._forwards = forwards
        self._features = None if features is None else Features(features)
        if features is not None and forwards == "per-task":
            raise ValueError(
                "`forwards` must be 'joint' with `features`, whose gradients come from one "
                "forward pass, got 'per-task'."
            )
        self._compared = False
        # As DDP does for a model that it wraps; here nothing wraps the model.
        broadcast_parameters(self._parameters, self.process_group)

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer, which updates the parameters."""
        return self._updater.base

    def _checked_shared(self, shared: Iterable[Tensor]) -> list[Tensor]:
        """Returns parameters to take norms over, or raises an error."""
        checked = check_parameters("shared", shared)
        own = {id(parameter) for parameter in self._parameters if parameter.requires_grad}
        if not checked or not {id(parameter) for parameter in checked} <= own:
            raise ValueError(
                "`shared` must hold at least one parameter, all among the optimizer's that "
                f"require a gradient, got {len(checked)} tensors."
            )
        return checked

    # Implemented by the methods.

    def _make_gradient(self, evaluation: Evaluation) -> Values:
        """Adds the method's gradient to `.grad` and returns the present tasks' losses."""
        if self._features is not None:
            return evaluation.at_features(self._features, self._combine)
        rows, _ = evaluation.per_task()
        add_to_grads(rows.tensors, self._combine(rows))
        return rows.values

    def _combine(self, rows: Rows) -> Gradients:
        """Returns one gradient made of the tasks'; called even if all tasks are absent."""
        raise NotImplementedError

    def _stepped(self, skipped: Tensor | None) -> None:
        """Learns from the step; `skipped` tells whether a scaler skipped the update."""

    def _is_sum(self) -> bool:
        """Returns whether the method's gradient is that of `sum(losses).backward()`."""
        return False

    # The step.

    def _take_step(self, evaluation: Evaluation) -> Values:
        values = self._fresh_gradient(evaluation)
        if not self._compared:
            self._compared = True
            remedy = "do not wrap the model in DistributedDataParallel, and give a `process_group`."
            evaluation.ranks.check_alike(self._made_gradients(), "of all tasks", remedy)
        if values:  # If all tasks are absent, not even the momentum moves.
            self._update(evaluation, values)
        return values

    @torch.enable_grad()
    def _fresh_gradient(self, evaluation: Evaluation) -> Values:
        evaluation.clear_grads()
        return self._make_gradient(evaluation)

    def _made_gradients(self) -> Gradients:
        """Returns the gradients that must be the same on all ranks before an update."""
        return [parameter.grad for parameter in self._parameters]

    def _update(self, evaluation: Evaluation, values: Values) -> None:
        skipped = None
        if self._scaling is not None:
            # Before the hooks, which may clip.
            skipped = self._unscale(self.base)
            try:
                self._scaling.step(self.base)
            finally:
                self._scaling.update()
        elif self._needs_closure:
            again = partial(self._fresh_gradient, evaluation)
            self.base.step(make_closure(values, again, self._objective, evaluation.parameters))
        else:
            self._updater.base.step()
        self._stepped(skipped)

    def _check_losses(self, losses: object, closure: object) -> None:
        if closure is not None:
            raise TypeError("Pass `losses` or `closure`, not both: they mean the same.")
        if isinstance(losses, Mapping):
            self._refuse_ready_losses()
            if self._needs_closure:
                raise TypeError(
                    "`losses` must be a function losses(tasks, *batch) for a class that evaluates "
                    f"it several times, {type(self.base).__name__}, got {type(losses).__name__}."
                )

    # The imperative form.

    @torch.enable_grad()
    def backward(self, losses: ReadyLosses, retain_graph: bool = False) -> None:
        """Adds the combined gradient of ready losses to `.grad`, instead of `.backward()`.

        Args:
            losses: Mapping from task to a scalar loss, (loss, count) or None.
            retain_graph: Whether to keep the graph, as in torch, for another optimizer.
        """
        self._refuse_ready_losses()
        evaluation = self._evaluation(losses, [()], prescaled=True, retain_graph=retain_graph)
        self._make_gradient(evaluation)
        self._ledger.mark(evaluation.parameters, "made")
        self._warn_of_mistakes()

    def _step_on_grads(self, closure: Callable[[], Any] | None) -> Any:
        """Applies the gradients in `.grad`, as torch's `step` does."""
        if closure is None and self._was_applied():
            return None
        result: Any
        # A closure makes the gradient during the step, so it can be judged only afterwards.
        if closure is None:
            self._check_made()
            result = self.base.step()
        else:
            result = self.base.step(closure)
            self._check_made()
        self._ledger.reset()
        self._stepped(None)
        return result

    def _check_made(self) -> None:
        """Warns of gradients that the method did not make, where that makes a difference."""
        # A gradient that was replaced, such as a centralised one, has lost the ledger's record.
        if self._ledger.made_last or self._is_sum() or len(self.tasks) == 1:
            return
        parameters = self._parameters
        if self._ledger.status(parameters) != "made" and any(
            local(parameter.grad).any() for parameter in parameters if parameter.grad is not None
        ):
            self._warnings.warn("plain", type(self).__name__)

    def _refuse_ready_losses(self) -> None:
        if self._features is not None:
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch) with `features`, which act on "
                "the graph while it runs: ready losses bring a finished one. Call "
                "optimizer.step(losses, *batch), or remove `features`."
            )

    def _scale_of_gradients(self) -> Tensor:
        """Returns the factor by which a scaler has multiplied the gradients, on their device."""
        one = torch.ones((), device=self._device)
        return one if self._scaling is None else self._scaling.scale(one)

    @property
    def _common_generator(self) -> torch.Generator | None:
        """Returns what ranks draw from, to draw alike; None for torch's own on one process."""
        ranks = self._choose_ranks(self._parameters)
        return self.generator if ranks.reduces or ranks.wrapped else None
