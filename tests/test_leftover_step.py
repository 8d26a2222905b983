"""`optimizer.step()` left over from a plain loop, after `optimizer.step(losses)`."""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam

import mtlopt
from all_methods import INDEPENDENT, every_method, make, make_for, one_step
from problems import TASKS, Network, assert_equal, batches, leaf, make_losses, no_warnings, snapshot
from round_trips import COPIERS, by_file

LEFTOVER = r"step\(losses"


@pytest.mark.parametrize("scheduled", [False, True])
@every_method
def test_a_leftover_step_does_nothing_and_warns_once(method: str, scheduled: bool) -> None:
    """It would apply the same gradient twice. No hook fires; the warning names the line."""
    torch.manual_seed(1)
    model = Network()
    twin = copy.deepcopy(model)
    optimizer, other = (make_for(m, method, optimizer_class=Adam, lr=0.01) for m in (model, twin))
    if scheduled:
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(each, gamma=0.9) for each in (optimizer, other)
        ]
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    left_over: list[Callable[[], Any]] = [
        optimizer.step,
        partial(optimizer.step, None),
        partial(optimizer.step, closure=None),
    ]
    for i, (x, y) in enumerate(batches(3)):
        optimizer.step(make_losses(model), x, y)
        other.step(make_losses(twin), x, y)
        assert_equal(snapshot(model), snapshot(twin))
        times = len(fired)
        if i == 0:
            with pytest.warns(UserWarning, match=LEFTOVER) as caught:
                left_over[i]()
            assert len(caught) == 1
            assert re.search(r"`?optimizer\.step\(\)", str(caught[0].message))
            assert scheduled or caught[0].filename == __file__
        with no_warnings():
            left_over[i]()
        assert len(fired) == times
        assert_equal(snapshot(model), snapshot(twin))
        if scheduled:
            for scheduler in schedulers:
                scheduler.step()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("passed", [True, False])
@every_method
def test_a_leftover_step_of_a_scaler_does_nothing(
    method: str, passed: bool, enabled: bool, scheduled: bool
) -> None:
    """It unscales `.grad` in place before it calls `step`, which is no new gradient."""
    model = Network()
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    scaler.scale(torch.ones(()))
    optimizer = make_for(model, method, keywords={"scaler": scaler} if passed else {})
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    x, y = batches(1)[0]
    for first in (True, False):
        optimizer.step(make_losses(model), x, y)
        after = snapshot(model)
        if first:
            with pytest.warns(UserWarning, match=LEFTOVER):
                scaler.step(optimizer)
        else:
            with no_warnings():
                scaler.step(optimizer)
        scaler.update()
        assert_equal(snapshot(model), after)


@every_method
def test_a_leftover_step_after_a_batch_without_labels_does_nothing(method: str) -> None:
    model = Network()
    optimizer = make_for(model, method)
    before = snapshot(model)
    assert optimizer.step(lambda tasks: {}) == {}
    with pytest.warns(UserWarning, match=LEFTOVER):
        optimizer.step()
    with no_warnings():
        optimizer.step(lambda tasks: {})
        optimizer.step()
    assert_equal(snapshot(model), before)


@every_method
def test_the_warning_of_a_leftover_step_can_be_turned_off(method: str) -> None:
    """For training loops that the user does not own."""
    model = Network()
    optimizer = make_for(model, method)
    assert optimizer.warn_of_repeated_step is True
    optimizer.warn_of_repeated_step = False
    optimizer.step(make_losses(model), *batches(1)[0])
    after = snapshot(model)
    with no_warnings():
        optimizer.step()
    assert_equal(snapshot(model), after)


def plain_sum(model: Network) -> None:
    x, y = batches(1)[0]
    torch.stack(list(make_losses(model)(TASKS, x, y).values())).sum().backward()


ORDINARY = (
    "zero_grad, backward",
    "the model's zero_grad, backward",
    "the model's zero_grad, the sum",
    "set by hand",
)


def new_gradient(what: str, optimizer: Any, model: Network) -> None:
    if what == "set by hand":
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return
    (model if what.startswith("the model") else optimizer).zero_grad()
    if what.endswith("sum"):
        plain_sum(model)
    else:
        optimizer.backward(make_losses(model)(TASKS, *batches(1)[0]))


@pytest.mark.parametrize("what", ORDINARY)
@one_step
def test_a_new_gradient_makes_it_an_ordinary_step(method: str, what: str) -> None:
    """Bit for bit what SGD does with the same `.grad`."""
    model = Network()
    optimizer = make_for(model, method)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    with pytest.warns(UserWarning, match=LEFTOVER):
        optimizer.step()
    # A gradient that a method did not make is warned of, here as elsewhere.
    foreign = what in ("the model's zero_grad, the sum", "set by hand") and method != "joint"
    for _ in range(2):
        before = snapshot(model)
        new_gradient(what, optimizer, model)
        expected = {
            n: torch.add(before[n], p.grad, alpha=-0.1)
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        if foreign:
            with pytest.warns(UserWarning, match="did not make"):
                optimizer.step()
        else:
            with no_warnings():
                optimizer.step()
        assert_equal(snapshot(model), expected)
        foreign = False


@one_step
def test_a_closure_makes_a_new_gradient(method: str) -> None:
    model = Network()
    optimizer = make_for(model, method)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    before = snapshot(model)

    def closure() -> None:
        optimizer.zero_grad()
        optimizer.backward(make_losses(model)(TASKS, x, y))

    with no_warnings():
        optimizer.step(closure=closure)
    assert not torch.equal(snapshot(model)["trunk.0.weight"], before["trunk.0.weight"])


def test_adding_to_an_applied_gradient_steps_and_warns_once() -> None:
    """This is how torch accumulates, and also what a forgotten `zero_grad` looks like."""
    model = Network()
    optimizer = mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS)
    for first in (True, False):
        optimizer.step(make_losses(model), *batches(1)[0])
        plain_sum(model)
        expected = {
            n: torch.add(p.detach(), p.grad, alpha=-0.1)
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        if first:
            with pytest.warns(UserWarning, match=r"already.*appl|appl.*again"):
                optimizer.step()
        else:
            with no_warnings():
                optimizer.step()
        assert_equal(snapshot(model), expected)


@pytest.mark.parametrize("method", ["alternating", *INDEPENDENT])
def test_a_step_without_losses_is_an_error_unless_a_gradient_was_applied(method: str) -> None:
    """After `zero_grad` too: then there is no applied gradient to repeat."""
    model = Network()
    optimizer = make_for(model, method)
    with pytest.raises(TypeError, match="needs `losses`"):
        optimizer.step()
    optimizer.step(make_losses(model), *batches(1)[0])
    with pytest.warns(UserWarning, match=LEFTOVER):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="needs `losses`"):
        optimizer.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
@every_method
def test_copies_and_resumed_runs_recognise_a_leftover_step(method: str, how: str) -> None:
    model = Network()
    optimizer = make_for(model, method)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    if how == "file":
        state = by_file(optimizer.state_dict())
        optimizer = make_for(model, method)
        optimizer.load_state_dict(state)
    else:
        model, optimizer = COPIERS[how]((model, optimizer))
    optimizer.step(make_losses(model), x, y)
    after = snapshot(model)
    with pytest.warns(UserWarning, match=LEFTOVER):
        optimizer.step()
    assert_equal(snapshot(model), after)


@pytest.mark.parametrize("method", ["joint", "independent"])
def test_a_copy_does_not_apply_the_originals_gradient_again(method: str) -> None:
    """A deep copy of a tensor, unlike one of a parameter, has a copy of its gradient."""
    w = leaf(1.0)
    optimizer = make(method, [w], ["a", "b"])
    optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    w, optimizer = copy.deepcopy((w, optimizer))
    assert w.grad is not None
    before = w.item()
    with pytest.warns(UserWarning, match=LEFTOVER):
        optimizer.step()
    assert w.item() == before
