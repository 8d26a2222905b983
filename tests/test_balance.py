"""GradNorm's Algorithm 1 by itself: numbers by hand, no network and no optimizer of one."""

import io
from typing import Any

import pytest
import torch

from mtlopt.methods.gradnorm import LossWeights


def make(**initial: float) -> Balance:
    return Balance(("a", "b"), alpha=1.0, lr=0.025, initial_losses=dict[Any, float](initial))


def weights(balance: Balance) -> list[float]:
    return [weight.item() for weight in balance.weights.values()]


def seen(a: float, b: float, loss_a: float = 1.0, loss_b: float = 1.0) -> dict[Any, Seen]:
    return {"a": Seen(a, {"a": loss_a}), "b": Seen(b, {"b": loss_b})}


def test_one_update_by_hand() -> None:
    """L(0) = (2, 4), L = (1, 4): r = (0.5, 1) / 0.75. G = (2, 8), mean 5: targets 10/3, 20/3.

    a is below its target and b above; Adam's first step is 0.025 either way.
    """
    balance = make(a=2.0, b=4.0)
    balance.update(seen(2.0, 8.0, 1.0, 4.0))
    assert weights(balance) == pytest.approx([1.025, 0.975])
    norm, rate = balance.rates["a"]
    assert norm.item() == 2.0
    assert rate.item() == pytest.approx(2 / 3)
    assert not balance.skipped


def test_the_first_loss_is_the_initial_one_where_none_was_given() -> None:
    balance = make(b=8.0)
    balance.update(seen(1.0, 1.0, 3.0, 4.0))
    assert balance.first.tolist() == [3.0, 8.0]
    balance.update(seen(1.0, 1.0, 1.0, 1.0))
    assert balance.first.tolist() == [3.0, 8.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["norm", "loss"])
def test_what_is_not_finite_changes_nothing(what: str, bad: float) -> None:
    balance = make()
    balance.update(seen(1.0, 4.0))
    file = io.BytesIO()
    torch.save(balance.state_dict(), file)
    balance.update(seen(bad, 1.0) if what == "norm" else seen(1.0, 1.0, bad))
    assert balance.skipped
    file.seek(0)
    before = torch.load(file, weights_only=True)
    now = balance.state_dict()
    assert torch.equal(before["weights"], now["weights"])
    assert torch.equal(before["initial_losses"], now["initial_losses"])
    for k, state in before["weights_adam"]["state"].items():
        assert all(torch.equal(v, now["weights_adam"]["state"][k][n]) for n, v in state.items())
    balance.update(seen(1.0, 4.0))
    assert not balance.skipped
    assert weights(balance) != before["weights"].tolist()


def test_the_weights_stay_positive_with_their_sum_and_an_absent_one_as_it_was() -> None:
    balance = Balance(("a", "b", "c"), alpha=0.0, lr=5.0, initial_losses={})
    balance.update({t: Seen(n, {t: 1.0}) for t, n in (("a", 1.0), ("b", 100.0), ("c", 1.0))})
    own = weights(balance)
    assert sum(own) == pytest.approx(3)
    assert min(own) > 0
    # b was clamped at 1e-3 before the others' 6 and its own were brought to the sum.
    assert own[1] == pytest.approx(1e-3 * 3 / 12.001, rel=1e-4)
    balance.update({"a": Seen(9.0, {"a": 1.0}), "c": Seen(1.0, {"c": 1.0})})
    assert weights(balance)[1] == own[1]
    assert sum(weights(balance)) == pytest.approx(3)


def test_a_groups_initial_loss_is_that_of_the_names_present() -> None:
    """(a, b) has L(0) = 2 with a alone, then 2 + 6; c halves: r = (1, 0.5) / 0.75."""
    balance = Balance((("a", "b"), "c"), alpha=1.0, lr=0.025, initial_losses={})
    balance.update({("a", "b"): Seen(1.0, {"a": 2.0}), "c": Seen(1.0, {"c": 4.0})})
    balance.update({("a", "b"): Seen(1.0, {"a": 2.0, "b": 6.0}), "c": Seen(1.0, {"c": 2.0})})
    rates = [rate.item() for _, rate in balance.rates.values()]
    assert rates == pytest.approx([4 / 3, 2 / 3])


def test_a_saved_balance_goes_on_as_the_one_that_was_not() -> None:
    balance = make()
    balance.update(seen(1.0, 3.0))
    other = make().loaded(balance.state_dict())
    for each in (balance, other):
        each.update(seen(2.0, 1.0, 0.5, 0.25))
    assert weights(balance) == weights(other)
