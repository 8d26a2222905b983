"""Makes an optimizer of any method by its name, for tests of what all methods promise."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.optim import SGD

import mtlopt
from problems import TASKS, Network

WRAPPERS = ("joint", "balanced", "pcgrad", "gradnorm", "aggregated", "alternating")
ONE_STEP = ("joint", "balanced", "pcgrad", "gradnorm", "aggregated")
INDEPENDENT = ("independent", "simultaneous")
METHODS = (*WRAPPERS, *INDEPENDENT)
every_method = pytest.mark.parametrize("method", METHODS)
one_step = pytest.mark.parametrize("method", ONE_STEP)


def wrapper(method: str, shared: Any = None) -> Callable[..., Any]:
    """Returns the constructor of a method that wraps an instance."""
    from torchjd.aggregation import Sum

    wrappers: dict[str, Callable[..., Any]] = {
        "joint": mtlopt.JointOptimizer,
        "balanced": lambda base, tasks, **k: mtlopt.Balanced(base, tasks, every=2, **k),
        "pcgrad": mtlopt.PCGrad,
        "gradnorm": lambda base, tasks, **k: mtlopt.GradNorm(base, tasks, shared=[shared], **k),
        "aggregated": lambda base, tasks, **k: mtlopt.Aggregated(base, tasks, Sum(), **k),
        "alternating": mtlopt.AlternatingOptimizer,
    }
    return wrappers[method]


def make(
    method: str,
    params: Any,
    tasks: Sequence[Any] = TASKS,
    optimizer_class: Any = SGD,
    shared: Any = None,
    keywords: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Builds a method over parameters; `options` are those of the optimizer class."""
    options = options or {"lr": 0.1}
    if method in INDEPENDENT:
        schedule: Any = "simultaneous" if method == "simultaneous" else "sequential"
        return mtlopt.IndependentOptimizer(
            optimizer_class, params, tasks, schedule=schedule, **(keywords or {}), **options
        )
    base = optimizer_class(params, **options)
    return wrapper(method, shared)(base, tasks, **(keywords or {}))


def make_for(model: Network, method: str, **options: Any) -> Any:
    """Builds a method over all parameters of a network."""
    return make(method, model.parameters(), shared=model.trunk[2].weight, **options)


def with_weights(optimizer: Any, *weights: float) -> Any:
    """Sets the weights that GradNorm has learned."""
    state = copy.deepcopy(optimizer.state_dict())
    state["mtlopt"]["weights"] = torch.tensor(weights)
    optimizer.load_state_dict(state)
    return optimizer
