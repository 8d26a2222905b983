"""Panel: one optimizer per task over the same parameters, shown to torch as one."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer

from mtlopt._base import MultiTaskOptimizer
from mtlopt._build import copied_group, copied_state
from mtlopt._classes import weakly
from mtlopt._follower import Follower, copied
from mtlopt._losses import Task
from mtlopt._passes import drop_zeros, has_compiled


class Panel(MultiTaskOptimizer, Mapping[Task, Optimizer]):
    """A mapping from task to optimizer whose own parameter groups are a control panel."""

    def _lay_out(self, optimizers: dict[Task, Optimizer]) -> None:
        self._optimizers = optimizers
        first = next(iter(optimizers.values()))
        if len(optimizers) > 1 and callable(getattr(first, "eval", None)):
            raise ValueError(
                "`optimizer_class` must not swap the parameters for evaluation when there are "
                f"several tasks, got {type(first).__name__} for {len(optimizers)}: each task's "
                "average would be taken over weights that the other tasks moved."
            )
        self.defaults = copied(first.defaults)
        self.state = defaultdict(dict)
        self.param_groups = [copied_group(group) for group in first.param_groups]
        self._forget_schedulers()
        self._follow([None] * len(optimizers), [None] * len(optimizers))
        self._hook()

    def __getitem__(self, task: Task) -> Optimizer:
        if task not in self._optimizers:
            raise KeyError(f"{task!r} is not among the tasks {list(self.tasks)}")
        return self._optimizers[task]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._optimizers)

    def __len__(self) -> int:
        return len(self._optimizers)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # The control panel.

    def _follow(
        self, overrides: Iterable[list[list[str]] | None], pins: Iterable[list[list[str]] | None]
    ) -> None:
        self._followers = {
            task: Follower(optimizer, self.param_groups, keys, pinned)
            for (task, optimizer), keys, pinned in zip(
                self._optimizers.items(), overrides, pins, strict=True
            )
        }

    def _kept(self) -> dict[str, list[list[list[str]]]]:
        """What each task keeps to itself, by name."""
        followers = self._followers.values()
        return {
            "overrides": [follower.overrides for follower in followers],
            "pins": [follower.pins for follower in followers],
        }

    def _hook(self) -> None:
        """Hooks the tasks' optimizers, so that in every form they follow the panel."""
        for task, optimizer in self._optimizers.items():
            optimizer.register_step_pre_hook(partial(weakly(self._before_update), task))
            optimizer.register_step_post_hook(partial(weakly(self._after_update), task))

    def _before_update(
        self, task: Task, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        self._followers[task].follow(self.param_groups)
        if not self._watch.in_turn and has_compiled():  # The user's own backward pass.
            drop_zeros(self._walk(), but_not_all=True)
        result = None
        for hook in self._optimizer_step_pre_hooks.values():
            changed = hook(optimizer, args, kwargs)
            if changed is not None:
                if not isinstance(changed, tuple):
                    raise TypeError(f"A step pre-hook must return (args, kwargs), got {changed!r}.")
                result = args, kwargs = changed
        if self._optimizer_step_pre_hooks:
            self._followers[task].follow(self.param_groups)  # A hook may have set the panel.
        return result

    def _after_update(self, task: Task, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._followers[task].accept()
        self._opt_called = True  # A scheduler on the panel asks whether a step came first,
        if not self._watch.in_turn:  # and so does one on a task that this batch lacks.
            self._note_step()
        self._watch.in_turn = False
        for hook in self._optimizer_step_post_hooks.values():
            hook(optimizer, args, kwargs)

    def pin(self, task: Task, *names: str) -> None:
        """Keeps a task's hyper-parameters at their present values, whatever the panel does.

        A value set on ``optimizer[task].param_groups`` is kept too, unless it equals the panel's:
        then nothing tells that it was set.

        Args:
            task: One of the tasks.
            *names: Hyper-parameters, such as "lr"; all of them if none is named.

        Raises:
            KeyError: If there is no such task.
            ValueError: If the class has no such hyper-parameter.
        """
        self[task]
        self._followers[task].pin(names, self.param_groups)

    def reset_overrides(self, task: Task) -> None:
        """Lets a task follow the panel again in every hyper-parameter, pinned ones too.

        Args:
            task: One of the tasks.

        Raises:
            KeyError: If there is no such task.
        """
        self[task]
        self._followers[task].reset(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters for every task.

        Args:
            param_group: As torch takes it.
        """
        self._follow_all()
        param_group = copied_group(param_group)
        inner = self._inner_optimizers()
        try:
            for optimizer in inner:
                optimizer.add_param_group(copied_group(param_group))
        except BaseException:
            for optimizer in inner:
                del optimizer.param_groups[len(self.param_groups) :]
            raise
        self.param_groups.append(copied_group(inner[0].param_groups[-1]))
        self._forget_schedulers(slice(-1, None))
        self._follow(**self._kept())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets all gradients to None.

        Args:
            set_to_none: Must be True: with a zero gradient, weight decay would move every head in
                every task's step, and each task's optimizer would hold states for all heads.

        Raises:
            ValueError: If `set_to_none` is False.
        """
        if not set_to_none:
            raise ValueError(
                "`set_to_none` must be True, got False: with zero gradients weight decay would "
                "move every head in every task's step. Call optimizer.zero_grad()."
            )
        super().zero_grad()
        self._watch.changed()

    def train(self) -> None:
        """Puts the task's optimizer in training mode, where it has modes (schedule-free)."""
        self._switch("train")

    def eval(self) -> None:
        """Puts the task's optimizer in evaluation mode, where it has modes (schedule-free)."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        self._follow_all()
        for task, optimizer in self._optimizers.items():
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()
                self._followers[task].accept()

    def _follow_all(self) -> None:
        for follower in self._followers.values():
            follower.follow(self.param_groups)

    def _forget_schedulers(self, groups: slice = slice(None)) -> None:
        # `initial_lr` in a task's own group says that a scheduler is attached to that task alone.
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups[groups]:
                group.pop("initial_lr", None)

    # State, copies and pickles.

    def _inner_optimizers(self) -> list[Optimizer]:
        return list(self._optimizers.values())

    def _collect_state(self) -> dict[str, Any]:
        self._follow_all()
        groups, start = [], 0
        for group in self.param_groups:
            indices = list(range(start, start + len(group["params"])))
            groups.append({**group, "params": indices})
            start += len(indices)
        return {
            "param_groups": groups,
            "mtlopt": {
                "optimizers": [optimizer.state_dict() for optimizer in self._inner_optimizers()],
                **self._kept(),
            },
        }

    def _restore_state(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("mtlopt")
        states = [state_dict] * len(self) if saved is None else saved["optimizers"]
        for optimizer, state in zip(self._inner_optimizers(), states, strict=True):
            # A copy, since torch keeps tensors that it need not cast.
            optimizer.load_state_dict(copied_state(state))
        if saved is None:
            self._forget_schedulers()
        first = self._optimizers[self.tasks[0]].param_groups
        self.param_groups = [
            {**copied_group(own), **copied_group(new), "params": old["params"]}
            for own, new, old in zip(
                first, state_dict["param_groups"], self.param_groups, strict=True
            )
        ]
        nothing = [None] * len(self)
        saved = saved or {}
        self._follow(saved.get("overrides", nothing), saved.get("pins", nothing))

    def __getstate__(self) -> dict[str, Any]:
        self._follow_all()
        return super().__getstate__() | {"_followers": self._kept()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_followers" in state:
            self._follow(**state["_followers"])
            self._hook()
