"""Follower: keeps one task's hyper-parameters in step with the control panel's."""

from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._core.state import NOT_OPTIONS, copied

Groups = list[dict[str, Any]]
KINDS = ("overrides", "pins", "adapted")
"""Reasons to keep a hyper-parameter: set for the task, to stay so at any value, or by a step."""


def fingerprint(value: Any) -> Any:
    """Returns a value that differs once a hyper-parameter has changed."""
    if isinstance(value, Tensor):
        # Comparing numbers would wait for the device. The tensor is kept for its id to be unique.
        return id(value), value._version, value
    if isinstance(value, (tuple, list)):
        return [fingerprint(item) for item in value]
    return value


class _Snapshot:
    """Remembers a group's hyper-parameters, to tell whether they have changed."""

    def __init__(self, group: dict[str, Any], keys: list[str]) -> None:
        self.marks = {key: fingerprint(group[key]) for key in keys}
        self._get = itemgetter("params", "params", *keys)  # Several, to get a tuple.
        self._values = self._get(group)
        self._immutable = all(_is_immutable(group[key]) for key in keys)

    def holds(self, group: dict[str, Any]) -> bool:
        """Returns whether every value is the same object, a quick test that suffices mostly."""
        return self._immutable and all(map(is_, self._get(group), self._values))


def _is_immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_immutable(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _is_option(key: str, value: Any) -> bool:
    items = value if isinstance(value, (tuple, list)) else [value]
    return key not in NOT_OPTIONS and all(isinstance(v, Tensor) or _is_immutable(v) for v in items)


class Follower:
    """Copies changes in the panel's groups to one task's groups, except for overrides.

    A value that differs from the one copied last was set by the user, or by a scheduler on the
    task's own optimizer: an override, which stays until :meth:`reset`. A change that the
    optimizer itself makes during a step (a counter in its groups, a rate that it adapts) is not
    one, and is never overwritten.
    """

    def __init__(self, own: Optimizer, panel: Groups, kept: Mapping[str, list[list[str]]]) -> None:
        self.own = own
        self._kept = {
            kind: [set(names) for names in found + [[]] * (len(panel) - len(found))]
            for kind, found in ((kind, kept.get(kind, [])) for kind in KINDS)
        }
        self._overrides, self._pins, self._adapted = self._kept.values()
        self._parameters = [list(group["params"]) for group in panel]
        # Some classes have options in their groups that are not among their defaults.
        self._keys = [
            [
                key
                for key, value in group.items()
                if key in source and (key in own.defaults or _is_option(key, value))
            ]
            for group, source in zip(own.param_groups, panel, strict=True)
        ]
        self._ignored = False
        self._had_initial = ["initial_lr" in group for group in own.param_groups]
        self._panel = [_Snapshot(*pair) for pair in zip(panel, self._keys, strict=True)]
        self._given = [_Snapshot(*pair) for pair in zip(own.param_groups, self._keys, strict=True)]

    def kept(self, kind: str) -> list[list[str]]:
        """Returns for each group the names that are not taken from the panel for one reason."""
        return [sorted(names) for names in self._kept[kind]]

    def pin(self, keys: Iterable[str], panel: Groups) -> None:
        """Keeps hyper-parameters at their present values."""
        self.follow(panel)
        wanted = set(keys)
        known = set().union(*self._keys)
        if not wanted <= known:
            raise ValueError(
                f"`names` must be among the hyper-parameters {sorted(known)}, "
                f"got {sorted(wanted - known)}."
            )
        for i, own in enumerate(self._keys):
            self._pins[i] |= (wanted or known) & set(own)
            self._overrides[i] |= self._pins[i]

    def accept(self) -> None:
        """Accepts what the optimizer wrote to its own groups: no override."""
        for i, (group, given) in enumerate(zip(self.own.param_groups, self._given, strict=True)):
            if not given.holds(group):
                self._given[i] = now = _Snapshot(group, self._keys[i])
                self._adapted[i] |= {k for k, mark in now.marks.items() if mark != given.marks[k]}

    def follow(self, panel: Groups) -> None:
        """Copies what has changed in the panel since the last call."""
        if not len(panel) == len(self.own.param_groups) == len(self._given):
            raise ValueError(
                f"A task's optimizer must have the panel's {len(panel)} parameter groups, "
                f"got {len(self.own.param_groups)}: add groups to the panel, for all tasks."
            )
        for i, (source, own) in enumerate(zip(panel, self.own.param_groups, strict=True)):
            given, before = source["params"], self._parameters[i]
            if len(given) != len(before) or not all(map(is_, given, before)):
                self._replace(i, source["params"], own)
            # A scheduler is attached to this task alone; torch's wrap `step`, others may not.
            if ("initial_lr" in own and not self._had_initial[i]) or (
                "step" in vars(self.own)
                and not self._ignored
                and hasattr(self.own.step, "_wrapped_by_lr_sched")
            ):
                self._overrides[i].add("lr")
            if not (self._given[i].holds(own) and self._panel[i].holds(source)):
                self._follow_group(i, source, own)

    def _replace(self, i: int, parameters: Sequence[Tensor], own: dict[str, Any]) -> None:
        """Takes over parameters that replaced the panel's, one by one."""
        before = self._parameters[i]
        if len(parameters) != len(before):
            raise ValueError(
                f"Parameter group {i} must keep its {len(before)} parameters, though each may be "
                f"replaced, got {len(parameters)}: add parameters with `add_param_group`."
            )
        swapped = {
            id(old): new for old, new in zip(before, parameters, strict=True) if new is not old
        }
        # In place, because LBFGS keeps a reference to the list.
        own["params"][:] = [swapped.get(id(old), old) for old in own["params"]]
        kept = set(map(id, parameters))
        for old in before:
            if id(old) not in kept:
                self.own.state.pop(old, None)
        self._parameters[i] = list(parameters)

    def _follow_group(self, i: int, source: dict[str, Any], own: dict[str, Any]) -> None:
        given, seen = self._given[i].marks, self._panel[i].marks
        for key in self._keys[i]:
            if (mark := fingerprint(own[key])) != given[key]:
                # Set back to the panel's value it follows again: torch.distributed.checkpoint sets
                # the learning rate to 0 for one step.
                follows = mark == fingerprint(source[key]) and key not in self._pins[i]
                (self._overrides[i].discard if follows else self._overrides[i].add)(key)
            fixed = key in self._overrides[i] or key in self._adapted[i]
            if not fixed and fingerprint(source[key]) != seen[key]:
                _give(own, key, source[key])
        self._given[i] = _Snapshot(own, self._keys[i])
        self._panel[i] = _Snapshot(source, self._keys[i])

    def reset(self, panel: Groups) -> None:
        """Copies the panel's values over all overrides."""
        self.follow(panel)
        for i, (source, own) in enumerate(zip(panel, self.own.param_groups, strict=True)):
            for key in self._overrides[i] - self._adapted[i]:
                _give(own, key, source[key])
            self._overrides[i].clear()
            self._pins[i].clear()
            self._given[i] = _Snapshot(own, self._keys[i])
        # A scheduler that is still attached is an override only once it changes something.
        self._ignored = hasattr(self.own.step, "_wrapped_by_lr_sched")
        self._had_initial = ["initial_lr" in group for group in self.own.param_groups]


def _give(own: dict[str, Any], key: str, value: Any) -> None:
    held = own[key]
    if isinstance(value, Tensor) and isinstance(held, Tensor) and held.shape == value.shape:
        # In place, because compiled and captured steps keep a reference to the tensor.
        with torch.no_grad():
            held.copy_(value)
    else:
        own[key] = copied(value)
