"""IndependentOptimizer: the mapping from task to optimizer, states, factories, groups."""

import copy
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import schedulefree
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_optimizer import Lion, Prodigy
from torch import Tensor
from torch.optim import SGD, Adam

import mtlopt
import reference
from mtlopt import IndependentOptimizer
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot, twins


def make(model: Network, **keywords: Any) -> Any:
    options = {"lr": 0.1} | keywords
    return IndependentOptimizer(
        options.pop("optimizer_class", Adam), model.parameters(), TASKS, **options
    )


def step(optimizer: IndependentOptimizer, model: Network) -> None:
    optimizer.step(make_losses(model), *batches(1)[0])


def test_it_is_an_optimizer_that_gives_each_tasks_own() -> None:
    """It reads like a mapping and is none: frameworks take mappings apart and rebuild them."""
    optimizer = make(Network())
    kinds = [isinstance(optimizer, kind) for kind in (torch.optim.Optimizer, Mapping)]
    assert kinds == [True, False]
    assert optimizer.get("a") is optimizer["a"]
    assert optimizer.get("d") is None
    assert dict(optimizer.items()) == {task: optimizer[task] for task in TASKS}
    assert len(optimizer) == 3
    assert tuple(optimizer) == optimizer.tasks == tuple(optimizer.keys()) == TASKS
    assert "a" in optimizer
    assert "d" not in optimizer
    assert all(type(own) is Adam for own in optimizer.values())
    with pytest.raises(KeyError, match=r"'d' is not among the tasks \['a', 'b', 'c'\]"):
        optimizer["d"]
    assert optimizer == optimizer  # noqa: PLR0124  # by identity, not as mappings compare
    assert optimizer != make(Network())
    assert {optimizer: 1}[optimizer] == 1


def test_the_imperative_form_is_step() -> None:
    model, twin = twins()
    optimizer, other = make(model), make(twin)
    for x, y in batches(5):
        optimizer.step(make_losses(model), x, y)
        for task, own in other.items():
            other.zero_grad()
            make_losses(twin)((task,), x, y)[task].backward()
            own.step()
    assert_equal(snapshot(model), snapshot(twin))


def test_a_task_has_no_state_for_parameters_its_loss_does_not_depend_on() -> None:
    model = Network()
    optimizer = make(model)
    step(optimizer, model)
    trunk = set(model.trunk.parameters())
    for task, own in optimizer.items():
        assert set(own.state) == trunk | set(model.heads[task].parameters())


def test_zero_gradients_are_refused() -> None:
    """Momentum and decay would move other tasks' heads; MONAI asks for them by default."""
    message = r"`set_to_none` must be True, got False.*`optim_set_to_none=True` in MONAI"
    with pytest.raises(ValueError, match=message):
        make(Network()).zero_grad(set_to_none=False)


def test_parameters_come_in_all_of_torchs_shapes() -> None:
    model = Network()
    heads = list(model.heads.parameters())
    shapes: list[Any] = [
        model.parameters(),
        [{"params": model.trunk.parameters(), "lr": 0.5}, {"params": (h for h in heads)}],
        model.named_parameters(),
        [{"params": model.trunk.named_parameters()}, {"params": model.heads.named_parameters()}],
        [{"params": heads[0]}, {"params": heads[1:]}],
    ]
    for params in shapes:
        optimizer = IndependentOptimizer(Adam, params, TASKS, lr=0.1)
        plain = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        for own in optimizer.values():
            assert [[id(p) for p in g["params"]] for g in own.param_groups] == plain
        assert sum(map(len, plain)) in {5, 3}
    assert (
        "param_names" in IndependentOptimizer(Adam, model.named_parameters(), TASKS).param_groups[0]
    )
    with pytest.raises(ValueError, match="`params` must hold at least one parameter, got none"):
        IndependentOptimizer(Adam, [], TASKS)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"schedule": "parallel"}, "`schedule` must be 'sequential' or 'simultaneous', got 'par"),
        ({"order": "random"}, "`order` must be 'fixed' or 'shuffled', got 'random'"),
        ({"lr": -1.0}, "Invalid learning rate"),
        (
            {"optimizer_class": lambda *_, **__: 3},
            "Optimizer, got int: `optimizer_class` made it",
        ),
        (
            {"optimizer_class": torch.optim.LBFGS, "schedule": "simultaneous"},
            "`schedule` must be 'sequential' for a class that needs a closure",
        ),
        (
            {"optimizer_class": torch.optim.LBFGS, "scaler": torch.amp.GradScaler("cpu")},
            "`scaler` and `process_group` must be None for a class that needs a closure",
        ),
    ],
)
def test_bad_options_are_named_with_their_value(keywords: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(Network(), **keywords)


@pytest.mark.parametrize(
    "factory", [partial(Adam, amsgrad=True), Lion, partial(Prodigy, safeguard_warmup=True)]
)
def test_factories_and_third_party_classes_are_their_plain_loop(factory: Any) -> None:
    """Prodigy keeps counters in its groups: they are its own, not overrides."""
    model, expected = twins()
    optimizer = make(model, optimizer_class=factory)
    plain = {task: factory(expected.parameters(), lr=0.1) for task in TASKS}
    for index, (x, y) in enumerate(batches(6)):
        if index == 3:
            for own in (optimizer, *plain.values()):
                own.param_groups[0]["lr"] = 0.05
        if index == 4:
            state = copy.deepcopy(optimizer.state_dict())
            assert state["mtlopt"]["overrides"] == [[[]]] * 3
            optimizer = make(model, optimizer_class=factory, lr=9.0)
            optimizer.load_state_dict(state)
        optimizer.step(make_losses(model), x, y)
        reference.independent(plain, make_losses(expected), TASKS, x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_schedule_free_is_exact_for_one_task_and_refused_for_several() -> None:
    """Each of several averages would be taken over weights that the other tasks moved."""
    free = schedulefree.AdamWScheduleFree
    methods: list[Any] = [
        lambda params: IndependentOptimizer(free, params, ["b"], lr=0.1),
        lambda params: mtlopt.AlternatingOptimizer(free(params, lr=0.1), ["b"]),
    ]
    for method in methods:
        model, expected = twins()
        optimizer = method(model.parameters())
        plain = free(expected.parameters(), lr=0.1)
        for x, y in batches(4):
            for own in (optimizer, plain):
                own.train()
            optimizer.step(make_losses(model), x, y)
            reference.alternating(plain, make_losses(expected), ["b"], x, y)
            for own in (optimizer, plain):
                own.eval()
            assert_equal(snapshot(model), snapshot(expected))
    with pytest.raises(ValueError, match=r"swap the parameters .*got AdamWScheduleFree for 3"):
        make(Network(), optimizer_class=free)


def test_shuffled_order_is_a_permutation_drawn_anew_and_saved() -> None:
    model = Network()
    optimizer = make(model, order="shuffled")
    asked: list[str] = []
    losses = make_losses(model)

    def record(tasks: Any, *batch: Any) -> dict[str, Tensor]:
        asked.extend(tasks)
        return losses(tasks, *batch)

    for _ in range(12):
        optimizer.step(record, *batches(1)[0])
    orders = [tuple(asked[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == list(TASKS) for order in orders)
    assert len(set(orders)) > 3
    loaded = make(model, order="shuffled")
    loaded.load_state_dict(optimizer.state_dict())
    asked.clear()
    for own in (optimizer, loaded):
        for _ in range(4):
            own.step(record, *batches(1)[0])
    assert asked[:12] == asked[12:]


def test_diagnostics_are_the_norms_of_the_tasks_own_gradients() -> None:
    model = Network()
    optimizer = make(model, optimizer_class=SGD, lr=0.0)
    assert optimizer.diagnostics() == {}
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    optimizer.step(lambda t, *b: {} if "b" in t else losses(t, *b), x, y)
    seen = optimizer.diagnostics()
    assert seen["skipped"].tolist() == [False] * 3
    assert seen["gradient_norms"][1].isnan()
    for index, task in ((0, "a"), (2, "c")):
        grads = torch.autograd.grad(
            losses((task,), x, y)[task], list(model.parameters()), allow_unused=True
        )
        flat = torch.cat([g.flatten() for g in cast(Any, grads) if g is not None])
        torch.testing.assert_close(seen["gradient_norms"][index], flat.norm(), rtol=1e-14, atol=0)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=12, unique=True), st.data())
def test_random_groups_partition_the_tasks(tasks: list[str], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(tasks)))
    groups = mtlopt.random_groups(tasks, size, torch.Generator().manual_seed(5))
    assert sorted(name for group in groups for name in group) == sorted(tasks)
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    assert 1 <= len(groups[-1]) <= size
    assert groups == mtlopt.random_groups(tasks, size, torch.Generator().manual_seed(5))


def test_random_groups_differ_and_refuse_a_size_out_of_range() -> None:
    def draws() -> Iterator[Any]:
        for _ in range(10):
            yield mtlopt.random_groups(list("abcdef"), 2)

    assert len(set(draws())) > 5
    for size in (0, 4):
        with pytest.raises(ValueError, match=rf"`size` must be between 1 and 3 .*got {size}"):
            mtlopt.random_groups(TASKS, size)


def test_a_plain_state_is_copied_for_every_task() -> None:
    """With one tensor in three states, the tasks would share their moments after all."""
    model = Network()
    plain = Adam(model.parameters(), lr=0.1)
    make_losses(model)(("a",), *batches(1)[0])["a"].backward()
    plain.step()
    optimizer = make(model)
    for state in (plain.state_dict(), make(model).state_dict()):
        optimizer.load_state_dict(state)
        step(optimizer, model)
    optimizer.load_state_dict(plain.state_dict())
    weight = model.trunk[0].weight
    states = [own.state[weight] for own in (plain, *optimizer.values())]
    for key in ("exp_avg", "step"):
        assert len({state[key].data_ptr() for state in states}) == 4


def test_names_may_be_of_a_subclass_of_str_and_load_with_weights_only(tmp_path: Path) -> None:
    class Name(str, Enum):
        A = "a"
        B = "b"
        C = "c"

    model = Network()
    optimizer = IndependentOptimizer(Adam, model.parameters(), list(Name))
    optimizer.step(make_losses(model), *batches(1)[0])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    make(model).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_closure_is_refused_with_the_reason() -> None:
    for schedule in ("sequential", "simultaneous"):
        with pytest.raises(TypeError, match="`closure` must be None: each task's loss"):
            make(Network(), schedule=schedule).step(lambda tasks: {}, closure=lambda: 0.0)
