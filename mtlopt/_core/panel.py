"""Panel: one optimizer per task over the same parameters, with common parameter groups."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from mtlopt._core.followers import KINDS, Follower
from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt._core.single import weak_hook
from mtlopt._core.state import SCHEDULERS, copied, copied_group, copied_state
from mtlopt._gradients.autograd import drop_zeros, has_compiled
from mtlopt._gradients.losses import Task

Keys = list[list[list[str]]]
"""For each task and each parameter group, names of hyper-parameters."""


class Panel:
    """Updates each task with its own optimizer; its parameter groups are a control panel.

    Each task's optimizer follows the panel: before an update it takes what has changed there.
    """

    hooked = None
    """None, because step hooks are the owner's: the panel calls them around each task's update."""

    def __init__(self, optimizers: dict[Task, Optimizer]) -> None:
        self.optimizers = optimizers
        self.inner = list(optimizers.values())
        first = self.inner[0]
        if len(optimizers) > 1 and callable(getattr(first, "eval", None)):
            raise ValueError(
                "`optimizer_class` must not swap the parameters for evaluation when there are "
                f"several tasks, got {type(first).__name__} for {len(optimizers)}: each task's "
                "average would be taken over weights that the other tasks moved."
            )
        self.defaults: dict[str, Any] = copied(first.defaults)
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.param_groups = [copied_group(group) for group in first.param_groups]
        self._in_turn = False
        self._follow({})

    @contextmanager
    def turn(self, task: Task) -> Iterator[Optimizer]:
        """Yields the task's optimizer for its update in a step on losses."""
        self._in_turn = True
        try:
            yield self.optimizers[task]
        finally:
            self._in_turn = False

    # Following.

    def _follow(self, kept: Mapping[str, Keys]) -> None:
        self._followers = {
            task: Follower(optimizer, self.param_groups, {k: keys[i] for k, keys in kept.items()})
            for i, (task, optimizer) in enumerate(self.optimizers.items())
        }

    def _kept(self) -> dict[str, Keys]:
        """Returns the names of what each task does not take from the panel."""
        return {kind: [own.kept(kind) for own in self._followers.values()] for kind in KINDS}

    def _follow_now(self) -> None:
        for follower in self._followers.values():
            follower.follow(self.param_groups)

    def pin(self, task: Task, names: Iterable[str]) -> None:
        """Keeps hyper-parameters of a task at their present values."""
        self._followers[task].pin(names, self.param_groups)

    def reset(self, task: Task) -> None:
        """Lets a task follow the panel in every hyper-parameter."""
        self._followers[task].reset(self.param_groups)

    # Hooks on the tasks' optimizers: they follow the panel in every form of a step.

    def connect(self, owner: MultiTaskOptimizer) -> None:
        """Calls the owner's step hooks around every update of a task."""
        self._owner = ref(owner)
        for task, optimizer in self.optimizers.items():
            optimizer.register_step_pre_hook(partial(weak_hook(self._before_update), task))
            optimizer.register_step_post_hook(partial(weak_hook(self._after_update), task))

    def _before_update(
        self, task: Task, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        self._followers[task].follow(self.param_groups)
        if not self._in_turn and has_compiled():  # After the user's own backward pass.
            drop_zeros((p for group in self.param_groups for p in group["params"]), True)
        owner, result = self._owner(), None
        hooks = () if owner is None else owner._optimizer_step_pre_hooks.values()
        for hook in hooks:
            changed = hook(optimizer, args, kwargs)
            if changed is not None:
                if not isinstance(changed, tuple):
                    raise TypeError(f"A step pre-hook must return (args, kwargs), got {changed!r}.")
                result = args, kwargs = changed
        if hooks:
            self._followers[task].follow(self.param_groups)  # A hook may have changed the panel.
        return result

    def _after_update(self, task: Task, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._followers[task].accept()
        owner = self._owner()
        if owner is None:
            return
        owner._opt_called = True  # A scheduler asks whether a step came first.
        if not self._in_turn:  # A scheduler on a task without labels asks for a step too.
            owner._mark_as_stepped()
        for hook in owner._optimizer_step_post_hooks.values():
            hook(optimizer, args, kwargs)

    # The contract with torch.

    def assign_groups(self, groups: list[dict[str, Any]]) -> None:
        """Replaces the groups, and adds those that come after the present ones, for every task."""
        self._follow_now()
        held = self.param_groups
        sizes = [len(group["params"]) for group in held]
        given = [{**group, "params": list(group["params"])} for group in groups]
        if [len(group["params"]) for group in given[: len(held)]] != sizes:
            raise ValueError(
                f"`param_groups` must begin with groups of {sizes} parameters, got groups of "
                f"{[len(group['params']) for group in given]}."
            )
        self.param_groups = [{**old, **new} for old, new in zip(held, given, strict=False)]
        self._follow_now()
        for group in given[len(held) :]:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group for every task, or, if that fails, for none."""
        self._follow_now()
        param_group = copied_group(param_group)
        try:
            for optimizer in self.inner:
                optimizer.add_param_group(copied_group(param_group))
        except BaseException:
            for optimizer in self.inner:
                del optimizer.param_groups[len(self.param_groups) :]
            raise
        self.param_groups.append(copied_group(self.inner[0].param_groups[-1]))
        self._follow(self._kept())

    def zero_grad(self, set_to_none: bool) -> None:
        """Sets all gradients to None; zeros would let weight decay move other heads."""
        if not set_to_none:
            raise ValueError(
                "`set_to_none` must be True, got False: with zero gradients weight decay would "
                "move every head in every task's step. Call optimizer.zero_grad(), or set the "
                "framework's option: `optim_set_to_none=True` in MONAI."
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def set_mode(self, mode: str) -> None:
        self._follow_now()
        for task, optimizer in self.optimizers.items():
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()
                self._followers[task].accept()

    def state_dict(self) -> dict[str, Any]:
        self._follow_now()
        place = count()
        groups = [{**g, "params": [next(place) for _ in g["params"]]} for g in self.param_groups]
        optimizers = [optimizer.state_dict() for optimizer in self.inner]
        return {"param_groups": groups, "mtlopt": {"optimizers": optimizers, **self._kept()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("mtlopt")
        states = [state_dict] * len(self.inner) if saved is None else saved["optimizers"]
        for optimizer, state in zip(self.inner, states, strict=True):
            # A copy, since torch keeps tensors that it need not cast.
            optimizer.load_state_dict(copied_state(state))
        # Options that an older release did not save come from a task, without its scheduler's.
        self.param_groups = [
            {key: value for key, value in copied_group(own).items() if key not in SCHEDULERS}
            | {**copied_group(new), "params": old["params"]}
            for own, new, old in zip(
                self.inner[0].param_groups,
                state_dict["param_groups"],
                self.param_groups,
                strict=True,
            )
        ]
        self._follow({kind: saved[kind] for kind in KINDS if saved and kind in saved})

    def __getstate__(self) -> dict[str, Any]:
        self._follow_now()
        lasting = {n: v for n, v in vars(self).items() if n not in ("_followers", "_owner")}
        return lasting | {"kept": self._kept()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("kept")
        vars(self).update(state)
        self._follow(kept)
