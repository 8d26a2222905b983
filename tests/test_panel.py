"""The parameter groups of IndependentOptimizer, the panel that every task's optimizer follows."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, lr_scheduler

import mtlopt
import reference
from mtlopt import IndependentOptimizer
from problems import TASKS, Network, assert_equal, batches, leaf, make_losses, snapshot
from round_trips import COPIERS, by_file


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


@FORMS
def test_an_option_set_in_the_panel_applies_to_every_tasks_next_update(form: Any) -> None:
    model = Network()
    optimizer = make(model)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda own, *_: used.append(own.param_groups[0]["lr"]))
    form(optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.02
    form(optimizer, model)
    assert used == [0.1] * 3 + [0.02] * 3


@FORMS
def test_an_option_set_on_a_task_overrides_the_panel_until_it_is_reset(form: Any) -> None:
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
    """Even while that scheduler leaves the learning rate unchanged."""
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
def test_tensor_learning_rates_are_copied_and_follow_in_place_writes(form: Any) -> None:
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
def test_schedulers_do_not_warn_of_the_order_of_calls(form: Any) -> None:
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


def test_an_override_set_back_to_the_panels_value_ends() -> None:
    """torch.distributed.checkpoint sets the learning rate to 0 and back, around a step."""
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


def test_a_new_group_is_added_to_every_task_and_an_invalid_one_to_none() -> None:
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


def test_an_initial_lr_in_the_panel_is_not_taken_for_a_tasks_scheduler() -> None:
    """It comes with a plain optimizer's groups, a plain checkpoint, or torch's way to resume."""
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


def test_pending_changes_survive_a_new_group_and_a_change_of_mode() -> None:
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


def test_a_group_that_fails_for_one_task_is_added_to_none() -> None:
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


class InGroups(torch.optim.Optimizer):
    """SGD whose options stand in its groups alone, as Muon's do; it writes `initial_lr` itself."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            group["steps"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * group["initial_lr"] * p.grad)


@pytest.mark.parametrize("form", ["class", "instance"])
@pytest.mark.parametrize("file", [False, True])
def test_options_in_groups_and_not_in_defaults_follow_the_panel(form: str, file: bool) -> None:
    """By hand: 1 - 0.5 * 0.5 for each of two tasks, then half that rate, which b overrides."""

    def make(w: Tensor) -> Any:
        groups = [{"params": [w], "lr": 0.5}]
        if form == "class":
            return IndependentOptimizer(InGroups, groups, ["a", "b"])
        return IndependentOptimizer(InGroups(groups), ["a", "b"])

    def losses(tasks: Any) -> Any:
        return {task: w.sum() for task in tasks}

    w = leaf(1.0)
    optimizer = make(w)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(losses)
    assert w.item() == 0.5
    scheduler.step()
    if file:
        state = by_file(optimizer.state_dict())
        optimizer = make(w)
        optimizer.load_state_dict(state)
    optimizer.step(losses)
    assert w.item() == 0.25
    optimizer["b"].param_groups[0]["lr"] = 1.0
    optimizer.step(losses)
    assert w.item() == 0.25 - 0.125 - 0.5
    optimizer.reset_overrides("b")
    assert rates(optimizer) == [0.25, 0.25]
    assert rates(optimizer, "steps") == [3, 3]


class Adapting(SGD):
    """Doubles its own learning rate in each step, as classes without one to tune change theirs."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 2


@pytest.mark.parametrize("copy", ["none", "file", *COPIERS])
def test_a_rate_that_the_class_adapts_is_not_overwritten(copy: str) -> None:
    """By hand: rates of 1/8, 1/4 and 1/2, each for two tasks, whatever a scheduler says."""
    w = leaf(4.0)
    optimizer: Any = IndependentOptimizer(Adapting, [w], ["a", "b"], lr=0.125)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.1)
    for _ in range(2):
        optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
        scheduler.step()
    assert w.item() == 4 - 2 * 0.125 - 2 * 0.25
    if copy == "file":
        state = by_file(optimizer.state_dict())
        optimizer = IndependentOptimizer(Adapting, [w], ["a", "b"], lr=0.125)
        optimizer.load_state_dict(state)
    elif copy != "none":
        optimizer = COPIERS[copy](optimizer)
        w = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    assert w.item() == 4 - 2 * 0.125 - 2 * 0.25 - 2 * 0.5
    optimizer.pin("a")
    optimizer.reset_overrides("a")
    assert rates(optimizer) == [1.0, 1.0]


@pytest.mark.parametrize("task", ["a", "b"])
def test_a_tasks_scheduler_stays_with_it_when_the_state_is_loaded(task: str) -> None:
    """The panel's own scheduler, attached later, starts from the panel's rate."""
    model = Network()
    optimizer = make(model)
    lr_scheduler.OneCycleLR(optimizer[task], max_lr=5.0, total_steps=9)
    step(optimizer, model)
    loaded = make(model)
    loaded.load_state_dict(by_file(optimizer.state_dict()))
    assert loaded.param_groups[0].keys() == make(model).param_groups[0].keys()
    scheduler = lr_scheduler.ExponentialLR(loaded, 0.5)
    step(loaded, model)
    scheduler.step()
    step(loaded, model)
    assert rates(loaded) == pytest.approx([0.2 if name == task else 0.05 for name in TASKS])


def test_groups_can_be_assigned_and_reach_every_task() -> None:
    """As Lightning's BackboneFinetuning assigns them on resume: with those it had added."""
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())

    def groups(model: Network, lr: float) -> list[dict[str, Any]]:
        heads = {"params": list(model.heads.parameters()), "lr": lr}
        return [heads, {"params": model.trunk.parameters(), "lr": 0.01}]

    optimizer = IndependentOptimizer(Adam, model.heads.parameters(), TASKS, lr=0.1)
    plain = {t: Adam(expected.heads.parameters(), lr=0.1) for t in TASKS}
    for i, (x, y) in enumerate(batches(4)):
        if i == 2:
            optimizer.param_groups = groups(model, 0.02)
            for own in plain.values():
                own.param_groups[0]["lr"] = 0.02
                own.add_param_group(groups(expected, 0.02)[1])
        optimizer.step(make_losses(model), x, y)
        reference.independent(plain, make_losses(expected), TASKS, x, y)
    assert_equal(snapshot(model), snapshot(expected))
    with pytest.raises(ValueError, match="begin with groups of"):
        optimizer.param_groups = groups(model, 0.02)[1:]
