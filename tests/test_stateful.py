"""Random sequences of what users do to an optimizer, compared with plain loops after each action.

Steps on some or all tasks, counts, micro-batches, overflows, leftover steps, new groups, files,
copies, schedulers, overrides, frozen and replaced parameters come in any order, with empty groups
and a second optimizer for the heads.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

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
from torchjd.scalarization import Sum

import mtlopt
import reference
from problems import TASKS, Network, batches
from round_trips import by_file, by_pickle

Gradient: TypeAlias = list[Tensor | None]
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
    "scalarized": (mtlopt.Scalarized, {"scalarizer": Sum()}),
    "scalarized, per task": (mtlopt.Scalarized, {"scalarizer": Sum(), "forwards": "per-task"}),
}
ABSENT = ("left out", "none", 0)
labels = st.sampled_from((*ABSENT, "bare", 1, 2, 3))
forms = st.sampled_from(("function", "function", "ready", "imperative"))


class Part(NamedTuple):
    """A batch, and for each task how its loss comes: absent in one of three ways, or counted.

    `losses` may freeze a matrix, or thaw it, and a task's loss may be too large once it is scaled.
    """

    batch: int
    labels: Mapping[str, Any]
    frozen: bool | None = None
    lost: str | None = None

    def count_of(self, tasks: Sequence[str]) -> int:
        return sum(self.count(task) for task in tasks)

    def count(self, task: str) -> int:
        label = self.labels[task]
        return 0 if label in ABSENT else 1 if label == "bare" else label


ALL = dict.fromkeys(TASKS, "bare")
parts = st.builds(
    Part,
    st.integers(0, 5),
    st.fixed_dictionaries(dict.fromkeys(TASKS, labels)),
    st.sampled_from((None, None, False, True)),
    st.none(),
)
HUGE = 1e308
RATE = 0.05  # Of the plain gradient descent that has the heads, where a second optimizer has them.


class Growing(Network):
    """A network to which vectors can be added: to the shared features, or to one task's output."""

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

    def outputs(self, part: Part, tasks: Sequence[str]) -> dict[str, Tensor]:
        if part.frozen is not None:
            self.trunk[0].weight.requires_grad_(not part.frozen)
        found: dict[str, Tensor] = self(DATA[part.batch][0], tasks)
        return found

    def replace(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Puts a new parameter in the place of one, and returns both."""
        module, _, attribute = name.rpartition(".")
        old = self.get_parameter(name)
        new = nn.Parameter(old.detach() * 0.5, requires_grad=old.requires_grad)
        setattr(self.get_submodule(module), attribute, new)
        return old, new

    def descend(self) -> None:
        """The step of the second optimizer, which has the heads."""
        with torch.no_grad():
            for parameter in self.heads.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)

    def _extras(self, where: str) -> list[nn.Parameter]:
        return [p for name, p in self.extras.items() if name.rstrip("0123456789") == where]


def error(part: Part, task: str, output: Tensor) -> Tensor:
    target = DATA[part.batch][1][task]
    loss = {"a": 1.0, "b": 3.0, "c": 0.2}[task] * ((output - target) ** 2).mean()
    return loss * HUGE if part.lost == task else loss


class Plain:
    """Does what a method does in plain PyTorch, with torch's optimizers."""

    def __init__(
        self, method: str, name: str, model: Growing, groups: list[Any], heads_apart: bool
    ) -> None:
        self.method, _, self.variant = method.partition(", ")
        self.model = model
        self.heads_apart = heads_apart
        count = len(TASKS) if self.method == "independent" else 1
        optimizer_class, options = CLASSES[name]
        self.optimizers: list[Optimizer] = [
            optimizer_class([dict(group) for group in groups], **options) for _ in range(count)
        ]
        keys = ("lr", "weight_decay")
        self.panel = [{k: g[k] for k in keys} for g in self.optimizers[0].param_groups]
        self.overrides: dict[tuple[str, int, str], float] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.weights = [torch.ones((), requires_grad=True) for _ in TASKS]
        self.weights_adam = Adam(self.weights, lr=0.025)
        self.first_losses: dict[str, Tensor] = {}

    def draw(self) -> list[int]:
        drawn: list[int] = torch.randperm(len(TASKS), generator=self.generator).tolist()
        return drawn

    def terms(self, tasks: Sequence[str], parts: Sequence[Part]) -> Iterator[dict[str, Tensor]]:
        """Yields each part's share of the tasks' means over all samples, from one forward pass."""
        totals = {t: sum(part.count(t) for part in parts) for t in tasks}
        for part in parts:
            outputs = self.model.outputs(part, tasks)
            yield {
                t: part.count(t) / totals[t] * error(part, t, outputs[t])
                for t in tasks
                if part.count(t)
            }

    def differentiate(
        self,
        tasks: Sequence[str],
        parts: Sequence[Part],
        objectives: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> tuple[dict[str, Tensor], dict[str, Gradient]]:
        """Returns the tasks' losses, and the gradients of the objectives summed over the parts."""
        values: dict[str, Tensor] = {}
        gradients: dict[str, Gradient] = {}
        for terms in self.terms(tasks, parts):
            for t, term in terms.items():
                values[t] = values[t] + term.detach() if t in values else term.detach()
            for key, objective in objectives(terms).items():
                self.model.zero_grad()
                objective.backward(retain_graph=True)
                new = [p.grad for p in self.model.parameters()]
                old = gradients.get(key, [None] * len(new))
                gradients[key] = [
                    b if a is None else a if b is None else a + b
                    for a, b in zip(old, new, strict=True)
                ]
        return {t: values[t] for t in tasks if t in values}, gradients

    def update(self, task: str, gradient: Gradient) -> None:
        """One step of the task's optimizer, with the panel's numbers but for the task's own."""
        own = self.optimizers[TASKS.index(task) % len(self.optimizers)]
        for g, (group, panel) in enumerate(zip(own.param_groups, self.panel, strict=True)):
            group.update({k: self.overrides.get((task, g, k), v) for k, v in panel.items()})
        for parameter, part in zip(self.model.parameters(), gradient, strict=True):
            parameter.grad = part
        own.step()
        if self.heads_apart:
            heads = {id(p) for p in self.model.heads.parameters()}
            for parameter, part in zip(self.model.parameters(), gradient, strict=True):
                if id(parameter) in heads and part is not None:
                    self.descents.append((parameter, RATE * part))

    def step(self, parts: Sequence[Part], form: str) -> dict[str, Tensor]:
        """Takes a step; then the second optimizer, if there is one, takes its own."""
        self.descents: list[tuple[Tensor, Tensor]] = []
        values = self.steps(parts, form)
        with torch.no_grad():
            for parameter, part in self.descents:
                parameter.sub_(part)
        return values

    def steps(self, parts: Sequence[Part], form: str) -> dict[str, Tensor]:
        lost = {part.lost for part in parts}
        if self.method == "alternating" or (
            self.method == "independent"
            and (self.variant != "simultaneous" or form == "imperative")
        ):
            shuffled = self.variant == "shuffled" and form != "imperative"
            values: dict[str, Tensor] = {}
            for task in [TASKS[k] for k in (self.draw() if shuffled else range(len(TASKS)))]:
                value, gradient = self.differentiate((task,), parts)
                values |= value
                if value and task not in lost:
                    self.update(task, gradient[task])
            return values
        if self.method == "independent":
            values, gradient = self.differentiate(TASKS, parts)
            for task in [task for task in values if task not in lost]:
                self.update(task, gradient[task])
            return values
        return self.one_step(parts, bool(lost - {None}))

    def one_step(self, parts: Sequence[Part], lost: bool) -> dict[str, Tensor]:
        slopes: dict[str, Tensor] = {}

        def weighted(terms: dict[str, Tensor]) -> dict[str, Tensor]:
            for t, term in terms.items():
                slopes[t] = slopes.get(t, 0) + self.slope(term)
            return total({t: self.weight(t) * term for t, term in terms.items()})

        if self.method == "pcgrad":
            values, gradient = self.differentiate(TASKS, parts)
            orders = [self.draw() for _ in TASKS]
            if values:
                gradient = {"all": self.project(gradient, orders)}
        else:
            objectives = weighted if self.method == "gradnorm" else total
            values, gradient = self.differentiate(TASKS, parts, objectives)
        if values and not lost:
            self.update("a", gradient["all"])
            if self.method == "gradnorm":
                norms = {t: slopes[t].norm() for t in values}
                self.balance(values, norms)
        return values

    def project(self, by_task: dict[str, Gradient], orders: list[list[int]]) -> Gradient:
        """Projects conflicts over the parameters that at least two present tasks share."""
        gradients = {TASKS.index(t): by_task[t] for t in TASKS if t in by_task}
        columns = list(zip(*gradients.values(), strict=True))
        reached = [sum(part is not None for part in column) for column in columns]
        shared = [i for i, number in enumerate(reached) if number > 1]
        parameters = list(self.model.parameters())

        def flat(gradient: Gradient) -> Tensor:
            present = [(gradient[i], parameters[i]) for i in shared]
            pieces = [torch.zeros_like(p) if g is None else g for g, p in present]
            return torch.cat([torch.zeros(0), *(piece.flatten() for piece in pieces)])

        place = {k: i for i, k in enumerate(gradients)}
        present = [[place[j] for j in orders[k] if j in place] for k in place]
        total = reference.project_conflicts([flat(g) for g in gradients.values()], present)
        if self.variant == "mean":
            total /= len(gradients)
        result = [next((g for g in column if g is not None), None) for column in columns]
        pieces = reference.split(total, [parameters[i] for i in shared])
        for i, piece in zip(shared, pieces, strict=True):
            result[i] = piece
        return result

    def slope(self, objective: Tensor) -> Tensor:
        shared = list(self.model.trunk[2].parameters())
        (own,) = torch.autograd.grad(objective, shared, retain_graph=True)
        return own

    def weight(self, task: str) -> Tensor:
        return self.weights[TASKS.index(task)].detach()

    def balance(self, losses: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        for task, loss in losses.items():
            self.first_losses.setdefault(task, loss)
        reference.update_weights(
            [self.weights[TASKS.index(task)] for task in losses],
            self.weights_adam,
            list(norms.values()),
            [loss / self.first_losses[task] for task, loss in losses.items()],
            alpha=1.5,
        )


def total(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    values = list(terms.values())
    return {"all": sum(values[1:], values[0])} if values else {}


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: torch.as_tensor(v).detach().clone() for k, v in state.items() if v is not None}


class Session(RuleBasedStateMachine):
    """Takes one optimizer through a random sequence of actions."""

    @initialize(
        # Those with a panel more often: they keep the most state.
        method=st.sampled_from((*METHODS, *(n for n in METHODS if n.startswith("independent")))),
        name=st.sampled_from(list(CLASSES)),
        apart=st.booleans(),
        empty=st.booleans(),
        beside=st.sampled_from(("nothing", "a scaler", "an optimizer of the heads")),
    )
    def build(self, method: str, name: str, apart: bool, empty: bool, beside: str) -> None:
        torch.manual_seed(3)
        self.method, self.name = method, name
        self.model = Growing()
        self.serial = 0
        self.schedulable = False
        self.applied = ""
        self.heads_apart = beside.endswith("heads")
        # Powers of two are exact; the scale would grow only after more steps than these.
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**40) if beside == "a scaler" else None
        )
        trunk, heads = (
            [name for name, _ in self.model.named_parameters() if name.startswith(where)]
            for where in ("trunk", "heads")
        )
        halves = [trunk[:1], trunk[1:]] if self.heads_apart else [trunk, heads]
        self.groups = halves if apart else [halves[0] + halves[1]]
        if empty:
            self.groups = [[], *self.groups]
        expected = copy.deepcopy(self.model)
        self.plain = Plain(method, name, expected, self.grouped(expected), self.heads_apart)
        self.optimizer = self.construct()
        self.scheduler = self.schedule()

    def grouped(self, model: Growing, **options: Any) -> list[dict[str, Any]]:
        parameters = dict(model.named_parameters())
        return [{"params": [parameters[n] for n in names], **options} for names in self.groups]

    def construct(self, **of_groups: Any) -> Any:
        method_class, keywords = METHODS[self.method]
        optimizer_class, options = CLASSES[self.name]
        groups = self.grouped(self.model, **of_groups)
        keywords = keywords | {"scaler": self.scaler}
        if self.method == "gradnorm":
            keywords["shared"] = self.model.trunk[2].parameters()
        if self.independent:
            optimizer = method_class(optimizer_class, groups, TASKS, **options, **keywords)
        else:
            optimizer = method_class(optimizer_class(groups, **options), TASKS, **keywords)
        # Warnings are errors here: it must stay silent in copies too.
        optimizer.warn_of_repeated_step = False
        return optimizer

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
        """Returns a new number: setting an option to its present value is no change."""
        self.serial += 1
        return 0.004 + 0.0007 * self.serial

    # Steps.

    def losses(self, tasks: Sequence[str], part: Part) -> dict[str, Any]:
        outputs, how = self.model.outputs(part, tasks), part.labels
        values = {t: error(part, t, outputs[t]) for t in tasks if how[t] != "left out"}
        special: dict[Any, dict[str, Any]] = {"none": dict.fromkeys(TASKS), "bare": values}
        return {
            t: special[how[t]][t] if how[t] in special else (v, how[t]) for t, v in values.items()
        }

    def take(self, form: str, part: Part) -> dict[str, Tensor] | None:
        """Takes a step in one of the forms, where the method has it; returns the losses."""
        if form == "imperative" and (self.independent or self.takes_ready_losses):
            self.take_by_hand(part)
            return None
        ready = form == "ready" and self.takes_ready_losses
        losses, *batch = (self.losses(TASKS, part),) if ready else (self.losses, part)
        values: dict[str, Tensor] = self.optimizer.step(losses, *batch)
        self.applied = "a gradient" if values and part.lost is None else "nothing"
        return values

    def take_by_hand(self, part: Part) -> None:
        scale = (lambda loss: loss) if self.scaler is None else self.scaler.scale
        # Half the time the model clears, where that is the same.
        by_model = part.batch % 2 and not self.heads_apart
        clear = self.model.zero_grad if by_model else self.optimizer.zero_grad
        self.applied = ""
        steps = []
        for tasks in [(task,) for task in TASKS] if self.independent else [TASKS]:
            clear()
            found = {
                t: (scale(loss[0]), loss[1]) if isinstance(loss, tuple) else scale(loss)
                for t, loss in self.losses(tasks, part).items()
                if loss is not None
            }
            own = self.optimizer
            if self.independent:
                own = self.optimizer[tasks[0]]
                loss, count = found.get(tasks[0], (None, 0)), 1
                if isinstance(loss, tuple):
                    loss, count = loss
                if not count or loss is None:
                    continue
                loss.backward()
            else:
                own.backward(found)
            if self.scaler is not None and part.count_of(tasks):
                self.scaler.step(own)
                steps.append(own)
            else:
                own.step()
        if self.scaler is not None and steps:
            self.scaler.update()

    def compare_step(
        self, parts: Sequence[Part], form: str, values: Any, before: dict[str, Any]
    ) -> None:
        alternating = self.method.startswith("alternating")
        expected = self.plain.step(parts, "function" if alternating else form)
        # The order of a sum differs over micro-batches, over forward passes, and in Gram space.
        exact = (
            len(parts) == 1
            and not self.method.startswith("pcgrad")
            and not (self.method.endswith(", per task") and form != "ready")
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
        # With no task present the imperative form of independent optimizers calls no step at all,
        # and a scaler calls none after an overflow.
        lost = any(part.lost for part in parts)
        self.schedulable |= form != "imperative" or (bool(expected) and not lost)

    def belongings(self, tasks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Returns what must not change while these tasks are absent."""
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
        """Compares weights and states; then copies them, so that rounding does not accumulate."""
        pairs = list(zip(self.model.parameters(), self.plain.model.parameters(), strict=True))
        for own, plain in zip(self.inner(), self.plain.optimizers, strict=True):
            # States of parameters that were replaced may go at the next update.
            assert [p in own.state for p, _ in pairs] == [p in plain.state for _, p in pairs]
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
            expected_weights = torch.stack([self.plain.weight(t) for t in TASKS])
            torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)
            for mine, weight in zip(self.plain.weights, weights, strict=True):
                mine.data.copy_(weight)

    def step_on(self, part: Part, form: str) -> None:
        before = self.belongings(TASKS)
        with self.second_optimizer():
            values = self.take(form, part)
        self.optimizer.diagnostics()
        self.compare_step([part], form, values, before)

    @contextmanager
    def second_optimizer(self) -> Iterator[None]:
        """Lets the user's second optimizer step around a step."""
        if self.heads_apart:
            self.model.heads.zero_grad()
        yield
        if self.heads_apart:
            self.model.descend()

    @rule(batch=st.integers(0, 5), form=forms)
    def step_on_all_tasks(self, batch: int, form: str) -> None:
        self.step_on(Part(batch, ALL), form)

    @rule(part=parts, form=forms)
    def step_on_some_tasks(self, part: Part, form: str) -> None:
        self.step_on(part, form)

    @rule(batch=st.integers(0, 5), how=st.sampled_from(ABSENT), form=forms)
    def step_on_no_task(self, batch: int, how: Any, form: str) -> None:
        self.step_on(Part(batch, dict.fromkeys(TASKS, how)), form)

    @precondition(lambda self: self.scaler is not None)
    @rule(part=parts, lost=st.sampled_from(TASKS), form=forms)
    def step_on_an_overflow(self, part: Part, lost: str, form: str) -> None:
        self.step_on(part._replace(labels={**part.labels, lost: "bare"}, lost=lost), form)

    @rule(several=st.lists(parts, min_size=2, max_size=3))
    def step_on_micro_batches(self, several: list[Part]) -> None:
        if self.heads_apart:
            # With unequal counts the second optimizer's gradients cannot be right.
            several = [part._replace(labels=ALL) for part in several]
        before = self.belongings(TASKS)
        with self.second_optimizer():
            values = self.optimizer.step(self.losses, micro_batches=[(part,) for part in several])
        self.applied = "a gradient" if values else "nothing"
        self.compare_step(several, "function", values, before)

    @precondition(lambda self: self.applied)
    @rule(by_scaler=st.booleans())
    def step_once_more(self, by_scaler: bool) -> None:
        """Takes a leftover step; that nothing moves is asserted after every rule."""
        # Without a gradient a scaler raises; an absent task has cleared that of the task before.
        given = any(p.grad is not None for g in self.optimizer.param_groups for p in g["params"])
        if by_scaler and given and self.scaler is not None and self.applied == "a gradient":
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    # Between steps.

    @precondition(lambda self: len(self.groups) < 6)
    @rule(where=st.sampled_from(("shared", *TASKS)), own_rate=st.booleans())
    def add_a_group(self, where: str, own_rate: bool) -> None:
        self.applied = ""
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
        state, schedule = by_file((self.optimizer.state_dict(), self.scheduler.state_dict()))
        self.applied = ""
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
            self.scaler = self.optimizer.scaler
            self.applied = ""  # Copies of parameters have no gradients.
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
    @rule(task=st.sampled_from(TASKS), key=st.sampled_from(("lr", "weight_decay")))
    def pin(self, task: str, key: str) -> None:
        self.optimizer.pin(task, key)
        for group, panel in enumerate(self.plain.panel):
            self.plain.overrides.setdefault((task, group, key), panel[key])

    @precondition(lambda self: self.independent)
    @rule(task=st.sampled_from(TASKS))
    def reset_overrides(self, task: str) -> None:
        self.optimizer.reset_overrides(task)
        kept = {place: v for place, v in self.plain.overrides.items() if place[0] != task}
        self.plain.overrides = kept

    @precondition(lambda self: self.independent)
    @rule(data=st.data(), in_place=st.booleans())
    def replace_a_parameter(self, data: st.DataObject, in_place: bool) -> None:
        """In the model and in the panel's groups; by hand in every optimizer, without a state."""
        name = data.draw(st.sampled_from([name for names in self.groups for name in names]))
        self.applied = ""
        for model, optimizers in (
            (self.model, [self.optimizer]),
            (self.plain.model, self.plain.optimizers),
        ):
            old, new = model.replace(name)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    params = [new if p is old else p for p in group["params"]]
                    if in_place:
                        group["params"][:] = params
                    else:
                        group["params"] = params
            if model is self.plain.model:
                for own in optimizers:
                    own.state.pop(old, None)

    @rule(data=st.data())
    def freeze_or_thaw(self, data: st.DataObject) -> None:
        """Changes any parameter but one, so that every loss has a gradient."""
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
def test_a_method_is_its_plain_loop_whatever_happens_between_steps() -> None:
    """Features may break one another in sequences that no list of cases contains."""
    run_state_machine_as_test(
        Session, settings=settings(max_examples=200, stateful_step_count=20, deadline=None)
    )
