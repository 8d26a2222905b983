"""What classes of optimizer differ in: their options, and whether they evaluate the losses."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakMethod

from torch import Tensor
from torch.optim import Optimizer

NOT_OPTIONS = {
    *("params", "param_names"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"),
}
"""What parameter groups hold beside the options of the class; the latter are of schedulers."""


def check_class(optimizer: Optimizer, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses the saved groups of another class, which torch would take."""
    own = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
    for group in groups:
        # Another release may lack an option, or have one more, but not both.
        missing, foreign = own - group.keys(), group.keys() - own - NOT_OPTIONS
        if missing and foreign:
            raise ValueError(
                "`state_dict` must be of the same class of optimizer, "
                f"{type(optimizer).__name__}, got one with {sorted(foreign)} and without "
                f"{sorted(missing)}."
            )


def refuse_hooks(optimizer: Optimizer) -> None:
    """Refuses a class that takes the gradients by hooks of its own, in every backward pass."""
    if any(kind.__name__ == "CPUOffloadOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "`optimizer` must step on what lies in `.grad`, got torchao's CPUOffloadOptimizer, "
            "whose hooks take the gradient of every task's backward pass, and whose copies of the "
            "weights would undo the other tasks' steps. For states off the device: FSDP2 with "
            "`offload_policy=CPUOffloadPolicy()`; for small ones: torchao's AdamW8bit."
        )


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's `step` cannot do without a closure, as LBFGS's."""
    # By the signature: to try would move the parameters.
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


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does not keep its optimizer, and the states of all tasks with it, alive."""
    kept = WeakMethod(method)

    def hook(*arguments: Any) -> Any:
        method = kept()
        return None if method is None else method(*arguments)

    return hook
