"""Random sequences of what users do to an optimizer, compared with plain loops after each action.

Steps on some or all tasks, counts, micro-batches, overflows, leftover steps, new groups, files,
copies, schedulers, overrides, frozen and replaced parameters come in any order, with empty groups
and a second optimizer for the heads.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
from torch import Tensor
from torch.optim import Optimizer
from torchjd.scalarization import Sum

import mtlopt
from plain_methods import ABSENT, CLASSES, Growing, Part, Plain, error
from problems import TASKS
from round_trips import by_file, by_pickle

GAMMA = 0.9
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "joint": (mtlopt.JointOptimizer, {}),
    "joint, per task": (mtlopt.JointOptimizer, {"forwards": "per-task"}),
    "balanced": (mtlopt.Balanced, {"every": 3}),
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
labels = st.sampled_from((*ABSENT, "bare", 1, 2, 3))
forms = st.sampled_from(("function", "function", "ready", "imperative"))


ALL = dict.fromkeys(TASKS, "bare")
parts = st.builds(
    Part,
    st.integers(0, 5),
    st.fixed_dictionaries(dict.fromkeys(TASKS, labels)),
    st.sampled_from((None, None, False, True)),
    st.none(),
)


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: torch.as_tensor(v).detach().clone() for k, v in state.items() if v is not None}


class RandomSequence(RuleBasedStateMachine):
    """Takes one optimizer through a random sequence of actions."""

    @initialize(
        # Those with a panel more often: they keep the most state.
        method=st.sampled_from((*METHODS, *(n for n in METHODS if n.startswith("independent")))),
        name=st.sampled_from(list(CLASSES)),
        two_groups=st.booleans(),
        empty=st.booleans(),
        extra=st.sampled_from(("nothing", "a scaler", "an optimizer of the heads")),
    )
    def build(self, method: str, name: str, two_groups: bool, empty: bool, extra: str) -> None:
        torch.manual_seed(3)
        self.method, self.name = method, name
        self.model = Growing()
        self.serial = 0
        self.schedulable = False
        self.applied = ""
        self.separate_heads = extra.endswith("heads")
        # Powers of two are exact; the scale would grow only after more steps than these.
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**40) if extra == "a scaler" else None
        )
        trunk, heads = (
            [name for name, _ in self.model.named_parameters() if name.startswith(where)]
            for where in ("trunk", "heads")
        )
        halves = [trunk[:1], trunk[1:]] if self.separate_heads else [trunk, heads]
        self.groups = halves if two_groups else [halves[0] + halves[1]]
        if empty:
            self.groups = [[], *self.groups]
        expected = copy.deepcopy(self.model)
        self.plain = Plain(method, name, expected, self.grouped(expected), self.separate_heads)
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
        by_model = part.batch % 2 and not self.separate_heads
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
            and not self.method.startswith(("pcgrad", "balanced"))
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
        if self.separate_heads:
            self.model.heads.zero_grad()
        yield
        if self.separate_heads:
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
        if self.separate_heads:
            # With unequal counts the second optimizer's gradients cannot be right.
            several = [part._replace(labels=ALL) for part in several]
            if self.method == "balanced":  # Nor where weights follow from all micro-batches.
                several = several[:1]
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
        RandomSequence, settings=settings(max_examples=200, stateful_step_count=20, deadline=None)
    )
