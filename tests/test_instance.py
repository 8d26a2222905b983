"""IndependentOptimizer from an instance: T optimizers as it is, whatever made it."""

import copy
from typing import Any

import pytest
import torch

import mtlopt
import reference
from problems import CLASSES, TASKS, assert_equal, batches, make_losses, make_network, snapshot


def train(optimizer: Any, model: Any, steps: int) -> None:
    for x, y in batches(steps):
        optimizer.step(make_losses(model), x, y)


@pytest.mark.parametrize("name", CLASSES)
def test_an_instance_is_its_class_called_once_a_task(name: str) -> None:
    """Bit for bit, with a scheduler on the panel; the instance itself stays as it was."""
    optimizer_class, options = CLASSES[name]
    model, expected = make_network(name), make_network(name)
    base = optimizer_class(model.parameters(), **options)
    optimizer = mtlopt.IndependentOptimizer(base, TASKS)
    by_class = mtlopt.IndependentOptimizer(optimizer_class, expected.parameters(), TASKS, **options)
    for each, network in ((optimizer, model), (by_class, expected)):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(each, 0.9)
        for x, y in batches(5):
            each.step(make_losses(network), x, y)
            scheduler.step()
    assert_equal(snapshot(model), snapshot(expected))
    assert not base.state or name == "Adagrad"
    assert {type(own) for own in optimizer.values()} == {optimizer_class}


def test_the_state_of_an_instance_goes_to_every_task() -> None:
    """As loading its state dict into each of T optimizers would."""
    model, expected = make_network("Adam"), make_network("Adam")
    groups = [
        [{"params": m.trunk.parameters(), "lr": 0.02}, {"params": m.heads.parameters()}]
        for m in (model, expected)
    ]
    base, plain = (torch.optim.AdamW(g, lr=0.01, weight_decay=0.1) for g in groups)
    for network, own in ((model, base), (expected, plain)):
        for x, y in batches(3):
            reference.joint(own, make_losses(network), TASKS, x, y)
    optimizer = mtlopt.IndependentOptimizer(base, TASKS)
    by_hand: dict[str, torch.optim.Optimizer] = {}
    for task in TASKS:
        by_hand[task] = torch.optim.AdamW(copy.deepcopy(groups[1]), lr=0.01)
        by_hand[task].param_groups = [{**g} for g in plain.param_groups]
        by_hand[task].load_state_dict(copy.deepcopy(plain.state_dict()))
    for x, y in batches(3):
        optimizer.step(make_losses(model), x, y)
        reference.independent(by_hand, make_losses(expected), TASKS, x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_a_constructor_of_another_signature_does_not_matter() -> None:
    """Frameworks and factories hand out instances."""

    class Odd(torch.optim.SGD):
        def __init__(self, model: Any, *, rate: float) -> None:
            super().__init__(model.parameters(), lr=rate, momentum=0.9)
            self.model_name = type(model).__name__

    model, expected = make_network("SGD"), make_network("SGD")
    optimizer = mtlopt.IndependentOptimizer(Odd(model, rate=0.02), tasks=TASKS)
    assert [vars(own)["model_name"] for own in optimizer.values()] == ["Network"] * 3
    plain = mtlopt.IndependentOptimizer(
        torch.optim.SGD, expected.parameters(), TASKS, lr=0.02, momentum=0.9
    )
    train(optimizer, model, 3)
    train(plain, expected, 3)
    assert_equal(snapshot(model), snapshot(expected))


def test_what_is_attached_to_an_instance_is_refused() -> None:
    """A scheduler or hook on the instance would have no effect."""
    model = make_network("Adam")
    base = torch.optim.Adam(model.parameters())
    torch.optim.lr_scheduler.StepLR(base, 1)
    with pytest.raises(ValueError, match=r"no scheduler yet.*attach it to the Independent"):
        mtlopt.IndependentOptimizer(base, TASKS)
    base = torch.optim.Adam(model.parameters())
    base.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no step hooks yet.*register them on the Independent"):
        mtlopt.IndependentOptimizer(base, TASKS)
    with pytest.raises(TypeError, match="mtlopt optimizers cannot be nested"):
        mtlopt.IndependentOptimizer(
            mtlopt.JointOptimizer(torch.optim.Adam([*model.parameters()]), TASKS), TASKS
        )
    with pytest.raises(TypeError, match="has its parameters and options already"):
        mtlopt.IndependentOptimizer(torch.optim.Adam(model.parameters()), TASKS, lr=0.1)  # type: ignore[call-overload]  # on purpose
    with pytest.raises(TypeError, match="takes a class, parameters and tasks, or an instance"):
        mtlopt.IndependentOptimizer(torch.optim.Adam, TASKS)  # type: ignore[call-overload]  # on purpose
