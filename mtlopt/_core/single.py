"""Single: one optimizer that updates the parameters for all tasks."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

from torch import Tensor
from torch.optim import Optimizer

from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt._gradients.losses import Task


class Single:
    """Updates every task with one optimizer, and shows its groups and state as they are."""

    def __init__(self, optimizer: Optimizer, method: str) -> None:
        check_plain(optimizer, f"{method}(torch.optim.Adam(params, lr=...), tasks)")
        # Its own hooks fire around each update.
        self.base = self.hooked = optimizer
        self.inner = [optimizer]
        self._turns: dict[Task, _Turn] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def assign_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    def connect(self, owner: MultiTaskOptimizer) -> None:
        """Tells the owner of every update."""
        self.base.register_step_post_hook(weak_hook(owner._after_update))

    @contextmanager
    def turn(self, task: Task) -> Iterator[Optimizer]:
        """Yields the optimizer for one task's update."""
        # As a separate object per task: a scaler allows one step per object and update
        # (https://github.com/pytorch/pytorch/pull/26512).
        turn: Any = self._turns.setdefault(task, _Turn(self.base))
        yield turn

    def set_mode(self, mode: str) -> None:
        getattr(self.base, mode, lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.base.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "mtlopt"})


class _Turn:
    """Stands for the optimizer in one task's turn."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._base.param_groups

    def step(self, *args: Any) -> Any:
        return self._base.step(*args)


def check_plain(optimizer: object, remedy: str) -> None:
    """Refuses an argument that is no plain optimizer, or one that hooks into backward passes."""
    name = type(optimizer).__name__
    rule = f"`optimizer` must be an instance of a plain torch.optim.Optimizer, got {name}"
    if isinstance(optimizer, MultiTaskOptimizer):
        raise TypeError(f"{rule}: mtlopt optimizers cannot be nested; pass the one that it wraps.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{rule}: {remedy}.")
    if any(kind.__name__ == "CPUOffloadOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "`optimizer` must step on the gradients in `.grad`, got torchao's "
            "CPUOffloadOptimizer, whose hooks take the gradient of every task's backward pass, and "
            "whose copies of the weights would undo the other tasks' steps. To offload states: "
            "FSDP2 with `offload_policy=CPUOffloadPolicy()`; for smaller ones: torchao's AdamW8bit."
        )
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):  # As Accelerate's.
        raise TypeError(f"{rule}, which wraps one: pass `optimizer.optimizer`.")


def weak_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook that does not keep the method's object, and all tasks' states, alive."""
    reference = WeakMethod(method)

    def hook(*arguments: Any) -> Any:
        method = reference()
        return None if method is None else method(*arguments)

    return hook
