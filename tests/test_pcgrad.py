"""PCGrad against the paper's algorithm on whole vectors, which is in the reference."""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import mtlopt
import reference
from mtlopt._gradients.arithmetic import combine, gram
from mtlopt.methods.pcgrad import project_conflicts
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot, twins


def project(gradients: list[Tensor], orders: Any) -> Tensor:
    lists: list[Any] = [[g.clone()] for g in gradients]
    coefficients = project_conflicts(gram(lists).tolist(), orders)
    (combined,) = combine(lists, coefficients)
    assert combined is not None
    return combined


def draw(count: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, generator=generator, dtype=torch.float64))


def drawn_orders(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(count)]


def test_two_conflicting_gradients_follow_the_closed_form() -> None:
    """g1 + g2 - (g1·g2/|g2|²) g2 - (g1·g2/|g1|²) g1, in numbers by hand."""
    first = torch.tensor([2.0, 0.0], dtype=torch.float64)
    second = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    # g1·g2 = -2, |g1|² = 4, |g2|² = 2: g1 + g2 = (1, 1) and then (-1, 1) and (0, 1) halves.
    expected = torch.tensor([2.0 - 1 - 1 + 1, 0.0 + 1 + 1 + 0])
    assert project([first, second], [[1], [0]]).tolist() == expected.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("count", [3, 4])
def test_every_order_gives_the_papers_result(count: int) -> None:
    others = [[j for j in range(count) if j != i] for i in range(count)]
    for seed, orders in enumerate(itertools.product(*map(itertools.permutations, others))):
        gradients = draw(count, 5, seed)
        torch.testing.assert_close(
            project(gradients, orders),
            reference.project_conflicts(gradients, orders),
            rtol=1e-9,
            atol=1e-12,
        )


def test_forty_gradients_give_the_papers_result() -> None:
    """All tasks take a projection at the same time; the last gradient is zero."""
    gradients = [*draw(39, 60, seed=5), torch.zeros(60, dtype=torch.float64)]
    orders = [[j for j in order if j != i] for i, order in enumerate(drawn_orders(40))]
    # Plain division by a squared norm of zero would be NaN.
    expected = torch.zeros(60, dtype=torch.float64)
    for i, order in enumerate(orders):
        projected = gradients[i].clone()
        for j in order:
            inner = projected @ gradients[j]
            if inner < 0 and j < 39:
                projected -= inner / (gradients[j] @ gradients[j]) * gradients[j]
        expected += projected
    torch.testing.assert_close(project(gradients, orders), expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=50)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 2**16))
def test_any_number_of_gradients_gives_the_papers_result(count: int, size: int, seed: int) -> None:
    """Also more gradients than dimensions, where the Gram matrix is singular."""
    generator = torch.Generator().manual_seed(seed)
    gradients = draw(count, size, seed)
    orders = [
        [j for j in torch.randperm(count, generator=generator).tolist() if j != i]
        for i in range(count)
    ]
    scale = max(1.0, reference.project_conflicts(gradients, orders).abs().max().item())
    result = project(gradients, orders)
    if all(abs(g @ h) > 1e-6 for g, h in itertools.combinations(gradients, 2)) and size > count:
        torch.testing.assert_close(
            result, reference.project_conflicts(gradients, orders), rtol=0, atol=1e-9 * scale
        )
    assert result.isfinite().all()


def test_gradients_that_agree_are_summed_to_the_last_bit() -> None:
    gradients = [g.abs() for g in draw(3, 100, 0)]
    orders = [[1, 2], [2, 0], [0, 1]]
    assert torch.equal(project(gradients, orders), gradients[0] + gradients[1] + gradients[2])


def test_zero_identical_and_opposite_gradients_are_exact() -> None:
    g, zero = draw(1, 10, 0)[0], torch.zeros(10, dtype=torch.float64)
    both = [[1], [0]]
    assert torch.equal(project([g, zero], both), g)
    assert torch.equal(project([zero, zero], both), zero)
    assert torch.equal(project([g, g], both), 2 * g)
    assert torch.equal(project([g, -g], both), zero)
    assert torch.equal(project([g], [[]]), g)


class Branched(torch.nn.Module):
    """A trunk for a, b and c; a branch for a and b; a head for each."""

    def __init__(self) -> None:
        super().__init__()
        make: Any = lambda: torch.nn.Linear(4, 4, dtype=torch.float64)  # noqa: E731  # shorthand
        self.trunk, self.branch = make(), make()
        self.heads = torch.nn.ModuleDict({t: make() for t in TASKS})

    def forward(self, x: Tensor, tasks: Any) -> dict[str, Tensor]:
        features = self.trunk(x).tanh()
        return {
            t: self.heads[t](self.branch(features).tanh() if t != "c" else features) for t in tasks
        }


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("forwards", ["joint", "per-task"])
def test_inner_products_run_over_what_at_least_two_tasks_share(
    reduction: Any, forwards: Any
) -> None:
    """A task has a zero gradient where its loss does not depend; heads get their plain gradient."""
    conflicts = 0
    for seed in range(5):
        torch.manual_seed(seed)
        model = Branched()
        losses = make_losses(model)
        (x, y), *_ = batches(1)
        shared = [*model.trunk.parameters(), *model.branch.parameters()]
        rows, heads = [], {}
        for task in TASKS:
            loss = losses((task,), x, y)[task]
            rows.append(reference.gradient_vector(loss, shared))
            heads[task] = torch.autograd.grad(loss, list(model.heads[task].parameters()))
        conflicts += sum(int(a @ b < 0) for a, b in itertools.combinations(rows, 2))
        expected = reference.project_conflicts(rows, drawn_orders(3, seed)) / (
            3 if reduction == "mean" else 1
        )
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = mtlopt.PCGrad(base, TASKS, reduction, seed, forwards=forwards)
        optimizer.step(losses, x, y)
        got = torch.cat([p.grad.flatten() for p in shared if p.grad is not None])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)
        for task in TASKS:
            for p, g in zip(model.heads[task].parameters(), heads[task], strict=True):
                assert p.grad is not None
                assert torch.equal(p.grad, g)
    assert conflicts > 0


def make(model: Any, seed: int = 0, **keywords: Any) -> Any:
    return mtlopt.PCGrad(
        torch.optim.Adam(model.parameters(), lr=0.05), TASKS, seed=seed, **keywords
    )


def run(optimizer: Any, model: Any, steps: slice = slice(None)) -> None:
    for x, y in batches(8)[steps]:
        optimizer.step(make_losses(model), x, y)


def test_the_same_seed_is_the_same_run_and_resumes_bit_for_bit() -> None:
    model = Network()
    twins = [copy.deepcopy(model) for _ in range(3)]
    optimizers = [make(twin, seed) for twin, seed in zip(twins, (1, 1, 2), strict=True)]
    for optimizer, twin in zip(optimizers, twins, strict=True):
        run(optimizer, twin)
    assert_equal(snapshot(twins[0]), snapshot(twins[1]))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(twins[0].parameters(), twins[2].parameters(), strict=True)
    )
    first = make(model, 1)
    run(first, model, slice(0, 4))
    later = make(model, 5)
    later.load_state_dict(first.state_dict())
    run(later, model, slice(4, 8))
    assert_equal(snapshot(model), snapshot(twins[0]))


@pytest.mark.parametrize("missing", ["b", "ac", "abc"])
def test_the_draws_do_not_depend_on_absent_tasks(missing: str) -> None:
    models = [Network(), Network()]
    optimizers = [make(model, 3) for model in models]
    (x, y), *_ = batches(1)
    for model, optimizer, absent in zip(models, optimizers, ("", missing), strict=True):
        losses = make_losses(model)(TASKS, x, y)
        optimizer.step({t: v for t, v in losses.items() if t not in absent})
    assert torch.equal(*(optimizer.generator.get_state() for optimizer in optimizers))


def test_every_step_draws_new_orders() -> None:
    vectors = [[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.8]]  # Each conflicts with each.
    gradients = [torch.tensor(v, dtype=torch.float64) for v in vectors]
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = mtlopt.PCGrad(torch.optim.SGD([w], lr=0.0), TASKS, seed=4)
    results = set()
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        optimizer.step({t: w @ g for t, g in zip(TASKS, gradients, strict=True)})
        orders = [torch.randperm(3, generator=generator).tolist() for _ in TASKS]
        assert w.grad is not None
        torch.testing.assert_close(
            w.grad, reference.project_conflicts(gradients, orders), rtol=1e-12, atol=1e-12
        )
        results.add(tuple(w.grad.tolist()))
    assert len(results) > 2


def test_the_mean_is_over_the_present_tasks() -> None:
    """The projected gradients (1, 1) and (0, 1), halved: two of the three tasks are present."""
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = mtlopt.PCGrad(torch.optim.SGD([w], lr=1.0), TASKS, "mean")
    optimizer.step({"a": 2 * w[0], "c": w[1] - w[0]})
    assert w.tolist() == [-0.5, -1.0]


def test_with_one_task_present_the_step_is_plain() -> None:
    """Absent tasks count for nothing, in the mean too; the head of the present one trains."""
    model, twin = twins()
    optimizer, plain = make(model, reduction="mean"), torch.optim.Adam(twin.parameters(), lr=0.05)
    for x, y in batches(3):
        optimizer.step(lambda ts, x, y: {"b": make_losses(model)("b", x, y)["b"]}, x, y)
        reference.joint(plain, make_losses(twin), ["b"], x, y)
    assert_equal(snapshot(model), snapshot(twin))


def test_diagnostics_show_the_angles_and_the_absent_tasks() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = mtlopt.PCGrad(torch.optim.SGD([w], lr=1.0), ["a", "b", "c"])
    assert optimizer.diagnostics() == {}
    vectors = {"a": torch.tensor([2.0, 0.0]), "c": torch.tensor([-1.0, 1.0])}
    optimizer.step({t: w @ v.double() for t, v in vectors.items()})
    seen = optimizer.diagnostics()
    nan = math.nan
    expected = torch.tensor([[1, nan, -(0.5**0.5)], [nan] * 3, [-(0.5**0.5), nan, 1]])
    torch.testing.assert_close(
        seen["cosines"], expected.double(), equal_nan=True, rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        seen["coefficients"], torch.tensor([1.5, nan, 2.0]).double(), equal_nan=True
    )
    assert seen["conflict_fraction"] == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0, 100_000, 3 * 2**12, 100 * 2**12])
def test_half_precision_gradients_are_multiplied_in_float32(dtype: torch.dtype, size: int) -> None:
    """Eight bits of precision would lose the small conflict beside the large norm."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator).to(dtype) for _ in range(3)]
    result = gram([[part] for part in parts])
    expected = torch.stack(parts).double() @ torch.stack(parts).double().T
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0.05)


@pytest.mark.parametrize("shared", [(0, 1, 2, 3), (0, 2), (1, 3), (0, 1, 3), (3, 1)])
def test_a_gram_matrix_is_right_whichever_tasks_share_a_parameter(shared: Any) -> None:
    lists: list[list[Tensor | None]] = [[None, torch.ones(2)] for _ in range(4)]
    for task in shared:
        lists[task][0] = torch.full((3,), task + 1.0)
    expected = [
        [2.0 + 3.0 * (a + 1) * (b + 1) * (a in shared and b in shared) for b in range(4)]
        for a in range(4)
    ]
    assert gram(lists).tolist() == expected


def test_gradients_in_any_memory_order_are_multiplied_element_by_element() -> None:
    """Of equal and different orders, and sparse."""
    a, b = (torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(2))
    expected = (a * b).sum()
    last: Any = torch.channels_last
    for first, second in (
        (a, b),
        (a.to(memory_format=last), b.to(memory_format=last)),
        (a, b.to(memory_format=last)),
        (a.to_sparse(), b.to_sparse()),
        (a.to_sparse(), b),
    ):
        lists: list[Any] = [[first.clone()], [second.clone()]]
        torch.testing.assert_close(gram(lists)[0, 1], expected, rtol=1e-12, atol=0)
        (combined,) = combine(lists, [2.0, -1.0])
        assert combined is not None
        dense = combined.to_dense() if combined.is_sparse else combined
        torch.testing.assert_close(dense, 2 * a - b, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_are_multiplied_and_combined_by_their_rows() -> None:
    """In numbers by hand; a whole table of this size would not fit any memory."""

    def table(rows: list[int], values: list[list[float]]) -> Tensor:
        entries = torch.tensor(values, dtype=torch.float64)
        return torch.sparse_coo_tensor([rows], entries, (10**15, 2), check_invariants=True)  # type: ignore[arg-type]  # a list will do

    far = 10**14
    first, second = table([5, far], [[1, 2], [3, 4]]), table([far], [[-1, 2]])
    twice = table([7, 7], [[1, 0], [1, 3]])  # Entries of one row are added up.
    lists: list[Any] = [[first], [second], [twice]]
    assert gram(lists).tolist() == [[30, 5, 0], [5, 5, 0], [0, 0, 13]]
    (combined,) = combine(lists, [2.0, -1.0, 1.0])
    assert combined is not None
    combined = combined.coalesce()
    assert combined.indices().tolist() == [[5, 7, far]]
    assert combined.values().tolist() == [[2, 4], [2, 3], [7, 6]]


def test_an_overflow_skips_the_step() -> None:
    model = Network()
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = make(model, scaler=amp)
    (x, y), *_ = batches(1)
    losses = make_losses(model)
    optimizer.step(losses, x, y)
    start = snapshot(model)
    optimizer.step(
        lambda ts, *b: {t: v * (1e308 if t == "b" else 1) for t, v in losses(ts, *b).items()}, x, y
    )
    assert_equal(snapshot(model), start)
    assert amp.get_scale() == 512


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="`reduction` must be 'sum' or 'mean', got 'max'"):
        make(Network(), reduction="max")
    with pytest.raises(ValueError, match=r"optimizers that require a closure, got LBFGS"):
        mtlopt.PCGrad(torch.optim.LBFGS(Network().parameters()), TASKS)


def test_gradients_whose_squares_overflow_are_combined_exactly() -> None:
    """Scaled gradients may be finite in float32 where their squares are not.

    g_a = (1, -1), g_b = (-2, 1): g_a - (-3/5) g_b = (-0.2, -0.4), g_b - (-3/2) g_a = (-0.5, -0.5).
    """
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**70)
    optimizer = mtlopt.PCGrad(torch.optim.SGD([w], lr=0.1), ["a", "b"], scaler=scaler)
    optimizer.step({"a": w[0] - w[1], "b": w[1] - 2 * w[0]})
    assert w.tolist() == pytest.approx([1.07, 1.09])
    assert scaler.get_scale() == 2.0**70


def pcgrad_of(gradients: Sequence[Tensor]) -> Tensor:
    """Returns what PCGrad combines these float32 gradients to."""
    names = [str(k) for k in range(len(gradients))]
    w = torch.zeros(len(gradients[0]), requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=0.0), names)
    optimizer.step({name: (w * g).sum() for name, g in zip(names, gradients, strict=True)})
    assert w.grad is not None
    return w.grad.double()


@pytest.mark.parametrize(
    "exponents",
    [
        (0, 0, 0),
        (-22, -22, -22),
        (-30, -30, -30),
        (30, 30, 30),
        (-30, 30, 0),
        (0, -26, 1),
        (30, -30, -29),
        (20, -20, 10, -10),
    ],
)
@pytest.mark.parametrize("size", [8, 5000])
def test_pcgrad_is_exact_at_any_scale_of_the_gradients(
    exponents: tuple[int, ...], size: int
) -> None:
    """Their squares leave float32 beyond 1e-22 and 1e19, their quotients beyond 1e38."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    gradients = []
    for k, exponent in enumerate(exponents):
        own = torch.randn(size, generator=generator, dtype=torch.float64)
        vector = own + (-0.6) ** k * common  # Every second one conflicts with the others.
        gradients.append((vector / vector.norm() * 10.0**exponent).float())
    found = pcgrad_of(gradients)
    expected = reference.project_conflicts(
        [g.double() for g in gradients], drawn_orders(len(gradients))
    )
    plain = torch.stack([g.double() for g in gradients]).sum(0)
    assert (plain - expected).norm() > 1e-3 * expected.norm()  # There is something to project.
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("saturated", ["zero", "denormal", "logit -58"])
def test_a_saturated_task_does_not_disturb_the_others(saturated: str) -> None:
    """By hand: (1, 0) and (-1, 1) give (1/2, 1/2) and (0, 1); the third adds next to nothing."""
    w = torch.zeros(3, requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=1.0), ["a", "b", "c"])

    def third() -> Tensor:
        if saturated == "logit -58":  # An all-negative batch; conflicts with neither.
            logit = (w * torch.tensor([0.0, 0.0, 1.0])).sum() - 58
            return nn.functional.binary_cross_entropy_with_logits(logit, torch.zeros(()))
        return (w * (0.0 if saturated == "zero" else 1e-42)).sum()

    losses = {"a": w[0] * 1.0, "b": w[1] - w[0], "c": third()}
    optimizer.step(losses)
    torch.testing.assert_close(w.detach(), torch.tensor([-0.5, -1.5, 0.0]))


def test_a_denormal_gradient_in_conflict_is_projected_or_left() -> None:
    """Its direction has few digits: either (-1, 1) less its part along (1, 0), or unchanged."""
    w = torch.zeros(2, requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=1.0), ["a", "b"])
    optimizer.step({"a": w[0] * 1e-42, "b": w[1] - w[0]})
    assert w.tolist() in ([0.0, -1.0], [1.0, -1.0])


def test_a_saturated_task_in_conflict_is_projected_off() -> None:
    """Sigmoid(-58) is 6e-26: its square is 0 in float32, but its direction is exact."""
    x = torch.tensor([1.0, 2.0])
    w = torch.zeros(2, requires_grad=True)
    optimizer = mtlopt.PCGrad(SGD([w], lr=1.0), ["a", "b"])
    logit = (w * x).sum() - 58
    negatives = nn.functional.binary_cross_entropy_with_logits(logit, torch.zeros(()))
    optimizer.step({"a": negatives, "b": -w[0]})
    # b's (-1, 0) less its part along (1, 2), which is (-1/5, -2/5).
    torch.testing.assert_close(w.detach(), torch.tensor([0.8, -0.4]), rtol=1e-5, atol=1e-7)
