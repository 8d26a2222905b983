"""MultiTaskOptimizer: the contract with torch, and the one `step()` of all methods."""

import inspect
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtlopt._core.closures import needs_closure
from mtlopt._core.options import Options, check_arguments
from mtlopt._core.state import extras, lasting, load, save
from mtlopt._core.warnings import EMPTY_STEPS, Warnings
from mtlopt._gradients.arithmetic import device_of
from mtlopt._gradients.autograd import Ledger
from mtlopt._gradients.evaluation import Evaluation, Forwards, unscaled
from mtlopt._gradients.losses import (
    SINGLE_PROCESS,
    LossesFunction,
    LossEvaluator,
    Ranks,
    ReadyLosses,
    Task,
    Values,
    check_tasks,
    list_batches,
    names_of,
    sum_tensors,
    weighted,
)
from mtlopt._gradients.ranks import broadcast_parameters, choose_ranks
from mtlopt._gradients.report import Report

if TYPE_CHECKING:
    from mtlopt._core.panel import Panel
    from mtlopt._core.single import Single


class MultiTaskOptimizer(Optimizer):
    """Base of all methods: a `torch.optim.Optimizer` that steps on the losses of several tasks.

    It is abstract, and the type of "any method". State dicts, copies and pickles work as in torch.
    With ``check_finite=True`` a loss that is not finite raises; with "skip" its task is absent from
    the step, and so is one whose gradient is not finite, where gradients are taken one by one. Both
    wait for the device at every step.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> def losses(tasks):
        ...     return {task: (w**2).sum() for task in tasks}
        >>> def decrease(optimizer: mtlopt.MultiTaskOptimizer) -> bool:
        ...     return sum(optimizer.step(losses).values()) > sum(optimizer.step(losses).values())
        >>> base = torch.optim.SGD([w], lr=0.125)
        >>> decrease(mtlopt.PCGrad(base, ["a", "b"])), decrease(mtlopt.JointOptimizer(base, ["a"]))
        (tensor(True), tensor(True))

    References:
        The closure of :meth:`torch.optim.Optimizer.step`, which :meth:`step` generalises.
    """

    warn_of_repeated_step: bool = True
    """Whether `step()` right after `step(losses)`, which does nothing, warns once."""

    generator: torch.Generator | None
    """Source of the method's random numbers, if it draws any; saved in the state dict."""

    _takes_class: ClassVar[bool] = False
    _third: ClassVar[str] = ""  # what follows `tasks` in the line that an error ends in
    _updater: "Single | Panel"
    """Whose update it is: one optimizer for all tasks, or one for each."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `__new__` below would hide it from help() and documentation.
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **options: Any) -> "MultiTaskOptimizer":
        """Refuses wrong arguments before Python does, with the line to write."""
        # Copies and pickles call this without arguments.
        if (args or options) and not cls._takes_class:
            check_arguments(cls, args, options)
        return super().__new__(cls)

    def __init__(self, updater: "Single | Panel", tasks: Iterable[Task], options: Options) -> None:
        # On the instance: Lightning's wrapper looks at the class before it asks the instance.
        self.generator = None
        self._updater = updater
        self._forwards: Forwards = "joint"
        # Whether the method expects a model in DDP, which reduces every backward pass.
        self._model_is_wrapped = False
        self._tasks = check_tasks(tasks)
        self._needs_closure = needs_closure(updater.inner[0])
        options.check(updater.inner[0], self._needs_closure)
        self.scaler, self.check_finite, self.process_group = options
        # Creates torch's tables of hooks. `__init__` would check and hold parameter groups.
        Optimizer.__setstate__(self, {})
        # Changed in place, never replaced: Lightning's wrapper shares an optimizer's attributes.
        self._ledger, self._report, self._warnings = Ledger(), Report(), Warnings()
        self._empty_steps = 0
        updater.connect(self)

    def _patch_step_function(self) -> None:
        # torch would fire the step hooks around `step`, before there is a gradient. Here they fire
        # around each parameter update, the step of a plain optimizer inside.
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the given order; a tuple among them is a group."""
        return self._tasks

    # The step.

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Callable[[], Any] | None = None,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """Takes one step on every task for which the batch has labels.

        Most methods ask for all tasks at once, and update the parameters once. Those that step
        through the tasks ask for one task or group at a time, and update for each.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None; or that mapping itself, for methods that need one
                forward pass. Without `losses`, methods with one update apply the gradients in
                `.grad`, as in torch, unless a step on losses has applied them just before.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, instead of `batch`.
            closure: Without `losses`, what torch's `step` takes, for methods with one update.
            **keywords: Not accepted: a batch is passed by position.

        Returns:
            The present tasks' losses, detached scalars. Without `losses`, what the wrapped
            optimizer returns.

        Raises:
            TypeError: If the arguments do not fit together, or the method.
            ValueError: If a loss is not a scalar with a graph, or belongs to no task. Nothing has
                moved then, except for earlier tasks of a method that steps through them.
        """
        batches = list_batches(losses, batch, micro_batches, keywords)
        if losses is None:
            if batch or micro_batches is not None:
                raise TypeError("`losses` must be given with a batch, got None.")
            return self._step_on_grads(closure)  # type: ignore[no-any-return]  # torch's value
        self._check_losses(losses, closure)
        self._mark_as_stepped()
        evaluation = self._evaluation(losses, batches)
        values = self._take_step(evaluation)
        self._ledger.mark(evaluation.parameters, "applied")
        self._empty_steps = 0 if values else self._empty_steps + 1
        if self._empty_steps == EMPTY_STEPS:
            self._warnings.warn("empty", str(list(self.tasks)))
        if self._report.mistakes:
            self._warn_of_mistakes()
        return values

    @abstractmethod
    def _take_step(self, evaluation: Evaluation) -> Values:
        """Updates the parameters and returns the present tasks' losses."""

    @abstractmethod
    def _step_on_grads(self, closure: Callable[[], Any] | None) -> Any:
        """Handles `step()` without losses."""

    @abstractmethod
    def _check_losses(self, losses: object, closure: object) -> None:
        """Refuses kinds of losses, and a closure, that do not fit the method."""

    def _weights_by_name(self) -> Mapping[str, float | Tensor]:
        """Returns the weights of the losses in the objective; a name left out has weight 1."""
        return {}

    def _objective(self, values: Values) -> Tensor:
        """Returns the value whose gradient is taken, for line-search optimizers (LBFGS)."""
        weights = self._weights_by_name()
        return sum_tensors([weighted(loss, weights.get(n, 1.0)) for n, loss in values.items()])

    @abstractmethod
    def diagnostics(self) -> dict[str, Tensor]:
        """Returns what the last step saw, as tensors ready for a logger.

        With ``check_finite="skip"`` also ``skipped`` (T,), which tasks it left out for that.
        """

    def _skipped(self) -> dict[str, Tensor]:
        if self.check_finite != "skip":
            return {}
        lost = [not self._report.skipped.isdisjoint(names_of(task)) for task in self._tasks]
        return {"skipped": torch.tensor(lost, device="cpu")}

    def _evaluation(
        self,
        losses: object,
        batches: list[tuple[Any, ...]],
        prescaled: bool = False,
        retain_graph: bool = False,
    ) -> Evaluation:
        """Returns what takes a step's gradients; `prescaled` losses were scaled by the user."""
        # Frozen parameters too: `losses` may freeze and unfreeze between tasks.
        parameters = self._parameters
        scaling = self._scaling
        self._report.skipped.clear()
        return Evaluation(
            LossEvaluator(losses, names_of(*self._tasks), self.check_finite),
            self._tasks,
            batches,
            parameters,
            self._choose_ranks(parameters),
            self._report,
            self._forwards,
            prescaled,
            retain_graph,
            unscaled if prescaled or scaling is None else scaling.scale,
        )

    def _choose_ranks(self, parameters: Sequence[Tensor]) -> Ranks:
        # At every step, because frameworks name the process group after construction.
        if self.process_group is None and not (dist.is_available() and dist.is_initialized()):
            return SINGLE_PROCESS
        return choose_ranks(parameters, self.process_group, self._model_is_wrapped)

    def _was_applied(self) -> bool:
        """Returns whether `step()` found gradients that `step(losses)` applied; warns then."""
        status = self._ledger.status(self._parameters)
        if self.warn_of_repeated_step and status in ("applied", "changed"):
            self._warnings.warn(status)
        return status == "applied"

    def _warn_of_mistakes(self) -> None:
        while self._report.mistakes:
            self._warnings.warn(*self._report.mistakes.pop(0))

    def _after_update(self, *_: Any) -> None:
        # A scheduler on this optimizer asks whether a step came first, also one of the base's.
        self._opt_called = True

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Registers a hook that is called before each update, with the optimizer that updates.

        Args:
            hook: As torch takes it: ``hook(optimizer, args, kwargs)``.
        """
        return Optimizer.register_step_pre_hook(self._updater.hooked or self, hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Registers a hook that is called after each update, with the optimizer that updates.

        Args:
            hook: As torch takes it: ``hook(optimizer, args, kwargs)``.
        """
        return Optimizer.register_step_post_hook(self._updater.hooked or self, hook)

    def _mark_as_stepped(self) -> None:
        # A scheduler on an inner optimizer asks whether a step came first. It did, even for a task
        # without labels in this batch.
        for inner in self._updater.inner:
            inner._opt_called = True  # type: ignore[attr-defined]  # torch sets it from outside

    # Mixed precision.

    @property
    def _scaling(self) -> torch.amp.GradScaler | None:
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    def _unscale(self, optimizer: Optimizer) -> Tensor | None:
        """Unscales the gradients; returns whether any overflowed, on their device."""
        if self._scaling is None:
            return None
        self._scaling.unscale_(optimizer)
        # The scaler's private record, because asking for the flag would wait for the device; it is
        # not offered otherwise: https://github.com/pytorch/pytorch/issues/152279.
        found = self._scaling._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        flags = list(found.values())
        if not flags:  # None of the parameters has a gradient.
            return None
        return torch.stack([flag.to(flags[0].device) for flag in flags]).sum() > 0

    # The contract with torch.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups that schedulers and users change."""
        return self._updater.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._updater.assign_groups(groups)

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]  # an attribute in torch
        """The wrapped optimizer's state; empty where each task has its own optimizer."""
        return self._updater.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute in torch
        """The defaults of the class of optimizer."""
        return self._updater.defaults

    @property
    def _parameters(self) -> list[Tensor]:
        groups = self._updater.param_groups
        return list(dict.fromkeys(p for group in groups for p in group["params"]))

    @property
    def _device(self) -> torch.device:
        return device_of(self._parameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, for every task, with the first rank's values.

        Args:
            param_group: As torch takes it.
        """
        self._updater.add_param_group(param_group)
        if not self._model_is_wrapped:  # As DDP does for a model that it wraps.
            broadcast_parameters(self.param_groups[-1]["params"], self.process_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients.

        Args:
            set_to_none: Whether they become None, or zero. IndependentOptimizer refuses zeros.
        """
        self._updater.zero_grad(set_to_none=set_to_none)
        self._ledger.reset()

    def train(self) -> None:
        """Switches to training mode, where the class has modes (schedule-free)."""
        self._updater.set_mode("train")

    def eval(self) -> None:
        """Switches to evaluation mode, where the class has modes (schedule-free)."""
        self._updater.set_mode("eval")

    def _own_state(self) -> dict[str, Any]:
        """Returns what the method saves in the entry `mtlopt`."""
        return {}

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        """Restores what :meth:`_own_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state as plain containers and tensors.

        It loads with ``torch.load(..., weights_only=True)`` and resumes bit for bit.
        """
        return save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; a load that fails changes nothing.

        The state dict of a plain optimizer of the same class is accepted too: the wrapped
        optimizer loads it, or every task's optimizer.

        Args:
            state_dict: State of the same method, tasks, optimizer class and parameters.

        Raises:
            ValueError: If the state belongs to something else.
        """
        load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return lasting(vars(self)) | {"extras": [extras(inner) for inner in self._updater.inner]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner_extras = state.pop("extras", ())
        super().__setstate__(state)
        for inner, attributes in zip(self._updater.inner, inner_extras, strict=True):
            for name, value in attributes.items():
                vars(inner).setdefault(name, value)
        self._updater.connect(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MultiTaskOptimizer":
        # A copy talks to the same ranks: a process group can be neither copied nor pickled.
        memo[id(self.process_group)] = self.process_group
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        copy._ledger.copied(copy._parameters)
        return copy
