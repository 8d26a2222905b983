"""Optimizer classes that keep state outside the parameters' own, such as a step count."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import mtlopt
import reference
from all_methods import INDEPENDENT, make_for
from problems import TASKS, Network, assert_equal, batches, leaf, make_losses, snapshot
from round_trips import COPIERS, by_file


class Counting(SGD):
    """Divides gradients by a count that it keeps outside the parameters' state."""

    kind: Any = staticmethod(torch.tensor)
    state: Any

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.state["count"] = self.kind(1.0)

    def step(self, closure: Any = None) -> Any:
        value = None if closure is None else closure()
        count = self.state["count"]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= float(count)
        if isinstance(count, Tensor):
            count += 1
        else:
            self.state["count"] = count + 1
        super().step()
        return value


class CountingNumbers(Counting):
    kind: Any = float


def global_states() -> dict[str, tuple[Any, dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "a tensor": (Counting, {"lr": 0.1}),
        "a number": (CountingNumbers, {"lr": 0.1}),
    }
    try:
        from pytorch_optimizer import MADGRAD, SPAM
    except ImportError:
        return found
    return found | {
        "MADGRAD": (MADGRAD, {"lr": 1e-3, "momentum": 0.0}),
        "SPAM": (SPAM, {"lr": 1e-3}),
    }


GLOBAL = global_states()


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("method", ["joint", "alternating", *INDEPENDENT])
def test_global_state_is_saved_and_resumed(method: str, name: str, how: str) -> None:
    """Bit for bit the plain loop, which is not interrupted."""
    torch.manual_seed(1)
    model = Network(torch.float32)
    expected = copy.deepcopy(model)
    optimizer_class, options = GLOBAL[name]
    optimizer = make_for(model, method, optimizer_class=optimizer_class, **options)
    plain = {task: optimizer_class(expected.parameters(), **options) for task in TASKS}
    by_hand = {
        "joint": partial(reference.joint, plain["a"]),
        "alternating": partial(reference.alternating, plain["a"]),
        "independent": partial(reference.independent, plain),
        "simultaneous": partial(reference.simultaneous, plain),
    }[method]
    data = [(x.float(), {t: v.float() for t, v in y.items()}) for x, y in batches(5)]
    for i, (x, y) in enumerate(data):
        if i == 3 and how == "file":
            state = by_file(optimizer.state_dict())
            optimizer = make_for(model, method, optimizer_class=optimizer_class, **options)
            optimizer.load_state_dict(state)
        elif i == 3:
            model, optimizer = COPIERS[how]((model, optimizer))
        random = torch.get_rng_state()  # SPAM draws.
        optimizer.step(make_losses(model), x, y)
        torch.set_rng_state(random)
        by_hand(make_losses(expected), TASKS, x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_the_global_state_of_a_plain_optimizer_is_copied_for_every_task() -> None:
    """A count shared by two optimizers would run twice as fast."""
    w = leaf(1.0)
    optimizer = mtlopt.IndependentOptimizer(Counting, [w], ["a", "b"], lr=0.1)
    optimizer.load_state_dict(Counting([leaf(1.0)], lr=0.1).state_dict())
    optimizer.step(lambda tasks: {task: w.sum() for task in tasks})
    counts = [optimizer[task].state["count"] for task in ("a", "b")]  # type: ignore[index]  # a name, not a parameter
    assert [count.item() for count in counts] == [2.0, 2.0]
    assert counts[0] is not counts[1]
