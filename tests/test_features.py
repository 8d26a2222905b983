"""Surgery where the features are: a loop by hand that differentiates by z and goes back once."""

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torchjd import aggregation

import mtlopt
from problems import SHARDS, TASKS, Network, assert_equal, batches, make_losses, snapshot
from spawned import start

STEPS = 5


def project(rows: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> list[float]:
    """Algorithm 1 of PCGrad on vectors, and what it makes of each of them."""
    total = [0.0] * len(rows)
    for i, order in enumerate(orders):
        own, coefficients = rows[i].clone(), [float(i == j) for j in range(len(rows))]
        for j in order:
            inner = own @ rows[j]
            if j != i and inner < 0:
                factor = (inner / (rows[j] @ rows[j])).item()
                own = own - factor * rows[j]
                coefficients[j] -= factor
        total = [t + c for t, c in zip(total, coefficients, strict=True)]
    return total


def orders(generator: torch.Generator) -> list[list[int]]:
    return [torch.randperm(len(TASKS), generator=generator).tolist() for _ in TASKS]


def by_hand(
    model: Network, x: Tensor, y: Any, weigh: Callable[[list[Tensor]], Sequence[float]]
) -> None:
    """Leaves in `.grad` what the rule makes of the gradients with respect to z."""
    z = model.trunk(x)
    leaf = z.detach().requires_grad_()
    scales = dict(zip(TASKS, (1.0, 3.0, 0.2), strict=True))
    rows = []
    for task in TASKS:
        loss = scales[task] * ((model.heads[task](leaf) - y[task]) ** 2).mean()
        rows.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        loss.backward(inputs=[model.heads[task].weight])
    combined = sum(c * row for c, row in zip(weigh(rows), rows, strict=True))
    z.backward(combined)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)


def twins() -> tuple[Network, Network]:
    model, expected = Network(), Network()
    expected.load_state_dict(model.state_dict())
    return model, expected


def assert_close(model: nn.Module, expected: nn.Module, atol: float = 1e-12) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=name)


def test_pcgrad_at_the_features_is_the_loop_by_hand() -> None:
    model, expected = twins()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk, seed=5)
    plain, generator = adam(expected), torch.Generator().manual_seed(5)
    conflicts = 0
    for x, y in batches(STEPS):
        values = optimizer.step(make_losses(model), x, y)
        assert values.keys() == set(TASKS)
        plain.zero_grad()
        drawn = orders(generator)
        by_hand(expected, x, y, lambda rows: project([r.flatten() for r in rows], drawn))
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
def test_an_aggregators_coefficients_are_those_of_the_stacked_gradients(name: str) -> None:
    """The aggregator itself, on the (T, n) matrix of gradients with respect to z."""
    model, expected = twins()
    make = gramian_aggregators()[name]
    optimizer = mtlopt.Aggregated(adam(model), TASKS, make(), features=model.trunk)
    aggregator, plain = make(), adam(expected)

    def weigh(rows: list[Tensor]) -> list[float]:
        matrix = torch.stack([row.flatten() for row in rows])
        weights: list[float] = aggregator.gramian_weighting(matrix @ matrix.mT).tolist()
        return weights

    for x, y in batches(2):
        torch.manual_seed(3)
        optimizer.step(make_losses(model), x, y)
        plain.zero_grad()
        torch.manual_seed(3)
        by_hand(expected, x, y, weigh)
        plain.step()
    assert_close(model, expected, atol=1e-7)


def test_an_aggregator_of_whole_rows_gets_the_stacked_gradients() -> None:
    model, expected = twins()
    optimizer = mtlopt.Aggregated(
        adam(model), TASKS, aggregation.TrimmedMean(1), features=model.trunk
    )
    plain = adam(expected)
    for x, y in batches(2):
        optimizer.step(make_losses(model), x, y)
        plain.zero_grad()
        z = expected.trunk(x)
        leaf = z.detach().requires_grad_()
        losses = make_losses(Behind(expected))(TASKS, leaf, y)
        rows = [torch.autograd.grad(losses[t], leaf, retain_graph=True)[0] for t in TASKS]
        torch.stack(list(losses.values())).sum().backward()
        z.backward(torch.stack(rows).median(0).values)  # of three
        plain.step()
    assert_close(model, expected)


class Behind(nn.Module):
    """What lies behind the features of a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        return {task: self.network.heads[task](z) for task in tasks}


def test_gradnorm_takes_its_norms_over_the_features() -> None:
    """Weights by the paper's Algorithm 1, written out; heads get their weighted gradient."""
    model, expected = twins()
    optimizer = mtlopt.GradNorm(adam(model), TASKS, features=model.trunk, alpha=0.5)
    plain = adam(expected)
    weights = torch.ones(3, requires_grad=True)
    balance = torch.optim.Adam([weights], lr=0.025)
    first: Tensor | None = None
    for x, y in batches(STEPS):
        optimizer.step(make_losses(model), x, y)
        plain.zero_grad()
        z = expected.trunk(x)
        losses = torch.stack(list(make_losses(Behind(expected))(TASKS, z, y).values()))
        norms = torch.stack(
            [torch.autograd.grad(loss, z, retain_graph=True)[0].norm() for loss in losses]
        )
        (weights.detach() * losses).sum().backward()
        plain.step()
        first = losses.detach() if first is None else first
        ratios = losses.detach() / first
        sizes = weights * norms.float()
        target = (sizes.mean() * (ratios / ratios.mean()) ** 0.5).detach()
        balance.zero_grad()
        (sizes - target).abs().sum().backward()
        balance.step()
        with torch.no_grad():
            weights.clamp_(min=1e-3).mul_(3 / weights.sum())
    assert_close(model, expected, atol=1e-7)
    torch.testing.assert_close(optimizer.diagnostics()["weights"], weights.detach())


@pytest.mark.parametrize("tasks", [("a",), TASKS])
def test_where_nothing_conflicts_it_is_the_plain_sum(tasks: Any) -> None:
    """To the last bit with one task; with several the additions have another order."""
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


class Tree(nn.Module):
    """A trunk whose output is nested, and of which one head sees one part alone (a U-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(5)])
        self.number = 3

    def forward(self, x: Tensor) -> dict[str, Any]:
        skips = []
        for layer in self.layers:
            x = layer(x).tanh()
            skips.append(x)
        return {"skips": skips, "rest": (skips[-1], self.number, skips[0])}


class Shaped(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shape = shape
        self.tree = Tree()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 4, dtype=torch.float64)
        self.heads = nn.ModuleDict({t: nn.Linear(4, 1, dtype=torch.float64) for t in TASKS})

    @property
    def features(self) -> Any:
        return {
            "nested": self.tree,
            "two modules": [self.first, self.second],
            "twice": self.first,
            "twice behind a stem": self.first,
            "chain": [self.first, self.second],
        }[self.shape]

    def zs(self, x: Tensor) -> list[Tensor]:
        """The features by task; a is behind the last of them alone."""
        if self.shape == "nested":
            tree = self.tree(x)
            return [tree["rest"][0], sum(tree["skips"]), tree["rest"][2] * tree["skips"][2]]
        if self.shape == "two modules":
            a, b = self.first(x), self.second(x)
            return [b, a * b, a]
        if self.shape == "chain":
            a = self.first(x)
            b = self.second(a.tanh())
            return [b, a + b, a]
        x = self.second(x) if "stem" in self.shape else x
        a, b = self.first(x), self.first(-x)
        return [b, a - b, a]

    def losses(self, x: Tensor, y: Mapping[str, Tensor]) -> dict[str, Tensor]:
        zs = dict(zip(TASKS, self.zs(x), strict=True))
        return {t: (self.heads[t](zs[t]) - y[t]).square().mean() for t in TASKS}


@pytest.mark.parametrize(
    "shape", ["nested", "two modules", "twice", "twice behind a stem", "chain"]
)
def test_the_trunks_gradient_is_the_combination_of_the_tasks(shape: str) -> None:
    """The oracle: each task's own gradient of the whole network, with a rule that is constant."""
    model, expected = Shaped(shape), Shaped(shape)
    found = [0.3, 2.0, -1.0]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = aggregation.Constant(torch.tensor(found, dtype=torch.float64))
    optimizer = mtlopt.Aggregated(base, TASKS, rule, features=model.features)
    for x, y in batches(3):
        expected.load_state_dict(model.state_dict())
        optimizer.step(lambda tasks: model.losses(x, y))
        gradients = {}
        for task in TASKS:
            expected.zero_grad()
            expected.losses(x, y)[task].backward()
            gradients[task] = {
                n: torch.zeros_like(p) if p.grad is None else p.grad
                for n, p in expected.named_parameters()
            }
        for name, p in model.named_parameters():
            head = name.startswith("heads")
            factors = [1.0] * 3 if head else found
            total = sum(f * gradients[t][name] for f, t in zip(factors, TASKS, strict=True))
            got = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(got, total, rtol=0, atol=1e-13, msg=name)


def test_absent_tasks_and_counts_are_as_without_features() -> None:
    """One linear layer as trunk: feature space and parameter space agree in who takes part."""
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


def test_micro_batches_are_combined_one_by_one_and_averaged() -> None:
    model, expected = twins()
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk, seed=2)
    plain, generator = adam(expected), torch.Generator().manual_seed(2)
    data = batches(2)
    values = optimizer.step(make_losses(model), micro_batches=data)
    plain.zero_grad()
    for x, y in data:
        drawn = orders(generator)
        by_hand(expected, x, y, lambda rows: project([r.flatten() for r in rows], drawn))
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


def test_a_scaler_scales_it_all_and_an_overflow_skips_the_step() -> None:
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


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint outside", "autocast", "compile"])
def test_what_happens_inside_the_trunk_is_its_own_business(how: str) -> None:
    torch.manual_seed(2)
    model, expected = Network(torch.float32), Network(torch.float32)
    expected.load_state_dict(model.state_dict())
    trunk: Any = model.trunk
    inner = model.trunk
    if how.startswith("checkpoint"):
        trunk = Checkpointed(inner)
    if how == "compile":
        trunk = torch.compile(inner, backend="aot_eager")
    features = inner if how == "checkpoint outside" else trunk
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=features)
    plain = mtlopt.PCGrad(adam(expected), TASKS, features=expected.trunk)

    def losses(network: Network, through: Any) -> Callable[..., dict[str, Tensor]]:
        def loss(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                z = through(x.float())
                return {
                    t: (network.heads[t](z).float() - y[t].float()).square().mean() for t in tasks
                }

        return loss

    for x, y in batches(3):
        optimizer.step(losses(model, trunk), x, y)
        plain.step(losses(expected, expected.trunk), x, y)
    assert_close(model, expected, atol=0 if how == "autocast" else 1e-5)
    assert all(p.grad is not None for p in model.parameters())


def test_buffers_move_once_a_forward_pass_and_nothing_is_kept_afterwards() -> None:
    trunk = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in TASKS})
    optimizer = mtlopt.PCGrad(
        torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1), TASKS, features=trunk
    )
    kept: list[Any] = []

    def losses(tasks: Any) -> dict[str, Tensor]:
        z = trunk(torch.randn(8, 4))
        kept.append(weakref.ref(z))
        return {task: heads[task](z).square().mean() for task in tasks}

    for _ in range(3):
        optimizer.step(losses)
    assert trunk[1].num_batches_tracked == 3
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3
    z = trunk(torch.randn(8, 4))
    assert z.grad_fn is not None  # The hook is gone.
    assert not trunk._forward_hooks


def test_what_cannot_work_is_refused_by_name() -> None:
    model = Network()
    losses = make_losses(model)
    (x, y), *_ = batches(1)
    before = snapshot(model)
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    for form in (optimizer.step, optimizer.backward):
        with pytest.raises(TypeError, match=r"must be a function.*ready losses come with one"):
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


# Ranks.

SIZE = 12
RANK_METHODS = ("pcgrad", "gradnorm", "aggregated")


def make(method: str, model: Network, **keywords: Any) -> Any:
    keywords["features"] = model.trunk
    if method == "pcgrad":
        return mtlopt.PCGrad(adam(model), TASKS, **keywords)
    if method == "gradnorm":
        return mtlopt.GradNorm(adam(model), TASKS, **keywords)
    return mtlopt.Aggregated(adam(model), TASKS, aggregation.UPGrad(), **keywords)


def rank_losses(model: Network, x: Tensor, y: Any, own: range) -> Callable[..., dict[str, Any]]:
    """Task b has labels on the first samples alone, so that one rank lacks it."""
    labelled = {"a": range(SIZE), "b": range(4), "c": range(3, SIZE)}

    def losses(tasks: Any) -> dict[str, Any]:
        outputs = model(x[own.start : own.stop], tasks)
        found: dict[str, Any] = {}
        for task in tasks:
            rows = [i for i in labelled[task] if i in own]
            if rows:
                errors = outputs[task][[i - own.start for i in rows]] - y[task][rows]
                found[task] = ((errors**2).mean(), len(rows))
        return found

    return losses


def train(method: str, own: range, **keywords: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Network()
    optimizer = make(method, model, **keywords)
    for x, y in batches(STEPS, size=SIZE):
        optimizer.step(rank_losses(model, x, y, own))
    return {"weights": snapshot(model), "seen": optimizer.diagnostics()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    own = range(rank * SIZE // 2, (rank + 1) * SIZE // 2)
    found: dict[str, Any] = {m: train(m, own, process_group=dist.group.WORLD) for m in RANK_METHODS}
    sent = []
    reduce: Any = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *arguments, **named)

    torch.manual_seed(0)
    model = Network()
    optimizer = make("pcgrad", model, process_group=dist.group.WORLD)
    dist.all_reduce = count
    x, y = batches(1, size=SIZE)[0]
    optimizer.step(rank_losses(model, x, y, own))
    dist.all_reduce = reduce
    found["sent"] = sum(sent)
    if SHARDS:
        fully_shard(model)
        with pytest.raises(ValueError, match=r"`features` must be None .* sharded \(FSDP2\)"):
            make("pcgrad", model).step(rank_losses(model, x, y, own))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("features")
    start(work, str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", RANK_METHODS)
def test_ranks_equal_one_process_on_the_joined_batch(
    method: str, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[method] for rank in ranks)
    assert_equal(first["weights"], second["weights"])
    expected = train(method, range(SIZE))
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-10)
    for key, value in expected["seen"].items():
        torch.testing.assert_close(
            first["seen"][key], value, rtol=1e-6, atol=1e-8, equal_nan=True, msg=key
        )


def test_a_matrix_and_one_gradient_travel(ranks: list[dict[str, Any]]) -> None:
    """Beside them the counts and losses, which parameters some rank reaches, and how often."""
    gradient = sum(p.numel() for p in Network().parameters()) * 8
    matrix = len(TASKS) ** 2 * 8
    counts = 3 * len(TASKS) * 8
    reached = 5 * 4
    micro_batches = 2 * 8
    assert ranks[0]["sent"] == gradient + matrix + counts + reached + micro_batches
