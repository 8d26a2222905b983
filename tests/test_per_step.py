"""`per_step`: some of the tasks a step, from a shuffled cycle in which each comes equally often."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch.optim import Adam

import mtlopt
import reference
from problems import Network, assert_equal, batches, make_losses, snapshot, twins

TASKS = ("a", "b", "c")
METHODS = (mtlopt.AlternatingOptimizer, mtlopt.IndependentOptimizer)


def make(method: Any, model: Any, **options: Any) -> Any:
    return method(Adam(model.parameters(), lr=0.01), TASKS, **options)


def toy(count: int, method: Any = mtlopt.AlternatingOptimizer, **options: Any) -> tuple[Any, Any]:
    """An optimizer of many tasks, and the function that notes which of them are asked for."""
    w = torch.ones(2, requires_grad=True)
    tasks = [f"t{i}" for i in range(count)]
    asked: list[str] = []

    def losses(names: Any) -> dict[str, Any]:
        asked.extend(names)
        return {name: (w**2).sum() for name in names}

    losses.asked = asked  # type: ignore[attr-defined]  # read by the tests
    return method(torch.optim.SGD([w], lr=0.01), tasks, **options), losses


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
@pytest.mark.parametrize(("count", "per_step"), [(40, 4), (5, 2), (5, 3), (7, 6), (3, 3), (4, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_visits_so_many_and_every_task_comes_equally_often(
    method: Any, count: int, per_step: int, order: Any
) -> None:
    """Also where the number does not divide the tasks: every round of T visits has each once."""
    optimizer, losses = toy(count, method, per_step=per_step, order=order)
    for _ in range(3 * count):
        before = len(losses.asked)
        values = optimizer.step(losses)
        visited = losses.asked[before:]
        assert len(visited) == len(set(visited)) == per_step
        assert list(values) == visited
        if order == "fixed":
            assert visited == sorted(visited, key=optimizer.tasks.index)
    assert set(Counter(losses.asked).values()) == {3 * per_step}


def test_the_cycle_is_shuffled_anew_each_round() -> None:
    optimizer, losses = toy(6, per_step=2, order="shuffled")
    for _ in range(9):
        optimizer.step(losses)
    rounds = [tuple(losses.asked[i : i + 6]) for i in (0, 6, 12)]
    assert len({*rounds, optimizer.tasks}) == 4
    assert all(sorted(one) == sorted(optimizer.tasks) for one in rounds)


@pytest.mark.parametrize("method", METHODS)
def test_a_visited_task_steps_as_it_would_alone(method: Any) -> None:
    """As the reference does over the tasks that the optimizer visited."""
    model, twin = twins()
    optimizer = make(method, model, per_step=2)
    plain = {task: Adam(twin.parameters(), lr=0.01) for task in TASKS}
    for x, y in batches(5):
        visited = list(optimizer.step(make_losses(model), x, y))
        if method is mtlopt.IndependentOptimizer:
            reference.independent(plain, make_losses(twin), visited, x, y)
        else:
            reference.alternating(plain["a"], make_losses(twin), visited, x, y)
    assert_equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("method", METHODS)
def test_all_of_them_in_the_fixed_order_is_the_plain_method(method: Any) -> None:
    model, twin = twins()
    optimizers = make(method, model, per_step=3), make(method, twin)
    for x, y in batches(3):
        optimizers[0].step(make_losses(model), x, y)
        optimizers[1].step(make_losses(twin), x, y)
    assert_equal(snapshot(model), snapshot(twin))


def by_state(optimizer: Any, model: Any) -> tuple[Any, Any]:
    twin = copy.deepcopy(model)
    later = make(type(optimizer), twin, per_step=2, order="shuffled")
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return later, twin


def by_copy(optimizer: Any, model: Any) -> tuple[Any, Any]:
    return copy.deepcopy((optimizer, model))


def by_pickle(optimizer: Any, model: Any) -> Any:
    return pickle.loads(pickle.dumps((optimizer, model)))


@pytest.mark.parametrize("transport", [by_state, by_copy, by_pickle])
@pytest.mark.parametrize("method", METHODS)
def test_it_resumes_in_the_middle_of_a_round(method: Any, transport: Any) -> None:
    """Bit for bit: the rest of the round that was drawn, then the same draws."""
    model = Network()
    optimizer = make(method, model, per_step=2, order="shuffled")
    data = batches(9)
    for x, y in data[:2]:
        optimizer.step(make_losses(model), x, y)
    later, twin = transport(optimizer, model)
    for x, y in data[2:]:
        first = optimizer.step(make_losses(model), x, y)
        assert list(later.step(make_losses(twin), x, y)) == list(first)
    assert_equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("method", METHODS)
def test_without_it_nothing_is_new_and_a_state_without_a_cycle_loads(method: Any) -> None:
    model = Network()
    plain, some = make(method, model), make(method, model, per_step=2)
    assert "cycle" not in plain.state_dict()["mtlopt"]
    plain.load_state_dict(some.state_dict())
    assert "cycle" not in plain.state_dict()["mtlopt"]
    some.step(make_losses(model), *batches(1)[0])
    some.load_state_dict(plain.state_dict())
    assert some.state_dict()["mtlopt"]["cycle"] == []


def test_a_cycle_of_other_tasks_is_refused_and_changes_nothing() -> None:
    optimizer, losses = toy(5, per_step=2)
    optimizer.step(losses)
    kept = optimizer.state_dict()["mtlopt"]["cycle"]
    state = copy.deepcopy(optimizer.state_dict())
    state["mtlopt"]["cycle"] = [1, 7]
    with pytest.raises(ValueError, match=r"`cycle` of 5 tasks, got \[1, 7\]"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["mtlopt"]["cycle"] == kept


def test_an_absent_task_has_had_its_turn() -> None:
    optimizer, losses = toy(4, per_step=2)
    for _ in range(4):
        values = optimizer.step(lambda names: {**losses(names), "t1": None})
        assert "t1" not in values
    assert set(Counter(losses.asked).values()) == {2}


@pytest.mark.parametrize("per_step", [0, 4, -1, 1.5, "two"])
@pytest.mark.parametrize("method", METHODS)
def test_other_numbers_are_refused(method: Any, per_step: Any) -> None:
    with pytest.raises(ValueError, match=r"`per_step` must be between 1 and 3 .*got"):
        make(method, Network(), per_step=per_step)


def test_one_forward_pass_of_all_tasks_cannot_leave_some_out() -> None:
    with pytest.raises(ValueError, match="`per_step` must be None with schedule='simultaneous'"):
        make(mtlopt.IndependentOptimizer, Network(), per_step=2, schedule="simultaneous")
