"""Where `features=` cuts the graph: nested outputs, several modules, hooks, skip connections."""

import gc
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchjd import aggregation

import mtlopt
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


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


class Tree(nn.Module):
    """A trunk with nested outputs, of which each head uses some, as in a U-Net."""

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
        """Returns the features that each task uses."""
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
def test_the_trunks_gradient_is_the_combination_of_the_tasks_gradients(shape: str) -> None:
    """With constant coefficients, each task's gradient of the whole network is the oracle."""
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


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint outside", "autocast", "compile"])
def test_a_trunk_may_be_checkpointed_cast_or_compiled(how: str) -> None:
    torch.manual_seed(2)
    model, expected = twins(torch.float32)
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


def test_buffers_are_updated_once_a_step_and_nothing_is_kept() -> None:
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


def test_features_that_get_to_the_heads_through_a_hook_are_cut_too() -> None:
    """The heads use what a forward hook of the trunk has stored."""
    model, expected = twins()
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


def test_a_skip_connection_may_bypass_the_features() -> None:
    """Parameters before the features get the gradient through them and the one past them."""
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


def test_the_compiled_head_of_an_absent_task_does_not_move() -> None:
    """A compiled graph gives zeros for unused outputs; AdamW would decay the head."""
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


def test_features_that_no_loss_depends_on_warn_once() -> None:
    """Here the heads use a tensor that is not the output of the module."""
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

    with pytest.warns(UserWarning, match="No loss depends on the outputs of `features`") as caught:
        optimizer.step(losses)
    optimizer.step(losses)
    assert len(caught) == 1


class Sample(NamedTuple):
    maps: Tensor


@dataclass(frozen=True)
class Images:
    maps: Any
    sizes: tuple[int, ...]


class Named(dict[str, Any]):
    """A mapping of its own class, and of its own attributes."""


class Slotted:
    __slots__ = ("maps",)

    def __init__(self, maps: Any) -> None:
        self.maps = maps


def packed(z: Tensor) -> Any:
    lengths = torch.full((len(z),), z.shape[1])
    return nn.utils.rnn.pack_padded_sequence(z, lengths, batch_first=True)


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dataclass": (lambda z: Images(z, (1, 2)), lambda found: found.maps),
    "nested": (lambda z: [Images({"maps": Slotted(z)}, ())], lambda f: f[0].maps["maps"].maps),
    "mapping": (lambda z: Named(maps=z), lambda found: found["maps"]),
    "slots": (Slotted, lambda found: found.maps),
    "named tuple": (Sample, lambda found: found.maps),
    "packed sequence": (packed, lambda f: nn.utils.rnn.pad_packed_sequence(f, True)[0]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_tensors_are_cut_in_objects_that_torch_does_not_know(kind: str) -> None:
    """Beside a tensor that the heads do not use; detection models return such objects."""
    make, read = CONTAINERS[kind]
    model, expected = twins()

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.trunk

        def forward(self, x: Tensor) -> Any:
            z = self.inner(x)
            self.returned = make(z.unsqueeze(1))
            return z * 2, self.returned

    trunk = Trunk()

    def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
        _, found = trunk(x)
        assert type(found) is type(trunk.returned)
        z = read(found).squeeze(1)
        scales = dict(zip(TASKS, (1.0, 3.0, 0.2), strict=True))
        return {t: scales[t] * ((model.heads[t](z) - y[t]) ** 2).mean() for t in tasks}

    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=trunk)
    plain = mtlopt.PCGrad(adam(expected), TASKS, features=expected.trunk)
    for x, y in batches(3):
        optimizer.step(losses, x, y)
        plain.step(make_losses(expected), x, y)
        assert plain.diagnostics()["cosines"].count_nonzero() == 9
    assert_close(model, expected)
    assert read(trunk.returned).grad_fn is not None  # The module's own object is unchanged.


def test_features_that_no_two_tasks_use_warn_once() -> None:
    """Here the trunk is called once per task."""
    model = Network()
    x, y = batches(1)[0]
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)

    def losses(tasks: Any) -> dict[str, Tensor]:
        return {t: (model(x, (t,))[t] - y[t]).square().mean() for t in tasks}

    with pytest.warns(UserWarning, match="No output of `features` is used by two tasks") as caught:
        optimizer.step(losses)
    optimizer.step(losses)
    optimizer.step(lambda tasks: losses(("a",)))  # One present task has no other to share with.
    assert len(caught) == 1


def test_one_present_task_does_not_warn_of_features_that_it_alone_uses() -> None:
    model = Network()
    x, y = batches(1)[0]
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    optimizer.step(lambda tasks: {"a": (model(x, ("a",))["a"] - y["a"]).square().mean()})


def make_at_features(method: str, model: nn.Module, features: Any) -> Any:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    if method == "aggregated":
        return mtlopt.Aggregated(base, TASKS, aggregation.Mean(), features=features)
    return {"pcgrad": mtlopt.PCGrad, "gradnorm": mtlopt.GradNorm}[method](
        base, TASKS, features=features
    )


def flux(loss: Tensor, x: Tensor, unused: str) -> Tensor:
    options: dict[str, Any] = {"zeros": {"materialize_grads": True}, "none": {}}[unused]
    return torch.autograd.grad(loss, x, create_graph=True, **options)[0].square().mean()


@pytest.mark.parametrize(
    ("by", "sees", "unused"),
    [
        (by, sees, unused)
        for by in ("coordinates", "what is computed from them", "an embedding")
        for sees in ("features", "features and coordinates")
        for unused in ("zeros", "none")
        # Nothing tells a derivative by parameters alone, and by no other path, from a true zero.
        if (by, sees, unused) != ("an embedding", "features", "zeros")
    ],
)
@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "aggregated"])
def test_losses_that_differentiate_by_what_lies_before_the_features_are_refused(
    method: str, by: str, sees: str, unused: str
) -> None:
    """Without the path through the features their very values would be wrong."""
    model = Network()
    stem = nn.Linear(4, 4, dtype=torch.float64)
    optimizer = make_at_features(method, nn.ModuleList([stem, model]), model.trunk)
    start = snapshot(model)
    x, _ = batches(1)[0]

    def losses(tasks: Any) -> dict[str, Tensor]:
        seen = x.clone()
        if by != "an embedding":
            seen.requires_grad_()
        if by != "coordinates":
            seen = stem(seen)
        outputs = model(seen, tasks)
        past = seen.square().sum() if "and" in sees else torch.zeros(())
        return {t: 1 + flux(outputs[t].sum() * (1 + past), seen, unused) for t in tasks}

    with pytest.raises((RuntimeError, ValueError), match="must not differentiate with respect to"):
        optimizer.step(losses)
    assert_equal(snapshot(model), start)


def test_losses_may_differentiate_by_the_features() -> None:
    """A penalty on the slope of a head, exactly as without a cut."""
    model, expected = twins()

    def make(network: Network) -> Callable[..., dict[str, Tensor]]:
        def losses(tasks: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
            z = network.trunk(x)
            found = {t: (network.heads[t](z).tanh() - y[t]).square().mean() for t in tasks}
            return {t: loss + flux(loss, z, "none") for t, loss in found.items()}

        return losses

    rule = aggregation.Constant(torch.ones(3, dtype=torch.float64))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mtlopt.Aggregated(base, TASKS, rule, features=model.trunk)
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    for x, y in batches(3):
        optimizer.step(make(model), x, y)
        plain.zero_grad()
        torch.stack(list(make(expected)(TASKS, x, y).values())).sum().backward()
        plain.step()
    assert_close(model, expected)


def test_a_cut_in_one_thread_leaves_the_calls_of_others_whole() -> None:
    """As a thread would that evaluates, or another optimizer's."""
    model = Network()
    x, y = batches(1)[0]
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    seen: list[tuple[Tensor, ...]] = []

    def evaluate() -> None:
        seen.append(torch.autograd.grad(model.trunk(x).sum(), [*model.trunk.parameters()]))

    expected = torch.autograd.grad(model.trunk(x).sum(), [*model.trunk.parameters()])

    def losses(tasks: Any) -> dict[str, Tensor]:
        outputs = model(x, tasks)
        other = threading.Thread(target=evaluate)
        other.start()
        other.join()
        return {t: (outputs[t] - y[t]).square().mean() for t in tasks}

    optimizer.step(losses)
    (found,) = seen
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("owner", ["module", "all modules"])
def test_backward_hooks_on_the_features_are_refused(owner: str, register: str) -> None:
    """They would get the last task's gradient; inside the trunk they get the combined one."""
    model = Network()
    x, y = batches(1)[0]
    optimizer = mtlopt.PCGrad(adam(model), TASKS, features=model.trunk)
    seen: list[Tensor] = []

    def hook(module: nn.Module, *gradients: Any) -> None:
        seen.append(gradients[-1][0])

    inside: Any = getattr(model.trunk[3], register)(hook)
    optimizer.step(make_losses(model), x, y)
    assert len(seen) == 1
    inside.remove()
    if owner == "module":
        handle = getattr(model.trunk, register)(hook)
    else:
        name = register.replace("register", "register_module")
        handle = getattr(nn.modules.module, name)(hook)
    start = snapshot(model)
    try:
        with pytest.raises(ValueError, match="`features` must have no backward hooks"):
            optimizer.step(make_losses(model), x, y)
    finally:
        handle.remove()
    assert_equal(snapshot(model), start)
