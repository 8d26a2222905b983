"""CombiningOptimizer: the methods that make one step of all tasks' gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._base import Common
from mtlopt._classes import repeat
from mtlopt._collect import Collected, Forwards, collect
from mtlopt._distributed import ALONE, Ranks, broadcast_parameters, choose_ranks
from mtlopt._features import Features, combine_through
from mtlopt._gradients import Gradients, add
from mtlopt._losses import LossesFunction, Question, ReadyLosses, Task, refuse_keywords, sum_tensors
from mtlopt._passes import put, take
from mtlopt._rows import Rows
from mtlopt._shards import is_sharded
from mtlopt._wrapper import WrappedOptimizer

Batches = list[tuple[Any, ...]]


class CombiningOptimizer(WrappedOptimizer):
    """One update of the wrapped optimizer per step, with a gradient made of all tasks'.

    A method implements :meth:`_combine`. One that needs other passes than a gradient per task
    implements :meth:`_add_gradient`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        forwards: Forwards,
        common: Common,
        features: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        self._wrap(optimizer)
        super().__init__(tasks, self.base, common)
        if forwards not in ("joint", "per-task"):
            raise ValueError(f"`forwards` must be 'joint' or 'per-task', got {forwards!r}.")
        self.forwards = forwards
        self._features = None if features is None else Features(features)
        if features is not None and forwards == "per-task":
            raise ValueError(
                "`forwards` must be 'joint' with `features`, whose gradients are of one forward "
                "pass, got 'per-task'."
            )
        self._compared = False
        # Nothing wraps the model, so nothing else makes the ranks begin alike.
        broadcast_parameters(self._parameters, self.process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer, with the first rank's parameters.

        Args:
            param_group: As torch takes it.
        """
        super().add_param_group(param_group)
        broadcast_parameters(self.param_groups[-1]["params"], self.process_group)

    def _refuse_closures(self) -> None:
        if self._needs_closure:
            raise ValueError(
                "`optimizer` must not need a closure, whose evaluations would each be combined "
                f"anew, got {type(self.base).__name__}."
            )

    # What a method is.

    def _combine(self, rows: Rows) -> Gradients:
        """Makes one gradient of the present tasks'; called at every step, with none too."""
        raise NotImplementedError

    def _add_gradient(
        self, question: Question, batches: Batches, arrived: bool
    ) -> dict[str, Tensor]:
        """Adds the combined gradient to `.grad`; returns the values of the present tasks.

        `arrived` says that the losses come from the user, who has scaled them if at all.
        """
        scaled = arrived or self._scaling is not None
        if self._features is not None:
            return self._add_through(self._features, question, batches, scaled)
        values, gradients = self._collect(question, batches, arrived)
        self._add(self._combine(Rows(gradients, self._parameters, values, scaled)))
        return values

    def _add_through(
        self, features: Features, question: Question, batches: Batches, scaled: bool
    ) -> dict[str, Tensor]:
        """The same with the rows cut off at the features, and one pass through the trunk."""
        parameters, ranks = self._parameters, self._ranks
        if is_sharded(parameters):
            raise ValueError(
                "`features` must be None where the parameters are sharded (FSDP2), whose wrapper "
                "takes whole backward passes."
            )
        values = combine_through(
            features,
            question,
            self.tasks,
            batches,
            parameters,
            ranks,
            combine=self._combine,
            weights=self._weights(),
            scale=self._scale,
            scaled=scaled,
            watch=self._watch,
        )
        # The one gradient that travels: each rank's rows have gone through its own trunk.
        if values:
            put(parameters, ranks.at_the_end.sum(take(parameters), parameters))
        return values

    def _weights(self) -> Mapping[str, float] | None:
        """What the losses are multiplied by before they are differentiated."""
        return None

    def _objective(self, values: dict[str, Tensor]) -> Tensor:
        """What the gradient is the gradient of, for a class that searches along a line."""
        return sum_tensors(list(values.values()))

    def _stepped(self, skipped: Tensor | None) -> None:
        """Called after each update, or what a scaler skipped of it."""

    def _is_sum(self) -> bool:
        """Whether the method's gradient is the one that `sum(losses).backward()` makes."""
        return False

    # What the methods share.

    @property
    def _common_generator(self) -> torch.Generator | None:
        """What ranks draw from, to draw alike; None for torch's own, as one process would."""
        return None if self._ranks is ALONE else self.generator

    @property
    def _ranks(self) -> Ranks:
        return choose_ranks(self._walk(), self.process_group, reduced=False)

    def _collect(
        self,
        question: Question,
        batches: Batches,
        arrived: bool,
        tasks: Sequence[Task] | None = None,
    ) -> Collected:
        return collect(
            question,
            self.tasks if tasks is None else tasks,
            batches,
            self._parameters,
            self._ranks,
            scale=None if arrived else self._scale,
            forwards=self.forwards,
            weights=self._weights(),
            watch=self._watch,
        )

    def _add(self, gradient: Gradients) -> None:
        parameters = self._parameters
        put(parameters, add([parameter.grad for parameter in parameters], gradient))

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Callable[[], Any] | None = None,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """Takes one step on all tasks that the batch has labels for.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None; or that mapping itself, from one forward pass. None:
                apply the gradients in `.grad`, as torch's `step` does; right after a step on
                losses they have been applied, so nothing is done, and a warning says so once.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: Without `losses`, what torch's `step` takes.
            **keywords: None: a batch goes by position.

        Returns:
            The present tasks' losses, detached scalars. Without `losses`, what the wrapped
            optimizer returns.

        Raises:
            TypeError: If the arguments do not go together.
            ValueError: If a loss is not a scalar with a graph, or of an unknown task. Nothing has
                moved then.
        """
        refuse_keywords(keywords)
        if losses is None:
            if batch or micro_batches is not None:
                raise TypeError("`losses` must be given with a batch, got None.")
            return self._apply(closure)  # type: ignore[no-any-return]  # torch's value, in torch's form
        if closure is not None:
            raise TypeError("`closure` must be None beside `losses`: they say the same.")
        if isinstance(losses, Mapping):
            self._refuse_ready_losses()
        batches = self._batches(losses, batch, micro_batches)
        if isinstance(losses, Mapping) and self._needs_closure:
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch) for a class that evaluates it "
                f"several times, {type(self.base).__name__}, got {type(losses).__name__}."
            )
        # A closure class asks for the gradient again, at other weights.
        self._note_step()
        gradient = partial(self._fresh_gradient, self._question(losses), batches)
        values = gradient()
        if not self._compared:
            self._compare_ranks()
        if values:  # Without them not even the momentum moves.
            self._update(values, gradient)
        self._finish(values)
        return values

    @torch.enable_grad()
    def backward(self, losses: ReadyLosses) -> None:
        """Adds the combined gradient of ready losses to `.grad`, in the place of `.backward()`.

        Args:
            losses: Mapping from task to a scalar loss, (loss, count) or None, of one forward pass.
        """
        self._refuse_ready_losses()
        self._add_gradient(self._question(losses), [()], arrived=True)
        self._watch.made(self._parameters)

    def _refuse_ready_losses(self) -> None:
        if self._features is not None:
            raise TypeError(
                "`losses` must be a function losses(tasks, *batch) with `features`, where the "
                "graph is cut while it runs: ready losses come with one that is whole. Call "
                "optimizer.step(losses, *batch), or leave `features` out."
            )

    @torch.enable_grad()
    def _fresh_gradient(self, question: Question, batches: Batches) -> dict[str, Tensor]:
        self._clear()
        return self._add_gradient(question, batches, arrived=False)

    def _apply(self, closure: Callable[[], Any] | None) -> Any:
        """Applies what lies in `.grad`, as torch's `step` does."""
        if closure is None and self._is_repeated():
            return None
        result: Any
        # A closure makes the gradient while the optimizer steps: it can be judged afterwards only.
        if closure is None:
            self._check_made()
            result = self.base.step()
        else:
            result = self.base.step(closure)
            self._check_made()
        self._stepped(None)
        return result

    def _check_made(self) -> None:
        """Warns of gradients that the method did not make, where that makes a difference."""
        plain = self._is_sum() or len(self.tasks) == 1
        if not plain and not self._watch.is_made(self._parameters):
            self._watch.once(
                "plain",
                f"`step` of {type(self).__name__} without losses applies gradients that it did "
                "not make: call `optimizer.backward(losses)` in the place of "
                "`sum(losses).backward()`, or `optimizer.step(losses, *batch)`. A framework that "
                "takes the backward pass itself makes the plain sum of every method.",
            )

    def _compare_ranks(self) -> None:
        """Makes sure, at the first step, that the ranks' gradients are one."""
        self._compared = True
        remedy = "do not wrap the model in DistributedDataParallel, and give a `process_group`."
        self._ranks.check_alike(self._seen_gradients(), "of all tasks", remedy)

    def _seen_gradients(self) -> Gradients:
        """What must be the same on all ranks before an update."""
        return [parameter.grad for parameter in self._parameters]

    def _update(self, values: dict[str, Tensor], again: Callable[[], dict[str, Tensor]]) -> None:
        skipped = None
        if self._scaling is not None:
            try:
                # Unscaled before the hooks, which may clip.
                skipped = self._unscale(self.base)
                self._scaling.step(self.base)
            finally:
                self._scaling.update()
        elif self._needs_closure:
            self.base.step(repeat(values, again, self._objective, self._parameters))
        else:
            self.base.step()
        self._stepped(skipped)
