"""Every method with every class of `torch.optim`, against the reference in plain PyTorch."""

import copy
import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlopt
import reference
from problems import (
    CLASSES,
    DENSE,
    TASKS,
    assert_equal,
    batches,
    make_losses,
    make_network,
    snapshot,
)
from round_trips import by_pickle

METHODS = ("joint", "alternating", "independent")
STEPS = 20


def make(method: str, name: str, model: nn.Module, tasks: Any = TASKS, **keywords: Any) -> Any:
    optimizer_class, options = CLASSES[name]
    if method == "independent":
        return mtlopt.IndependentOptimizer(
            optimizer_class, model.parameters(), tasks, **keywords, **options
        )
    wrap = {"joint": mtlopt.JointOptimizer, "alternating": mtlopt.AlternatingOptimizer}[method]
    return wrap(optimizer_class(model.parameters(), **options), tasks, **keywords)


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


def reference_of(method: str, name: str, model: nn.Module) -> tuple[Any, list[Any]]:
    """Returns a step of the reference, and the optimizers that it uses."""
    optimizer_class, options = CLASSES[name]

    def build() -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = optimizer_class(
            model.parameters(), **copy.deepcopy(options)
        )
        return optimizer

    if method in ("joint", "alternating"):
        optimizer = build()
        return partial(getattr(reference, method), optimizer), [optimizer]
    optimizers = {task: build() for task in TASKS}
    return partial(getattr(reference, method), optimizers), list(optimizers.values())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_plain_loop_bit_for_bit(method: str, name: str) -> None:
    """Weights and returned losses, 20 steps, with a scheduler running on the one optimizer."""
    expected, model = make_network(name), make_network(name)
    plain_step, plain = reference_of(method, name, expected)
    start = snapshot(model)
    optimizer = make(method, name, model)
    schedulers = [scheduler_of(each) for each in (optimizer, *plain)]
    for x, y in batches(STEPS):
        values = optimizer.step(make_losses(model), x, y)
        expected_values = plain_step(make_losses(expected), TASKS, x, y)
        for scheduler in schedulers:
            scheduler.step()
        assert list(values) == list(TASKS)
        assert all(not value.requires_grad for value in values.values())
        assert [v.item() for v in values.values()] == [v.item() for v in expected_values.values()]
    assert_equal(snapshot(model), snapshot(expected))
    assert not any(torch.equal(p, start[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_balanced_is_the_plain_weighted_sum_bit_for_bit(name: str) -> None:
    """With the weights in force at each step, over two measurements, whatever the class."""
    expected, model = make_network(name), make_network(name)
    optimizer_class, options = CLASSES[name]
    plain = optimizer_class(expected.parameters(), **copy.deepcopy(options))
    optimizer = mtlopt.Balanced(optimizer_class(model.parameters(), **options), TASKS, every=5)
    for x, y in batches(8):
        optimizer.step(make_losses(model), x, y)
        weights: Any = optimizer.weights
        reference.joint(plain, make_losses(expected), TASKS, x, y, weights=weights)
        assert_equal(snapshot(model), snapshot(expected))
    assert len({*weights.values()}) == len(TASKS)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("method", METHODS)
def test_with_one_task_a_method_is_the_class_itself(method: str, name: str) -> None:
    expected, model = make_network(name), make_network(name)
    optimizer_class, options = CLASSES[name]
    plain = optimizer_class(expected.parameters(), **copy.deepcopy(options))
    optimizer = make(method, name, model, ["b"])
    for x, y in batches(5):
        reference.joint(plain, make_losses(expected), ["b"], x, y)
        optimizer.step(make_losses(model), x, y)
    assert_equal(snapshot(model), snapshot(expected))


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "LBFGS"])
def test_simultaneous_is_three_optimizers_on_gradients_of_the_same_weights(name: str) -> None:
    expected, model = make_network(name), make_network(name)
    plain_step, _ = reference_of("simultaneous", name, expected)
    optimizer = make("independent", name, model, schedule="simultaneous")
    for x, y in batches(STEPS):
        optimizer.step(make_losses(model), x, y)
        plain_step(make_losses(expected), TASKS, x, y)
    assert_equal(snapshot(model), snapshot(expected))


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_contract import *
torch.set_num_threads(1)
runs = torch.load(sys.argv[2], weights_only=True)
torch.save({run: resumed(*run, saved) for run, saved in runs.items()}, sys.argv[2])
"""
RESUMED = ("Adam", "SGD-momentum", "Adam-tensor-lr", "LBFGS", "SparseAdam")


def resumed(method: str, name: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    """Continues from what was saved after four steps, up to the eighth."""
    model = make_network(name)
    optimizer = make(method, name, model, **saved["keywords"])
    scheduler = scheduler_of(optimizer)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    losses = make_losses(model)
    for x, y in batches(8)[4:]:
        optimizer.step(losses, x, y)
        scheduler.step()
    return snapshot(model)


def test_a_run_resumes_bit_for_bit_in_another_process(tmp_path: Path) -> None:
    """With classes that keep different kinds of state; all in one process, which starts slowly."""
    runs, expected = {}, {}
    for method, name in itertools.product(METHODS, RESUMED):
        keywords = {} if method == "joint" else {"order": "shuffled"}
        model = make_network(name)
        optimizer = make(method, name, model, **keywords)
        scheduler = scheduler_of(optimizer)
        losses = make_losses(model)
        for step, (x, y) in enumerate(batches(8)):
            if step == 4:
                saved = {
                    "keywords": keywords,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                }
                runs[method, name] = copy.deepcopy(saved)
            optimizer.step(losses, x, y)
            scheduler.step()
        expected[method, name] = snapshot(model)
    file = tmp_path / "runs.pt"
    torch.save(runs, file)
    program = [sys.executable, "-c", RESUME, str(Path(__file__).parent), str(file)]
    subprocess.run(program, check=True)
    found = torch.load(file, weights_only=True)
    for run, weights in expected.items():
        assert_equal(found[run], weights)


@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("name", ["Adam", "SGD-momentum", "LBFGS", "Adam-tensor-lr"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_alone_with_its_scheduler(
    method: str, name: str, copier: Callable[[Any], Any]
) -> None:
    """The copy's steps move the copied network, the original's the original network."""
    model = make_network(name)
    optimizer = make(method, name, model)
    scheduler = scheduler_of(optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    for x, y in batches(3):
        optimizer.step(make_losses(model), x, y)
        scheduler.step()
    twin, twin_optimizer, twin_scheduler = copier((model, optimizer, scheduler))
    start = snapshot(twin)
    assert twin_scheduler.optimizer is twin_optimizer
    for x, y in batches(5)[3:]:
        optimizer.step(make_losses(model), x, y)
        scheduler.step()
    assert_equal(snapshot(twin), start)
    for x, y in batches(5)[3:]:
        twin_optimizer.step(make_losses(twin), x, y)
        twin_scheduler.step()
    assert_equal(snapshot(twin), snapshot(model))
    assert twin_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", [name for name in DENSE if name != "LBFGS"])
@pytest.mark.parametrize("method", METHODS)
def test_an_absent_task_moves_nothing_of_its_own(method: str, name: str) -> None:
    """Not its head by decay or momentum, not its state; all absent: nothing at all moves."""
    model = make_network(name)
    optimizer = make(method, name, model)
    losses = make_losses(model)

    def without_b(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor | None]:
        return {t: None if t == "b" else loss for t, loss in losses(tasks, x, y).items()}

    data = batches(4)
    optimizer.step(losses, *data[0])
    head = snapshot(model.heads["b"])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    for x, y in data[1:]:
        assert list(optimizer.step(without_b, x, y)) == ["a", "c"]
    assert_equal(snapshot(model.heads["b"]), head)
    if isinstance(optimizer, mtlopt.IndependentOptimizer):
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)["mtlopt"]["optimizers"][1]["state"]
        for index, state in optimizer["b"].state_dict()["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved[index][key])), key
    everything = snapshot(model)
    assert optimizer.step(lambda tasks, x, y: {}, *data[0]) == {}
    assert optimizer.step(lambda tasks, x, y: dict.fromkeys(tasks), *data[0]) == {}
    assert_equal(snapshot(model), everything)
