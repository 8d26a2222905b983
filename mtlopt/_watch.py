"""Watch: says, once each, what would otherwise go wrong without a word."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlopt._shards import local

MARK, MADE = "_mtlopt_applied", "_mtlopt_made"
NOT_THE_USERS = tuple(
    os.path.join(os.path.dirname(file), "") for file in (torch.__file__, __file__)
)
EMPTY_STEPS = 100
"""Steps in a row without a label after which the names are likely to be wrong."""


class Watch:
    """What an optimizer remembers of its steps so that a mistake in the loop is noticed.

    It changes in place: a framework's wrapper that shares an optimizer's attributes shares it.
    """

    def __init__(self) -> None:
        self.in_turn = False
        """Whether a task's update is part of a step on losses."""
        self.looked: set[str] = set()
        """The tasks whose graphs have been searched for the optimizer's parameters."""
        self._applied = False
        self._empty = 0
        self._warned: set[str] = set()

    def once(self, key: str, text: str) -> None:
        """Warns, unless it has been said."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, stacklevel=_frames_to_the_user())

    def stepped(
        self, parameters: Sequence[Tensor], values: Mapping[str, Tensor], tasks: Sequence[object]
    ) -> None:
        """Notes that `step(losses)` has applied what lies in `.grad`.

        A mark lies on each gradient and holds its version, so a new gradient has none and one that
        was written to has an old one. What a scaler unscales keeps its version.
        """
        # Not the tensors themselves: that would keep their memory after `zero_grad`.
        self._applied = True
        for parameter in parameters:
            if (gradient := parameter.grad) is not None:
                setattr(gradient, MARK, gradient._version)
        self._empty = 0 if values else self._empty + 1
        if self._empty == EMPTY_STEPS:
            self.once(
                "empty",
                f"For {EMPTY_STEPS} steps `losses` has brought none of the tasks {list(tasks)}, so "
                "nothing was trained: do the names of the labels match those of the tasks?",
            )

    def made(self, parameters: Sequence[Tensor]) -> None:
        """Notes that a method has made what lies in `.grad`, which is to be applied."""
        self._applied = False
        for parameter in parameters:
            if (gradient := parameter.grad) is not None:
                setattr(gradient, MADE, True)

    def is_made(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a method has made what lies in `.grad`, if anything but zeros does."""
        given = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return any(hasattr(gradient, MADE) for gradient in given) or not any(
            local(gradient).any() for gradient in given
        )

    def changed(self) -> None:
        """Notes that what lies in `.grad` from now on has not been applied."""
        self._applied = False

    def is_applied(self, parameters: Sequence[Tensor], warn: bool) -> bool:
        """Whether all that lies in `.grad` has been applied, so that nothing is left to do."""
        if not self._applied:
            return False
        # By tensor and version, not by number: comparing numbers would wait for the device.
        given = [parameter.grad for parameter in parameters if parameter.grad is not None]
        ages = [g._version - getattr(g, MARK) for g in given if hasattr(g, MARK)]
        if len(ages) < len(given) or any(ages):
            # Written to once: clipped, or a backward pass on top. More often: cleared before.
            if len(ages) == len(given) and max(ages) == 1 and warn:
                self.once(
                    "again",
                    "`step()` after `step(losses)` applies gradients again that were applied and "
                    "then changed: delete the lines that clip and step, or call "
                    "`optimizer.zero_grad()` before `.backward()`.",
                )
            return False
        if warn:
            self.once(
                "repeated",
                "`step()` after `step(losses)` did nothing, for the gradients have been applied: "
                "delete the line `optimizer.step()` (or `scaler.step(optimizer)`). In a loop that "
                "is not yours set `optimizer.warn_of_repeated_step = False`.",
            )
        return True

    def unreached(self, task: object) -> None:
        """Says that a task's loss reaches none of the parameters."""
        self.once(
            f"unreached {task!r}",
            f"The loss of task {task!r} reaches none of the optimizer's parameters, so it trains "
            "nothing: were they given to the optimizer, and are they the model's own?",
        )

    def copied(self, parameters: Sequence[Tensor]) -> None:
        """Marks copies of marked gradients, whose versions have begun anew."""
        for parameter in parameters:
            if hasattr(parameter.grad, MARK) and parameter.grad is not None:
                setattr(parameter.grad, MARK, parameter.grad._version)


def _frames_to_the_user() -> int:
    """Counts the frames up to the first that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    return level
