"""The control panel, the mapping, and what only independent optimizers have."""

import copy
import warnings
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
from torch.optim import SGD, Adam, lr_scheduler

import mtlopt
from mtlopt import IndependentOptimizer
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot


def make(model: Network, **keywords: Any) -> Any:
    options = {"lr": 0.1} | keywords
    return IndependentOptimizer(
        options.pop("optimizer_class", Adam), model.parameters(), TASKS, **options
    )


def rates(optimizer: IndependentOptimizer, key: str = "lr") -> list[Any]:
    return [own.param_groups[0][key] for own in optimizer.values()]


def step(optimizer: IndependentOptimizer, model: Network) -> None:
    optimizer.step(make_losses(model), *batches(1)[0])


def by_hand(optimizer: Any, model: Network) -> None:
    """The imperative form of a step."""
    (x, y), *_ = batches(1)
    for task, own in optimizer.items():
        optimizer.zero_grad()
        make_losses(model)((task,), x, y)[task].backward()
        own.step()


FORMS = pytest.mark.parametrize("form", [step, by_hand])


def test_it_is_an_optimizer_and_a_mapping_from_task_to_optimizer() -> None:
    optimizer = make(Network())
    assert all(isinstance(optimizer, kind) for kind in (torch.optim.Optimizer, Mapping))
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
    model, twin = Network(), Network()
    twin.load_state_dict(model.state_dict())
    optimizer, other = make(model), make(twin)
    for _ in range(5):
        step(optimizer, model)
        by_hand(other, twin)
    assert_equal(snapshot(model), snapshot(twin))


def test_a_task_has_no_state_for_a_parameter_that_it_does_not_reach() -> None:
    model = Network()
    optimizer = make(model)
    step(optimizer, model)
    trunk = set(model.trunk.parameters())
    for task, own in optimizer.items():
        assert set(own.state) == trunk | set(model.heads[task].parameters())


def test_frozen_parameters_are_left_alone() -> None:
    model = Network()
    model.trunk[0].weight.requires_grad_(False)
    start = snapshot(model)
    for schedule in ("sequential", "simultaneous"):
        optimizer = make(model, schedule=schedule, weight_decay=0.1)
        step(optimizer, model)
        assert model.trunk[0].weight not in optimizer["a"].state
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start[name])]
    assert moved == [name for name in start if name != "trunk.0.weight"]


def test_zero_gradients_are_refused() -> None:
    """They would move other tasks' heads by momentum and decay."""
    with pytest.raises(ValueError, match="`set_to_none` must be True, got False"):
        make(Network()).zero_grad(set_to_none=False)


@FORMS
def test_what_is_set_in_the_panel_reaches_every_task_before_its_update(form: Any) -> None:
    model = Network()
    optimizer = make(model)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda own, *_: used.append(own.param_groups[0]["lr"]))
    form(optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.02
    form(optimizer, model)
    assert used == [0.1] * 3 + [0.02] * 3


@FORMS
def test_what_is_set_on_a_task_stays_with_it_until_it_is_reset(form: Any) -> None:
    model = Network()
    optimizer = make(model)
    optimizer["b"].param_groups[0]["lr"] = 0.7
    form(optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    form(optimizer, model)
    assert rates(optimizer) == [0.02, 0.7, 0.02]
    assert rates(optimizer, "betas") == [(0.5, 0.9)] * 3
    optimizer.reset_overrides("b")
    assert rates(optimizer) == [0.02] * 3
    optimizer.param_groups[0]["lr"] = 0.01
    form(optimizer, model)
    assert rates(optimizer) == [0.01] * 3
    with pytest.raises(KeyError, match="'d' is not among the tasks"):
        optimizer.reset_overrides("d")


@FORMS
def test_a_scheduler_on_the_panel_moves_all_but_a_task_with_its_own(form: Any) -> None:
    """The task's scheduler rules even while it leaves its rate as it is."""
    model = Network()
    optimizer = make(model)
    panel = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    alone = lr_scheduler.StepLR(optimizer["c"], step_size=2, gamma=0.1)
    seen = []
    for _ in range(4):
        form(optimizer, model)
        seen.append(rates(optimizer))
        panel.step()
        alone.step()
    assert [row[:2] for row in seen] == [[r] * 2 for r in (0.1, 0.05, 0.025, 0.0125)]
    assert [row[2] for row in seen] == pytest.approx([0.1, 0.1, 0.01, 0.01], abs=1e-15)
    assert "initial_lr" not in optimizer["a"].param_groups[0]


def test_one_cycle_moves_the_momentum_of_every_task() -> None:
    model = Network()
    optimizer = make(model, optimizer_class=SGD, momentum=0.9)
    twin = SGD(Network().parameters(), lr=0.1, momentum=0.9)
    cycles = [lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=6) for o in (optimizer, twin)]
    for _ in range(5):
        step(optimizer, model)
        group = twin.param_groups[0]
        assert rates(optimizer) == [group["lr"]] * 3
        assert rates(optimizer, "momentum") == [group["momentum"]] * 3
        twin.step()
        for cycle in cycles:
            cycle.step()


@FORMS
def test_tensor_learning_rates_are_copied_and_follow_writes_in_place(form: Any) -> None:
    model = Network()
    rate = torch.tensor(0.1)
    optimizer = make(model, lr=rate, foreach=False)
    held = rates(optimizer)
    assert len({id(r) for r in [rate, optimizer.param_groups[0]["lr"], *held]}) == 5
    optimizer.param_groups[0]["lr"].fill_(0.03)
    form(optimizer, model)
    assert rates(optimizer) == [torch.tensor(0.03)] * 3
    assert all(new is old for new, old in zip(rates(optimizer), held, strict=True))
    optimizer["a"].param_groups[0]["lr"].fill_(0.5)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    form(optimizer, model)
    assert rates(optimizer) == [torch.tensor(0.5), torch.tensor(0.01), torch.tensor(0.01)]


@FORMS
def test_no_scheduler_complains_of_its_order_in_any_form(form: Any) -> None:
    """On the panel, on a task, on a task that is absent from the first batch."""
    model = Network()
    optimizer = make(model)
    schedulers = [lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, optimizer["b"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if form is by_hand:
            form(optimizer, model)
        else:
            losses = make_losses(model)
            optimizer.step(lambda t, *b: {} if "b" in t else losses(t, *b), *batches(1)[0])
        for scheduler in schedulers:
            scheduler.step()


def test_an_override_set_back_to_the_panels_value_is_none() -> None:
    """As torch.distributed.checkpoint does to the learning rate, around a step without lr."""
    model = Network()
    optimizer = make(model)
    step(optimizer, model)
    for value in (0.0, 0.1):
        optimizer["b"].param_groups[0]["lr"] = value
        by_hand(optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.2
    by_hand(optimizer, model)
    assert rates(optimizer) == [0.2, 0.2, 0.2]


def test_overrides_and_rates_survive_a_state_dict() -> None:
    model = Network()
    optimizer = make(model)
    optimizer["b"].param_groups[0]["lr"] = 0.7
    optimizer.param_groups[0]["eps"] = 1e-3
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = make(Network(), lr=5.0)
    loaded.load_state_dict(saved)
    assert rates(loaded) == [0.1, 0.7, 0.1]
    assert rates(loaded, "eps") == [1e-3] * 3
    loaded.param_groups[0]["lr"] = 0.2
    by_hand(loaded, model := Network())
    assert model is not None
    assert rates(loaded) == [0.2, 0.7, 0.2]


def test_a_new_group_reaches_every_task_and_a_bad_one_none() -> None:
    model = Network()
    optimizer = make(model)
    step(optimizer, model)
    extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": (p for p in [extra]), "lr": 0.5})
    assert [g["params"] for g in optimizer.param_groups[1:]] == [[extra]]
    assert [own.param_groups[1]["lr"] for own in optimizer.values()] == [0.5] * 3
    losses = make_losses(model)
    optimizer.step(
        lambda t, *b: {n: v + extra.sum() for n, v in losses(t, *b).items()}, *batches(1)[0]
    )
    assert all(extra in own.state for own in optimizer.values())
    optimizer.param_groups[1]["lr"] = 0.25
    step(optimizer, model)
    assert [own.param_groups[1]["lr"] for own in optimizer.values()] == [0.25] * 3
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [extra]})
    assert {len(o.param_groups) for o in (optimizer, *optimizer.values())} == {2}
    optimizer["a"].add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="2 parameter groups, got 3: add groups to the panel"):
        step(optimizer, model)


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
        ({"optimizer_class": lambda *_, **__: 3}, "`optimizer_class` must make a plain .*got int"),
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
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())
    optimizer = make(model, optimizer_class=factory)
    plain = {task: factory(expected.parameters(), lr=0.1) for task in TASKS}
    losses, expected_losses = make_losses(model), make_losses(expected)
    for index, (x, y) in enumerate(batches(6)):
        if index == 3:
            for own in (optimizer, *plain.values()):
                own.param_groups[0]["lr"] = 0.05
        if index == 4:
            state = copy.deepcopy(optimizer.state_dict())
            assert state["mtlopt"]["overrides"] == [[[]]] * 3
            optimizer = make(model, optimizer_class=factory, lr=9.0)
            optimizer.load_state_dict(state)
        optimizer.step(losses, x, y)
        for task, own in plain.items():
            expected.zero_grad()
            expected_losses((task,), x, y)[task].backward()
            own.step()
    assert_equal(snapshot(model), snapshot(expected))


def test_schedule_free_is_exact_for_one_task_and_refused_for_several() -> None:
    """Several averages over weights that other tasks moved would be nobody's."""
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())
    free = schedulefree.AdamWScheduleFree
    optimizer = IndependentOptimizer(free, model.parameters(), ["b"], lr=0.1)
    plain = free(expected.parameters(), lr=0.1)
    for x, y in batches(4):
        for own in (optimizer, plain):
            own.train()
        optimizer.step(make_losses(model), x, y)
        expected.zero_grad()
        make_losses(expected)(("b",), x, y)["b"].backward()
        plain.step()
        for own in (optimizer, plain):
            own.eval()
        assert_equal(snapshot(model), snapshot(expected))
    with pytest.raises(ValueError, match=r"swap the parameters .*got AdamWScheduleFree for 3"):
        make(model, optimizer_class=free)
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())
    wrapped = mtlopt.AlternatingOptimizer(free(model.parameters(), lr=0.1), ["b"])
    plain = free(expected.parameters(), lr=0.1)
    for x, y in batches(4):
        for own in (wrapped, plain):
            own.train()
        wrapped.step(make_losses(model), x, y)
        expected.zero_grad()
        make_losses(expected)(("b",), x, y)["b"].backward()
        plain.step()
        for own in (wrapped, plain):
            own.eval()
    assert_equal(snapshot(model), snapshot(expected))


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
    """One tensor in three states would be three tasks' moments mixed after all."""
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


def test_an_initial_rate_in_the_panel_is_no_scheduler_of_a_task() -> None:
    """As a group that is taken over, a plain checkpoint, or torch's way to resume brings it."""
    model = Network()
    plain = Adam(model.parameters(), lr=0.1)
    lr_scheduler.StepLR(plain, 1)
    resumed = IndependentOptimizer(Adam, plain.param_groups, TASKS)
    lr_scheduler.StepLR(resumed, 1, last_epoch=3)
    loaded = make(model)
    loaded.load_state_dict(plain.state_dict())
    grown = make(model)
    extra = torch.nn.Parameter(torch.ones(1))
    grown.add_param_group({"params": [extra], "lr": 0.1, "initial_lr": 0.1})
    for optimizer in (resumed, loaded, grown):
        for group in optimizer.param_groups:
            group["lr"] = 0.03
        by_hand(optimizer, model)
        for own in optimizer.values():
            assert [group["lr"] for group in own.param_groups] == [0.03] * len(own.param_groups)


def test_what_is_pending_survives_a_new_group_and_a_change_of_mode() -> None:
    model = Network()
    optimizer = make(model)
    optimizer.param_groups[0]["eps"] = 1e-3
    optimizer["a"].param_groups[0]["lr"] = 0.5
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    optimizer["b"].param_groups[0]["lr"] = 0.6
    optimizer.train()
    optimizer["c"].param_groups[0]["lr"] = 0.7
    optimizer.eval()
    optimizer.param_groups[0]["lr"] = 0.2
    step(optimizer, model)
    assert rates(optimizer) == [0.5, 0.6, 0.7]
    assert rates(optimizer, "eps") == [1e-3] * 3


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


def test_a_class_that_fails_for_one_task_adds_its_group_to_none() -> None:
    calls = []

    class Picky(Adam):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            calls.append(self)
            if len(calls) == 5:
                raise RuntimeError("no")

    model = Network()
    optimizer = make(model, optimizer_class=Picky)
    with pytest.raises(RuntimeError, match=r"^no$"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert {len(own.param_groups) for own in (optimizer, *optimizer.values())} == {1}
    step(optimizer, model)


def test_a_closure_is_refused_with_the_reason() -> None:
    for schedule in ("sequential", "simultaneous"):
        with pytest.raises(TypeError, match="`closure` must be None: each task has a loss"):
            make(Network(), schedule=schedule).step(lambda tasks: {}, closure=lambda: 0.0)
