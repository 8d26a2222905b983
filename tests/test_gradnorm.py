"""GradNorm: steps by hand and by the reference, and what does not update its weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import mtlopt
import reference
from all_methods import with_weights
from gradnorm_toy import GradNormToy
from mtlopt.methods.gradnorm import weight_gradients
from problems import (
    TASKS,
    Network,
    assert_close,
    assert_equal,
    batches,
    leaf,
    make_losses,
    snapshot,
    step_overflowing,
    twins,
)
from round_trips import by_file


def make(model: Any, tasks: Any = TASKS, **keywords: Any) -> mtlopt.GradNorm:
    keywords = {"shared": model.trunk[-2].parameters()} | keywords
    base = keywords.pop("base", None) or torch.optim.Adam(model.parameters(), lr=0.02)
    return mtlopt.GradNorm(base, tasks, **keywords)


def scalar_problem(**keywords: Any) -> tuple[Tensor, mtlopt.GradNorm]:
    w = torch.tensor(1.0, requires_grad=True)
    base = torch.optim.SGD([w], lr=0.1)
    return w, mtlopt.GradNorm(base, ["a", "b"], shared=[w], **keywords)


def test_one_step_worked_by_hand() -> None:
    """L = (w², 4w²) at w = 1 with initial losses 2 and 4: r = (2/3, 4/3), alpha 1.

    Norms 2 and 8, G = (2, 8), mean 5, targets 10/3 and 20/3: a's weight is too small, b's too
    large. Adam's first step is 0.025 either way: 1.025 and 0.975, whose sum is 2 already. The
    network's step used weights of 1: 1 - 0.1 * (2 + 8) = 0.
    """
    w, optimizer = scalar_problem(alpha=1.0, initial_losses={"a": 2.0, "b": 4.0})
    optimizer.step({"a": w**2, "b": 4 * w**2})
    assert w.item() == pytest.approx(0.0, abs=1e-7)
    seen = optimizer.diagnostics()
    assert seen["weights"].tolist() == pytest.approx([1.025, 0.975], abs=1e-6)
    assert seen["norms"].tolist() == [2.0, 8.0]
    assert seen["rates"].tolist() == pytest.approx([2 / 3, 4 / 3])


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
def test_the_derivative_is_autograds_with_constant_targets(alpha: float) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        weights = torch.rand(4, dtype=torch.float64).add(0.1).requires_grad_()
        trunk = torch.randn(6, dtype=torch.float64, requires_grad=True)
        matrix = torch.randn(4, 6, dtype=torch.float64)
        losses = (matrix @ trunk) ** 2
        ratios = losses.detach() / torch.rand(4, dtype=torch.float64)
        # The paper's way: norms of the weighted losses' gradients, with a second-order graph.
        norms = torch.stack(
            [
                torch.autograd.grad(weight * loss, trunk, create_graph=True, retain_graph=True)[
                    0
                ].norm()
                for weight, loss in zip(weights, losses, strict=True)
            ]
        )
        rates = ratios / ratios.mean()
        target = (norms.mean() * rates**alpha).detach()
        expected = torch.autograd.grad((norms - target).abs().sum(), weights)[0]
        plain = norms.detach() / weights.detach()
        got, got_rates = weight_gradients(weights.detach(), plain, ratios, alpha)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(got_rates, rates, rtol=1e-12, atol=0)


def test_the_networks_gradient_is_that_of_the_weighted_sum_to_the_last_bit() -> None:
    """With this step's weights, heads included; no gradient of GradNorm's own loss leaks in."""
    model, twin = twins()
    optimizer = make(model)
    plain = torch.optim.Adam(twin.parameters(), lr=0.02)
    for x, y in batches(10):
        weights = dict(zip(TASKS, optimizer.diagnostics()["weights"].clone(), strict=True))
        optimizer.step(make_losses(model), x, y)
        reference.joint(plain, make_losses(twin), TASKS, x, y, weights=weights)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert_equal(snapshot(model), snapshot(twin))
    assert (optimizer.diagnostics()["weights"] - 1).abs().min() > 1e-3


def test_a_run_is_that_of_the_reference() -> None:
    """Chen et al.'s Algorithm 1 by autograd, network and weights together."""
    model, expected = twins()
    optimizer = make(model)
    plain = torch.optim.Adam(expected.parameters(), lr=0.02)
    weights = {task: torch.ones((), requires_grad=True) for task in TASKS}
    options: dict[str, Any] = {
        "shared": list(expected.trunk[-2].parameters()),
        "weights": weights,
        "weight_optimizer": torch.optim.Adam(weights.values(), lr=0.025),
        "initial": {},
    }
    for x, y in batches(10):
        optimizer.step(make_losses(model), x, y)
        reference.gradnorm(plain, make_losses(expected), TASKS, x, y, **options)
        found = optimizer.diagnostics()["weights"]
        # The weights are float32.
        torch.testing.assert_close(
            found, torch.stack([*weights.values()]).detach(), rtol=1e-5, atol=0
        )
    assert_close(model, expected, atol=1e-6)
    assert (found - 1).abs().min() > 0.05


def test_the_slower_task_gets_the_larger_target() -> None:
    """With equal norms the sign of alpha decides; some public code has it inverted."""
    w, optimizer = scalar_problem(alpha=1.5, initial_losses={"a": 1.0, "b": 10.0})
    optimizer.step({"a": w**2, "b": w**2})
    weights = optimizer.diagnostics()["weights"].tolist()
    assert weights[0] > 1 > weights[1]


def test_the_weights_stay_positive_and_sum_to_the_number_of_tasks() -> None:
    model = Network()
    optimizer = make(model, weight_lr=3.0)
    smallest = 1.0
    for x, y in batches(40):
        optimizer.step(make_losses(model), x, y)
        weights = optimizer.diagnostics()["weights"]
        assert weights.sum().item() == pytest.approx(3, rel=1e-6)
        smallest = min(smallest, weights.min().item())
        assert smallest > 0
    assert smallest < 0.01


def test_an_absent_tasks_weight_and_moments_stay_bit_equal() -> None:
    model = Network()
    optimizer = make(model)
    data = batches(6)
    for x, y in data[:3]:
        optimizer.step(make_losses(model), x, y)
    before = copy.deepcopy(optimizer.state_dict()["mtlopt"])
    losses = make_losses(model)
    for x, y in data[3:]:
        optimizer.step(lambda ts, *b: {t: v for t, v in losses(ts, *b).items() if t != "b"}, x, y)
        after = optimizer.state_dict()["mtlopt"]
        assert torch.equal(after["weights"][1], before["weights"][1])
        for key, value in before["weights_adam"]["state"][1].items():
            assert torch.equal(value, after["weights_adam"]["state"][1][key])
        others = [0, 2]
        assert not torch.equal(after["weights"][others], before["weights"][others])
        assert after["weights"][others].sum().item() == pytest.approx(
            before["weights"][others].sum().item(), rel=1e-6
        )
    assert optimizer.diagnostics()["norms"].isnan().tolist() == [False, True, False]


def test_the_initial_loss_is_that_of_the_first_step_with_the_task() -> None:
    model = Network()
    optimizer = make(model, initial_losses={"c": 7.0})
    first, second, third = batches(3)
    losses = make_losses(model)
    values = optimizer.step(lambda ts, *b: {"a": losses("a", *b)["a"]}, *first)
    later = optimizer.step(losses, *second)
    optimizer.step(losses, *third)
    expected = [values["a"].item(), later["b"].item(), 7.0]
    assert optimizer.state_dict()["mtlopt"]["initial_losses"].tolist() == pytest.approx(expected)
    loaded = make(Network())
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state_dict()["mtlopt"]["initial_losses"].tolist() == pytest.approx(expected)


def test_a_run_resumes_bit_for_bit() -> None:
    model = Network()
    optimizer = make(model)
    data = batches(8)
    for x, y in data[:4]:
        optimizer.step(make_losses(model), x, y)
    twin = copy.deepcopy(model)
    later = make(twin)
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, network in ((optimizer, model), (later, twin)):
        for x, y in data[4:]:
            own.step(make_losses(network), x, y)
    assert_equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("form", ["per-task", "micro-batches", "imperative", "scaler"])
def test_every_form_takes_the_same_steps(form: str) -> None:
    model, twin = twins()
    plain = make(twin)
    amp = torch.amp.GradScaler("cpu", init_scale=256.0)
    keywords: Any = {
        "per-task": {"forwards": "per-task"},
        "scaler": {"scaler": amp},
        "imperative": {"scaler": amp},
    }
    optimizer = make(model, **keywords.get(form, {}))
    losses = make_losses(model)
    for x, y in batches(5):
        plain.step(make_losses(twin), x, y)
        if form == "imperative":
            optimizer.zero_grad()
            optimizer.backward({t: amp.scale(v) for t, v in losses(TASKS, x, y).items()})
            amp.step(optimizer)
            amp.update()
        elif form == "micro-batches":
            halves = [(x[r], {t: v[r] for t, v in y.items()}) for r in (slice(0, 2), slice(2, 6))]
            counted = lambda ts, x, y: {t: (v, len(x)) for t, v in losses(ts, x, y).items()}  # noqa: E731  # shorthand
            optimizer.step(counted, micro_batches=halves)
        else:
            optimizer.step(losses, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # The weights are float32.
    for key, value in plain.diagnostics().items():
        torch.testing.assert_close(optimizer.diagnostics()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("imperative", [False, True])
def test_an_overflow_changes_no_weights_and_no_initial_loss(imperative: bool) -> None:
    model = Network()
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = make(model, scaler=amp)
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    start = snapshot(model)
    step_overflowing(optimizer, losses(TASKS, x, y), amp, imperative)
    assert_equal(snapshot(model), start)
    state = optimizer.state_dict()["mtlopt"]
    assert state["weights"].tolist() == [1.0] * 3
    assert state["initial_losses"].isnan().all()
    optimizer.step(losses, x, y)
    state = optimizer.state_dict()["mtlopt"]
    assert state["initial_losses"].isfinite().all()
    assert amp.get_scale() == 512


def test_scaled_losses_are_unscaled_before_they_are_compared_with_initial_ones() -> None:
    model = Network()
    amp = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = make(model, scaler=amp, initial_losses={"a": 7.0})
    (x, y), *_ = batches(1)
    found = make_losses(model)(TASKS, x, y)
    optimizer.zero_grad()
    optimizer.backward({t: amp.scale(v) for t, v in found.items()})
    amp.step(optimizer)
    amp.update()
    saved = optimizer.state_dict()["mtlopt"]["initial_losses"].tolist()
    assert saved == pytest.approx([7.0, found["b"].item(), found["c"].item()])
    ratios = torch.tensor([found["a"].item() / 7, 1.0, 1.0])
    torch.testing.assert_close(optimizer.diagnostics()["rates"], ratios / ratios.mean())


def test_the_norm_is_over_all_shared_parameters_at_once() -> None:
    """Also where gradients share their memory, as those of p and q do here."""
    p, q = (torch.tensor([1.0, 1.0], requires_grad=True) for _ in range(2))
    optimizer = mtlopt.GradNorm(torch.optim.SGD([p, q], lr=0.1), ["a", "b"], [p, q])
    optimizer.zero_grad()
    for _ in range(2):  # Each adds (3, 3) of a and (1, 1) of b to p and to q.
        total = (p + q).sum()
        optimizer.backward({"a": 3 * total, "b": total})
    optimizer.step()
    assert optimizer.diagnostics()["norms"].tolist() == pytest.approx([12.0, 4.0])


def test_what_cannot_be_balanced_is_refused() -> None:
    model = Network()
    losses = make_losses(model)
    start = snapshot(model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shared": []}, r"`shared` must hold at least one parameter.*got 0"),
        ({"shared": [torch.ones(1)]}, r"`shared` must .*among the optimizer's.*got 1"),
        ({"weight_lr": 0.0}, "`weight_lr` must be positive, got 0.0"),
        ({"initial_losses": {"d": 1.0}}, r"`initial_losses` must .*got 1.0 for 'd'"),
        ({"initial_losses": {"a": 0.0}}, r"`initial_losses` must .*got 0.0 for 'a'"),
        (
            {"base": torch.optim.LBFGS(model.parameters())},
            r"optimizers that require a closure, got LBFGS",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            make(model, **bad)
    with pytest.raises(ValueError, match=r"loss of task 'b' must be positive for GradNorm, got -"):
        make(model).step(
            lambda ts, *b: {t: v * (-1 if t == "b" else 1) for t, v in losses(ts, *b).items()},
            *batches(1)[0],
        )
    for forwards in ("joint", "per-task"):
        with pytest.raises(ValueError, match=r"`shared` must be used by every task.*'b'"):
            make(model, shared=model.heads["a"].parameters(), forwards=forwards).step(
                losses, *batches(1)[0]
            )
    assert_equal(snapshot(model), start)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 10])
def test_the_papers_toy_problem_improves_over_equal_weights(count: int) -> None:
    """The measure is the paper's: the sum of the losses relative to their initial values."""
    toy = GradNormToy(count)
    relative = {}
    for method in ("equal", "gradnorm"):
        *_, (_, losses, _) = toy.train(method, steps=200, every=200)
        relative[method] = losses.mean().item()
    assert relative["gradnorm"] < 0.9 * relative["equal"], relative


def learned_by(optimizer: Any) -> dict[str, Tensor]:
    """Returns all that GradNorm has learned: weights, initial losses, moments."""
    state = copy.deepcopy(optimizer.state_dict()["mtlopt"])
    found = {"weights": state["weights"], "initial": torch.as_tensor(state["initial_losses"])}
    for k, own in state["weights_adam"]["state"].items():
        found |= {f"{k} {name}": value for name, value in own.items()}
    return found


def assert_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True, msg=name)


FORMS = ("function", "per-task", "micro-batches", "ready", "imperative")


def take_step(
    optimizer: Any, losses: Callable[..., Any], form: str, scaler: torch.amp.GradScaler | None
) -> None:
    if form == "imperative":
        optimizer.zero_grad()
        values = losses(optimizer.tasks)
        scaled = {t: v if scaler is None else scaler.scale(v) for t, v in values.items()}
        optimizer.backward(scaled)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    elif form == "ready":
        optimizer.step(losses(optimizer.tasks))
    elif form == "micro-batches":
        optimizer.step(losses, micro_batches=[(), ()])
    else:
        optimizer.step(losses)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_overflows_only_unweighted_updates_the_weights(form: str) -> None:
    """With its weight of a half, the gradient of a fits float16; without it, 65536 overflows.

    By hand: w = 1 - 0.1 (0.5 * 1 + 1.5 * 2) = 0.65, and G = (0.5, 3) around their mean, so that
    Adam's first step is 0.025 up for a and as much down for b.
    """
    w = leaf(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    forwards = {"forwards": "per-task"} if form == "per-task" else {}
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w], scaler=scaler, **forwards)  # type: ignore[arg-type]  # a literal
    with_weights(optimizer, 0.5, 1.5)

    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        own = {"a": w.half().float().sum(), "b": (w**2).sum()}
        return {task: own[task] for task in tasks}

    take_step(optimizer, losses, form, scaler)
    assert w.item() == pytest.approx(0.65)
    seen = optimizer.diagnostics()
    assert not seen["skipped"]
    torch.testing.assert_close(seen["norms"], torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(seen["weights"], torch.tensor([0.525, 1.475]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["infinite loss", "nan loss", "infinite norm"])
def test_non_finite_losses_and_norms_do_not_update_the_weights(what: str, form: str) -> None:
    """Weights, moments and L(0) stay; the network steps, and the next step updates the weights.

    By hand: w = 1 - 0.1 (0.5 * 1 + 1.5 * 2) = 0.65; then G = (0.25, 1.95) of the gradients 0.5 and
    1.3, so that Adam's first step is 0.025 up for a and as much down for b.
    """
    w, other = leaf(1.0), leaf(1.0)
    forwards = {"forwards": "per-task"} if form == "per-task" else {}
    groups: list[dict[str, Any]] = [{"params": [w]}, {"params": [other], "lr": 0.0}]
    base = SGD(groups, lr=0.1)
    optimizer = mtlopt.GradNorm(base, ["a", "b"], [w, other], **forwards)  # type: ignore[arg-type]  # a literal
    with_weights(optimizer, 0.5, 1.5)
    scaler = None
    poison = {"infinite norm": 0.0, "infinite loss": float("inf"), "nan loss": float("nan")}[what]
    steep = 1e30 if what == "infinite norm" else 0.0  # its square leaves float32
    slope = 1.0

    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        own = {
            "a": slope * w.sum() + steep * other.sum() + poison,
            "b": (w**2).sum() + 0 * other.sum(),
        }
        return {task: own[task] for task in tasks}

    before = learned_by(optimizer)
    take_step(optimizer, losses, form, scaler)
    assert_bits(learned_by(optimizer), before)
    skipped = optimizer.diagnostics()["skipped"]
    assert skipped.shape == ()
    assert skipped.dtype == torch.bool
    assert skipped
    assert w.item() == pytest.approx(0.65)

    poison, slope, steep = 0.0, 0.5, 0.0
    take_step(optimizer, losses, form, scaler)
    assert not optimizer.diagnostics()["skipped"]
    torch.testing.assert_close(optimizer.diagnostics()["weights"], torch.tensor([0.525, 1.475]))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["scaler", "the user"])
def test_the_norms_of_a_skipped_step_are_dropped_with_its_gradients(
    by: str, set_to_none: bool
) -> None:
    """In the skipped batch a has the larger gradient, in the next one b: a's weight must grow."""
    w = nn.Parameter(torch.ones(1))
    model = nn.ParameterList([w])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=by == "scaler")
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w], scaler=scaler)

    def losses(a: float, b: float) -> dict[str, Tensor]:
        return {"a": scaler.scale(a * w.sum()), "b": scaler.scale(b * w.sum())}

    optimizer.backward(losses(3e38 if by == "scaler" else 100.0, 1.0))
    if by == "scaler":
        scaler.step(optimizer)
        scaler.update()
        assert w.item() == 1
    model.zero_grad(set_to_none=set_to_none)
    optimizer.backward(losses(1.0, 2.0))
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))
    seen = optimizer.diagnostics()
    torch.testing.assert_close(seen["norms"], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(seen["weights"], torch.tensor([1.025, 0.975]))
    first = torch.as_tensor(optimizer.state_dict()["mtlopt"]["initial_losses"])
    torch.testing.assert_close(first, torch.tensor([1.0, 2.0]))


def test_a_plain_gradient_after_a_skipped_step_does_not_update_the_weights() -> None:
    """The combined gradient has been cleared; GradNorm did not make the present one."""
    w = nn.Parameter(torch.ones(1))
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w])
    optimizer.backward({"a": 100 * w.sum(), "b": w.sum()})
    nn.ParameterList([w]).zero_grad()
    (w.sum() + 2 * w.sum()).backward()
    with pytest.warns(UserWarning, match="did not make"):
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))
    assert optimizer.diagnostics()["weights"].tolist() == [1.0, 1.0]


def test_the_initial_loss_of_a_group_is_that_of_the_tasks_present() -> None:
    """Otherwise a group whose first batch lacked a label would seem to train backwards."""
    w = leaf(1.0, dtype=torch.float64)
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.0), [("a", "b"), "c"], [w])
    values = {"a": 0.0, "b": 0.0, "c": 0.0}

    def step(**given: float) -> list[float]:
        values.update(given)
        optimizer.step(lambda tasks: {t: values[t] * w.sum() for t in tasks if t in given})
        rates: list[float] = optimizer.diagnostics()["rates"].tolist()
        return rates

    def by_hand(group: float, c: float) -> Any:
        mean = (group + c) / 2
        return pytest.approx([group / mean, c / mean], rel=1e-5)

    assert step(a=4.0, c=2.0) == by_hand(1.0, 1.0)
    assert step(a=2.0, b=6.0, c=1.0) == by_hand((2 + 6) / (4 + 6), 1 / 2)
    optimizer.load_state_dict(by_file(optimizer.state_dict()))
    assert step(b=3.0, c=1.0) == by_hand(3 / 6, 1 / 2)
    assert step(a=2.0, b=3.0, c=1.0) == by_hand((2 + 3) / (4 + 6), 1 / 2)


@pytest.mark.parametrize("of", ["features", "shared"])
def test_norms_too_large_for_half_precision_update_the_weights(of: str) -> None:
    """The gradients are finite in float16, though their norms are not."""
    half = torch.nn.Parameter(torch.zeros(100, 100, dtype=torch.float16))
    trunk = nn.Identity()
    base = torch.optim.SGD([half], lr=1e-4)
    over: dict[str, Any] = {"features": trunk} if of == "features" else {"shared": [half]}
    optimizer = mtlopt.GradNorm(base, ["a", "b"], **over)

    def losses(tasks: Any) -> dict[str, Tensor]:
        z = trunk(half)
        slopes = dict(zip("ab", (1000.0, 900.0), strict=True))
        return {task: 1 + (z.float() * slopes[task]).sum() for task in tasks}

    optimizer.step(losses)
    found = optimizer.diagnostics()
    torch.testing.assert_close(found["norms"], torch.tensor([1e5, 9e4]), rtol=1e-4, atol=0)
    assert not found["skipped"]
    assert found["weights"][0] < 1 < found["weights"][1]


@pytest.mark.filterwarnings("ignore:.*did not make")
@pytest.mark.parametrize("copied", [False, True])
def test_a_replaced_gradient_updates_the_weights(copied: bool) -> None:
    """Gradient centralisation, by hand: norms of 3 and 1, so a's weight falls by Adam's 0.025."""
    w = nn.Parameter(torch.ones(1))
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w])
    for rate in (0.025, 0.05):
        if copied:
            optimizer, w = copy.deepcopy((optimizer, w))
        optimizer.zero_grad()
        optimizer.backward({"a": 3 * w.sum(), "b": w.sum()})
        assert w.grad is not None
        w.grad = w.grad - 0.5
        optimizer.step()
        weights = optimizer.diagnostics()["weights"]
        torch.testing.assert_close(weights, torch.tensor([1 - rate, 1 + rate]), rtol=0, atol=2e-3)
    nn.ParameterList([w]).zero_grad()
    optimizer.backward({"a": 3 * w.sum(), "b": w.sum()})
    nn.ParameterList([w]).zero_grad()
    w.sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.diagnostics()["weights"], weights)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_weights_are_learned_in_single_precision(default: torch.dtype) -> None:
    """Near 1 a step of 0.0025 is lost in bfloat16."""
    torch.set_default_dtype(default)
    w = torch.ones(1, requires_grad=True)
    optimizer = mtlopt.GradNorm(SGD([w], lr=0.1), ["a", "b"], [w], weight_lr=0.0025)
    optimizer.step({"a": 3 * w.sum(), "b": w.sum()})
    weights = optimizer.diagnostics()["weights"]
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([0.9975, 1.0025], dtype=torch.float32))
    state = optimizer.state_dict()["mtlopt"]
    assert state["weights"].dtype == state["initial_losses"].dtype == torch.float32
