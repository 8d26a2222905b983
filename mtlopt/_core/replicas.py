"""Replicas: the optimizers of the tasks, made from a class or from an instance."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from mtlopt._core.single import check_plain
from mtlopt._core.state import copied, copied_group, copy_subclasses, extras
from mtlopt._gradients.losses import Task, check_tasks


def make_replicas(
    optimizer_class: Any, params: Any, tasks: Any, options: dict[str, Any]
) -> dict[Task, Optimizer]:
    """Makes an optimizer for each task, for both forms of the constructor."""
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
            "IndependentOptimizer takes no `weights`: a separate Adam cancels its task's weight. "
            "Set a task's learning rate, optimizer[task].param_groups[0]['lr'] = ..., or use "
            "JointOptimizer(optimizer, tasks, weights)."
        )
    checked = check_tasks(tasks)
    params = _check_params(params)
    return {task: _build(optimizer_class, params, options) for task in checked}


def _duplicates(optimizer: Optimizer, tasks: Iterable[Task]) -> dict[Task, Optimizer]:
    """Makes an optimizer for each task like the given one, with a copy of its state."""
    name = type(optimizer).__name__
    check_plain(optimizer, "")
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            f"`optimizer` must have no scheduler yet, got {name} with one, which would have "
            "no effect: attach it to the IndependentOptimizer."
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
    # References to the optimizer, such as bound methods, become references to the copy.
    memo[id(optimizer)] = copy
    copy_subclasses(optimizer.state, memo)
    # Without the constructor, whose signature can be anything.
    vars(copy).update(deepcopy(extras(optimizer), memo))
    copy.__setstate__(deepcopy(optimizer.__getstate__(), memo))
    return copy


def _check_params(params: Iterable[Any]) -> Any:
    """Reads generators once, so that every task's optimizer gets the same parameters."""
    if isinstance(params, (Tensor, set)):
        return params  # torch raises its own error on these.
    if isinstance(params, Module):
        raise TypeError(
            "`params` must be an iterable of parameters, such as `model.parameters()`, "
            f"got a {type(params).__name__}."
        )
    checked = [copied_group(item) if isinstance(item, dict) else item for item in params]
    if not checked:
        raise ValueError("`params` must hold at least one parameter, got none.")
    return checked


def _build(
    optimizer_class: Callable[..., Optimizer], params: Any, options: dict[str, Any]
) -> Optimizer:
    if isinstance(params, list):
        params = [copied_group(item) if isinstance(item, dict) else item for item in params]
    optimizer = optimizer_class(params, **copied(options))
    check_plain(optimizer, f"`optimizer_class` made it, {optimizer_class!r}")
    return optimizer
