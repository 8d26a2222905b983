"""MultiTaskOptimizer: what every method shares, in one contract with torch."""

from abc import abstractmethod
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._classes import check_class, needs_closure
from mtlopt._distributed import broadcast_parameters, is_sharded
from mtlopt._losses import LossesFunction, ReadyLosses, Task, check_tasks

FORMAT = 1
"""Version of the entry `mtlopt` in state dicts."""


class MultiTaskOptimizer(Optimizer):
    """Base of all methods: a `torch.optim.Optimizer` that steps on the losses of several tasks.

    Not to be instantiated; it fixes the protocol, :meth:`step`, and keeps torch's promises about
    state dicts, copies and pickles for the methods. It is the type of "any method".

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

    generator: torch.Generator | None
    """What the method draws from, if it draws; saved in the state dict."""

    def __init__(
        self,
        tasks: Iterable[Task],
        *,
        scaler: torch.amp.GradScaler | None,
        check_finite: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._tasks = check_tasks(tasks)
        self.generator = None
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"`scaler` must be a torch.amp.GradScaler, got {scaler!r}.")
        self.scaler = scaler
        self.check_finite = check_finite
        self.process_group = process_group
        # Sets up torch's tables of hooks; parameters are the methods' own business.
        super().__setstate__({})
        inner = self._inner_optimizers()[0]
        self._needs_closure = needs_closure(inner)
        if self._needs_closure and (scaler is not None or process_group is not None):
            raise ValueError(
                "`scaler` and `process_group` must be None for a class that needs a closure, "
                f"got {type(inner).__name__}."
            )

    def _patch_step_function(self) -> None:
        # torch would fire the step hooks around `step`, before any gradient is there. Here they
        # fire around each parameter update, which is a step of a plain optimizer inside.
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order given; a tuple among them is a group."""
        return self._tasks

    @abstractmethod
    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Any = None,
    ) -> dict[str, Tensor]:
        """Takes one step on every task that the batch has labels for.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: For torch's signature.

        Returns:
            The present tasks' losses, detached scalars.
        """

    @abstractmethod
    def diagnostics(self) -> dict[str, Tensor]:
        """Returns what the last step saw, as tensors ready for a logger."""

    @abstractmethod
    def _inner_optimizers(self) -> list[Optimizer]:
        """The plain optimizers that move the parameters."""

    @property
    def _parameters(self) -> list[Tensor]:
        each = dict.fromkeys(p for group in self.param_groups for p in group["params"])
        return [p for p in each if p.requires_grad]

    @property
    def _device(self) -> torch.device:
        return cast(torch.device, self.param_groups[0]["params"][0].device)

    def _broadcast(self, groups: list[dict[str, Any]]) -> None:
        parameters = [p for group in groups for p in group["params"]]
        if self.process_group is not None and not is_sharded(parameters):
            broadcast_parameters(parameters, self.process_group)

    def _note_step(self) -> None:
        # A scheduler on an inner optimizer asks whether a step came first. It did, even where the
        # batch lacked the labels.
        for inner in self._inner_optimizers():
            inner._opt_called = True  # type: ignore[attr-defined]  # torch sets it from outside

    # Mixed precision.

    @property
    def _scaling(self) -> torch.amp.GradScaler | None:
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self._scaling is None else self._scaling.scale(loss)

    def _unscale(self, optimizer: Optimizer) -> Tensor | None:
        """Unscales the gradients; returns whether any overflowed, on their device."""
        if self._scaling is None:
            return None
        self._scaling.unscale_(optimizer)
        # The scaler's own record, not public: asking for it forces no synchronisation.
        found = self._scaling._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        flags = list(found.values())
        if not flags:  # No gradient of the optimizer's parameters.
            return None
        return torch.stack([flag.to(flags[0].device) for flag in flags]).sum() > 0

    # State dicts: torch's hooks around each method's own collecting and restoring.

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state as plain containers and tensors.

        It loads with ``torch.load(..., weights_only=True)`` and resumes bit for bit.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._collect_state()
        state["mtlopt"] = self._identity() | state["mtlopt"]
        if self.generator is not None:
            state["mtlopt"]["generator"] = self.generator.get_state()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; a load that fails changes nothing.

        The state dict of a plain optimizer of the same class is accepted too: the wrapped
        optimizer takes it, or every task's optimizer.

        Args:
            state_dict: State of the same method, tasks, optimizer class and parameters.

        Raises:
            ValueError: If the state belongs to something else.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        owners = (self, *self._inner_optimizers())
        kept = [dict(vars(owner)) for owner in owners]
        drawn = None if self.generator is None else self.generator.get_state()
        try:
            self._check_state(state_dict)
            self._restore_state(state_dict)
            saved = state_dict.get("mtlopt", {}).get("generator")
            if self.generator is not None and saved is not None:
                # A generator's state stays on the CPU, wherever `map_location` put it.
                self.generator.set_state(saved.cpu())
        except BaseException as error:
            for owner, attributes in zip(owners, kept, strict=True):
                vars(owner).clear()
                vars(owner).update(attributes)
            if self.generator is not None and drawn is not None:
                self.generator.set_state(drawn)
            if isinstance(error, (AttributeError, IndexError, KeyError, TypeError)):
                raise ValueError(f"`state_dict` must be whole, got one with {error!r}.") from error
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @abstractmethod
    def _collect_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore_state(self, state_dict: dict[str, Any]) -> None: ...

    def _identity(self) -> dict[str, Any]:
        """What a saved state must have in common with the optimizer that loads it."""
        return {
            "format": FORMAT,
            "method": type(self).__name__,
            # Plain strings, whatever subclass the names are: a file is loaded with weights only.
            "tasks": [
                "".join(task) if isinstance(task, str) else tuple(map("".join, task))
                for task in self.tasks
            ],
            "optimizer": type(self._inner_optimizers()[0]).__qualname__,
            "shapes": [[list(p.shape) for p in group["params"]] for group in self.param_groups],
        }

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        if "param_groups" not in state_dict or not ({"state", "mtlopt"} & state_dict.keys()):
            raise ValueError(
                "`state_dict` must have the entries `param_groups` and `state` or `mtlopt`, "
                f"got {sorted(map(str, state_dict))}."
            )
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        expected = [len(group["params"]) for group in self.param_groups]
        if sizes != expected:
            raise ValueError(
                "`state_dict` must be of the same parameters: groups of "
                f"{expected} parameters, got groups of {sizes}."
            )
        saved = state_dict.get("mtlopt")
        if saved is None:
            check_class(self._inner_optimizers()[0], state_dict["param_groups"])
            return
        for entry, value in self._identity().items():
            if _as_lists(saved.get(entry)) != _as_lists(value):
                raise ValueError(
                    f"`state_dict` must be of the same {entry}: {value}, got {saved.get(entry)}."
                )
        if self.generator is not None:
            saved["generator"].cpu()

    # Copies and pickles.

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if _lasts(name)}
        return state | {"extras": [_extras(inner) for inner in self._inner_optimizers()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        extras = state.pop("extras", ())
        super().__setstate__(state)
        for inner, attributes in zip(self._inner_optimizers(), extras, strict=True):
            for name, value in attributes.items():
                vars(inner).setdefault(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MultiTaskOptimizer":
        # A copy talks to the same ranks: a process group can be neither copied nor pickled.
        memo[id(self.process_group)] = self.process_group
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        return copy


def _extras(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes that torch's own `__getstate__` drops, without which LBFGS is of no use."""
    kept = optimizer.__getstate__()
    return {name: value for name, value in vars(optimizer).items() if _lasts(name) - kept.keys()}


def _lasts(name: str) -> set[str]:
    # As in torch, a copy carries no hooks, and not the `step` that a scheduler patches in.
    return set() if name == "step" or name.startswith("_optimizer_") else {name}


def _as_lists(value: Any) -> Any:
    # Containers that went through a file or another library may come back as the other kind.
    if isinstance(value, (tuple, list)):
        return [_as_lists(item) for item in value]
    return value
