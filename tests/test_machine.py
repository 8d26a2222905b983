"""Long random lives of an optimizer, beside plain loops written here.

Steps on some tasks or all, counts, micro-batches, new groups, files, copies, schedules, overrides
and frozen parameters come in any order; after each the weights and the states are compared.
"""

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import mtlopt
from problems import TASKS, Network, batches

DATA = batches(6, size=3)
GAMMA = 0.9
# With a large `eps` a gradient of nearly zero does not magnify the rounding of another order.
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01, "eps": 1e-4}),
    "AdamW": (AdamW, {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}),
    "RMSprop": (RMSprop, {"lr": 0.01, "eps": 1e-4, "momentum": 0.5}),
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "joint": (mtlopt.JointOptimizer, {}),
    "joint, per task": (mtlopt.JointOptimizer, {"forwards": "per-task"}),
    "alternating": (mtlopt.AlternatingOptimizer, {}),
    "alternating, shuffled": (mtlopt.AlternatingOptimizer, {"order": "shuffled"}),
    "independent": (mtlopt.IndependentOptimizer, {}),
    "independent, shuffled": (mtlopt.IndependentOptimizer, {"order": "shuffled"}),
    "independent, simultaneous": (mtlopt.IndependentOptimizer, {"schedule": "simultaneous"}),
    "pcgrad": (mtlopt.PCGrad, {}),
    "pcgrad, mean": (mtlopt.PCGrad, {"reduction": "mean"}),
    "gradnorm": (mtlopt.GradNorm, {}),
}
ABSENT = ("left out", "none", 0)
labels = st.sampled_from((*ABSENT, "bare", 1, 2, 3))
forms = st.sampled_from(("function", "function", "ready", "imperative"))


class Part(NamedTuple):
    """A batch, and for each task how its loss comes: absent in one of three ways, or counted."""

    batch: int
    labels: Mapping[str, Any]

    def count(self, task: str) -> int:
        label = self.labels[task]
        return 0 if label in ABSENT else 1 if label == "bare" else label


ALL = dict.fromkeys(TASKS, "bare")
parts = st.builds(Part, st.integers(0, 5), st.fixed_dictionaries(dict.fromkeys(TASKS, labels)))


class Growing(Network):
    """A network that vectors may join: added to the shared features, or to one task's output."""

    def __init__(self) -> None:
        super().__init__()
        self.extras = nn.ParameterDict()

    def grow(self, where: str, value: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(value.clone())
        self.extras[f"{where}{len(self.extras)}"] = parameter
        return parameter

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = sum(self._extras("shared"), self.trunk(x))
        return {t: sum(self._extras(t), self.heads[t](features)) for t in tasks}

    def own(self, task: str) -> list[nn.Parameter]:
        return [*self.heads[task].parameters(), *self._extras(task)]

    def _extras(self, where: str) -> list[nn.Parameter]:
        return [p for name, p in self.extras.items() if name.rstrip("0123456789") == where]


def error(task: str, output: Tensor, target: Tensor) -> Tensor:
    return {"a": 1.0, "b": 3.0, "c": 0.2}[task] * ((output - target) ** 2).mean()


class Plain:
    """What a method does, by hand, with torch's optimizers."""

    def __init__(self, method: str, name: str, model: Growing, groups: list[Any]) -> None:
        self.method, _, self.variant = method.partition(", ")
        self.model = model
        count = len(TASKS) if self.method == "independent" else 1
        optimizer_class, options = CLASSES[name]
        self.optimizers: list[Optimizer] = [
            optimizer_class([dict(group) for group in groups], **options) for _ in range(count)
        ]
        keys = ("lr", "weight_decay")
        self.panel = [{k: g[k] for k in keys} for g in self.optimizers[0].param_groups]
        self.overrides: dict[tuple[str, int, str], float] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.weights = [torch.ones(()) for _ in TASKS]
        self.weights_adam = Adam(self.weights, lr=0.025)
        self.first_losses: dict[str, float] = {}

    def draw(self) -> list[int]:
        drawn: list[int] = torch.randperm(len(TASKS), generator=self.generator).tolist()
        return drawn

    def objectives(self, tasks: Sequence[str], parts: Sequence[Part]) -> dict[str, Tensor]:
        """Each present task's mean over the samples of all parts; one forward pass a part."""
        totals = {t: sum(part.count(t) for part in parts) for t in tasks}
        terms: dict[str, list[Tensor]] = {t: [] for t in tasks if totals[t]}
        for part in parts:
            x, y = DATA[part.batch]
            outputs = self.model(x, tasks)
            for t, values in terms.items():
                if part.count(t):
                    share = part.count(t) / totals[t]
                    values.append(share * error(t, outputs[t], y[t]))
        return {t: sum(values[1:], values[0]) for t, values in terms.items()}

    def gradient(self, objective: Tensor) -> list[Tensor | None]:
        self.model.zero_grad()
        objective.backward(retain_graph=True)
        return [p.grad for p in self.model.parameters()]

    def update(self, task: str, gradient: Sequence[Tensor | None]) -> None:
        """One step of the task's optimizer, with the panel's numbers but for the task's own."""
        own = self.optimizers[TASKS.index(task) % len(self.optimizers)]
        for g, (group, panel) in enumerate(zip(own.param_groups, self.panel, strict=True)):
            group.update({k: self.overrides.get((task, g, k), v) for k, v in panel.items()})
        for parameter, part in zip(self.model.parameters(), gradient, strict=True):
            parameter.grad = part
        own.step()

    def step(self, parts: Sequence[Part], form: str) -> dict[str, Tensor]:
        one_after_the_other = self.method == "alternating" or (
            self.method == "independent"
            and (self.variant != "simultaneous" or form == "imperative")
        )
        if one_after_the_other:
            shuffled = self.variant == "shuffled" and form != "imperative"
            turns = self.draw() if shuffled else range(len(TASKS))
            values = {}
            for task in [TASKS[k] for k in turns]:
                for objective in self.objectives((task,), parts).values():
                    values[task] = objective.detach()
                    self.update(task, self.gradient(objective))
            return values
        objectives = self.objectives(TASKS, parts)
        if self.method == "independent":
            gradients = {t: self.gradient(objective) for t, objective in objectives.items()}
            for task, gradient in gradients.items():
                self.update(task, gradient)
        elif self.method == "pcgrad":
            orders = [self.draw() for _ in TASKS]
            if objectives:
                self.update("a", self.project(objectives, orders))
        elif self.method == "gradnorm":
            if objectives:
                norms = {t: self.norm(objective) for t, objective in objectives.items()}
                weighted = [self.weights[TASKS.index(t)] * v for t, v in objectives.items()]
                self.update("a", self.gradient(sum(weighted[1:], weighted[0])))
                self.balance({t: v.item() for t, v in objectives.items()}, norms)
        elif objectives:
            first, *others = objectives.values()
            self.update("a", self.gradient(sum(others, first)))
        return {t: objective.detach() for t, objective in objectives.items()}

    def project(
        self, objectives: dict[str, Tensor], orders: list[list[int]]
    ) -> list[Tensor | None]:
        """Algorithm 1 of PCGrad on vectors of the parameters that two present tasks reach."""
        gradients = {TASKS.index(t): self.gradient(v) for t, v in objectives.items()}
        columns = list(zip(*gradients.values(), strict=True))
        reached = [sum(part is not None for part in column) for column in columns]
        shared = [i for i, number in enumerate(reached) if number > 1]
        parameters = list(self.model.parameters())

        def flat(gradient: list[Tensor | None]) -> Tensor:
            present = [(gradient[i], parameters[i]) for i in shared]
            pieces = [torch.zeros_like(p) if g is None else g for g, p in present]
            return torch.cat([torch.zeros(0), *(piece.flatten() for piece in pieces)])

        vectors = {k: flat(gradient) for k, gradient in gradients.items()}
        total = torch.zeros_like(next(iter(vectors.values())))
        for k, vector in vectors.items():
            own = vector.clone()
            for j in orders[k]:
                if j != k and j in vectors and own @ vectors[j] < 0:
                    own -= (own @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
            total += own
        if self.variant == "mean":
            total /= len(vectors)
        result = [next((g for g in column if g is not None), None) for column in columns]
        for i, piece in zip(
            shared, total.split([parameters[i].numel() for i in shared]), strict=True
        ):
            result[i] = piece.view_as(parameters[i])
        return result

    def norm(self, objective: Tensor) -> Tensor:
        shared = list(self.model.trunk[2].parameters())
        (own,) = torch.autograd.grad(objective, shared, retain_graph=True)
        length: Tensor = own.norm()
        return length

    def balance(self, losses: dict[str, float], norms: dict[str, Tensor]) -> None:
        """Algorithm 1 of GradNorm, differentiated by autograd."""
        index = [TASKS.index(t) for t in losses]
        for task, loss in losses.items():
            self.first_losses.setdefault(task, loss)
        ratios = torch.tensor([loss / self.first_losses[t] for t, loss in losses.items()])
        leaf = torch.stack([self.weights[k] for k in index]).requires_grad_()
        weighted = leaf * torch.stack(list(norms.values())).float()
        target = weighted.mean() * (ratios / ratios.mean()) ** 1.5
        (weighted - target.detach()).abs().sum().backward()
        self.weights_adam.zero_grad()
        assert leaf.grad is not None
        for k, slope in zip(index, leaf.grad, strict=True):
            self.weights[k].grad = slope
        self.weights_adam.step()
        moved = [self.weights[k].clamp(min=1e-3) for k in index]
        factor = leaf.detach().sum() / torch.stack(moved).sum()
        for k, weight in zip(index, moved, strict=True):
            self.weights[k].copy_(weight * factor)


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: torch.as_tensor(v).detach().clone() for k, v in state.items() if v is not None}


class Life(RuleBasedStateMachine):
    """One optimizer's life, from its construction."""

    @initialize(
        # Those with a panel oftener: they have the most to remember.
        method=st.sampled_from((*METHODS, *(n for n in METHODS if n.startswith("independent")))),
        name=st.sampled_from(list(CLASSES)),
        apart=st.booleans(),
    )
    def build(self, method: str, name: str, apart: bool) -> None:
        torch.manual_seed(3)
        self.method, self.name = method, name
        self.model = Growing()
        self.serial = 0
        self.schedulable = False
        groups = [[*self.model.trunk.parameters()], [*self.model.heads.parameters()]]
        self.groups = [
            [name for name, p in self.model.named_parameters() if any(p is q for q in group)]
            for group in (groups if apart else [groups[0] + groups[1]])
        ]
        expected = copy.deepcopy(self.model)
        self.plain = Plain(method, name, expected, self.grouped(expected))
        self.optimizer = self.construct()
        self.scheduler = self.schedule()

    def grouped(self, model: Growing, **options: Any) -> list[dict[str, Any]]:
        parameters = dict(model.named_parameters())
        return [{"params": [parameters[n] for n in names], **options} for names in self.groups]

    def construct(self, **of_groups: Any) -> Any:
        method_class, keywords = METHODS[self.method]
        optimizer_class, options = CLASSES[self.name]
        groups = self.grouped(self.model, **of_groups)
        if self.independent:
            return method_class(optimizer_class, groups, TASKS, **options, **keywords)
        if self.method == "gradnorm":
            keywords = {"shared": self.model.trunk[2].parameters()}
        return method_class(optimizer_class(groups, **options), TASKS, **keywords)

    def schedule(self) -> torch.optim.lr_scheduler.ExponentialLR:
        return torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=GAMMA)

    @property
    def independent(self) -> bool:
        return self.method.startswith("independent")

    @property
    def takes_ready_losses(self) -> bool:
        return not self.method.startswith("alternating") and self.method not in (
            "independent",
            "independent, shuffled",
        )

    def fresh_rate(self) -> float:
        """A number that was not there before: what is set again to its value is no change."""
        self.serial += 1
        return 0.004 + 0.0007 * self.serial

    # Steps.

    def losses(self, tasks: Sequence[str], batch: int, how: Mapping[str, Any]) -> dict[str, Any]:
        x, y = DATA[batch]
        outputs = self.model(x, tasks)
        values = {t: error(t, outputs[t], y[t]) for t in tasks if how[t] != "left out"}
        special: dict[Any, dict[str, Any]] = {"none": dict.fromkeys(TASKS), "bare": values}
        return {
            t: special[how[t]][t] if how[t] in special else (v, how[t]) for t, v in values.items()
        }

    def take(self, form: str, batch: int, how: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Takes a step in one of the forms, where the method has it; returns the losses."""
        if form == "imperative" and self.independent:
            for task in TASKS:
                self.optimizer.zero_grad()
                found = self.losses((task,), batch, how).get(task)
                loss, count = found if isinstance(found, tuple) else (found, 1)
                if loss is not None and count:
                    loss.backward()
                    self.optimizer[task].step()
            return None
        if form == "imperative" and self.takes_ready_losses:
            self.optimizer.zero_grad()
            self.optimizer.backward(self.losses(TASKS, batch, how))
            self.optimizer.step()
            return None
        if form == "ready" and self.takes_ready_losses:
            ready: dict[str, Tensor] = self.optimizer.step(self.losses(TASKS, batch, how))
            return ready
        values: dict[str, Tensor] = self.optimizer.step(self.losses, batch, how)
        return values

    def compare_step(
        self, parts: Sequence[Part], form: str, values: Any, before: dict[str, Any]
    ) -> None:
        alternating = self.method.startswith("alternating")
        expected = self.plain.step(parts, "function" if alternating else form)
        # The order of a sum differs over micro-batches, over forward passes, and in Gram space.
        exact = (
            len(parts) == 1
            and not self.method.startswith("pcgrad")
            and not (self.method == "joint, per task" and form != "ready")
        )
        tolerance = 0.0 if exact else 1e-12
        if values is not None:
            assert values.keys() == expected.keys()
            for task, value in values.items():
                torch.testing.assert_close(value, expected[task], rtol=tolerance, atol=tolerance)
        self.compare(tolerance)
        after = self.belongings([t for t in TASKS if not any(part.count(t) for part in parts)])
        for owner, kept in before.items():
            if owner in after:
                assert kept.keys() == after[owner].keys(), owner
                for key, value in kept.items():
                    assert torch.equal(value, after[owner][key]), (owner, key)
        # With no task present the imperative form of independent optimizers calls no step at all.
        self.schedulable |= form != "imperative" or bool(expected)

    def belongings(self, tasks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """What must stay as it is while these tasks are absent."""
        found: dict[str, dict[str, Tensor]] = {}
        adam = self.optimizer.state_dict()["mtlopt"].get("weights_adam", {"state": {}})["state"]
        for task in tasks:
            for i, parameter in enumerate(self.model.own(task)):
                found[f"{task}'s parameter {i}"] = {"": parameter.detach().clone()}
                for k, own in enumerate(self.inner()):
                    found[f"{task}'s parameter {i}, state {k}"] = tensors(
                        own.state.get(parameter, {})
                    )
            if self.independent:
                for i, state in self.optimizer[task].state_dict()["state"].items():
                    found[f"{task}'s state {i}"] = tensors(state)
            if self.method == "gradnorm":
                k = TASKS.index(task)
                found[f"{task}'s weight"] = {"": self.optimizer.diagnostics()["weights"][k]}
                found[f"{task}'s weight, state"] = tensors(adam.get(k, {}))
        return found

    def inner(self) -> list[Optimizer]:
        return list(self.optimizer.values()) if self.independent else [self.optimizer.base]

    def compare(self, tolerance: float = 0.0) -> None:
        """Compares weights and states; then takes them over, so that rounding does not add up."""
        pairs = list(zip(self.model.parameters(), self.plain.model.parameters(), strict=True))
        for own, plain in zip(self.inner(), self.plain.optimizers, strict=True):
            assert len(own.state) == len(plain.state)
            for parameter, twin in pairs:
                state, expected = own.state.get(parameter, {}), plain.state.get(twin, {})
                assert state.keys() == expected.keys()
                for key, value in tensors(state).items():
                    torch.testing.assert_close(
                        value, tensors(expected)[key], rtol=tolerance, atol=tolerance
                    )
                    if tolerance:
                        expected[key].copy_(value)
        for parameter, twin in pairs:
            torch.testing.assert_close(
                parameter.detach(), twin.detach(), rtol=tolerance, atol=tolerance
            )
            if tolerance:
                twin.data.copy_(parameter.detach())
        if self.method == "gradnorm":
            # Loss weights are float32.
            weights = self.optimizer.diagnostics()["weights"]
            torch.testing.assert_close(weights, torch.stack(self.plain.weights), rtol=1e-5, atol=0)
            for mine, weight in zip(self.plain.weights, weights, strict=True):
                mine.copy_(weight)

    def step_on(self, part: Part, form: str) -> None:
        before = self.belongings(TASKS)
        values = self.take(form, part.batch, part.labels)
        self.compare_step([part], form, values, before)

    @rule(batch=st.integers(0, 5), form=forms)
    def step_on_all_tasks(self, batch: int, form: str) -> None:
        self.step_on(Part(batch, ALL), form)

    @rule(part=parts, form=forms)
    def step_on_some_tasks(self, part: Part, form: str) -> None:
        self.step_on(part, form)

    @rule(batch=st.integers(0, 5), how=st.sampled_from(ABSENT), form=forms)
    def step_on_no_task(self, batch: int, how: Any, form: str) -> None:
        self.step_on(Part(batch, dict.fromkeys(TASKS, how)), form)

    @rule(several=st.lists(parts, min_size=2, max_size=3))
    def step_on_micro_batches(self, several: list[Part]) -> None:
        before = self.belongings(TASKS)
        values = self.optimizer.step(self.losses, micro_batches=[tuple(part) for part in several])
        self.compare_step(several, "function", values, before)

    # What happens between steps.

    @precondition(lambda self: len(self.groups) < 5)
    @rule(where=st.sampled_from(("shared", *TASKS)), own_rate=st.booleans())
    def add_a_group(self, where: str, own_rate: bool) -> None:
        size = 5 if where == "shared" else 2
        value = torch.linspace(-0.3, 0.4, size, dtype=torch.float64)
        options = {"lr": self.fresh_rate()} if own_rate else {}
        self.optimizer.add_param_group({"params": self.model.grow(where, value), **options})
        twin = self.plain.model.grow(where, value)
        for own in self.plain.optimizers:
            own.add_param_group({"params": twin, **options})
        group = self.plain.optimizers[0].param_groups[-1]
        self.plain.panel.append({key: group[key] for key in self.plain.panel[0]})
        self.groups.append([[name for name, _ in self.model.named_parameters()][-1]])

    @rule()
    def go_on_from_a_file(self) -> None:
        file = io.BytesIO()
        torch.save((self.optimizer.state_dict(), self.scheduler.state_dict()), file)
        file.seek(0)
        state, schedule = torch.load(file, weights_only=True)
        self.optimizer = self.construct(lr=9.0, weight_decay=0.5)
        self.scheduler = self.schedule()
        self.optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(schedule)
        self.schedulable = False

    @rule(copier=st.sampled_from((copy.deepcopy, by_pickle)), keep=st.booleans())
    def copy_and_go_on(self, copier: Callable[[Any], Any], keep: bool) -> None:
        twin = copier((self.model, self.optimizer, self.scheduler))
        if not keep:
            self.model, self.optimizer, self.scheduler = twin
            if self.scheduler.last_epoch == 0:
                # Until its first step torch's scheduler wants the very object that it patched.
                self.scheduler = self.schedule()

    @precondition(lambda self: self.schedulable)
    @rule()
    def step_the_scheduler(self) -> None:
        self.scheduler.step()
        for group in self.plain.panel:
            group["lr"] *= GAMMA

    @rule(key=st.sampled_from(("lr", "weight_decay")))
    def write_to_the_panel(self, key: str) -> None:
        for group, panel in zip(self.optimizer.param_groups, self.plain.panel, strict=True):
            group[key] = panel[key] = self.fresh_rate()

    @precondition(lambda self: self.independent)
    @rule(data=st.data(), task=st.sampled_from(TASKS), key=st.sampled_from(("lr", "weight_decay")))
    def override(self, data: st.DataObject, task: str, key: str) -> None:
        group = data.draw(st.integers(0, len(self.groups) - 1))
        rate = self.fresh_rate()
        self.optimizer[task].param_groups[group][key] = rate
        self.plain.overrides[task, group, key] = rate

    @precondition(lambda self: self.independent)
    @rule(task=st.sampled_from(TASKS))
    def reset_overrides(self, task: str) -> None:
        self.optimizer.reset_overrides(task)
        kept = {place: v for place, v in self.plain.overrides.items() if place[0] != task}
        self.plain.overrides = kept

    @rule(data=st.data())
    def freeze_or_thaw(self, data: st.DataObject) -> None:
        """All but one parameter, so that every loss has a gradient."""
        names = [name for name, _ in self.model.named_parameters() if name != "trunk.2.weight"]
        name = data.draw(st.sampled_from(names))
        for model in (self.model, self.plain.model):
            parameter = dict(model.named_parameters())[name]
            parameter.requires_grad_(not parameter.requires_grad)

    @invariant()
    def nothing_moves_between_steps(self) -> None:
        if hasattr(self, "optimizer"):
            self.compare()
            for group, panel in zip(self.optimizer.param_groups, self.plain.panel, strict=True):
                assert {key: group[key] for key in panel} == panel


@pytest.mark.slow
def test_a_method_is_its_plain_loop_whatever_happens_in_between() -> None:
    """What one feature leaves behind, another may trip over; no list of cases finds that."""
    run_state_machine_as_test(
        Life, settings=settings(max_examples=200, stateful_step_count=20, deadline=None)
    )
