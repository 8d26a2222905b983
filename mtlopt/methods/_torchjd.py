"""State and random draws of TorchJD's aggregators and scalarizers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = (Tensor, bool, int, float, str, tuple, torch.dtype, type(None))
KIND = "torch.optim"
"""Key that marks the saved state of a module's optimizer."""


def stateful(module: nn.Module) -> list[nn.Module]:
    """Lists the parts that have a state."""
    from torchjd import Stateful

    return [part for part in module.modules() if isinstance(part, Stateful)]


def state_of(part: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a part as plain containers, empty if one cannot be saved.

    TorchJD's own `state_dict` lacks the key by which an aggregator recognises its buffers.
    """
    saved = {name: _saved(part, value) for name, value in _attributes(part).items()}
    return saved if all(_is_plain(value) for value in saved.values()) else {}


def restore(parts: Sequence[nn.Module], states: Sequence[dict[str, Any]]) -> None:
    """Gives the parts the states that :func:`state_of` returned."""
    for part, attributes in zip(parts, states, strict=False):
        for name, value in attributes.items():
            owner = part._buffers if name in part._buffers else vars(part)
            owner[name] = _restored(part, value)


def needs_all_tasks(module: nn.Module, count: int) -> str:
    """Returns why a module needs every task at every step, or an empty string."""
    if stateful(module):
        return "a state with a row for each task"
    vectors = [
        value
        for part in module.modules()
        for value in (*_attributes(part).values(), *part._parameters.values())
        if isinstance(value, Tensor) and value.shape == (count,)
    ]
    return f"a vector of length {count}" if vectors else ""


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Seeds torch's default generator from the given one, for the duration of the context."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _attributes(part: nn.Module) -> dict[str, Any]:
    inner = vars(nn.Module()).keys()
    return {k: v for k, v in vars(part).items() if k not in inner} | part._buffers


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN) or (isinstance(value, dict) and KIND in value)


def _saved(part: nn.Module, value: Any) -> Any:
    """Replaces an optimizer over the part's own parameters by its class's name and its state."""
    if not isinstance(value, Optimizer) or type(value) is not getattr(
        torch.optim, type(value).__name__, None
    ):
        return value
    own = [id(parameter) for parameter in part.parameters(recurse=False)]
    held = [[id(parameter) for parameter in group["params"]] for group in value.param_groups]
    return {KIND: type(value).__name__, **value.state_dict()} if held == [own] else value


def _restored(part: nn.Module, value: Any) -> Any:
    if not (isinstance(value, dict) and KIND in value):
        return deepcopy(value)
    state = deepcopy(value)
    optimizer: Optimizer = getattr(torch.optim, state.pop(KIND))(part.parameters(recurse=False))
    optimizer.load_state_dict(state)
    return optimizer
