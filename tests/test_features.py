"""`features=`: gradients combined at the features z, and one backward pass through the trunk."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation

import mtlopt
import reference
from problems import (
    TASKS,
    Network,
    assert_close,
    assert_equal,
    batches,
    make_losses,
    snapshot,
    twins,
)

STEPS = 5


Aggregate = Callable[[Tensor], Tensor]


class Heads(nn.Module):
    """The part of a network after its features."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        return {task: self.network.heads[task](z) for task in tasks}


def by_hand(model: Network, x: Tensor, y: Any, aggregate: Aggregate) -> None:
    """Adds to `.grad`: aggregates the gradients with respect to z, then goes back once."""
    z = model.trunk(x)
    leaf = z.detach().requires_grad_()
    losses = make_losses(Heads(model))(TASKS, leaf, y)
    jacobian = torch.stack([reference.gradient_vector(v, [leaf]) for v in losses.values()])
    reference.weighted_sum(losses).backward()
    z.backward(aggregate(jacobian).view_as(z))


def projection(generator: torch.Generator) -> Aggregate:
    """Returns PCGrad with orders drawn as one step draws them."""
    orders = [torch.randperm(len(TASKS), generator=generator).tolist() for _ in TASKS]
    return lambda jacobian: reference.project_conflicts(jacobian, orders)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def test_pcgrad_projects_the_gradients_of_the_features() -> None:
    model, expected = twins()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk, seed=5)
    plain, generator = adam(expected), torch.Generator().manual_seed(5)
    conflicts = 0
    for x, y in batches(STEPS):
        values = optimizer.step(make_losses(model), x, y)
        assert values.keys() == set(TASKS)
        plain.zero_grad()
        by_hand(expected, x, y, projection(generator))
        plain.step()
        conflicts += int(optimizer.diagnostics()["conflict_fraction"] > 0)
    assert_close(model, expected)
    assert conflicts


GRAMIAN: list[Callable[[], Any]] = [
    *(getattr(aggregation, name) for name in aggregation.__all__),
    lambda: aggregation.CAGrad(c=0.5),
    lambda: aggregation.Krum(n_byzantine=0, n_selected=1),
    lambda: aggregation.Constant(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    lambda: aggregation.NashMTL(n_tasks=3),
]


def gramian_aggregators() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for make in GRAMIAN:
        try:
            aggregator = make()
        except TypeError:  # Abstract, or with arguments: those that need some are listed.
            continue
        if isinstance(aggregator, aggregation.GramianWeightedAggregator):
            found[type(aggregator).__name__] = make
    return found


@pytest.mark.parametrize("name", gramian_aggregators())
def test_an_aggregator_of_the_gramian_gets_that_of_the_features(name: str) -> None:
    """The aggregator itself, on the (T, n) matrix of gradients with respect to z."""
    model, expected = twins()
    make = gramian_aggregators()[name]
    optimizer = mtlopt.Aggregated(adam(model), TASKS, make(), features=model.trunk)
    aggregator, plain = make(), adam(expected)

    def aggregate(matrix: Tensor) -> Tensor:
        weights: Tensor = aggregator.gramian_weighting(matrix @ matrix.mT)
        return weights @ matrix

    for x, y in batches(2):
        torch.manual_seed(3)
        optimizer.step(make_losses(model), x, y)
        plain.zero_grad()
        torch.manual_seed(3)
        by_hand(expected, x, y, aggregate)
        plain.step()
    assert_close(model, expected, atol=1e-7)


def test_an_aggregator_of_the_matrix_gets_that_of_the_features() -> None:
    model, expected = twins()
    optimizer = mtlopt.Aggregated(
        adam(model), TASKS, aggregation.TrimmedMean(1), features=model.trunk
    )
    plain = adam(expected)
    for x, y in batches(2):
        optimizer.step(make_losses(model), x, y)
        plain.zero_grad()
        by_hand(expected, x, y, lambda rows: rows.median(0).values)  # of three
        plain.step()
    assert_close(model, expected)


def test_gradnorm_takes_its_norms_over_the_features() -> None:
    model, expected = twins()
    optimizer = mtlopt.GradNorm(adam(model), TASKS, features=model.trunk, alpha=0.5)
    plain = adam(expected)
    weights = {task: torch.ones((), requires_grad=True) for task in TASKS}
    balance = torch.optim.Adam(weights.values(), lr=0.025)
    initial: dict[str, Tensor] = {}
    losses = make_losses(Heads(expected))
    for x, y in batches(STEPS):
        optimizer.step(make_losses(model), x, y)
        z = expected.trunk(x)
        reference.gradnorm(
            plain,
            losses,
            TASKS,
            z,
            y,
            shared=[z],
            weights=weights,
            weight_optimizer=balance,
            initial=initial,
            alpha=0.5,
        )
    assert_close(model, expected, atol=1e-7)
    found = torch.stack([weight.detach() for weight in weights.values()])
    torch.testing.assert_close(optimizer.diagnostics()["weights"], found)


@pytest.mark.parametrize("tasks", [("a",), TASKS])
def test_without_conflicts_the_step_is_that_of_the_sum(tasks: Any) -> None:
    """To the last bit with one task; with several, additions come in another order."""
    model, expected = twins()
    optimizer = mtlopt.PCGrad(adam(model), tasks, features=model.trunk)
    plain = adam(expected)

    def losses(network: Network, x: Tensor) -> dict[str, Tensor]:
        z = network.trunk(x)
        return {t: (network.heads["a"](z).square().mean() * (k + 1)) for k, t in enumerate(tasks)}

    for x, _ in batches(STEPS):
        optimizer.step(lambda names, x=x: losses(model, x))
        plain.zero_grad()
        torch.stack(list(losses(expected, x).values())).sum().backward()
        plain.step()
    if len(tasks) == 1:
        assert_equal(snapshot(model), snapshot(expected))
    assert_close(model, expected, atol=1e-13)


def test_absent_tasks_and_counts_are_as_without_features() -> None:
    """Counts of 0 and None are absent here too."""
    model = Network()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    before = snapshot(model)

    def some(tasks: Any) -> dict[str, Any]:
        found = losses(tasks, x, y)
        return {"a": (found["a"], 4), "b": (found["b"] * float("nan"), 0), "c": None}

    values = optimizer.step(some)
    assert list(values) == ["a"]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"trunk.0.weight", "trunk.2.weight", "heads.a.weight"}
    assert optimizer.diagnostics()["cosines"].isnan().sum() == 8
    assert optimizer.step(lambda tasks: losses(tasks, x, y) and {}) == {}


def test_micro_batches_are_combined_separately_and_averaged() -> None:
    model, expected = twins()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk, seed=2)
    plain, generator = adam(expected), torch.Generator().manual_seed(2)
    data = batches(2)
    values = optimizer.step(make_losses(model), micro_batches=data)
    plain.zero_grad()
    for x, y in data:
        by_hand(expected, x, y, projection(generator))
    for p in expected.parameters():
        assert p.grad is not None
        p.grad /= 2
    plain.step()
    assert_close(model, expected)
    halves = [make_losses(expected)(TASKS, *part)["a"] for part in data]
    assert values["a"].dtype == halves[0].dtype

    def unequal(tasks: Any, x: Tensor, y: Any) -> dict[str, Any]:
        found = make_losses(model)(tasks, x, y)
        return {t: (v, 3 if x is data[0][0] else 5) for t, v in found.items()}

    before = snapshot(model)
    with pytest.raises(ValueError, match=r"equal counts, got \[3, 5\] for task 'a'"):
        optimizer.step(unequal, micro_batches=data)
    assert_equal(snapshot(model), before)


def test_a_scaler_changes_nothing_and_an_overflow_skips_the_step() -> None:
    model, expected = twins()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk, scaler=scaler)
    plain = mtlopt.PCGrad(adam(expected), TASKS, features=expected.trunk)
    for x, y in batches(3):
        optimizer.step(make_losses(model), x, y)
        plain.step(make_losses(expected), x, y)
    assert_close(model, expected)
    before = snapshot(model)
    x, y = batches(1)[0]
    optimizer.step(lambda tasks: {t: v * 1e308 for t, v in make_losses(model)(tasks, x, y).items()})
    assert_equal(snapshot(model), before)
    assert scaler.get_scale() == 512


def test_what_cannot_work_with_features_is_refused() -> None:
    model = Network()
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    before = snapshot(model)
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    for form in (optimizer.step, optimizer.backward):
        with pytest.raises(TypeError, match=r"must be a function.*bring a finished one"):
            form(losses(TASKS, x, y))
    uncalled = mtlopt.PCGrad(adam(model), TASKS, features=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must be called by `losses`, got \['Linear'\]"):
        uncalled.step(losses, x, y)
    with pytest.raises(ValueError, match="`forwards` must be 'joint' with `features`"):
        mtlopt.PCGrad(adam(model), TASKS, features=model.trunk, forwards="per-task")
    for wrong in ([], [1], 3):
        with pytest.raises(TypeError, match=r"`features` must be a module|not iterable"):
            mtlopt.PCGrad(adam(model), TASKS, features=wrong)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match=r"either `shared` .* or `features`"):
        mtlopt.GradNorm(adam(model), TASKS, features=model.trunk, shared=model.trunk.parameters())
    with pytest.raises(ValueError, match=r"either `shared` .* or `features`"):
        mtlopt.GradNorm(adam(model), TASKS)

    def in_place(tasks: Any) -> dict[str, Tensor]:
        z = model.trunk(x).relu_()
        return {t: model.heads[t](z).square().mean() for t in tasks}

    with pytest.raises(RuntimeError, match=r"in place.*inplace=False"):
        optimizer.step(in_place)
    assert_equal(snapshot(model), before)


FEATURES: dict[str, Callable[..., Any]] = {
    "balanced": mtlopt.Balanced,
    "pcgrad": mtlopt.PCGrad,
    "gradnorm": mtlopt.GradNorm,
    "aggregated": lambda base, tasks, **options: mtlopt.Aggregated(
        base, tasks, aggregation.UPGrad(), **options
    ),
}


@pytest.mark.parametrize("method", FEATURES)
def test_a_batch_without_labels_need_not_call_the_features(method: str) -> None:
    """With all tasks absent `losses` may skip the forward pass: nothing moves."""
    model = Network()
    optimizer = FEATURES[method](adamw(model), TASKS, features=model.trunk)
    before = snapshot(model)
    assert optimizer.step(lambda tasks: {}) == {}
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("method", FEATURES)
def test_features_may_be_frozen(method: str) -> None:
    """As for the first epochs of fine-tuning: the heads train as without `features`."""
    model = Network()
    model.trunk.requires_grad_(False)
    optimizer = FEATURES[method](adamw(model), TASKS, features=model.trunk)
    x, y = batches(1)[0]
    before = snapshot(model)
    optimizer.step(make_losses(model), x, y)
    expected: Any = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"heads.{task}.weight" for task in TASKS} == expected.keys()
    model.load_state_dict(before)
    for task, loss in make_losses(model)(TASKS, x, y).items():
        head = model.get_parameter(f"heads.{task}.weight")
        gradient = torch.autograd.grad(loss, head, retain_graph=True)[0]
        assert torch.equal(expected[f"heads.{task}.weight"], gradient)
    if method == "gradnorm":
        assert optimizer.diagnostics()["weights"].tolist() == [1.0] * 3
    model.trunk.requires_grad_(True)
    optimizer.step(make_losses(model), x, y)
    assert not torch.equal(snapshot(model)["trunk.0.weight"], before["trunk.0.weight"])


def test_the_same_batch_may_come_twice_as_micro_batches() -> None:
    """The average over both is the gradient of the batch itself."""
    model, expected = twins()
    batch = batches(1)[0]
    for network, micro_batches in ((model, [batch, batch]), (expected, [batch])):
        optimizer = mtlopt.GradNorm(adamw(network), TASKS, features=network.trunk)
        optimizer.step(make_losses(network), micro_batches=micro_batches)
    assert_close(model, expected)
