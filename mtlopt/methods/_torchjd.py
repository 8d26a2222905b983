"""State and random draws of TorchJD's aggregators and scalarizers."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._gradients.losses import Task

PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))
KIND = "torch.optim"
"""Key that marks the saved state of a module's optimizer."""


def check_rule(rule: object, module: str, kind: str, method: Any) -> None:
    """Refuses a rule that is not an object of TorchJD's, such as its name."""
    try:
        expected = getattr(import_module(f"torchjd.{module}"), kind)
    except ImportError as error:
        remedy = 'pip install "torchjd[quadprog_projector]>=0.18,<0.19"'
        raise ImportError(f"`{type(method).__name__}` needs TorchJD: {remedy}.") from error
    if not isinstance(rule, expected):
        raise TypeError(
            f"`{kind.lower()}` must be an instance of torchjd.{module}.{kind}, got {rule!r}: "
            f"{type(method).__name__}(optimizer, tasks{method._third})."
        )


def stateful(module: nn.Module) -> list[nn.Module]:
    """Lists the parts that have a state."""
    from torchjd import Stateful

    return [part for part in module.modules() if isinstance(part, Stateful)]


def states_of(module: nn.Module) -> list[dict[str, Any]]:
    """Returns, for each part, what it remembers, as far as that is plain containers and tensors.

    TorchJD's own `state_dict` lacks the key by which an aggregator recognises its buffers.
    """
    parts, states = stateful(module), []
    for part in module.modules():
        names = part._buffers.keys() - part._non_persistent_buffers_set
        found = _attributes(part) if part in parts else {n: part._buffers[n] for n in names}
        saved = {name: _saved(part, value) for name, value in found.items()}
        # The numbers beside a solver make no sense without it.
        solver = any(type(value).__module__.startswith("cvxpy") for value in saved.values())
        states.append({n: v for n, v in saved.items() if _is_plain(v) and not solver})
    return states


def restore(
    module: nn.Module, states: Sequence[dict[str, Any]], device: torch.device | None = None
) -> None:
    """Gives the parts the states that :func:`states_of` returned, moved to their inputs' device."""
    for part, attributes in zip(module.modules(), states, strict=False):
        for name, value in attributes.items():
            owner = part._buffers if name in part._buffers else vars(part)
            owner[name] = _restored(part, value, device)


def check_absent(
    argument: str, module: nn.Module, tasks: Sequence[Task], present: Container[Task]
) -> None:
    """Refuses absent tasks where a module needs every task at every step."""
    absent = [task for task in tasks if task not in present]
    if absent and (stateful(module) or vectors(module, len(tasks))):
        state = "a state with a row for each task"
        reason = state if stateful(module) else f"a vector of length {len(tasks)}"
        raise ValueError(
            f"`{argument}` {type(module).__name__} must see every task at every step: it has "
            f"{reason}. Absent from this batch: {absent}."
        )


def vectors(module: nn.Module, count: int) -> list[Tensor]:
    """Lists the vectors with an entry for each task."""
    return [
        value
        for part in module.modules()
        for value in (*_attributes(part).values(), *part._parameters.values())
        if isinstance(value, Tensor) and value.shape == (count,)
    ]


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Seeds torch's default generator from the given one, for the duration of the context."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _attributes(part: nn.Module) -> dict[str, Any]:
    inner = vars(nn.Module()).keys()
    return {k: v for k, v in vars(part).items() if k not in inner} | part._buffers


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, PLAIN)


def _saved(part: nn.Module, value: Any) -> Any:
    """Replaces an optimizer over the part's own parameters by its class's name and its state."""
    if not isinstance(value, Optimizer) or type(value) is not getattr(
        torch.optim, type(value).__name__, None
    ):
        return value
    own = [id(parameter) for parameter in part.parameters(recurse=False)]
    held = [[id(parameter) for parameter in group["params"]] for group in value.param_groups]
    return {KIND: type(value).__name__, **value.state_dict()} if held == [own] else value


def _restored(part: nn.Module, value: Any, device: torch.device | None) -> Any:
    if not (isinstance(value, dict) and KIND in value):
        return _moved(deepcopy(value), device)
    state = deepcopy(value)
    optimizer: Optimizer = getattr(torch.optim, state.pop(KIND))(part.parameters(recurse=False))
    optimizer.load_state_dict(state)
    return optimizer


def _moved(value: Any, device: torch.device | None) -> Any:
    """Moves tensors, and names of devices: some rules recognise their state by its device."""
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if device is None or not isinstance(value, (Tensor, torch.device)):
        return value
    return value.to(device) if isinstance(value, Tensor) else device
