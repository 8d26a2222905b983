"""Tasks that have nothing to say in a batch: no samples, a constant loss, one not finite."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam

import mtlopt
from all_methods import METHODS, ONE_STEP, every_method, make
from problems import TASKS, Network, assert_equal, batches, halves, make_losses, snapshot, twins
from spawned import start

PER_TASK = ("alternating", "independent", "simultaneous", "pcgrad", "gradnorm", "aggregated")
Spoil = Callable[[Any, Any], Any]


def build(model: Network, method: str, **keywords: Any) -> Any:
    shared = model.trunk[2].weight
    return make(method, model.parameters(), TASKS, Adam, shared=shared, keywords=keywords, lr=0.01)


def spoilt(model: Network, spoil: Spoil | None, at: int = 0) -> Callable[..., Any]:
    """Returns losses in which b is spoilt, or left out; of micro-batches from the `at`-th call."""
    plain, calls = make_losses(model), [0]

    def losses(tasks: Any, *batch: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(tasks, *batch)
        if "b" in tasks:
            calls[0] += 1
            if spoil is None:
                del found["b"]
            elif calls[0] > at:
                found["b"] = spoil(found["b"], model)
        return found

    return losses


def nan_loss(loss: Tensor, _: Any) -> Tensor:
    return loss * float("nan")


def nan_gradient(loss: Tensor, model: Any) -> Any:
    """The root has no derivative at 0."""
    return loss + (0 * model.trunk[2].weight.square().sum()).sqrt()


def compare(method: str, spoil: Spoil, form: str = "function") -> None:
    """Four steps, in the third of which b is spoilt; in the twin's it is left out."""
    model, expected = twins()
    optimizer, twin = build(model, method, check_finite="skip"), build(expected, method)
    for i, (x, y) in enumerate(batches(4)):
        own = [spoilt(model, spoil, int(form == "micro-batches")), spoilt(expected, None)]
        if i != 2:
            own = [make_losses(model), make_losses(expected)]
        for each, losses in zip((optimizer, twin), own, strict=True):
            if form == "micro-batches":
                values = each.step(losses, micro_batches=halves(x, y, 3))
            elif form == "ready":
                values = each.step(losses(TASKS, x, y))
            elif form == "imperative":
                each.zero_grad()
                each.backward(losses(TASKS, x, y))
                each.step()
            else:
                values = each.step(losses, x, y)
        if form != "imperative":
            assert values.keys() == set(TASKS) - ({"b"} if i == 2 else set())
        assert optimizer.diagnostics()["skipped"].tolist() == [False, i == 2, False]
        assert_equal(snapshot(model), snapshot(expected))


@pytest.mark.parametrize("form", ["function", "micro-batches"])
@every_method
def test_a_task_whose_loss_is_not_finite_is_absent(method: str, form: str) -> None:
    compare(method, nan_loss, form)


@pytest.mark.parametrize("form", ["ready", "imperative"])
@pytest.mark.parametrize("method", ONE_STEP)
def test_so_it_is_in_the_forms_with_ready_losses(method: str, form: str) -> None:
    compare(method, nan_loss, form)


@pytest.mark.parametrize("method", PER_TASK)
def test_a_task_whose_gradient_is_not_finite_is_absent(method: str) -> None:
    compare(method, nan_gradient)


@pytest.mark.parametrize("kind", ["pcgrad", "gradnorm"])
def test_a_task_whose_loss_is_not_finite_is_absent_at_features(kind: str) -> None:
    model, expected = twins()
    classes: Any = {"pcgrad": mtlopt.PCGrad, "gradnorm": mtlopt.GradNorm}
    optimizer, twin = (
        classes[kind](Adam(m.parameters(), lr=0.01), TASKS, features=m.trunk, check_finite=check)
        for m, check in ((model, "skip"), (expected, False))
    )
    for x, y in batches(2):
        optimizer.step(spoilt(model, nan_loss), x, y)
        twin.step(spoilt(expected, None), x, y)
        assert optimizer.diagnostics()["skipped"].tolist() == [False, True, False]
    assert_equal(snapshot(model), snapshot(expected))


@every_method
def test_with_a_scaler_nothing_but_the_task_is_skipped(method: str) -> None:
    """If no task is left, the scaler has nothing to update."""
    model, expected = twins()
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    optimizer = build(model, method, check_finite="skip", scaler=scalers[0])
    twin = build(expected, method, scaler=scalers[1])
    (x, y), *_ = batches(1)
    optimizer.step(spoilt(model, nan_loss), x, y)
    twin.step(spoilt(expected, None), x, y)
    assert_equal(snapshot(model), snapshot(expected))
    plain = make_losses(model)
    lost = optimizer.step(lambda t, *b: {n: v / 0 for n, v in plain(t, *b).items()}, x, y)
    assert lost == {}
    assert optimizer.diagnostics()["skipped"].tolist() == [True] * 3
    assert_equal(snapshot(model), snapshot(expected))
    assert scalers[0].get_scale() == 4.0


@every_method
def test_a_count_of_0_needs_neither_a_graph_nor_a_number(method: str) -> None:
    for value in (torch.tensor(float("nan")), torch.tensor(0.0)):
        model, expected = twins()
        (x, y), *_ = batches(1)
        build(model, method, check_finite=True).step(
            spoilt(model, lambda *_, value=value: (value, 0)),
            x,
            y,
        )
        build(expected, method).step(spoilt(expected, None), x, y)
        assert_equal(snapshot(model), snapshot(expected))


@every_method
def test_a_constant_loss_is_an_error_before_anything_moves(method: str) -> None:
    """A method that steps through the tasks finds it before it moves for that task."""
    model = Network()
    optimizer, before = build(model, method), snapshot(model)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'a' must have a graph.*leave it out or return None"):
        optimizer.step(lambda tasks: {task: torch.tensor(1.0) for task in tasks})
    assert_equal(snapshot(model), before)
    assert str(optimizer.state_dict()) == str(state)


@every_method
def test_other_values_of_the_option_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="`check_finite` must be False, True or 'skip', got 'no'"):
        build(Network(), method, check_finite="no")


def work(rank: int, folder: str) -> None:
    """On rank 1 alone the loss of b is not finite; both leave it out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for method in ("joint", "pcgrad", "gradnorm", "simultaneous", "independent"):
        for spoil in (nan_loss, None):
            torch.manual_seed(0)
            model = Network()
            options = {"check_finite": "skip"} if spoil else {}
            optimizer = build(model, method, process_group=dist.group.WORLD, **options)
            network: Any = model
            if method == "independent":
                network = torch.nn.parallel.DistributedDataParallel(
                    model, find_unused_parameters=True
                )
            for i, batch in enumerate(batches(3)):
                x, y = halves(*batch, 2)[rank]
                own = spoil if rank == 1 or spoil is None else lambda loss, _: loss

                def losses(tasks: Any, *batch: Any, own: Any = own, network: Any = network) -> Any:
                    values: dict[str, Any] = {**make_losses(network)(tasks, *batch)}
                    if "b" in tasks and own is None:
                        values["b"] = values["b"] * 0, 0
                    elif "b" in tasks:
                        values["b"] = own(values["b"], None)
                    return values

                plain = make_losses(network)
                if method == "independent" or i % 2:
                    optimizer.step(losses if i else plain, x, y)
                else:
                    optimizer.step(losses if i else plain, micro_batches=[(x, y), (x, y)])
            found[method, spoil is None] = snapshot(model)
            if spoil:
                assert optimizer.diagnostics()["skipped"].tolist() == [False, True, False]
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_leave_out_the_same_tasks(tmp_path: Path) -> None:
    start(work, str(tmp_path), ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == 10
    for (method, absent), weights in first.items():
        assert_equal(weights, second[method, absent])
        assert_equal(weights, first[method, True])


assert {*PER_TASK, "joint", "balanced"} == {*METHODS}
