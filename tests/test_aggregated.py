"""Every aggregator that TorchJD exports, against TorchJD on the whole Jacobian."""

import copy
import inspect
import itertools
from typing import Any, cast

import pytest
import torch
import torchjd.aggregation
from torch import Tensor
from torch.optim import SGD
from torchjd.aggregation import Aggregator

import mtlopt
import reference
from problems import (
    TASKS,
    Network,
    assert_equal,
    batches,
    make_losses,
    snapshot,
    step_overflowing,
    twins,
)
from round_trips import by_file

ARGUMENTS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.5},
    "Constant": {"weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 0, "n_selected": 2},
    "NashMTL": {"n_tasks": 3},
    "TrimmedMean": {"trim_number": 1},
}
ABSTRACT = {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator"}
NAMES = [
    name
    for name in torchjd.aggregation.__all__
    if inspect.isclass(kind := getattr(torchjd.aggregation, name))
    and issubclass(kind, Aggregator)
    and name not in ABSTRACT
]
# cvxpy's word on how TorchJD poses its problem.
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
STATEFUL = ("ExcessMTL", "GradVac", "NashMTL", "PCD")


def make_aggregator(name: str) -> Any:
    try:
        return getattr(torchjd.aggregation, name)(**ARGUMENTS.get(name, {}))
    except ImportError as error:
        pytest.skip(f"TorchJD's optional dependencies are missing: {error}")


def make(model: Network, aggregator: Any, **keywords: Any) -> mtlopt.Aggregated:
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    return mtlopt.Aggregated(base, TASKS, aggregator, **keywords)


def jacobian(model: Any, x: Any, y: Any) -> tuple[torch.Tensor, list[Any]]:
    trunk = list(model.trunk.parameters())
    losses = make_losses(model)(TASKS, x, y).values()
    return torch.stack([reference.gradient_vector(loss, trunk) for loss in losses]), trunk


def test_the_package_exports_what_is_tested_here() -> None:
    assert len(NAMES) >= 19
    assert set(ARGUMENTS) | set(STATEFUL) <= set(NAMES)


@pytest.mark.parametrize("forwards", ["joint", "per-task"])
@pytest.mark.parametrize("name", NAMES)
def test_the_shared_part_is_the_aggregation_and_heads_are_plain(name: str, forwards: Any) -> None:
    """Over three steps, so that states move too; from the same random numbers."""
    model, expected = twins()
    aggregator = make_aggregator(name)
    optimizer = make(model, copy.deepcopy(aggregator), forwards=forwards)
    plain = torch.optim.SGD(expected.parameters(), lr=0.05)
    trunk = list(expected.trunk.parameters())
    for seed, (x, y) in enumerate(batches(3)):
        expected.load_state_dict(model.state_dict())
        torch.manual_seed(seed)
        reference.aggregated(
            plain, make_losses(expected), TASKS, x, y, shared=trunk, aggregate=aggregator
        )
        torch.manual_seed(seed)
        optimizer.step(make_losses(model), x, y)
        for (parameter, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            if parameter.startswith("trunk"):
                # Solvers stop at a tolerance of their own.
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(p.grad, q.grad)


def test_an_aggregator_of_the_gramian_never_sees_a_matrix() -> None:
    model: Any = Network()
    aggregator = torchjd.aggregation.UPGrad()
    aggregator.register_forward_pre_hook(lambda *_: pytest.fail("the Jacobian was built"))
    make(model, aggregator).step(make_losses(model), *batches(1)[0])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in {*STATEFUL, "Constant"}])
def test_rows_of_absent_tasks_are_dropped(name: str) -> None:
    if name in {"Krum", "TrimmedMean"}:
        pytest.skip("takes three rows or more")
    model: Any = Network()
    aggregator = make_aggregator(name)
    optimizer = make(model, copy.deepcopy(aggregator))
    (x, y), *_ = batches(1)
    matrix, trunk = jacobian(model, x, y)
    torch.manual_seed(0)
    expected = aggregator(matrix[[0, 2]])
    torch.manual_seed(0)
    losses = make_losses(model)
    head = model.heads["b"].weight.detach().clone()
    optimizer.step(lambda ts, *b: {t: v for t, v in losses(ts, *b).items() if t != "b"}, x, y)
    got = torch.cat([p.grad.flatten() for p in trunk if p.grad is not None])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.heads["b"].weight, head)


@pytest.mark.parametrize("name", [*STATEFUL, "Constant", "UPGrad with preferences"])
def test_what_knows_the_tasks_by_their_rows_refuses_to_miss_one(name: str) -> None:
    model: Any = Network()
    aggregator = (
        torchjd.aggregation.UPGrad(torch.ones(3).double())
        if name.startswith("UPGrad")
        else make_aggregator(name)
    )
    optimizer = make(model, aggregator)
    losses = make_losses(model)
    start = snapshot(model)
    with pytest.raises(ValueError, match=r"must see every task.*Absent from this batch: \['b'\]"):
        optimizer.step(
            lambda ts, *b: {t: v for t, v in losses(ts, *b).items() if t != "b"}, *batches(1)[0]
        )
    assert_equal(snapshot(model), start)


@pytest.mark.parametrize("name", [n for n in STATEFUL if n != "NashMTL"])
def test_an_aggregators_state_is_saved(name: str) -> None:
    model: Any = Network()
    optimizer = make(model, make_aggregator(name))
    data = batches(8)
    for x, y in data[:4]:
        optimizer.step(make_losses(model), x, y)
    twin = copy.deepcopy(model)
    later = make(twin, make_aggregator(name))
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, network in ((optimizer, model), (later, twin)):
        torch.manual_seed(0)  # GradVac draws.
        for x, y in data[4:]:
            own.step(make_losses(network), x, y)
    assert_equal(snapshot(model), snapshot(twin))


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="`aggregator` must be an instance of torchjd"):
        make(Network(), torchjd.aggregation.UPGradWeighting())


def test_conflicts_are_those_of_the_gradients_and_nothing_moves() -> None:
    model: Any = Network()
    (x, y), *_ = batches(1)
    matrix, trunk = jacobian(model, x, y)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    start = snapshot(model)
    for params in (trunk, [trunk[0]]):
        part = matrix[:, : sum(p.numel() for p in params)]
        report = mtlopt.conflicts(make_losses(model), params, TASKS, x, y)
        torch.testing.assert_close(report.norms, part.norm(dim=1), rtol=1e-12, atol=0)
        unit = part / part.norm(dim=1, keepdim=True)
        torch.testing.assert_close(report.cosines, unit @ unit.T, rtol=1e-9, atol=1e-12)
        pairs = list(itertools.combinations(range(3), 2))
        expected = sum(int(part[i] @ part[j] < 0) for i, j in pairs) / 3
        assert report.conflict_fraction == pytest.approx(expected)
        assert report.tasks == TASKS
    assert_equal(snapshot(model), start)
    assert all(torch.all(p.grad == 3.0) for p in model.parameters())


def test_conflicts_of_groups_and_absent_tasks(tmp_path: Any) -> None:
    model: Any = Network()
    losses = make_losses(model)
    report = mtlopt.conflicts(
        lambda ts, *b: {t: v for t, v in losses(ts, *b).items() if t != "c"},
        model.parameters(),
        [("a", "b"), "c"],
        *batches(1)[0],
    )
    assert report.norms.isnan().tolist() == [False, True]
    assert report.cosines.isnan().tolist() == [[False, True], [True, True]]
    assert report.conflict_fraction == 0.0
    report.plot().savefig(tmp_path / "conflicts.png")
    assert (tmp_path / "conflicts.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"`params` must hold at least one.*got none"):
        mtlopt.conflicts(losses, [], TASKS, *batches(1)[0])


@pytest.mark.parametrize("imperative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_overflow_skips_the_step(name: str, imperative: bool) -> None:
    """Some aggregators raise where a number is not finite; a scaler is to see it first."""
    model = Network()
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = mtlopt.Aggregated(
        torch.optim.SGD(model.parameters(), lr=0.1),
        TASKS,
        make_aggregator(name),
        scaler=None if imperative else amp,
    )
    before = snapshot(model)
    x, y = batches(1)[0]
    step_overflowing(optimizer, make_losses(model)(TASKS, x, y), amp, imperative)
    assert_equal(snapshot(model), before)
    assert amp.get_scale() == 512.0


def test_a_matrix_of_two_dtypes_is_of_the_wider() -> None:
    """And each part of the result has its parameter's."""
    narrow = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    wide = torch.ones(2, requires_grad=True)
    tasks = ["a", "b", "c"]
    losses = {t: (narrow * i).sum().float() + (wide * i / 3).sum() for i, t in enumerate(tasks, 1)}
    optimizer = mtlopt.Aggregated(
        torch.optim.SGD([narrow, wide], lr=1.0), tasks, torchjd.aggregation.TrimmedMean(1)
    )
    optimizer.backward(losses)
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert wide.grad is not None
    assert wide.grad.tolist() == [torch.tensor(2 / 3).item()] * 2


def test_a_state_goes_on_after_a_change_of_device() -> None:
    """ExcessMTL recognises its state by the device it was made on: a GPU, as the file has it."""
    model: Any = Network()
    name = "ExcessMTL"
    optimizer = make(model, make_aggregator(name))
    data = batches(8)
    for x, y in data[:4]:
        optimizer.step(make_losses(model), x, y)
    twin = copy.deepcopy(model)
    later = make(twin, make_aggregator(name))
    saved = copy.deepcopy(optimizer.state_dict())
    changed = 0
    for part in saved["mtlopt"]["aggregator"]:
        if isinstance(key := part.get("_state_key"), tuple):
            part["_state_key"] = (*key[:-1], torch.device("cuda", 1))
            changed += 1
    assert changed
    later.load_state_dict(by_file(saved))
    for own, network in ((optimizer, model), (later, twin)):
        torch.manual_seed(0)
        for x, y in data[4:]:
            own.step(make_losses(network), x, y)
    assert_equal(snapshot(model), snapshot(twin))


def test_a_state_is_loaded_onto_the_device_of_its_inputs() -> None:
    """A matrix is where the parameters are, here on `meta`; a Gramian is on the CPU."""
    for name, device in (("ExcessMTL", "meta"), ("GradVac", "cpu")):
        w = torch.ones(2, requires_grad=True)
        here = mtlopt.Aggregated(SGD([w], lr=0.1), ["a", "b"], make_aggregator(name))
        here.step({"a": w.sum(), "b": (w * torch.tensor([1.0, -2.0])).sum()})
        far = torch.ones(2, requires_grad=True, device="meta")
        there = mtlopt.Aggregated(SGD([far], lr=0.1), ["a", "b"], make_aggregator(name))
        there.load_state_dict(here.state_dict())
        buffers = list(there.aggregator.buffers())
        assert {buffer.device.type for buffer in buffers} == {device}


class Odd(torchjd.aggregation.Aggregator):
    """Remembers a sum in a buffer, and holds a function."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4, 6).double())
        self.function = abs

    def forward(self, matrix: Tensor, /) -> Tensor:
        self.seen = self.seen + matrix[:, :24].sum(0).view(4, 6)
        out: Tensor = matrix.sum(0)
        out[:24] = self.seen.flatten()
        return out


class OddWithState(Odd, torchjd.Stateful):
    def reset(self) -> None:
        pass


@pytest.mark.parametrize("kind", [Odd, OddWithState])
def test_the_state_of_a_rule_of_ones_own_is_saved(kind: Any) -> None:
    """Though it has buffers alone, or an attribute that no file can hold."""
    model: Any = Network()
    optimizer = make(model, kind())
    data = batches(6)
    for x, y in data[:3]:
        optimizer.step(make_losses(model), x, y)
    twin = copy.deepcopy(model)
    later = make(twin, kind())
    later.load_state_dict(by_file(optimizer.state_dict()))
    assert cast(Odd, later.aggregator).seen.any()
    for own, network in ((optimizer, model), (later, twin)):
        for x, y in data[3:]:
            own.step(make_losses(network), x, y)
    assert_equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "AlignedMTL", "Constant"])
def test_preferences_are_taken_in_any_precision(name: str, dtype: torch.dtype) -> None:
    """Against TorchJD on the Jacobian in that precision."""
    model, preferences = Network(torch.float32), torch.tensor([0.2, 0.3, 0.5], dtype=dtype)
    aggregator = getattr(torchjd.aggregation, name)(preferences)
    x, y = batches(1)[0]
    x, y = x.float(), {task: target.float() for task, target in y.items()}
    matrix, trunk = jacobian(model, x, y)
    expected = aggregator(matrix.to(dtype)).float()
    make(model, aggregator).step(make_losses(model), x, y)
    got = torch.cat([p.grad.flatten() for p in trunk])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
