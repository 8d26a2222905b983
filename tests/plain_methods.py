"""The methods in plain PyTorch with all that can happen to them, as the oracle of test_stateful.

Beyond `reference`: absent tasks, counts, micro-batches, overflows, frozen parameters,
parameter groups with overrides, and a second optimizer for the heads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import reference
from problems import TASKS, Network, batches

Gradient: TypeAlias = list[Tensor | None]
DATA = batches(6, size=3)
# With a large `eps` a gradient of nearly zero does not magnify the rounding of another order.
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01, "eps": 1e-4}),
    "AdamW": (AdamW, {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}),
    "RMSprop": (RMSprop, {"lr": 0.01, "eps": 1e-4, "momentum": 0.5}),
}
ABSENT = ("left out", "none", 0)
HUGE = 1e308
RATE = 0.05  # The learning rate of the second optimizer, plain gradient descent.


class Part(NamedTuple):
    """A batch, and for each task how its loss comes: absent in one of three ways, or counted.

    `losses` may freeze or unfreeze a matrix, and a task's loss may be too large once it is scaled.
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
        """Replaces a parameter by a new one, and returns both."""
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
        self, method: str, name: str, model: Growing, groups: list[Any], separate_heads: bool
    ) -> None:
        self.method, _, self.variant = method.partition(", ")
        self.model = model
        self.separate_heads = separate_heads
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
        self.squares: dict[str, float] = {}
        self.due: set[str] = set()
        self.count = 0
        self.users: dict[int, set[str]] = {}

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
        if self.separate_heads:
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
        if self.method == "balanced":
            return self.balanced_step(parts, bool(lost - {None}), form)
        return self.one_step(parts, bool(lost - {None}))

    def balanced_step(
        self, parts: Sequence[Part], lost: bool, form: str, every: int = 3
    ) -> dict[str, Tensor]:
        """Measures tasks that are due and present over what two tasks have been seen to share."""
        values, gradients = self.differentiate(TASKS, parts)
        due = set(TASKS) if self.count % every == 0 else self.due - self.squares.keys()
        measured = [task for task in values if task in due]
        parameters = list(self.model.parameters())
        for task in measured:
            for parameter, part in zip(parameters, gradients[task], strict=True):
                if part is not None:
                    self.users.setdefault(id(parameter), set()).add(task)
        squares = dict(self.squares)
        for task in measured:
            new = sum(
                float(part.square().sum())
                for parameter, part in zip(parameters, gradients[task], strict=True)
                if part is not None and len(self.users[id(parameter)]) > 1
            )
            if new > 0:
                squares[task] = 0.9 * squares.get(task, new) + 0.1 * new
        if not values or (lost and (due or form == "imperative")):
            return values
        self.squares, self.due, self.count = squares, due - {*measured}, self.count + 1
        if not lost:
            sizes = {task: square**0.5 for task, square in squares.items()}
            mean = sum(sizes.values()) / max(len(sizes), 1)
            weights = {task: mean / sizes[task] if task in sizes else 1.0 for task in values}
            total: Gradient = [None] * len(parameters)
            for task, weight in weights.items():
                own = [g if g is None else weight * g for g in gradients[task]]
                total = [
                    b if a is None else a if b is None else a + b
                    for a, b in zip(total, own, strict=True)
                ]
            self.update("a", total)
        return values

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
