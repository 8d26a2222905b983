"""What the equations imply, for any scale, seed and order."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam

import mtlopt
from problems import TASKS, Network, batches, make_losses, snapshot

seeds = st.integers(0, 2**16)
few = settings(max_examples=25)


def run(make: Any, seed: int, factors: dict[str, float] | None = None, steps: int = 6) -> Tensor:
    """Trains a network drawn from the seed and returns its weights in one vector."""
    torch.manual_seed(seed)
    model = Network()
    optimizer = make(model)
    plain = make_losses(model)

    def losses(tasks: Any, *batch: Any) -> dict[str, Tensor]:
        return {t: (factors or {}).get(t, 1.0) * v for t, v in plain(tasks, *batch).items()}

    for x, y in batches(steps):
        optimizer.step(losses, x, y)
    return torch.cat([p.flatten() for p in snapshot(model).values()])


def independent(optimizer_class: Any, **options: Any) -> Any:
    return lambda m: mtlopt.IndependentOptimizer(optimizer_class, m.parameters(), TASKS, **options)


def joint(optimizer_class: Any, **options: Any) -> Any:
    return lambda m: mtlopt.JointOptimizer(optimizer_class(m.parameters(), **options), TASKS)


def alternating(optimizer_class: Any, **options: Any) -> Any:
    return lambda m: mtlopt.AlternatingOptimizer(optimizer_class(m.parameters(), **options), TASKS)


@few
@given(seeds, st.sampled_from(TASKS), st.floats(0.1, 100).filter(lambda f: abs(f - 1) > 0.5))
def test_a_tasks_scale_does_not_matter_to_independent_adam_but_to_joint(
    seed: int, task: str, factor: float
) -> None:
    """Adam divides each task's gradient by its own size; eps 1e-14 against gradients of 1e-3."""
    own, together = (make(Adam, lr=0.01, eps=1e-14) for make in (independent, joint))
    scaled = run(own, seed, {task: factor})
    # Rounding of the scaled gradients, magnified where a gradient is nearly zero.
    torch.testing.assert_close(scaled, run(own, seed), rtol=0, atol=1e-7)
    assert (run(together, seed, {task: factor}) - run(together, seed)).abs().max() > 1e-5


@few
@given(seeds, st.floats(1e-3, 0.1))
def test_without_a_state_independent_is_alternating(seed: int, lr: float) -> None:
    assert torch.equal(run(independent(SGD, lr=lr), seed), run(alternating(SGD, lr=lr), seed))


@few
@given(seeds, st.floats(1e-3, 0.1))
def test_without_a_state_simultaneous_is_joint(seed: int, lr: float) -> None:
    """Up to rounding: three subtractions of a gradient, or one of the sum."""
    simultaneous = independent(SGD, lr=lr, schedule="simultaneous")
    torch.testing.assert_close(
        run(simultaneous, seed), run(joint(SGD, lr=lr), seed), rtol=1e-9, atol=1e-12
    )


@few
@given(seeds, st.floats(-5, 5), st.floats(-5, 5))
def test_all_methods_find_the_minimum_of_two_quadratics_that_agree(
    seed: int, x: float, y: float
) -> None:
    """Both tasks have their minimum at (x, y), with curvatures 1 and 10 turned about."""
    for make in (independent, joint, alternating):
        w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        model: Any = torch.nn.ParameterList([w])
        optimizer = make(SGD, lr=0.05)(model)
        goal = torch.tensor([x, y], dtype=torch.float64)
        curvature = {"a": (1.0, 10.0), "b": (10.0, 1.0), "c": (1.0, 1.0)}
        for _ in range(40):  # Each leaves at most 0.45 of the error.
            optimizer.step(
                lambda ts: {t: (torch.tensor(curvature[t]) * (w - goal) ** 2).sum() / 2 for t in ts}
            )
        torch.testing.assert_close(w.detach(), goal, rtol=0, atol=1e-6)
