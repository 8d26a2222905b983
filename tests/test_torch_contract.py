"""What every method promises as a `torch.optim.Optimizer`: state, hooks, schedulers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mtlopt
from all_methods import every_method, make
from problems import TASKS, Network, batches, leaf, make_losses, snapshot
from round_trips import by_file, flat

MAKERS: dict[str, Callable[..., Any]] = {
    "joint": lambda m, t=TASKS, c=Adam, **k: mtlopt.JointOptimizer(
        c(m.parameters(), lr=0.1), t, **k
    ),
    "alternating": lambda m, t=TASKS, c=Adam, **k: mtlopt.AlternatingOptimizer(
        c(m.parameters(), lr=0.1), t, **k
    ),
    "independent": lambda m, t=TASKS, c=Adam, **k: mtlopt.IndependentOptimizer(
        c, m.parameters(), t, lr=0.1, **k
    ),
    "simultaneous": lambda m, t=TASKS, c=Adam, **k: mtlopt.IndependentOptimizer(
        c, m.parameters(), t, schedule="simultaneous", lr=0.1, **k
    ),
}
methods = pytest.mark.parametrize("method", MAKERS)
wrappers = pytest.mark.parametrize("method", ["joint", "alternating"])


def train(optimizer: Any, model: Network, steps: int = 1) -> None:
    for x, y in batches(steps):
        optimizer.step(make_losses(model), x, y)


def saved(optimizer: Any) -> Any:
    return by_file(optimizer.state_dict())


@wrappers
def test_a_wrapper_shares_groups_and_state_with_its_base_after_either_loads(method: str) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    train(optimizer, model)
    state = optimizer.base.state_dict()
    for load in (optimizer.load_state_dict, optimizer.base.load_state_dict):
        load(copy.deepcopy(state))
        assert optimizer.param_groups is optimizer.base.param_groups
        assert optimizer.state is optimizer.base.state
        assert optimizer.defaults is optimizer.base.defaults
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert len(optimizer.base.param_groups) == 2


@wrappers
def test_a_wrappers_state_dict_is_torchs_plus_one_entry(method: str) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    train(optimizer, model)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "mtlopt"}
    own = optimizer.base.state_dict()
    assert flat({"state": state["state"], "param_groups": state["param_groups"]}) == flat(own)


def test_an_independent_state_dict_lists_the_tasks_states_in_order() -> None:
    model = Network()
    optimizer = MAKERS["independent"](model)
    train(optimizer, model)
    state = saved(optimizer)
    assert state["mtlopt"]["tasks"] == list(TASKS)
    for own, part in zip(optimizer.values(), state["mtlopt"]["optimizers"], strict=True):
        assert flat(part) == flat(own.state_dict())
    assert state["param_groups"][0]["params"] == list(range(5))
    assert state["param_groups"][0]["lr"] == 0.1


def foreign_states() -> dict[str, tuple[Callable[[str], Any], str]]:
    def wider() -> Network:
        model = Network()
        model.trunk[0] = torch.nn.Linear(4, 6, bias=False, dtype=torch.float32)
        model.trunk[0].weight = torch.nn.Parameter(torch.ones(6, 9))
        return model

    def without(method: str, *path: Any) -> Any:
        state = saved_after_training(method)
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return state

    return {
        "tasks": (
            lambda m: saved(MAKERS[m](Network(), ("a", "c", "b"))),
            r"same tasks: \['a', 'b', 'c'\], got \['a', 'c', 'b'\]",
        ),
        "class": (lambda m: saved(MAKERS[m](Network(), c=SGD)), "same optimizer: Adam, got SGD"),
        "shapes": (lambda m: saved(MAKERS[m](wider())), r"same shapes: .*got \[\[\[6, 9\]"),
        "number": (
            lambda m: saved(MAKERS[m](torch.nn.Linear(2, 2))),
            r"groups of \[5\] parameters, got groups of \[2\]",
        ),
        "model": (lambda m: Network().state_dict(), "must have the entries .*got .*trunk.0.weight"),
        "no groups": (lambda m: without(m, "param_groups"), "must have the entries"),
        "no options": (lambda m: without(m, "param_groups", 0, "params"), "params"),
    }


def saved_after_training(method: str) -> Any:
    model = Network()
    optimizer = MAKERS[method](model)
    train(optimizer, model, 2)
    return saved(optimizer)


@methods
@pytest.mark.parametrize("case", foreign_states())
def test_a_foreign_state_is_refused_and_changes_nothing(method: str, case: str) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    train(optimizer, model, 2)
    before = flat(optimizer.state_dict())
    make, message = foreign_states()[case]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make(method))
    assert flat(optimizer.state_dict()) == before


def test_a_load_that_fails_at_the_last_task_changes_no_other() -> None:
    model = Network()
    optimizer = MAKERS["independent"](model)
    train(optimizer, model, 2)
    before = flat(optimizer.state_dict())
    broken = saved_after_training("independent")
    del broken["mtlopt"]["optimizers"][2]["state"]
    with pytest.raises(ValueError, match=r"must be complete, got one with KeyError\('state'\)"):
        optimizer.load_state_dict(broken)
    assert flat(optimizer.state_dict()) == before
    train(optimizer, model)


@methods
def test_a_plain_optimizers_state_loads_into_every_tasks_optimizer(method: str) -> None:
    model = Network()
    plain = Adam(model.parameters(), lr=0.3)
    sum(make_losses(model)(TASKS, *batches(1)[0]).values()).backward()  # type: ignore[union-attr]  # not 0
    plain.step()
    optimizer = MAKERS[method](model)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    inner = list(optimizer.values()) if not hasattr(optimizer, "base") else [optimizer.base]
    for own in inner:
        assert flat(own.state_dict()) == flat(plain.state_dict())


@methods
def test_state_dict_hooks_fire_as_in_torch(method: str) -> None:
    optimizer = MAKERS[method](Network())
    calls = []
    optimizer.register_state_dict_pre_hook(lambda own: calls.append(("before", own)))
    optimizer.register_state_dict_post_hook(lambda own, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda own, state: {k: v for k, v in state.items() if k != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda own: calls.append(("after", own)))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert calls == [("before", optimizer), ("after", optimizer)]


@methods
def test_step_hooks_fire_around_each_update_with_its_gradient(method: str) -> None:
    """Once a step, or once per present task; their first argument is the updating optimizer."""
    model = Network()
    optimizer = MAKERS[method](model)
    joint = method == "joint"
    inner = [optimizer.base] * 3 if hasattr(optimizer, "base") else list(optimizer.values())
    calls: list[Any] = []
    head = [model.heads[task].weight for task in TASKS]

    def record(when: str) -> Callable[..., None]:
        def hook(own: Any, args: Any, kwargs: Any) -> None:
            calls.append((when, own, [h.grad is not None for h in head]))

        return hook

    handles = [
        optimizer.register_step_pre_hook(record("before")),
        optimizer.register_step_post_hook(record("after")),
    ]
    train(optimizer, model)
    if joint:
        assert calls == [(when, inner[0], [True] * 3) for when in ("before", "after")]
    else:
        assert calls == [
            (when, inner[i], [i == j for j in range(3)])
            for i in range(3)
            for when in ("before", "after")
        ]
    calls.clear()
    losses = make_losses(model)
    optimizer.step(
        lambda t, *b: {n: v for n, v in losses(t, *b).items() if n == "a"}, *batches(1)[0]
    )
    assert [call[1] for call in calls] == inner[:1] * 2
    calls.clear()
    optimizer.step(lambda t: {})
    for handle in handles:
        handle.remove()
    train(optimizer, model)
    assert calls == []


@methods
def test_global_hooks_of_torch_see_each_update_once(method: str) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    calls: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda own, *_: calls.append(own))
    try:
        train(optimizer, model)
    finally:
        handle.remove()
    assert len(calls) == (1 if method == "joint" else 3)
    assert optimizer not in calls


@methods
def test_clipping_in_a_pre_hook_bounds_what_the_update_uses(method: str) -> None:
    """Of each task's gradient in sequential methods, of the sum in the joint one."""
    model = Network()
    optimizer = MAKERS[method](model, c=SGD)
    norms = []

    def clip(own: Any, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        norms.append(
            torch.nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None]
            )
        )

    optimizer.register_step_pre_hook(clip)
    start = snapshot(model)
    train(optimizer, model)
    assert [n.item() for n in norms] == pytest.approx(
        [1e-3] * (1 if method == "joint" else 3), rel=1e-2
    )
    moved = torch.cat([(p - start[n]).flatten() for n, p in model.named_parameters()]).norm()
    assert 0 < moved.item() <= 0.1 * 1e-3 * len(norms) * 1.01


@methods
@pytest.mark.parametrize("reduce", [False, True])
def test_schedulers_move_every_group_without_a_warning(method: str, reduce: bool) -> None:
    model = Network()
    optimizer = MAKERS[method](model)
    scheduler: Any = (
        lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        if reduce
        else lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    )
    for _ in range(3):
        train(optimizer, model)
        scheduler.step(*([1.0] if reduce else []))
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda own, *_: used.append(own.param_groups[0]["lr"]))
    train(optimizer, model)
    assert set(used) == {optimizer.param_groups[0]["lr"]}
    assert used[0] < 0.1


@methods
def test_a_generators_state_stays_on_the_cpu(method: str) -> None:
    """`map_location` moves every tensor of a checkpoint, and generators do not load that."""
    if method == "joint":
        pytest.skip("draws nothing")
    optimizer = MAKERS[method](Network(), order="shuffled")
    state = optimizer.state_dict()
    assert torch.equal(state["mtlopt"]["generator"], optimizer.generator.get_state())

    class Elsewhere(torch.Tensor):
        """Simulates a tensor on a device, which has to be copied back."""

        def cpu(self) -> Any:  # type: ignore[override]  # one form is enough here
            return torch.Tensor.cpu(self).as_subclass(torch.Tensor)

    optimizer.generator.manual_seed(99)
    state["mtlopt"]["generator"] = state["mtlopt"]["generator"].as_subclass(Elsewhere)
    optimizer.load_state_dict(state)
    expected = torch.Generator().manual_seed(0)
    assert torch.equal(optimizer.generator.get_state(), expected.get_state())


@wrappers
@pytest.mark.parametrize("wrong", [Adam, None, "inner"])
def test_a_wrapper_takes_an_instance_of_a_plain_optimizer(method: str, wrong: Any) -> None:
    wrap = {"joint": mtlopt.JointOptimizer, "alternating": mtlopt.AlternatingOptimizer}[method]
    given = MAKERS[method](Network()) if wrong == "inner" else wrong
    with pytest.raises(TypeError, match="`optimizer` must be an instance of a plain"):
        wrap(given, TASKS)


@every_method
def test_the_first_group_may_be_empty(method: str) -> None:
    """1 - 0.1 (1 + 2), in every method."""
    w = leaf(1.0)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [w]}]
    optimizer = make(method, groups, ["a", "b"], shared=w)
    optimizer.diagnostics()
    optimizer.step(
        lambda tasks: {t: v for t, v in {"a": w[0], "b": 2 * w[0]}.items() if t in tasks}
    )
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))
    for value in optimizer.diagnostics().values():
        assert not value.is_floating_point() or value.isfinite().all()
    optimizer.load_state_dict(by_file(optimizer.state_dict()))


@every_method
def test_parameter_groups_can_be_assigned(method: str) -> None:
    """SGD by hand: 1 - 0.5 * 2 with joint losses or task after task, then with a tenth of that."""
    w, v = leaf(1.0), leaf(1.0)
    optimizer = make(method, [w], ["a", "b"], shared=w, lr=0.5)
    optimizer.step(lambda tasks: {task: w.sum() + v.sum() for task in tasks})
    assert (w.item(), v.item()) == (0.0, 1.0)
    first, options = {**optimizer.param_groups[0]}, {**optimizer.param_groups[0]}
    optimizer.param_groups = [first | {"lr": 0.25}, options | {"params": [v], "lr": 0.125}]
    optimizer.step(lambda tasks: {task: w.sum() + v.sum() for task in tasks})
    assert (w.item(), v.item()) == (-0.5, 0.75)
