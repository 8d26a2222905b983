"""Where `features=` cuts the graph: nested outputs, several modules, hooks, skip connections."""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

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
