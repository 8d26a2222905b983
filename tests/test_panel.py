"""The parameter groups of IndependentOptimizer, the panel that every task's optimizer follows."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mtlopt
import reference
from problems import TASKS, Network, assert_equal, batches, leaf, make_losses, snapshot
from round_trips import COPIERS, by_file


def replace(model: Network, optimizers: Sequence[Any], how: str) -> None:
    """Replaces parameters in the model and in the parameter groups of the optimizers."""
    names = [name for name, _ in model.named_parameters()]
    for name in names[:1] if how == "one" else names:
        module, _, attribute = name.rpartition(".")
        old = model.get_parameter(name)
        new = nn.Parameter(old.detach() * 0.5)
        setattr(model.get_submodule(module), attribute, new)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                params = [new if p is old else p for p in group["params"]]
                if how == "list":
                    group["params"] = params
                else:
                    group["params"][:] = params


@pytest.mark.parametrize("how", ["list", "in place", "one"])
@pytest.mark.parametrize("form", ["sequential", "simultaneous", "imperative"])
def test_every_task_trains_parameters_that_were_replaced(how: str, form: str) -> None:
    """As Accelerate's `prepare` replaces them for FSDP2: without state; the others keep theirs."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    schedule: Any = "simultaneous" if form == "simultaneous" else "sequential"

    def build(model: Network) -> mtlopt.IndependentOptimizer:
        return mtlopt.IndependentOptimizer(
            Adam, model.parameters(), TASKS, schedule=schedule, lr=0.01
        )

    def go_on(steps: Sequence[Any]) -> None:
        losses = make_losses(model)
        method = reference.simultaneous if form == "simultaneous" else reference.independent
        for x, y in steps:
            method(plain, make_losses(expected), TASKS, x, y)
            if form != "imperative":
                optimizer.step(losses, x, y)
                continue
            for task in TASKS:
                optimizer.zero_grad()
                losses((task,), x, y)[task].backward()
                optimizer[task].step()
        assert_equal(snapshot(model), snapshot(expected))

    optimizer = build(model)
    plain = {task: Adam(expected.parameters(), lr=0.01) for task in TASKS}
    data = batches(6)
    go_on(data[:2])
    replace(model, [optimizer], how)
    replace(expected, list(plain.values()), how)
    optimizer.state_dict()
    go_on(data[2:4])
    state = by_file(optimizer.state_dict())
    optimizer = build(model)
    optimizer.load_state_dict(state)
    go_on(data[4:])


def test_reordered_parameters_keep_their_states() -> None:
    """As in torch, where state belongs to the parameter and not to its position."""
    torch.manual_seed(1)
    model = Network()
    expected = copy.deepcopy(model)
    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS, lr=0.01)
    plain = {task: Adam(expected.parameters(), lr=0.01) for task in TASKS}
    for i, (x, y) in enumerate(batches(4)):
        if i == 2:
            for each in (optimizer, *plain.values()):
                each.param_groups[0]["params"].reverse()
        reference.independent(plain, make_losses(expected), TASKS, x, y)
        optimizer.step(make_losses(model), x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_replacing_parameters_by_more_or_fewer_is_an_error() -> None:
    """It would be ambiguous which parameter replaced which."""
    for change in (lambda params: params[1:], lambda params: [*params, leaf(1.0)]):
        model = Network()
        optimizer = mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)
        optimizer.step(make_losses(model), *batches(1)[0])
        group = optimizer.param_groups[0]
        group["params"] = change(group["params"])
        with pytest.raises(ValueError, match=r"(?i)param"):
            optimizer.step(make_losses(model), *batches(1)[0])


@pytest.mark.parametrize("form", ["sequential", "simultaneous", "imperative"])
def test_a_learning_rate_set_by_a_step_hook_applies_to_that_update(form: str) -> None:
    """Warm-up in a step hook: 1 - 0.25 - 0.125, not 1 - 0.5 - 0.25."""
    w = leaf(1.0)
    schedule: Any = "simultaneous" if form == "simultaneous" else "sequential"
    optimizer = mtlopt.IndependentOptimizer(SGD, [w], ["a", "b"], schedule=schedule, lr=0.5)
    rates = iter([0.25, 0.125])
    optimizer.register_step_pre_hook(
        lambda *_: optimizer.param_groups[0].update({"lr": next(rates)})
    )
    if form == "imperative":
        for task in ("a", "b"):
            optimizer.zero_grad()
            w.sum().backward()
            optimizer[task].step()
    else:
        optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    assert w.item() == 0.625


def rates_of(optimizer: Any, task: str, group: int = 0) -> tuple[float, float]:
    """Returns the learning rate and weight decay that a task's update uses."""
    optimizer[task].step()
    own = optimizer[task].param_groups[group]
    return own["lr"], own["weight_decay"]


def pinned(w: Tensor, *names: str) -> Any:
    optimizer: Any = mtlopt.IndependentOptimizer(
        SGD, [{"params": [w]}, {"params": [leaf(1.0)]}], ["a", "b"], lr=0.5, weight_decay=0.1
    )
    optimizer.pin("a", *names)
    return optimizer


def set_panel(optimizer: Any, rate: float, decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay


def test_a_pinned_option_stays_even_if_the_panel_has_the_same_value() -> None:
    optimizer = pinned(leaf(1.0), "lr")
    for rate in (0.25, 0.5, 0.125):  # The pinned value among them.
        set_panel(optimizer, rate, 0.2)
        for group in (0, 1):
            assert rates_of(optimizer, "a", group) == (0.5, 0.2)
            assert rates_of(optimizer, "b", group) == (rate, 0.2)
    for group in optimizer["a"].param_groups:
        group["lr"] = 0.125  # An override, though the panel has the same value.
    assert rates_of(optimizer, "a") == (0.125, 0.2)
    set_panel(optimizer, 0.25, 0.2)
    assert rates_of(optimizer, "a") == (0.125, 0.2)
    optimizer.reset_overrides("a")
    assert rates_of(optimizer, "a") == (0.25, 0.2)
    set_panel(optimizer, 0.5, 0.3)
    assert rates_of(optimizer, "a") == (0.5, 0.3)


def test_pinning_without_names_pins_every_option() -> None:
    optimizer = pinned(leaf(1.0))
    set_panel(optimizer, 0.25, 0.2)
    assert rates_of(optimizer, "a") == (0.5, 0.1)
    assert rates_of(optimizer, "b") == (0.25, 0.2)


def test_a_pin_holds_the_value_the_panel_had_last() -> None:
    optimizer = pinned(leaf(1.0), "weight_decay")
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.pin("a", "lr")
    optimizer.param_groups[0]["lr"] = 0.125
    assert rates_of(optimizer, "a")[0] == 0.25


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_a_pin_is_saved_and_copied(how: str) -> None:
    w = leaf(1.0)
    optimizer = pinned(w, "lr")
    if how == "file":
        state = by_file(optimizer.state_dict())
        optimizer = mtlopt.IndependentOptimizer(
            SGD, [{"params": [w]}, {"params": [leaf(1.0)]}], ["a", "b"], lr=0.9
        )
        optimizer.load_state_dict(state)
    else:
        optimizer = COPIERS[how](optimizer)
    set_panel(optimizer, 0.25, 0.2)
    assert rates_of(optimizer, "a") == (0.5, 0.2)
    assert rates_of(optimizer, "b") == (0.25, 0.2)


def test_pinning_an_unknown_option_or_task_is_an_error() -> None:
    optimizer = pinned(leaf(1.0), "lr")
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer.pin("a", "learning_rate")
    with pytest.raises(ValueError, match="params"):
        optimizer.pin("a", "params")
    with pytest.raises(KeyError, match="'z'"):
        optimizer.pin("z", "lr")
