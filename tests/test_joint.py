"""JointOptimizer: weights, closures, and the imperative form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mtlopt
import reference
from mtlopt import JointOptimizer
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot, twins


def make(model: Network, **keywords: Any) -> JointOptimizer:
    return JointOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), TASKS, **keywords)


@pytest.mark.parametrize("forwards", ["joint", "per-task"])
def test_the_gradient_is_the_weighted_sum_over_the_present_tasks(forwards: Any) -> None:
    model = Network()
    optimizer = make(model, weights={"a": 2.0, "c": 0.0}, forwards=forwards)
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    expected = torch.autograd.grad(
        2.0 * losses(TASKS, x, y)["a"] + losses(TASKS, x, y)["b"], list(model.trunk.parameters())
    )
    optimizer.step(losses, x, y)
    for p, g in zip(model.trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)


def test_weights_must_name_known_tasks() -> None:
    with pytest.raises(ValueError, match=r"`weights` must name tasks among .*got \['fovea'\]"):
        make(Network(), weights={"fovea": 1.0})
    with pytest.raises(ValueError, match="`forwards` must be 'joint' or 'per-task', got 'both'"):
        make(Network(), forwards="both")


def test_backward_adds_to_the_gradients_and_step_applies_them_as_torch_does() -> None:
    """Accumulation as in torch: two halves, one step."""
    model, twin = twins()
    optimizer = make(model)
    plain = torch.optim.Adam(twin.parameters(), lr=0.1)
    for (x, y), (x2, y2) in zip(batches(6)[::2], batches(6)[1::2], strict=True):
        optimizer.zero_grad()
        plain.zero_grad()
        for part in ((x, y), (x2, y2)):
            optimizer.backward(make_losses(model)(TASKS, *part))
            losses = make_losses(twin)(TASKS, *part)
            (losses["a"] + losses["b"] + losses["c"]).backward()
        assert optimizer.step() is None
        plain.step()
    assert_equal(snapshot(model), snapshot(twin))


def test_step_takes_a_closure_as_torch_does() -> None:
    """Lightning and others call `step(closure=...)`, `step(closure=None)` and `step(None)`."""
    model, twin = twins()
    optimizer, plain = make(model), torch.optim.Adam(twin.parameters(), lr=0.1)
    (x, y), *_ = batches(1)

    def closure(own: Any, network: Network) -> Any:
        own.zero_grad()
        total: Any = sum(make_losses(network)(TASKS, x, y).values())
        total.backward()
        return total

    expected: Any = plain.step(lambda: closure(plain, twin))
    returned: Any = optimizer.step(closure=lambda: closure(optimizer, model))
    assert torch.equal(returned, expected)
    assert_equal(snapshot(model), snapshot(twin))
    optimizer.step(closure=None)
    optimizer.step(None)
    plain.step()
    plain.step()
    assert_equal(snapshot(model), snapshot(twin))
    with pytest.raises(TypeError, match="Pass `losses` or `closure`, not both"):
        optimizer.step(lambda tasks: {}, closure=lambda: 0.0)
    with pytest.raises(TypeError, match="`losses` must be given with a batch, got None"):
        optimizer.step(None, x)


def test_lbfgs_needs_a_function_to_evaluate_again() -> None:
    model = Network()
    optimizer = JointOptimizer(torch.optim.LBFGS(model.parameters()), TASKS)
    with pytest.raises(TypeError, match=r"function losses\(tasks, \*batch\) for a class.*LBFGS"):
        optimizer.step(make_losses(model)(TASKS, *batches(1)[0]))
    calls = []

    def fickle(tasks: Any, *batch: Any) -> Any:
        calls.append(tasks)
        losses = make_losses(model)(tasks, *batch)
        return losses if len(calls) == 1 else {"a": losses["a"]}

    with pytest.raises(ValueError, match=r"same tasks at every evaluation.*got \['a'\]"):
        optimizer.step(fickle, *batches(1)[0])


def test_a_line_search_sees_the_weighted_objective() -> None:
    """Bit for bit the plain loop's on the weighted sum; another value would mislead the search."""
    model, twin = twins()
    options: Any = {"max_iter": 5, "line_search_fn": "strong_wolfe"}
    weights = {"a": 1.0, "b": 20.0, "c": 0.5}
    base = torch.optim.LBFGS(model.parameters(), **options)
    optimizer = JointOptimizer(base, TASKS, weights)
    plain = torch.optim.LBFGS(twin.parameters(), **options)
    for x, y in batches(3):
        optimizer.step(make_losses(model), x, y)
        reference.joint(plain, make_losses(twin), TASKS, x, y, weights=weights)
    assert_equal(snapshot(model), snapshot(twin))


def test_ready_losses_override_forwards_per_task() -> None:
    model, twin = twins()
    (x, y), *_ = batches(1)
    make(model, forwards="per-task").step(make_losses(model)(TASKS, x, y))
    make(twin).step(make_losses(twin)(TASKS, x, y))
    assert_equal(snapshot(model), snapshot(twin))


def test_a_completely_frozen_network_is_an_error() -> None:
    model = Network()
    optimizer = make(model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="'a' must have a graph"):
        optimizer.step(make_losses(model), *batches(1)[0])


def test_weights_may_be_set_between_steps() -> None:
    """So a rule that learns or draws weights takes three lines in the loop."""
    model, twin = twins()
    optimizer = make(model)
    optimizer.weights["b"] = 0.25
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    make(twin, weights={"b": 0.25}).step(make_losses(twin), x, y)
    assert_equal(snapshot(model), snapshot(twin))
    optimizer.weights = {"b": 0.25}  # The others keep the weight 1.
    assert list(optimizer.step(make_losses(model), x, y)) == list(TASKS)


def test_a_weight_may_be_a_tensor_that_changes() -> None:
    model, twin = twins()
    weight = torch.tensor(0.5, dtype=torch.float64)
    optimizer = make(model, weights={"b": weight})
    weight.fill_(0.25)
    x, y = batches(1)[0]
    optimizer.step(make_losses(model), x, y)
    make(twin, weights={"b": 0.25}).step(make_losses(twin), x, y)
    assert_equal(snapshot(model), snapshot(twin))


def test_weights_that_require_a_gradient_are_refused() -> None:
    """They would be learned in one form of the step and not in another."""
    model = Network()
    learned = nn.Parameter(torch.ones((), dtype=torch.float64))
    before = snapshot(model)
    for weight in (learned, learned.exp()):
        with pytest.raises(TypeError, match=r"`weights`.*gradient"):
            mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS, {"a": weight})  # type: ignore[dict-item]  # on purpose
    x, y = batches(1)[0]
    steps: list[Callable[[Any], Any]] = [
        lambda optimizer: optimizer.step(make_losses(model), x, y),
        lambda optimizer: optimizer.step(make_losses(model), micro_batches=[(x, y), (x, y)]),
        lambda optimizer: optimizer.backward(make_losses(model)(TASKS, x, y)),
    ]
    for step in steps:
        optimizer: Any = mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS)
        with pytest.raises(TypeError, match=r"`weights`.*gradient"):  # noqa: PT012  # either line
            optimizer.weights["a"] = learned
            step(optimizer)
        assert_equal(snapshot(model), before)
    assert learned.grad is None
