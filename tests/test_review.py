"""What a hostile reading of the core found; each test names the promise that was broken."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchjd import aggregation

import mtlopt
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot
from spawned import start

FEATURES: dict[str, Callable[..., Any]] = {
    "pcgrad": mtlopt.PCGrad,
    "gradnorm": mtlopt.GradNorm,
    "aggregated": lambda base, tasks, **options: mtlopt.Aggregated(
        base, tasks, aggregation.UPGrad(), **options
    ),
}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("method", FEATURES)
def test_a_batch_without_labels_need_not_call_the_features(method: str) -> None:
    """All absent: `{}` and nothing moves."""
    model = Network()
    optimizer = FEATURES[method](adam(model), TASKS, features=model.trunk)
    before = snapshot(model)
    assert optimizer.step(lambda tasks: {}) == {}
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("method", FEATURES)
def test_features_may_be_frozen_for_a_while(method: str) -> None:
    """The hook does nothing when gradients are off: the heads train, as without `features`."""
    model = Network()
    model.trunk.requires_grad_(False)
    optimizer = FEATURES[method](adam(model), TASKS, features=model.trunk)
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


def test_what_a_hook_keeps_of_the_features_is_cut_too() -> None:
    """The modules' outputs are what all tasks share, though the heads get them from a hook."""
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())
    kept: dict[str, Tensor] = {}
    model.trunk.register_forward_hook(lambda module, inputs, z: kept.__setitem__("z", z))

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        model.trunk(x)
        scales = dict(zip(TASKS, (1.0, 3.0, 0.2), strict=True))
        return {t: scales[t] * ((model.heads[t](kept["z"]) - y[t]) ** 2).mean() for t in tasks}

    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    plain = mtlopt.PCGrad(adam(expected), TASKS, features=expected.trunk)
    for x, y in batches(3):
        optimizer.step(losses, x, y)
        plain.step(make_losses(expected), x, y)
        assert plain.diagnostics()["cosines"].count_nonzero() == 9
    assert_equal(snapshot(model), snapshot(expected))


def test_a_connection_may_skip_the_features() -> None:
    """The parameters before the features get both: what comes back, and what goes past them."""
    torch.manual_seed(0)
    stem, trunk = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
    heads = nn.ModuleDict({task: nn.Linear(4, 1, dtype=torch.float64) for task in TASKS})
    model = nn.ModuleList([stem, trunk, heads])
    found = [0.3, 2.0, -1.0]
    rule = aggregation.Constant(torch.tensor(found, dtype=torch.float64))
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mtlopt.Aggregated(base, TASKS, rule, features=trunk)
    x, y = batches(1)[0]

    def losses(tasks: Any, cut: Callable[[Tensor], Tensor] = lambda z: z) -> dict[str, Tensor]:
        skipped = stem(x).tanh()
        z = cut(trunk(skipped).tanh())
        return {t: (heads[t](z + skipped) - y[t]).square().mean() for t in tasks}

    optimizer.step(losses)
    own = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    # By hand: each task's loss, its gradient multiplied where it comes back through z.
    for task, factor in zip(TASKS, found, strict=True):

        def times(z: Tensor, factor: float = factor) -> Tensor:
            return z * factor - (z * (factor - 1)).detach()

        losses((task,), times)[task].backward()
    for name, p in model.named_parameters():
        assert own[name] is not None
        assert p.grad is not None
        torch.testing.assert_close(own[name], p.grad, rtol=0, atol=1e-14, msg=name)


def test_a_compiled_head_of_an_absent_task_stays() -> None:
    """Absent: its heads do not move at all. A compiled graph gives zeros for its other outputs."""
    model = Network()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = model.heads

        def forward(self, z: Tensor) -> dict[str, Tensor]:
            return {task: self.heads[task](z) for task in TASKS}

    heads = torch.compile(Heads(), backend="aot_eager")
    before = snapshot(model)
    x, y = batches(1)[0]

    def losses(tasks: Any) -> dict[str, Tensor]:
        outputs = heads(model.trunk(x))
        return {task: (outputs[task] - y[task]).square().mean() for task in ("a", "b")}

    optimizer.step(losses)
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {"heads.c.weight"}


def test_one_batch_may_come_twice_as_micro_batches() -> None:
    """Per task the gradient is the average over the micro-batches: here it is the batch's own."""
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())
    batch = batches(1)[0]
    for network, micro_batches in ((model, [batch, batch]), (expected, [batch])):
        optimizer = mtlopt.GradNorm(adam(network), TASKS, features=network.trunk)
        optimizer.step(make_losses(network), micro_batches=micro_batches)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of", ["features", "shared"])
def test_gradnorm_learns_from_norms_that_half_precision_does_not_hold(of: str) -> None:
    """Its norms are those of finite gradients: G_i = |w_i dL_i|, whatever type they are of."""
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


def test_features_that_no_loss_depends_on_are_asked_about_once() -> None:
    """The modules' outputs are what all tasks share: here the heads read something else."""
    model = Network()
    x, y = batches(1)[0]

    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Any:
            self.z = model.trunk(x)
            return self.z * 1

    trunk = Keeping()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=trunk)

    def losses(tasks: Any) -> dict[str, Tensor]:
        trunk(x)
        return {t: (model.heads[t](trunk.z) - y[t]).square().mean() for t in tasks}

    with pytest.warns(UserWarning, match="No loss depends on what `features` gave") as caught:
        optimizer.step(losses)
    optimizer.step(losses)
    assert len(caught) == 1


# Ranks.


def rank_losses(model: Network, calls: bool) -> Callable[..., dict[str, Tensor]]:
    """Those of a rank that has no labels at all do not call the model."""
    losses = make_losses(model)
    return lambda tasks, x, y: losses(tasks, x, y) if calls else {}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for method, make in FEATURES.items():
        model = Network()
        optimizer = make(adam(model), TASKS, features=model.trunk, process_group=dist.group.WORLD)
        for x, y in batches(2):
            optimizer.step(rank_losses(model, calls=rank == 0), x, y)
        found[method] = snapshot(model)
    model = Network()
    optimizer = mtlopt.PCGrad(
        adam(model), TASKS, features=model.trunk, process_group=dist.group.WORLD
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="the same number of `micro_batches`, got") as raised:
        optimizer.step(make_losses(model), micro_batches=batches(1 + rank))
    assert_equal(snapshot(model), before)
    found["unequal"] = str(raised.value)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("review")
    start(work, str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_rank_without_labels_need_not_call_the_features(ranks: list[dict[str, Any]]) -> None:
    """A task absent on one rank is right and never a deadlock: as one process on its batch."""
    torch.manual_seed(0)
    for method, make in FEATURES.items():
        model = Network()
        optimizer = make(adam(model), TASKS, features=model.trunk)
        for x, y in batches(2):
            optimizer.step(make_losses(model), x, y)
        for rank in ranks:
            for name, weight in snapshot(model).items():
                torch.testing.assert_close(rank[method][name], weight, rtol=0, atol=1e-12)


def test_unequal_numbers_of_micro_batches_are_an_error_on_every_rank(
    ranks: list[dict[str, Any]],
) -> None:
    """Never a deadlock: without `features` they may differ, with them no rank is to wait."""
    for rank, found in enumerate(ranks):
        assert f"got {1 + rank} on this one of 2 that have 3" in found["unequal"]
