"""Classes of optimizers that evaluate the losses several times in a step, such as LBFGS."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mtlopt._gradients.losses import Values


def needs_closure(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer's `step` requires a closure, as LBFGS's does."""
    # By its signature: trying would move the parameters.
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def make_closure(
    values: Values,
    evaluate: Callable[[], Values],
    objective: Callable[[Values], Tensor],
    parameters: Sequence[Tensor],
) -> Callable[[], Any]:
    """Makes a closure in torch's sense, whose first call uses the gradient taken already.

    That gradient is of `values` at the `parameters`. Further calls `evaluate` it again. They return
    the scalar `objective` that it belongs to, for line searches.
    """
    first = [values]
    versions = [parameter._version for parameter in parameters]

    def closure() -> Tensor:
        # Some classes move the parameters before the first evaluation (schedule-free ones).
        stale = versions != [parameter._version for parameter in parameters]
        present = evaluate() if stale or not first else first.pop()
        if present.keys() != values.keys():
            raise ValueError(
                "`losses` must bring the same tasks at every evaluation of one step, "
                f"{list(values)}, got {list(present)}."
            )
        return objective(present)

    return closure
