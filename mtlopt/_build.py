"""What makes T optimizers over the same parameters: of a class, or of an instance."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from mtlopt._base import MultiTaskOptimizer
from mtlopt._classes import refuse_hooks
from mtlopt._follower import copied
from mtlopt._losses import Task, check_tasks
from mtlopt._saved import extras


def make(
    optimizer_class: Any, params: Any, tasks: Any, options: dict[str, Any]
) -> dict[Task, Optimizer]:
    """Tells the two forms of the constructor from each other."""
    if isinstance(optimizer_class, Optimizer):
        if options or (params is not None and tasks is not None):
            raise TypeError(
                "An instance has its parameters and options already: "
                "IndependentOptimizer(optimizer, tasks)."
            )
        return _duplicates(optimizer_class, check_tasks(params if tasks is None else tasks))
    if params is None or tasks is None:
        raise TypeError(
            "IndependentOptimizer takes a class, parameters and tasks, or an instance and tasks: "
            "IndependentOptimizer(torch.optim.Adam, model.parameters(), tasks, lr=1e-3)."
        )
    if "weights" in options:
        raise TypeError(
            "IndependentOptimizer takes no `weights`: Adam, by itself, undoes a task's weight. "
            "Give a task a learning rate of its own, optimizer[task].param_groups[0]['lr'] = ..., "
            "or take JointOptimizer(optimizer, tasks, weights)."
        )
    return _build_each(optimizer_class, params, check_tasks(tasks), options)


def _build_each(
    optimizer_class: Callable[..., Optimizer],
    params: Iterable[Any],
    tasks: Iterable[Task],
    options: dict[str, Any],
) -> dict[Task, Optimizer]:
    """Makes an optimizer for each task by calling the class or factory."""
    params = _check_params(params)
    return {task: _build(optimizer_class, params, options) for task in tasks}


def _duplicates(optimizer: Optimizer, tasks: Iterable[Task]) -> dict[Task, Optimizer]:
    """Makes an optimizer for each task that is as the given one, with a copy of its state."""
    name = type(optimizer).__name__
    if isinstance(optimizer, MultiTaskOptimizer):
        raise TypeError(
            f"`optimizer` must be a plain torch.optim.Optimizer, got {name}: a method does not go "
            "into another; pass what that one wraps."
        )
    refuse_hooks(optimizer)
    if "step" in vars(optimizer) or any("initial_lr" in g for g in optimizer.param_groups):
        raise ValueError(
            f"`optimizer` must have no scheduler yet, got {name} with one, which would move "
            "nothing any more: attach it to the IndependentOptimizer."
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            f"`optimizer` must have no step hooks yet, got {name} with some: register them on the "
            "IndependentOptimizer."
        )
    return {task: _duplicate(optimizer) for task in tasks}


def _duplicate(optimizer: Optimizer) -> Optimizer:
    copy = type(optimizer).__new__(type(optimizer))
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    # What refers to the optimizer, a bound method say, is to refer to the copy.
    memo[id(optimizer)] = copy
    _note_subclasses(optimizer.state, memo)
    # Not the constructor, whose signature is the class's own business.
    copy.__setstate__(deepcopy(optimizer.__getstate__(), memo))
    for name, value in extras(optimizer).items():
        vars(copy).setdefault(name, deepcopy(value, memo))
    return copy


def _check_params(params: Iterable[Any]) -> Any:
    """Spends generators once, so that every task's optimizer gets the same parameters."""
    if isinstance(params, (Tensor, set)):
        return params  # torch has its say on these.
    if isinstance(params, Module):
        raise TypeError(
            "`params` must be an iterable of parameters, such as `model.parameters()`, "
            f"got a {type(params).__name__}."
        )
    checked = [copied_group(item) if isinstance(item, dict) else item for item in params]
    if not checked:
        raise ValueError("`params` must hold at least one parameter, got none.")
    return checked


def copied_group(group: dict[str, Any]) -> dict[str, Any]:
    """Copies a parameter group: new containers and options, the same parameters."""
    params = group["params"]
    options = {key: copied(value) for key, value in group.items() if key != "params"}
    return {"params": params if isinstance(params, (Tensor, set)) else list(params), **options}


def copied_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copies a state dict."""
    memo: dict[int, Any] = {}
    _note_subclasses(state_dict["state"], memo)
    return deepcopy(state_dict, memo)


def _note_subclasses(state: Mapping[Any, Any], memo: dict[int, Any]) -> None:
    """Copies subclasses of tensors, which may know no copy, part by part."""
    # Some classes keep what is common to all parameters beside them, under a name.
    for entries in state.values():
        for value in entries.values() if isinstance(entries, dict) else ():
            if hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit states, FSDP's shards.
                names, context = value.__tensor_flatten__()
                parts = {name: copied(getattr(value, name)) for name in names}
                memo[id(value)] = type(value).__tensor_unflatten__(
                    parts, context, value.shape, value.stride()
                )


def _build(
    optimizer_class: Callable[..., Optimizer], params: Any, options: dict[str, Any]
) -> Optimizer:
    if isinstance(params, list):
        params = [copied_group(item) if isinstance(item, dict) else item for item in params]
    optimizer = optimizer_class(params, **copied(options))
    if isinstance(optimizer, MultiTaskOptimizer) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            "`optimizer_class` must make a plain torch.optim.Optimizer, "
            f"got {type(optimizer).__name__} from {optimizer_class!r}."
        )
    refuse_hooks(optimizer)
    return optimizer
