"""What `record="updates"` says of the tasks' steps, and AdaTask, whose figure it has."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

import mtlopt
import reference
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot, twins

METHODS = (mtlopt.AlternatingOptimizer, mtlopt.IndependentOptimizer)


def make(method: Any, model: Network, **options: Any) -> Any:
    return method(Adam(model.parameters(), lr=0.01), TASKS, record="updates", **options)


def trunk_of(model: Network) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.trunk.parameters()])


def moves_by_hand(method: Any, model: Network, data: Any) -> list[Tensor]:
    """Returns how far each task's step moves the trunk in a plain loop: (T, n) for each step."""
    plain = {task: Adam(model.parameters(), lr=0.01) for task in TASKS}
    if method is mtlopt.AlternatingOptimizer:
        plain = dict.fromkeys(TASKS, plain["a"])
    history = []
    for x, y in data:
        places = [trunk_of(model)]
        for task in TASKS:
            reference.independent(plain, make_losses(model), [task], x, y)
            places.append(trunk_of(model))
        history.append(torch.stack(places).diff(dim=0))
    return history


@pytest.mark.parametrize("method", METHODS)
def test_the_figures_are_those_of_the_moves_of_the_trunk(method: Any) -> None:
    """And the heads, which one task alone reaches, have no part in them."""
    model, plain = twins()
    data = batches(4)
    optimizer = make(method, model)
    assert optimizer.diagnostics() == {}
    averages = torch.zeros(3, dtype=torch.float64)
    for (x, y), moves in zip(data, moves_by_hand(method, plain, data), strict=True):
        optimizer.step(make_losses(model), x, y)
        seen = optimizer.diagnostics()
        averages = 0.99 * averages + 0.01 * (moves**2).sum(1)
        norms = moves.norm(dim=1)
        torch.testing.assert_close(seen["update_norms"], norms, rtol=1e-10, atol=0)
        cosines = moves @ moves.T / norms / norms[:, None]
        torch.testing.assert_close(seen["update_cosines"], cosines, rtol=1e-9, atol=1e-12)
        shares = averages / averages.sum()
        torch.testing.assert_close(seen["update_shares"], shares, rtol=1e-9, atol=0)
    assert_equal(snapshot(model), snapshot(plain))


def test_with_simultaneous_steps_too() -> None:
    """Plain gradient descent moves by the gradient."""
    model = Network()
    optimizer = mtlopt.IndependentOptimizer(
        SGD, model.parameters(), TASKS, lr=0.1, schedule="simultaneous", record="updates"
    )
    x, y = batches(1)[0]
    losses = make_losses(model)(TASKS, x, y)
    trunk = list(model.trunk.parameters())
    rows = [torch.autograd.grad(losses[t], trunk, retain_graph=True) for t in TASKS]
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    optimizer.step(losses)
    torch.testing.assert_close(optimizer.diagnostics()["update_norms"], 0.1 * norms)


@pytest.mark.parametrize("method", METHODS)
def test_a_task_without_a_step_has_nan_and_keeps_its_part(method: Any) -> None:
    model = Network()
    optimizer, losses = make(method, model), make_losses(model)
    for x, y in batches(2):
        optimizer.step(losses, x, y)
    before = optimizer.diagnostics()["update_shares"]
    optimizer.step(lambda ts, *b: {t: v for t, v in losses(ts, *b).items() if t != "b"}, x, y)
    seen = optimizer.diagnostics()
    assert seen["update_norms"].isnan().tolist() == [False, True, False]
    assert seen["update_cosines"].isnan().sum() == 5
    assert seen["update_shares"].sum() == pytest.approx(1)
    assert 0 < seen["update_shares"][1] < before[1]


def test_a_task_by_itself_has_all_its_parameters_to_share() -> None:
    model = Network()
    optimizer = mtlopt.AlternatingOptimizer(
        SGD(model.parameters(), lr=0.1), ["a"], record="updates"
    )
    optimizer.step(make_losses(model), *batches(1)[0])
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    expected = 0.1 * torch.cat(grads).norm()
    torch.testing.assert_close(optimizer.diagnostics()["update_norms"], expected[None])


def test_only_shared_parameters_are_copied() -> None:
    """Once each task has had a turn, the heads are known to be theirs alone."""
    model = Network()
    optimizer, losses = make(mtlopt.IndependentOptimizer, model), make_losses(model)
    copied: list[set[int]] = []
    place = {id(p): i for i, p in enumerate(model.parameters())}

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f is torch.ops.aten.clone.default:
                copied[-1] |= {i for p, i in pointers.items() if args[0].data_ptr() == p}
            return f(*args, **(kwargs or {}))

    counting: Any = Counting
    pointers = {p.data_ptr(): place[id(p)] for p in model.parameters()}
    x, y = batches(1)[0]
    for _ in range(2):
        copied.append(set())
        with counting():
            optimizer.step(losses, x, y)
    assert copied[1] == {0, 1}  # The two matrices of the trunk.
    assert copied[0] > {0, 1}


@pytest.mark.parametrize("method", METHODS)
def test_the_shares_go_on_from_a_state(method: Any) -> None:
    model = Network()
    optimizer, losses = make(method, model), make_losses(model)
    data = batches(5)
    for x, y in data[:3]:
        optimizer.step(losses, x, y)
    twin = copy.deepcopy(model)
    later = make(method, twin)
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in data[3:]:
        optimizer.step(losses, x, y)
        later.step(make_losses(twin), x, y)
    for name, value in optimizer.diagnostics().items():
        if name.startswith("update"):
            assert torch.equal(later.diagnostics()[name], value), name


def test_a_skipped_step_moves_nothing() -> None:
    model = Network()
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, losses = make(mtlopt.IndependentOptimizer, model, scaler=amp), make_losses(model)
    x, y = batches(1)[0]
    optimizer.step(
        lambda ts, *b: {t: v * (1e308 if t == "b" else 1) for t, v in losses(ts, *b).items()}, x, y
    )
    seen = optimizer.diagnostics()
    assert seen["skipped"].tolist() == [False, True, False]
    assert seen["update_norms"][1] == 0
    assert seen["update_cosines"][1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_without_it_nothing_is_recorded_or_saved(method: Any) -> None:
    model = Network()
    optimizer = method(Adam(model.parameters(), lr=0.01), TASKS)
    optimizer.step(make_losses(model), *batches(1)[0])
    assert not [name for name in optimizer.diagnostics() if name.startswith("update")]
    assert "squares" not in optimizer.state_dict()["mtlopt"]
    recording = make(method, Network())
    recording.load_state_dict(optimizer.state_dict())  # An older state.
    with pytest.raises(ValueError, match="`record` must be 'updates' or None, got 'all'"):
        method(Adam(model.parameters(), lr=0.01), TASKS, record="all")


def test_adam_with_simultaneous_steps_is_adatask() -> None:
    """AdaTask (Yang et al., 2023): for the shared parameters moments of their own for each task.

    From the gradients at one point w, the update is minus lr times the sum over the tasks k of
    m_k / (1 - b1^t) over sqrt(v_k / (1 - b2^t)) + eps; a head has plain Adam.
    """
    model, expected = twins()
    optimizer = mtlopt.IndependentOptimizer(
        Adam(model.parameters(), lr=0.01), TASKS, schedule="simultaneous"
    )
    parameters = list(expected.parameters())
    m = {(k, i): torch.zeros_like(p) for k in TASKS for i, p in enumerate(parameters)}
    v = copy.deepcopy(m)
    for step, (x, y) in enumerate(batches(20), 1):
        optimizer.step(make_losses(model), x, y)
        losses = make_losses(expected)(TASKS, x, y)
        updates = [torch.zeros_like(p) for p in parameters]
        for k in TASKS:
            gradients = torch.autograd.grad(
                losses[k], parameters, retain_graph=True, allow_unused=True
            )
            for i, g in enumerate(gradients):
                if g is None:
                    continue
                m[k, i] = 0.9 * m[k, i] + 0.1 * g
                v[k, i] = 0.999 * v[k, i] + 0.001 * g**2
                mean, square = m[k, i] / (1 - 0.9**step), v[k, i] / (1 - 0.999**step)
                updates[i] += mean / (square.sqrt() + 1e-8)
        with torch.no_grad():
            for p, update in zip(parameters, updates, strict=True):
                p.sub_(0.01 * update)
    # The tasks' updates are added in another order.
    torch.testing.assert_close(snapshot(model), snapshot(expected), rtol=1e-10, atol=1e-12)
