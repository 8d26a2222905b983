"""Loops that bring an optimizer something unusual: shared graphs, tokens, several optimizers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam

import all_methods
import mtlopt
from problems import TASKS, Network, assert_close, assert_equal, batches, snapshot, twins


def value_losses(model: Network, values: nn.ModuleDict, z: Tensor, y: Any) -> dict[str, Tensor]:
    return {t: mse_loss(values[t](z), y[t].expand(-1, 2)) for t in TASKS}


@pytest.mark.parametrize("method", ["joint", "pcgrad", "aggregated"])
def test_two_optimizers_go_backward_through_one_graph(method: str) -> None:
    """One over the heads, one over the trunk and further heads, as of an actor and a critic."""
    model, twin = twins()
    pairs: list[Any] = []
    torch.manual_seed(0)
    values = nn.ModuleDict({t: nn.Linear(5, 2, dtype=torch.float64) for t in TASKS})
    others = nn.ModuleDict({t: nn.Linear(5, 2, dtype=torch.float64) for t in TASKS})
    others.load_state_dict(values.state_dict())
    for network, further in ((model, values), (twin, others)):
        heads = Adam(network.heads.parameters(), lr=0.01)
        rest = Adam([*network.trunk.parameters(), *further.parameters()], lr=0.01)
        pairs.append((heads, rest))
    actor = all_methods.wrapper(method)(pairs[0][0], TASKS)
    critic = mtlopt.JointOptimizer(pairs[0][1], TASKS)
    for x, y in batches(3):
        actor.zero_grad()
        critic.zero_grad()
        z = model.trunk(x)
        own = {t: mse_loss(model.heads[t](z), y[t].expand(-1, 2)) for t in TASKS}
        further = value_losses(model, values, z, y)
        actor.backward(own, retain_graph=True)
        critic.backward(further)
        actor.step()
        critic.step()
        # The heads belong to a task each, so every method leaves them their plain gradient.
        for plain in pairs[1]:
            plain.zero_grad()
        z = twin.trunk(x)
        loss = sum(mse_loss(twin.heads[t](z), y[t].expand(-1, 2)) for t in TASKS)
        total: Any = loss + sum(value_losses(twin, others, z, y).values())
        total.backward()
        for plain in pairs[1]:
            plain.step()
    assert_close(model, twin)
    with pytest.raises(RuntimeError, match=r"backward\(losses, retain_graph=True\)"):
        critic.backward(further)


def test_micro_batches_count_tokens_and_one_may_have_none() -> None:
    """As of language models: labels of -100 are ignored, and a micro-batch may have no others."""
    torch.manual_seed(0)
    model, twin = (nn.Linear(4, 6, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(4, 3, 5, 4, dtype=torch.float64)  # micro-batches, rows, tokens, features
    labels = torch.randint(3, (2, 4, 3, 5))
    labels[:, torch.rand(4, 3, 5) < 0.4] = -100
    labels[1, 2] = -100  # the second task has nothing to say in the third micro-batch

    def losses(tasks: Any, x: Tensor, y: Tensor) -> Any:
        outputs = dict(zip(TASKS, model(x).split(3, -1), strict=False))
        found = {}
        for task in tasks:
            own = y[TASKS.index(task)].flatten()
            loss = cross_entropy(outputs[task].flatten(0, -2), own)
            found[task] = loss, int((own != -100).sum())  # NaN, 0 where all are ignored
        return found

    optimizer = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS[:2], lr=0.01)
    plain = {task: Adam(twin.parameters(), lr=0.01) for task in TASKS[:2]}
    for _ in range(3):
        optimizer.step(losses, micro_batches=list(zip(inputs, labels.unbind(1), strict=True)))
        for k, own in enumerate(plain.values()):
            own.zero_grad()
            outputs = twin(inputs).split(3, -1)[k].flatten(0, -2)
            cross_entropy(outputs, labels[k].flatten()).backward()
            own.step()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-10)


def test_a_segmentation_loop_gets_a_second_head() -> None:
    """As of nnU-Net: SGD with Nesterov momentum, clipping at 12, and a rate that decays by a power.

    The loop sets the rate by hand at each epoch, and one optimizer serves both heads.
    """

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(1, 4, 3, padding=1, dtype=torch.float64)
            self.heads = nn.ModuleDict(
                {t: nn.Conv2d(4, 2, 1, dtype=torch.float64) for t in ("organ", "edge")}
            )

        def forward(self, x: Tensor, tasks: Any) -> dict[str, Tensor]:
            z = torch.relu(self.encoder(x))
            return {t: self.heads[t](z) for t in tasks}

    torch.manual_seed(0)
    model, twin = Segmenter(), Segmenter()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    y = {"organ": (x[:, 0] > 0).long(), "edge": (x[:, 0].abs() < 0.1).long()}
    options: Any = {"lr": 0.01, "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}

    def losses(tasks: Any, x: Tensor, y: Any) -> Any:
        return {t: cross_entropy(out, y[t]) for t, out in model(x, tasks).items()}

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    optimizer = mtlopt.IndependentOptimizer(SGD(model.parameters(), **options), ("organ", "edge"))
    optimizer.register_step_pre_hook(clip)
    plain = {t: SGD(twin.parameters(), **options) for t in ("organ", "edge")}
    for epoch in range(4):
        rate = 0.01 * (1 - epoch / 4) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step(losses, x, y)
        for task, own in plain.items():
            own.param_groups[0]["lr"] = rate
            own.zero_grad()
            cross_entropy(twin(x, [task])[task], y[task]).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            own.step()
    assert_equal(snapshot(model), snapshot(twin))


def test_actor_and_critics_have_an_optimizer_each() -> None:
    """As of soft actor-critic: the actor's tasks step through critics that do not move."""
    names = ("a", "b")

    def make() -> tuple[nn.ModuleDict, nn.Linear]:
        torch.manual_seed(1)
        critics = nn.ModuleDict({t: nn.Linear(6, 1, dtype=torch.float64) for t in names})
        return critics, nn.Linear(4, 2, dtype=torch.float64)

    def critic_losses(critics: Any, actor: Any, tasks: Any, x: Tensor, y: Tensor) -> Any:
        with torch.no_grad():
            pairs = torch.cat([x, actor(x)], 1)
        return {t: mse_loss(critics[t](pairs), y) for t in tasks}

    def actor_losses(critics: Any, actor: Any, tasks: Any, x: Tensor) -> Any:
        return {t: -critics[t](torch.cat([x, actor(x).tanh()], 1)).mean() for t in tasks}

    critics, actor = make()
    twins_, twin = make()
    first = mtlopt.IndependentOptimizer(Adam, critics.parameters(), names, lr=0.01)
    second = mtlopt.PCGrad(Adam(actor.parameters(), lr=0.01), names)
    plain_first = {t: Adam(twins_.parameters(), lr=0.01) for t in names}
    plain_second = mtlopt.PCGrad(Adam(twin.parameters(), lr=0.01), names)
    for _ in range(4):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
        first.step(lambda tasks, *b: critic_losses(critics, actor, tasks, *b), x, y)
        before = snapshot(critics)
        second.step(lambda tasks, *b: actor_losses(critics, actor, tasks, *b), x)
        assert_equal(snapshot(critics), before)
        for task, own in plain_first.items():
            own.zero_grad()
            critic_losses(twins_, twin, [task], x, y)[task].backward()
            own.step()
        # The critics are frozen by hand, as careful loops do.
        twins_.requires_grad_(False)
        plain_second.step(lambda tasks, *b: actor_losses(twins_, twin, tasks, *b), x)
        twins_.requires_grad_(True)
    assert_equal(snapshot(critics), snapshot(twins_))
    assert_equal(snapshot(actor), snapshot(twin))
