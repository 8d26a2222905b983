"""Saved: torch's promises about state dicts, copies and pickles, kept for all methods."""

from abc import abstractmethod
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from mtlopt._classes import check_class
from mtlopt._watch import Watch

FORMAT = 1
"""Version of the entry `mtlopt` in state dicts."""


class Saved(Optimizer):
    """An optimizer made of plain ones, which saves, loads and copies them with what is its own."""

    tasks: Any
    generator: torch.Generator | None
    """What the method draws from, if it draws; saved in the state dict."""
    process_group: dist.ProcessGroup | None
    _watch: Watch

    @abstractmethod
    def _inner_optimizers(self) -> list[Optimizer]:
        """The plain optimizers that move the parameters."""

    @abstractmethod
    def _collect_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore_state(self, state_dict: dict[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state as plain containers and tensors.

        It loads with ``torch.load(..., weights_only=True)`` and resumes bit for bit.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._collect_state()
        state["mtlopt"] = self._identity() | state["mtlopt"] | self._own_state()
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
            own = state_dict.get("mtlopt", {})
            self._restore_own_state(own)
            if self.generator is not None and own.get("generator") is not None:
                # A generator's state stays on the CPU, wherever `map_location` put it.
                self.generator.set_state(own["generator"].cpu())
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

    def _own_state(self) -> dict[str, Any]:
        """What a kind of method saves beside its optimizers' states."""
        return {}

    def _restore_own_state(self, own: dict[str, Any]) -> None:
        """Takes from the entry `mtlopt` what an older one may lack."""

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

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if _lasts(name)}
        return state | {"extras": [extras(inner) for inner in self._inner_optimizers()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        extras = state.pop("extras", ())
        super().__setstate__(state)
        for inner, attributes in zip(self._inner_optimizers(), extras, strict=True):
            for name, value in attributes.items():
                vars(inner).setdefault(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Saved":
        # A copy talks to the same ranks: a process group can be neither copied nor pickled.
        memo[id(self.process_group)] = self.process_group
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        copy._watch.copied([p for group in copy.param_groups for p in group["params"]])
        return copy


def extras(optimizer: Optimizer) -> dict[str, Any]:
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
