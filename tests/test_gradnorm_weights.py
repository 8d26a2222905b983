"""GradNorm's Algorithm 1 alone: numbers by hand, without a network."""

import io
from typing import Any

import pytest
import torch

from mtlopt.methods.gradnorm import LossWeights


def make(**initial: float) -> LossWeights:
    return LossWeights(("a", "b"), alpha=1.0, lr=0.025, initial_losses=dict[Any, float](initial))


def values(weights: LossWeights) -> list[float]:
    return [weight.item() for weight in weights.by_task.values()]


def update(weights: LossWeights, norms: dict[Any, float], **losses: float) -> None:
    """Takes a step after one observation; a loss not given is 1."""
    names = [name for task in norms for name in (task if isinstance(task, tuple) else (task,))]
    found = losses if losses else dict.fromkeys(names, 1.0)
    weights.observe(norms, found, gradients={task: [] for task in norms})
    weights.learn(skipped=False)


def test_one_update_by_hand() -> None:
    """L(0) = (2, 4), L = (1, 4): r = (0.5, 1) / 0.75. G = (2, 8), mean 5: targets 10/3, 20/3.

    a is below its target and b above; Adam's first step is 0.025 either way.
    """
    weights = make(a=2.0, b=4.0)
    update(weights, {"a": 2.0, "b": 8.0}, a=1.0, b=4.0)
    assert values(weights) == pytest.approx([1.025, 0.975])
    norm, rate = weights.rates["a"]
    assert norm.item() == 2.0
    assert rate.item() == pytest.approx(2 / 3)
    assert not weights.skipped


def test_the_first_loss_is_the_initial_one_where_none_was_given() -> None:
    weights = make(b=8.0)
    update(weights, {"a": 1.0, "b": 1.0}, a=3.0, b=4.0)
    assert weights.first.tolist() == [3.0, 8.0]
    update(weights, {"a": 1.0, "b": 1.0}, a=1.0, b=1.0)
    assert weights.first.tolist() == [3.0, 8.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["norm", "loss"])
def test_what_is_not_finite_changes_nothing(what: str, bad: float) -> None:
    weights = make()
    update(weights, {"a": 1.0, "b": 4.0})
    file = io.BytesIO()
    torch.save(weights.state_dict(), file)
    if what == "norm":
        update(weights, {"a": bad, "b": 1.0})
    else:
        update(weights, {"a": 1.0, "b": 1.0}, a=bad, b=1.0)
    assert weights.skipped
    file.seek(0)
    before = torch.load(file, weights_only=True)
    now = weights.state_dict()
    assert torch.equal(before["weights"], now["weights"])
    assert torch.equal(before["initial_losses"], now["initial_losses"])
    for k, state in before["weights_adam"]["state"].items():
        assert all(torch.equal(v, now["weights_adam"]["state"][k][n]) for n, v in state.items())
    update(weights, {"a": 1.0, "b": 4.0})
    assert not weights.skipped
    assert values(weights) != before["weights"].tolist()


def test_weights_stay_positive_with_their_sum_and_an_absent_one_as_it_was() -> None:
    weights = LossWeights(("a", "b", "c"), alpha=0.0, lr=5.0, initial_losses={})
    update(weights, {"a": 1.0, "b": 100.0, "c": 1.0})
    own = values(weights)
    assert sum(own) == pytest.approx(3)
    assert min(own) > 0
    # b was clamped at 1e-3 before the others' 6 and its own were brought to the sum.
    assert own[1] == pytest.approx(1e-3 * 3 / 12.001, rel=1e-4)
    update(weights, {"a": 9.0, "c": 1.0})
    assert values(weights)[1] == own[1]
    assert sum(values(weights)) == pytest.approx(3)


def test_a_groups_initial_loss_is_that_of_the_names_present() -> None:
    """(a, b) has L(0) = 2 with a alone, then 2 + 6; c halves: r = (1, 0.5) / 0.75."""
    weights = LossWeights((("a", "b"), "c"), alpha=1.0, lr=0.025, initial_losses={})
    update(weights, {("a", "b"): 1.0, "c": 1.0}, a=2.0, c=4.0)
    update(weights, {("a", "b"): 1.0, "c": 1.0}, a=2.0, b=6.0, c=2.0)
    rates = [rate.item() for _, rate in weights.rates.values()]
    assert rates == pytest.approx([4 / 3, 2 / 3])


def test_a_saved_balance_goes_on_as_the_one_that_was_not() -> None:
    weights = make()
    update(weights, {"a": 1.0, "b": 3.0})
    other = make().loaded(weights.state_dict())
    for each in (weights, other):
        update(each, {"a": 2.0, "b": 1.0}, a=0.5, b=0.25)
    assert values(weights) == values(other)
