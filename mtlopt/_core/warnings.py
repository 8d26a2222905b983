"""Warnings: silent mistakes in a training loop, each reported once."""

import os
import sys
import warnings

import torch

from mtlopt._gradients.report import Mistake

NOT_THE_USERS = tuple(
    os.path.join(os.path.dirname(file), "") for file in (torch.__file__, os.path.dirname(__file__))
)
EMPTY_STEPS = 100
"""Steps in a row without labels after which the tasks' names are likely to be wrong."""


class Warnings:
    """Warns of each mistake once; nothing depends on it."""

    def __init__(self) -> None:
        # Changed in place: Lightning's wrapper of an optimizer shares its attributes.
        self._warned: set[object] = set()

    def repeated_step(self) -> None:
        """Warns of a `step()` that found its gradients applied."""
        self._warn(
            "repeated",
            "`step()` after `step(losses)` did nothing, because the gradients were applied "
            "already: delete the line `optimizer.step()` (or `scaler.step(optimizer)`). In a loop "
            "that is not yours set `optimizer.warn_of_repeated_step = False`.",
        )

    def changed_before_repeated_step(self) -> None:
        """Warns of a `step()` on gradients that were applied and then changed."""
        self._warn(
            "again",
            "`step()` after `step(losses)` applies gradients again that were applied and then "
            "changed: delete the lines that clip and step, or call `optimizer.zero_grad()` before "
            "`.backward()`.",
        )

    def empty_steps(self, tasks: object) -> None:
        """Warns of many steps in a row without a loss."""
        self._warn(
            "empty",
            f"For {EMPTY_STEPS} steps `losses` has brought none of the tasks {tasks}, so nothing "
            "was trained: do the names of the labels match those of the tasks?",
        )

    def plain_gradients(self, method: str) -> None:
        """Warns of a step on gradients that the method did not make."""
        self._warn(
            "plain",
            f"`step` of {method} without losses applies gradients that it did not make: call "
            "`optimizer.backward(losses)` instead of `sum(losses).backward()`, or "
            "`optimizer.step(losses, *batch)`. A framework that runs the backward pass itself "
            "turns every method into the plain sum.",
        )

    def mistake(self, found: Mistake) -> None:
        """Warns of a sign of a mistake that was found while gradients were taken."""
        text = {
            "unreached": (
                f"The loss of task {found.task!r} depends on none of the optimizer's parameters, "
                "so it trains nothing: were they given to the optimizer, and are they the model's? "
                "Checkpoints of inputs that need no gradient must have `use_reentrant=False`."
            ),
            "others": (
                "`losses` depends on parameters that are not this optimizer's, and its tasks' "
                "counts differ between the `micro_batches`: their gradients are averaged as if the "
                "counts were equal. Give them to this optimizer, or use micro-batches with equal "
                "counts."
            ),
            "uncut": (
                "No loss depends on the outputs of `features`, so no gradients are combined: give "
                "the modules whose outputs the heads are called with."
            ),
            "unshared": (
                "No output of `features` is used by two tasks, so their gradients cannot conflict "
                "there and the method is the plain sum: call the modules once for all tasks, or "
                "remove `features`."
            ),
        }[found.kind]
        self._warn(found, text)

    def _warn(self, key: object, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, stacklevel=_frames_to_the_user())


def _frames_to_the_user() -> int:
    """Counts the frames up to the first one outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    return level
