"""Scalarized: any scalarizer of TorchJD as the one loss that all tasks' losses make."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._base import Common
from mtlopt._collect import Forwards, ask
from mtlopt._combining import Batches
from mtlopt._gradients import Gradients, scaled
from mtlopt._losses import Loss, Question, Task, names_of, sum_by_task, sum_tensors
from mtlopt._one_pass import OnePassOptimizer
from mtlopt._torchjd import drawing_from, needs_all_tasks, restore, state_of, stateful


class Scalarized(OnePassOptimizer):
    r"""Takes one step on the scalar that a scalarizer of TorchJD makes of the losses.

    .. math:: w \leftarrow w - \eta \, \nabla_w \, \mathcal{S}(L_1(w), \dots, L_T(w))
              = w - \eta \sum_k \frac{\partial \mathcal{S}}{\partial L_k} \, g_k(w)

    Uncertainty weighting, dynamic weight average, IMTL-L, FAMO, smooth Tchebycheff, random weights
    and the others: all from the losses' values alone, so one forward and one backward pass make a
    step. Over several micro-batches and ranks the rule is applied once, to the averages of the
    losses; its slopes :math:`\partial \mathcal{S} / \partial L_k` there weigh the averages of the
    tasks' gradients, which is the gradient on the joined batch. With micro-batches, or with
    ``forwards="per-task"``, each task is therefore differentiated apart.

    Parameters of the scalarizer (those of UW and IMTL-L) that `optimizer` does not hold become a
    group of it, without weight decay. They are moved to the device of the optimizer's first
    parameter, and are saved in the state dict with the scalarizer's state; for
    ``torch.distributed.checkpoint``, which knows parameters by their names in the model, let the
    scalarizer be a submodule of it. A rule that wants the
    losses after the step (FAMO, by its method ``update``) keeps its parameters to itself, and gets
    those losses: ``losses`` is called once more, without gradients unless it differentiates by its
    inputs, and in whatever mode the model is in, so that batch norm sees the batch twice. What is
    due once an epoch stays the loop's: ``optimizer.scalarizer.step()`` for DWA.

    Args:
        optimizer: Optimizer that applies the gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one value.
        scalarizer: A ``torchjd.scalarization.Scalarizer`` (TorchJD 0.18 or later), which gets the
            (T,) losses in the order of `tasks`. Without the losses of absent tasks, which one with
            a state or with a vector of length T cannot take.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one after the other.
        scaler: Gradient scaler for float16; the rule sees losses without its factor, and an
            overflow skips the step and leaves the rule's state as it was.
        check_finite: Whether a loss that is not finite raises, and a rule that is not finite at
            losses that are; it costs a synchronisation. At the first step, and at every step of
            FAMO, which would remember it, the rule is looked at all the same.
        process_group: Ranks to average over, with a model that is not wrapped in DDP.

    Raises:
        ImportError: If TorchJD is not installed.
        TypeError: If `optimizer` or `scalarizer` is of another kind.
        ValueError: If `tasks` is empty or repeats a name, or the class needs a closure (LBFGS).

    Example:
        >>> import torch, mtlopt, torchjd.scalarization
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=0.5)
        >>> rule = torchjd.scalarization.GeometricMean()
        >>> optimizer = mtlopt.Scalarized(base, ["a", "b"], rule)
        >>> values = optimizer.step({"a": w.sum(), "b": 4 * w.sum()})
        >>> w  # 1 - 0.5 * 2: the geometric mean is 2 w
        tensor([0.], requires_grad=True)

    References:
        Kendall et al., 2018 (arXiv 1705.07115), UW; Liu et al., 2019 (arXiv 1803.10704), DWA; Liu
        et al., 2023 (arXiv 2306.03792), FAMO; https://torchjd.org for the others.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        scalarizer: nn.Module,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(optimizer, tasks, forwards, Common(scaler, check_finite, process_group))
        self._refuse_closures()
        try:
            from torchjd.scalarization import Scalarizer
        except ImportError as error:
            raise ImportError(
                "`Scalarized` needs TorchJD: pip install 'mtlopt[torchjd]'."
            ) from error
        if not isinstance(scalarizer, Scalarizer):
            raise TypeError(
                "`scalarizer` must be an instance of torchjd.scalarization.Scalarizer, "
                f"got {scalarizer!r}."
            )
        self.scalarizer = scalarizer.to(self._device)
        self._learns_afterwards = callable(getattr(scalarizer, "update", None))
        self._needs_graph = False
        self._adopt_parameters()
        # Draws for scalarizers that are random, alike on every rank.
        self.generator = torch.Generator().manual_seed(0)
        self._seen: dict[str, Tensor] = {}
        self._before: list[dict[str, Any]] | None = None
        self._afterwards: Callable[[], None] | None = None

    def _adopt_parameters(self) -> None:
        held = {id(parameter) for parameter in self._walk()}
        named = [
            (f"scalarizer.{name}", parameter)
            for name, parameter in self.scalarizer.named_parameters()
            if parameter.requires_grad and id(parameter) not in held
        ]
        if self._learns_afterwards or not named:
            return
        with_names = "param_names" in self.param_groups[0]
        group: dict[str, Any] = {"params": named if with_names else [p for _, p in named]}
        if "weight_decay" in self.defaults:
            group["weight_decay"] = 0.0
        self.add_param_group(group)

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns ``coefficients`` (T,), the slopes of the last step, NaN for an absent task.

        Empty before the first step.
        """
        return dict(self._seen)

    def _add_gradient(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        if self._learns_afterwards and not question.is_function:
            raise TypeError(
                f"`losses` must be a function losses(tasks, *batch) for "
                f"{type(self.scalarizer).__name__}, which learns from the losses after the step: "
                "ready losses, and `backward`, cannot be asked once more."
            )
        self._afterwards = None
        if self._before is not None and all(p.grad is None for p in self._walk()):
            # What was added to the gradient has been thrown away without a step.
            restore(stateful(self.scalarizer), self._before)
            self._before = None
        apart = self.forwards == "per-task" and question.is_function
        add_gradient = self._add_collected if apart or len(batches) > 1 else self._add_at_once
        values = add_gradient(question, batches, arrived)
        if self._learns_afterwards and values:
            self._afterwards = partial(self._learn, question.without_graph(), batches)
        return values

    def _add_at_once(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        """One backward pass of the losses, each times the rule's slope at their averages."""
        ranks = self._ranks
        terms, means = ask(question, names_of(*self.tasks), batches[0], ranks)
        self._note_reach(terms)
        values = {name: mean.value for name, mean in means.items()}
        slopes = self._apply_rule(values, arrived)
        total = [
            terms[name] * slope
            for task, slope in slopes.items()
            for name in names_of(task)
            if name in terms
        ]
        scale = None if arrived else self._scale
        self._pass(sum_tensors(total) if total else None, scale, ranks, bool(means))
        return values

    def _add_collected(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        """The tasks' gradients, averaged, and weighed once their averages are known."""
        values, gradients = self._collect(question, batches, arrived)
        slopes = self._apply_rule(values, arrived)
        numbers = torch.stack([*slopes.values()]).tolist() if slopes else []
        for task, slope in zip(slopes, numbers, strict=True):
            self._add(scaled(gradients.pop(task), slope))
        return values

    def _apply_rule(self, values: Mapping[str, Tensor], arrived: bool) -> dict[Task, Tensor]:
        """Calls the scalarizer, once; adds its parameters' gradients and returns its slopes."""
        present = sum_by_task(self.tasks, values)
        if not present:
            return {}
        self._check_present(present)
        unit = self._scale(torch.ones((), device=self._device))
        losses = _stack(present, self._device)
        losses = (losses / unit if arrived else losses).requires_grad_()
        if self._before is None and (arrived or self._scaling is not None):
            self._before = deepcopy([state_of(part) for part in stateful(self.scalarizer)])
        parameters = self._parameters
        drawing = drawing_from(self._common_generator)
        # A caller's autocast is not for the rule.
        with drawing, torch.autocast(self._device.type, enabled=False):
            scalar = self.scalarizer(losses)
        held = {id(parameter) for parameter in parameters}
        own = [p for p in self.scalarizer.parameters() if p.requires_grad and id(p) in held]
        slopes, *found = torch.autograd.grad(scalar, [losses, *own], allow_unused=True)
        # The question waits for the device: once, or where the rule would remember the answer.
        if self.check_finite or self._learns_afterwards or not self._seen:
            self._check_rule(losses, scalar.detach() + slopes.sum(), list(present))
        # A parameter that the rule does not use has None, and stays without a gradient.
        reached: Gradients = list(found)
        gradients = {id(p): g * unit for p, g in zip(own, reached, strict=True) if g is not None}
        if gradients:
            self._add([gradients.get(id(parameter)) for parameter in parameters])
        by_task = dict(zip(present, slopes.unbind(), strict=True))
        nan = torch.full_like(slopes[0], float("nan"))
        self._seen["coefficients"] = torch.stack([by_task.get(task, nan) for task in self.tasks])
        return by_task

    def _check_rule(self, losses: Tensor, found: Tensor, tasks: list[Task]) -> None:
        if losses.isfinite().all() & ~found.isfinite():
            values = dict(zip(tasks, losses.tolist(), strict=True))
            raise ValueError(
                f"`losses` must be what {type(self.scalarizer).__name__} is defined for, which is "
                f"not finite at {values}: most rules want positive losses."
            )

    def _check_present(self, present: Mapping[Task, Tensor]) -> None:
        absent = [task for task in self.tasks if task not in present]
        reason = needs_all_tasks(self.scalarizer, len(self.tasks)) if absent else ""
        if reason:
            raise ValueError(
                f"`scalarizer` {type(self.scalarizer).__name__} must see every task at every step: "
                f"it has {reason}. Absent from this batch: {absent}."
            )

    def _stepped(self, skipped: Tensor | None) -> None:
        before, self._before = self._before, None
        afterwards, self._afterwards = self._afterwards, None
        if (before or afterwards) and skipped is not None and skipped:
            restore(stateful(self.scalarizer), before or [])
        elif afterwards is not None:
            afterwards()

    def _learn(self, question: Question, batches: Batches) -> None:
        """Shows the rule the losses, averaged as before, at the weights after the step."""
        try:
            with torch.set_grad_enabled(self._needs_graph):
                values = self._ask_again(question, batches)
        except RuntimeError:
            if self._needs_graph:
                raise
            # A loss that differentiates by its inputs (a residual of an equation) wants a graph.
            self._needs_graph = True
            with torch.enable_grad():
                values = self._ask_again(question, batches)
        with torch.autocast(self._device.type, enabled=False):
            self.scalarizer.update(_stack(values, self._device))  # type: ignore[operator]  # FAMO's

    def _ask_again(self, question: Question, batches: Batches) -> dict[Task, Tensor]:
        names, ranks = names_of(*self.tasks), self._ranks
        seen: dict[str, list[Loss]] = {name: [] for name in names}
        for batch in batches:
            for asked in [(name,) for name in names] if self.forwards == "per-task" else [names]:
                for name, mean in ask(question, asked, batch, ranks.each_batch)[1].items():
                    seen[name].append(mean)
        means = ranks.at_the_end.agree(seen)
        return sum_by_task(self.tasks, {name: mean.value for name, mean in means.items()})

    def _is_sum(self) -> bool:
        from torchjd.scalarization import Sum

        return isinstance(self.scalarizer, Sum)

    def _collect_state(self) -> dict[str, Any]:
        state = super()._collect_state()
        state["mtlopt"]["scalarizer"] = {
            "parameters": [parameter.detach() for parameter in self.scalarizer.parameters()],
            "states": [state_of(part) for part in stateful(self.scalarizer)],
        }
        return state

    def _restore_state(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("mtlopt", {}).get("scalarizer")
        parameters = list(self.scalarizer.parameters())
        shapes = [parameter.shape for parameter in parameters]
        if saved is not None and [value.shape for value in saved["parameters"]] != shapes:
            raise ValueError("`state_dict` must be of the same scalarizer, got other parameters.")
        super()._restore_state(state_dict)
        if saved is None:
            return
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        restore(stateful(self.scalarizer), saved["states"])
        self._before = None


def _stack(losses: Mapping[Task, Tensor], device: torch.device) -> Tensor:
    """The vector that a rule is applied to; not in half precision."""
    wide = reduce(torch.promote_types, (loss.dtype for loss in losses.values()), torch.float32)
    return torch.stack([loss.detach().to(device, wide) for loss in losses.values()])
