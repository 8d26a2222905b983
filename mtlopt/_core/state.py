"""State dicts, copies and pickles: what torch promises, for optimizers made of optimizers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from mtlopt._core.optimizer import MultiTaskOptimizer

FORMAT = 1
"""Version of the entry `mtlopt` in state dicts."""
SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}
"""Keys of parameter groups that schedulers write."""
NOT_OPTIONS = {"params", "param_names"} | SCHEDULERS
"""Keys of parameter groups that are no options of the class."""


def save(optimizer: "MultiTaskOptimizer") -> dict[str, Any]:
    """Returns the state dict of a method: its updater's, and the entry `mtlopt`."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    state = optimizer._updater.state_dict()
    state["mtlopt"] = _identity(optimizer) | state.get("mtlopt", {}) | optimizer._own_state()
    if optimizer.generator is not None:
        state["mtlopt"]["generator"] = optimizer.generator.get_state()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, state)
        state = state if changed is None else changed
    return state


def load(optimizer: "MultiTaskOptimizer", state_dict: dict[str, Any]) -> None:
    """Loads the state dict of a method, or of a plain optimizer; all of it or nothing."""
    state_dict = dict(state_dict)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    updater = optimizer._updater
    with _undone_on_failure(optimizer):
        _check_state(optimizer, state_dict)
        updater.load_state_dict(state_dict)
        if (saved := state_dict.get("mtlopt")) is not None:
            optimizer._load_own_state(saved)
            if optimizer.generator is not None and saved.get("generator") is not None:
                # A generator's state lives on the CPU, even if `map_location` moved it.
                optimizer.generator.set_state(saved["generator"].cpu())
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _identity(optimizer: "MultiTaskOptimizer") -> dict[str, Any]:
    """Returns what a saved state must have in common with the optimizer that loads it."""
    return {
        "format": FORMAT,
        "method": type(optimizer).__name__,
        # Plain strings, because a subclass of str does not load with `weights_only=True`.
        "tasks": [
            "".join(task) if isinstance(task, str) else tuple(map("".join, task))
            for task in optimizer.tasks
        ],
        "optimizer": type(optimizer._updater.inner[0]).__qualname__,
        "shapes": [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups],
    }


def _check_state(optimizer: "MultiTaskOptimizer", state_dict: dict[str, Any]) -> None:
    """Refuses the state of another method, class or set of parameters."""
    # Some classes, such as Lookahead, have state dicts of another form.
    usual = "param_groups" in (form := optimizer._updater.state_dict())
    if not usual and form.keys() <= state_dict.keys():
        state_dict = state_dict | {"param_groups": optimizer.param_groups}
    elif "param_groups" not in state_dict or not ({"state", "mtlopt"} & state_dict.keys()):
        raise ValueError(
            "`state_dict` must have the entries `param_groups` and `state` or `mtlopt`, "
            f"got {sorted(map(str, state_dict))}."
        )
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        raise ValueError(
            "`state_dict` must be of the same parameters: groups of "
            f"{expected} parameters, got groups of {sizes}."
        )
    saved = state_dict.get("mtlopt")
    if saved is None:
        _check_class(optimizer._updater.inner[0], state_dict["param_groups"])
        return
    for entry, value in _identity(optimizer).items():
        if _as_lists(saved.get(entry)) != _as_lists(value):
            raise ValueError(
                f"`state_dict` must be of the same {entry}: {value}, got {saved.get(entry)}."
            )
    if optimizer.generator is not None:
        saved["generator"].cpu()


def _check_class(optimizer: Optimizer, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses the groups of another class, which torch would accept."""
    own = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
    for group in groups:
        # Another release can lack an option or have one more, but not both.
        missing, foreign = own - group.keys(), group.keys() - own - NOT_OPTIONS
        if missing and foreign:
            raise ValueError(
                "`state_dict` must be of the same class of optimizer, "
                f"{type(optimizer).__name__}, got one with {sorted(foreign)} and without "
                f"{sorted(missing)}."
            )


def _as_lists(value: Any) -> Any:
    # Files and other libraries can turn tuples into lists, and the reverse.
    if isinstance(value, (tuple, list)):
        return [_as_lists(item) for item in value]
    return value


@contextmanager
def _undone_on_failure(optimizer: "MultiTaskOptimizer") -> Iterator[None]:
    """Restores everything if loading a state fails."""
    owners = (optimizer, optimizer._updater, *optimizer._updater.inner)
    earlier = [(owner, dict(vars(owner))) for owner in owners]
    # Copies, because a rule's parameters, and generators, are loaded in place.
    own = deepcopy(optimizer._own_state())
    drawn = None if optimizer.generator is None else optimizer.generator.get_state()
    try:
        yield
    except BaseException as error:
        optimizer._load_own_state(own)
        for owner, attributes in earlier:
            vars(owner).clear()
            vars(owner).update(attributes)
        if optimizer.generator is not None and drawn is not None:
            optimizer.generator.set_state(drawn)
        if isinstance(error, (AttributeError, IndexError, KeyError, TypeError)):
            raise ValueError(f"`state_dict` must be complete, got one with {error!r}.") from error
        raise


# Copies.


def lasting(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that a copy keeps: as in torch, no hooks and no patched `step`."""
    return {
        name: value
        for name, value in attributes.items()
        if name != "step" and not name.startswith("_optimizer_")
    }


def extras(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the attributes that torch's `__getstate__` drops, without which LBFGS fails."""
    # Three are kept on purpose: https://github.com/pytorch/pytorch/pull/72839.
    kept = optimizer.__getstate__()
    return {n: value for n, value in lasting(vars(optimizer)).items() if n not in kept}


def copied(value: Any) -> Any:
    """Copies a hyper-parameter and the tensors in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def copied_group(group: dict[str, Any]) -> dict[str, Any]:
    """Copies a parameter group: new containers and options, the same parameters."""
    params = group["params"]
    options = {key: copied(value) for key, value in group.items() if key != "params"}
    return {"params": params if isinstance(params, (Tensor, set)) else list(params), **options}


def copied_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copies a state dict."""
    memo: dict[int, Any] = {}
    copy_subclasses(state_dict.get("state", {}), memo)
    return deepcopy(state_dict, memo)


def copy_subclasses(state: Mapping[Any, Any], memo: dict[int, Any]) -> None:
    """Copies tensor subclasses part by part into the memo: some cannot be deep-copied."""
    for entries in state.values():
        # Some classes keep what is common to all parameters under a name, not a parameter.
        for value in entries.values() if isinstance(entries, dict) else ():
            if hasattr(value, "__tensor_flatten__"):  # torchao's 8-bit states, FSDP's shards.
                names, context = value.__tensor_flatten__()
                parts = {name: copied(getattr(value, name)) for name in names}
                memo[id(value)] = type(value).__tensor_unflatten__(
                    parts, context, value.shape, value.stride()
                )
