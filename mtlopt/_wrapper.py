"""WrappedOptimizer: the methods that stand before one plain optimizer."""

from collections import defaultdict
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtlopt._base import MultiTaskOptimizer
from mtlopt._classes import refuse_hooks, weakly

Self = TypeVar("Self", bound="WrappedOptimizer")


class WrappedOptimizer(MultiTaskOptimizer):
    """Shows the wrapped optimizer's parameter groups and state as its own, live."""

    base: Optimizer
    """The wrapped optimizer, which moves the parameters."""

    def __new__(cls: type[Self], *args: Any, **options: Any) -> Self:
        """Refuses a class before Python compares the arguments with the wrong signature."""
        # A copy or a pickle calls this without arguments.
        if args and isinstance(args[0], type):
            name = args[0].__name__
            raise TypeError(
                f"`optimizer` must be an instance of a plain torch.optim.Optimizer, got the class "
                f"{name}: pass an instance, {cls.__name__}({name}(params, lr=...), tasks)."
            )
        return super().__new__(cls)

    def _wrap(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, MultiTaskOptimizer):
            raise TypeError(
                "`optimizer` must be an instance of a plain torch.optim.Optimizer, got "
                f"{type(optimizer).__name__}: a method does not go into another; pass what that "
                "one wraps."
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "`optimizer` must be an instance of a plain torch.optim.Optimizer, "
                f"got {type(optimizer).__name__}: "
                f"{type(self).__name__}(torch.optim.Adam(params, lr=...), tasks)."
            )
        refuse_hooks(optimizer)
        self.base = optimizer
        self._hook()

    def _hook(self) -> None:
        self.base.register_step_post_hook(weakly(self._after_update))

    def _after_update(self, *_: Any) -> None:
        # A scheduler on the wrapper asks whether a step came first, also one of the base's.
        self._opt_called = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base" in state:
            self._hook()

    def _inner_optimizers(self) -> list[Optimizer]:
        return [self.base]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute in torch
        """The wrapped optimizer's parameter groups."""
        return self.base.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]  # an attribute in torch
        """The wrapped optimizer's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute in torch
        """The wrapped optimizer's defaults."""
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer.

        Args:
            param_group: As torch takes it.
        """
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the wrapped optimizer does.

        Args:
            set_to_none: Whether they become None, or zero.
        """
        self.base.zero_grad(set_to_none=set_to_none)
        self._watch.changed()

    def train(self) -> None:
        """Puts the wrapped optimizer in training mode, where it has modes (schedule-free)."""
        getattr(self.base, "train", lambda: None)()

    def eval(self) -> None:
        """Puts the wrapped optimizer in evaluation mode, where it has modes (schedule-free)."""
        getattr(self.base, "eval", lambda: None)()

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer, called before each update.

        Args:
            hook: As torch takes it: ``hook(optimizer, args, kwargs)``.
        """
        return self.base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer, called after each update.

        Args:
            hook: As torch takes it: ``hook(optimizer, args, kwargs)``.
        """
        return self.base.register_step_post_hook(hook)

    def _collect_state(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "mtlopt": {}}

    def _restore_state(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "mtlopt"})
