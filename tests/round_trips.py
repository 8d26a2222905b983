"""Copies optimizers and states as users do: by file, pickle and deepcopy."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch


def by_file(state: Any) -> Any:
    """Saves and loads a state with nothing but tensors and plain containers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIERS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": by_pickle}


def flat(value: Any) -> Any:
    """Turns tensors into numbers, so that states can be compared with `==`."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value
