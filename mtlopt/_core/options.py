"""Options: what every method accepts."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from mtlopt._gradients.losses import CheckFinite


class Options(NamedTuple):
    """The options of every method."""

    scaler: torch.amp.GradScaler | None = None
    check_finite: CheckFinite = False
    process_group: dist.ProcessGroup | None = None

    def check(self, optimizer: Optimizer, needs_closure: bool) -> None:
        """Refuses values out of range, or that do not fit the class of optimizer."""
        if self.check_finite not in (False, True, "skip"):
            raise ValueError(
                f"`check_finite` must be False, True or 'skip', got {self.check_finite!r}."
            )
        if self.scaler is not None and not isinstance(self.scaler, torch.amp.GradScaler):
            raise TypeError(
                f"`scaler` must be a torch.amp.GradScaler, got {self.scaler!r}: "
                "scaler=torch.amp.GradScaler()."
            )
        if needs_closure and (self.scaler is not None or self.process_group is not None):
            raise ValueError(
                "`scaler` and `process_group` must be None for a class that needs a closure, "
                f"got {type(optimizer).__name__}."
            )


def check_arguments(method: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuses arguments that a method's constructor does not take, with the line to write."""
    kind = args[0].__name__ if args and isinstance(args[0], type) else ""
    line = f"{method.__name__}({kind or 'Adam'}(params, lr=...), tasks{method._third})"
    if kind:
        raise TypeError(
            "`optimizer` must be an instance of a plain torch.optim.Optimizer, "
            f"got the class {kind}: pass an instance, {line}."
        )
    try:
        inspect.signature(method).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"`{method.__name__}` {error}: {line}.") from None
