"""Classes whose `step` evaluates the losses itself, as LBFGS's does."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's `step` cannot do without a closure, as LBFGS's."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def repeat(
    values: dict[str, Tensor],
    again: Callable[[], dict[str, Tensor]],
    objective: Callable[[dict[str, Tensor]], Tensor],
    parameters: Sequence[Tensor],
) -> Callable[[], Any]:
    """Makes a closure in torch's sense of a gradient that has been taken once already.

    Args:
        values: The losses of the first evaluation, whose gradient is in `.grad`.
        again: Takes the gradient anew and returns the losses there.
        objective: Makes of the losses what the gradient is the gradient of.
        parameters: What the gradient was taken with respect to.
    """
    first = [values]
    versions = [parameter._version for parameter in parameters]

    def closure() -> Tensor:
        # Some classes move the parameters before they ask (schedule-free's closure classes).
        stale = versions != [parameter._version for parameter in parameters]
        present = again() if stale or not first else first.pop()
        if present.keys() != values.keys():
            raise ValueError(
                "`losses` must bring the same tasks at every evaluation of one step, "
                f"{list(values)}, got {list(present)}."
            )
        return objective(present)

    return closure
