"""Follower: how one task's hyper-parameters follow those of the control panel."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Groups = list[dict[str, Any]]


class _Version:
    """A tensor as it was: equal to itself until it is written to or replaced.

    Comparing the numbers would force a synchronisation with the device.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Version)
            and self.tensor is other.tensor
            and self.version == other.version
        )

    __hash__ = None  # type: ignore[assignment]  # compared, never looked up


def fingerprint(value: Any) -> Any:
    """Returns what tells later whether a hyper-parameter has changed."""
    if isinstance(value, Tensor):
        return _Version(value)
    if isinstance(value, (tuple, list)):
        return [fingerprint(item) for item in value]
    return value


def copied(value: Any) -> Any:
    """Copies a hyper-parameter, with the tensors in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


class Follower:
    """Passes on to one task's groups what changes in the panel's, but for overrides.

    A value that differs from what the follower gave was set by the user (or a scheduler on the
    task's own optimizer): an override, which stays until :meth:`reset`. What the optimizer itself
    changes during a step (a counter that it keeps in its groups) is not one.
    """

    def __init__(self, own: Optimizer, panel: Groups, overrides: list[list[str]] | None = None):
        self.own = own
        overrides = overrides or []
        self._overrides = [set(keys) for keys in overrides + [[]] * (len(panel) - len(overrides))]
        self._keys = [[k for k in group if k in own.defaults] for group in own.param_groups]
        self._panel: list[dict[str, Any]] = [self._snapshot(panel[i], i) for i in range(len(panel))]
        self._given: list[dict[str, Any]] = []
        self.accept()

    @property
    def overrides(self) -> list[list[str]]:
        """Names of the overridden hyper-parameters of each group."""
        return [sorted(keys) for keys in self._overrides]

    def _snapshot(self, group: dict[str, Any], i: int) -> dict[str, Any]:
        return {key: fingerprint(group[key]) for key in self._keys[i] if key in group}

    def accept(self) -> None:
        """Takes the task's present values for given, after the optimizer wrote to them."""
        self._given = [self._snapshot(group, i) for i, group in enumerate(self.own.param_groups)]

    def follow(self, panel: Groups) -> None:
        """Copies what changed in the panel since the last time."""
        if not len(panel) == len(self.own.param_groups) == len(self._given):
            raise ValueError(
                f"A task's optimizer must have the panel's {len(panel)} parameter groups, "
                f"got {len(self.own.param_groups)}: add groups to the panel, for all tasks."
            )
        for i, (source, own) in enumerate(zip(panel, self.own.param_groups, strict=True)):
            given, seen, overrides = self._given[i], self._panel[i], self._overrides[i]
            if "initial_lr" in own:  # A scheduler is attached to this task alone.
                overrides.add("lr")
            for key in self._keys[i]:
                if key not in overrides and fingerprint(own[key]) != given[key]:
                    overrides.add(key)
                mark = fingerprint(source[key])
                if mark != seen[key]:
                    seen[key] = mark
                    if key not in overrides:
                        self._give(own, key, source[key])
                        given[key] = fingerprint(own[key])

    def reset(self, panel: Groups) -> None:
        """Gives overridden hyper-parameters the panel's values again."""
        self.follow(panel)
        for i, (source, own) in enumerate(zip(panel, self.own.param_groups, strict=True)):
            own.pop("initial_lr", None)
            for key in self._overrides[i]:
                self._give(own, key, source[key])
                self._given[i][key] = fingerprint(own[key])
            self._overrides[i].clear()

    @staticmethod
    def _give(own: dict[str, Any], key: str, value: Any) -> None:
        held = own[key]
        if isinstance(value, Tensor) and isinstance(held, Tensor) and held.shape == value.shape:
            # In place: compiled and captured steps hold on to the tensor.
            with torch.no_grad():
                held.copy_(value)
        else:
            own[key] = copied(value)
