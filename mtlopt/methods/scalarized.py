"""Scalarized: any scalarizer of TorchJD as one loss made of all tasks' losses."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.combining import CombiningOptimizer
from mtlopt._core.options import Options
from mtlopt._gradients.autograd import add_to_grads
from mtlopt._gradients.evaluation import Evaluation, Forwards
from mtlopt._gradients.losses import CheckFinite, Task, Values, names_of, sum_by_task
from mtlopt._gradients.sums import average_losses
from mtlopt.methods._torchjd import check_absent, check_rule, drawing_from, restore, states_of


class Scalarized(CombiningOptimizer):
    r"""Takes one step on the scalar that a scalarizer of TorchJD makes of the losses.

    .. math:: w \leftarrow w - \eta \, \nabla_w \, \mathcal{S}(L_1(w), \dots, L_T(w))
              = w - \eta \sum_k \frac{\partial \mathcal{S}}{\partial L_k} \, g_k(w)

    Uncertainty weighting (UW), DWA, IMTL-L, FAMO, smooth Tchebycheff, random weights and others
    need only the values of the losses, so a step is one forward and one backward pass. Over several
    micro-batches and ranks the rule is applied once, to the averaged losses, and its derivatives
    there weight the tasks' averaged gradients. With micro-batches, or with ``forwards="per-task"``,
    each task is therefore differentiated separately.

    Parameters of the scalarizer (those of UW and IMTL-L) that `optimizer` does not hold become a
    group of it, without weight decay, on the device of its first parameter. For
    ``torch.distributed.checkpoint``, which knows parameters by their names in the model, make the
    scalarizer a submodule of it. For a rule that needs the losses after the step (FAMO, by its
    method ``update``), ``losses`` is called once more, without gradients unless it differentiates
    with respect to its inputs; in training mode batch norm sees the batch twice. Once an epoch,
    call what the rule needs in your loop: ``optimizer.scalarizer.step()`` for DWA.

    Args:
        optimizer: Optimizer that applies the gradient; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one value.
        scalarizer: A ``torchjd.scalarization.Scalarizer`` (TorchJD 0.18 or later) of the (T,)
            losses in the order of `tasks`. Absent tasks are left out, which a rule with a state or
            with a vector of length T does not allow; in UW and IMTL-L their parameters rest.
        forwards: "joint" asks for all tasks' losses at once, "per-task" for one at a time.
        scaler: Gradient scaler for float16; the rule sees unscaled losses, and an overflow skips
            the step and leaves the rule's state as it was.
        check_finite: Whether a loss that is not finite raises, and a rule that is not finite at
            finite losses; "skip" leaves the task of such a loss out. At the first step, and at
            every step of FAMO, which would remember it, the rule is checked in any case.
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

    _third = ", torchjd.scalarization.UW(len(tasks))"

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        scalarizer: nn.Module,
        *,
        forwards: Forwards = "joint",
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(scaler, check_finite, process_group)
        super().__init__(optimizer, tasks, forwards, options, takes_closures=False)
        check_rule(scalarizer, "scalarization", "Scalarizer", self)
        from torchjd.scalarization import IMTLL, UW

        self.scalarizer = scalarizer.to(self._device)
        self._rule = Rule(self.scalarizer)
        # Rules that are a sum over the tasks, each with a parameter.
        self._separates = type(scalarizer) in (UW, IMTLL)
        if not self._rule.learns_afterwards:
            self._adopt_parameters()
        # Draws for scalarizers that are random, alike on every rank.
        self.generator = torch.Generator("cpu").manual_seed(0)
        self._seen: dict[str, Tensor] = {}
        self._losses_are_scaled = False
        self._evaluation_to_repeat: Evaluation | None = None

    def _adopt_parameters(self) -> None:
        held = set(map(id, self._parameters))
        named = [
            (f"scalarizer.{name}", parameter)
            for name, parameter in self.scalarizer.named_parameters()
            if parameter.requires_grad and id(parameter) not in held
        ]
        if not named:
            return
        if hasattr(self.base.step, "_wrapped_by_lr_sched"):
            raise ValueError(
                f"`optimizer` must have no scheduler yet, since {type(self.scalarizer).__name__} "
                "adds a group of parameters to it: make schedulers afterwards, or give it the "
                "parameters at first, Adam([*model.parameters(), *scalarizer.parameters()])."
            )
        with_names = "param_names" in self.param_groups[0]
        group: dict[str, Any] = {"params": named if with_names else [p for _, p in named]}
        if "weight_decay" in self.defaults:
            group["weight_decay"] = 0.0
        self.add_param_group(group)

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns ``coefficients`` (T,), the last step's derivatives, NaN for an absent task.

        Empty before the first step.
        """
        return self._seen | self._skipped()

    def _make_gradient(self, evaluation: Evaluation) -> Values:
        if self._rule.learns_afterwards and not evaluation.losses.is_function:
            raise TypeError(
                f"`losses` must be a function losses(tasks, *batch) for "
                f"{type(self.scalarizer).__name__}, which learns from the losses after the step: "
                "ready losses, and `backward`, cannot be evaluated again."
            )
        if all(parameter.grad is None for parameter in evaluation.parameters):
            self._rule.roll_back()  # An earlier gradient was cleared without a step.
            self._rule.release(self.state)
        self._losses_are_scaled = evaluation.prescaled
        # Eq. 1 with the rule's derivatives at the averaged losses as weights.
        values = evaluation.add_sum(evaluation.names, self._weights)
        repeat = self._rule.learns_afterwards and values
        self._evaluation_to_repeat = evaluation if repeat else None
        return values

    def _weights(self, values: Values) -> Mapping[str, Tensor]:
        """Applies the rule, adds the gradient of its parameters, and returns its derivatives."""
        present = sum_by_task(self.tasks, values)
        if not present:
            return {}
        absent = [k for k, task in enumerate(self.tasks) if task not in present]
        asked = present
        if self._separates:
            # Any loss will do for an absent task, whose term is left out below.
            one = torch.ones((), device=self._device)
            asked = {task: present.get(task, one) for task in self.tasks}
            self._rule.hold(absent, self.state)
        else:
            check_absent("scalarizer", self.scalarizer, self.tasks, present)
        unit = self._scale_of_gradients()
        losses = _stack(asked, self._device)
        losses = losses / unit if self._losses_are_scaled else losses
        if self._losses_are_scaled or self._scaling is not None:
            self._rule.keep_state()
        parameters = self._parameters
        with drawing_from(self._common_generator):
            scalar, slopes, found = self._rule.differentiate(losses, parameters)
        # Looking at the numbers waits for the device: once, or where the rule remembers them.
        if self.check_finite or self._rule.learns_afterwards or not self._seen:
            self._check_finite_rule(losses, scalar + slopes.sum(), list(asked))
        if found:
            scaled = {key: gradient * unit for key, gradient in found.items()}
            for gradient in scaled.values() if absent else ():
                gradient[absent] = 0
            add_to_grads(parameters, [scaled.get(id(parameter)) for parameter in parameters])
        own = zip(asked, slopes.unbind(), strict=True)
        by_task = {task: slope for task, slope in own if task in present}
        nan = torch.full_like(slopes[0], float("nan"))
        self._seen["coefficients"] = torch.stack([by_task.get(task, nan) for task in self.tasks])
        return {name: slope for task, slope in by_task.items() for name in names_of(task)}

    def _check_finite_rule(self, losses: Tensor, found: Tensor, tasks: list[Task]) -> None:
        if losses.isfinite().all() & ~found.isfinite():
            values = dict(zip(tasks, losses.tolist(), strict=True))
            raise ValueError(
                f"`losses` must be in the domain of {type(self.scalarizer).__name__}, which is not "
                f"finite at {values}: most rules need positive losses."
            )

    def _stepped(self, skipped: Tensor | None) -> None:
        self._rule.release(self.state)
        evaluation, self._evaluation_to_repeat = self._evaluation_to_repeat, None
        if skipped is not None and (self._rule.kept is not None or evaluation) and skipped:
            self._rule.roll_back()
            return
        self._rule.kept = None
        if evaluation is not None:
            self._rule.learn(evaluation, self.tasks, self._device)

    def _is_sum(self) -> bool:
        from torchjd.scalarization import Sum

        return isinstance(self.scalarizer, Sum)

    def _own_state(self) -> dict[str, Any]:
        return {"scalarizer": self._rule.state_dict()}

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        self._rule.load_state_dict(saved["scalarizer"], self._device)


class Rule:
    """Differentiates a scalarizer, keeps its state over skipped steps, and lets it learn."""

    def __init__(self, scalarizer: nn.Module) -> None:
        self.scalarizer = scalarizer
        self.learns_afterwards = callable(getattr(scalarizer, "update", None))
        """Whether it needs the losses after the step, as FAMO does."""
        self.kept: list[dict[str, Any]] | None = None
        """The state before a step that may be skipped."""
        self._needs_graph = False
        self._held: tuple[list[int], list[tuple[Tensor, str | None, Tensor]]] | None = None

    def differentiate(
        self, losses: Tensor, parameters: Iterable[Tensor]
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Returns the scalar at (T,) losses, its derivatives there, and those by the parameters.

        The last are gradients by the id of those of the optimizer's parameters that the rule uses.
        """
        losses = losses.detach().requires_grad_()
        # A caller's autocast region is not meant for the rule.
        with torch.autocast(losses.device.type, enabled=False), losses.device:
            scalar = self.scalarizer(losses)
        held = set(map(id, parameters))
        own = [p for p in self.scalarizer.parameters() if p.requires_grad and id(p) in held]
        slopes, *found = torch.autograd.grad(scalar, [losses, *own], allow_unused=True)
        gradients: list[Tensor | None] = list(found)
        by_id = {id(p): g for p, g in zip(own, gradients, strict=True) if g is not None}
        return scalar.detach(), slopes, by_id

    def learn(self, evaluation: Evaluation, tasks: Iterable[Task], device: torch.device) -> None:
        """Shows the rule the losses, averaged as before, at the weights after the step."""
        evaluation = replace(evaluation, losses=replace(evaluation.losses, needs_graph=False))
        drawn = _random_states(device)
        try:
            with torch.set_grad_enabled(self._needs_graph):
                values = average_losses(evaluation)
        except RuntimeError:
            if self._needs_graph:
                raise
            # A loss with derivatives by its inputs (the residual of an equation) needs a graph.
            # What the failed attempt drew (dropout) is drawn again.
            for restore_state, state in drawn:
                restore_state(state)
            with torch.enable_grad():
                values = average_losses(evaluation)
            self._needs_graph = True
        with torch.autocast(device.type, enabled=False), device:
            losses = _stack(sum_by_task(tasks, values), device)
            self.scalarizer.update(losses)  # type: ignore[operator]  # FAMO's

    def hold(self, absent: Sequence[int], state: Mapping[Tensor, Any]) -> None:
        """Keeps the entries of tasks absent from a whole step, which its update must not move."""
        places = [k for k in absent if self._held is None or k in self._held[0]]
        entries: list[tuple[Tensor, str | None, Tensor]] = []
        for p in self.scalarizer.parameters() if places else ():
            entries.append((p, None, p.detach()[places].clone()))
            for key, value in state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    entries.append((p, key, value[places].clone()))
        self._held = places, entries

    def release(self, state: Mapping[Tensor, Any]) -> None:
        """Restores the entries that were held."""
        places, entries = self._held or ([], [])
        for parameter, key, value in entries:
            (parameter.detach() if key is None else state[parameter][key])[places] = value
        self._held = None

    def keep_state(self) -> None:
        """Keeps the state before a step, unless one is kept already."""
        if self.kept is None:
            self.kept = deepcopy(states_of(self.scalarizer))

    def roll_back(self) -> None:
        """Restores the state that was kept, if any."""
        if self.kept is not None:
            restore(self.scalarizer, self.kept)
            self.kept = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the parameters and the states of the parts."""
        return {
            "parameters": [parameter.detach() for parameter in self.scalarizer.parameters()],
            "states": states_of(self.scalarizer),
            "needs_graph": self._needs_graph,
        }

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        """Loads what :meth:`state_dict` returned."""
        parameters = list(self.scalarizer.parameters())
        shapes = [parameter.shape for parameter in parameters]
        if [value.shape for value in saved["parameters"]] != shapes:
            raise ValueError("`state_dict` must be of the same scalarizer, got other parameters.")
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        restore(self.scalarizer, saved["states"], device)
        self.kept, self._needs_graph = None, saved["needs_graph"]


def _random_states(device: torch.device) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """Returns the states of torch's generators, each with the function that restores it."""
    states: list[Any] = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        states.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))
    return states


def _stack(losses: Mapping[Task, Tensor], device: torch.device) -> Tensor:
    """Returns the losses as a vector, in float32 at least."""
    wide = reduce(torch.promote_types, (loss.dtype for loss in losses.values()), torch.float32)
    return torch.stack([loss.detach().to(device, wide) for loss in losses.values()])
