"""Warnings: silent mistakes in a training loop, each reported once."""

import os
import sys
import warnings

import torch

NOT_THE_USERS = tuple(
    os.path.join(os.path.dirname(file), "") for file in (torch.__file__, os.path.dirname(__file__))
)
EMPTY_STEPS = 100
"""Steps in a row without labels after which the tasks' names are likely to be wrong."""


TEXTS = {
    "applied": (
        "`step()` after `step(losses)` did nothing, because the gradients were applied already: "
        "delete the line `optimizer.step()` (or `scaler.step(optimizer)`). In a loop that is not "
        "yours set `optimizer.warn_of_repeated_step = False`."
    ),
    "changed": (
        "`step()` after `step(losses)` applies gradients again that were applied and then changed: "
        "delete the lines that clip and step, or call `optimizer.zero_grad()` before `.backward()`."
    ),
    "empty": (
        f"For {EMPTY_STEPS} steps `losses` has brought none of the tasks {{}}, so nothing was "
        "trained: do the names of the labels match those of the tasks?"
    ),
    "plain": (
        "`step` of {} without losses applies gradients that it did not make: call "
        "`optimizer.backward(losses)` instead of `sum(losses).backward()`, or "
        "`optimizer.step(losses, *batch)`. A framework that runs the backward pass itself turns "
        "every method into the plain sum."
    ),
    "unreached": (
        "The loss of task {!r} depends on none of the optimizer's parameters, so it trains "
        "nothing: were they given to the optimizer, and are they the model's? Checkpoints of "
        "inputs that need no gradient must have `use_reentrant=False`."
    ),
    "others": (
        "`losses` depends on parameters that are not this optimizer's, and its tasks' counts "
        "differ between the `micro_batches`: their gradients are averaged as if the counts were "
        "equal. Give them to this optimizer, or use micro-batches with equal counts."
    ),
    "uncut": (
        "No loss depends on the outputs of `features`, so no gradients are combined: give the "
        "modules whose outputs the heads are called with."
    ),
    "unshared": (
        "No output of `features` is used by two tasks, so their gradients cannot conflict there "
        "and the method is the plain sum: call the modules once for all tasks, or remove "
        "`features`."
    ),
}
"""What is said of each mistake, with a place for the method or the tasks that it concerns."""


class Warnings:
    """Warns of each mistake once; nothing depends on it."""

    def __init__(self) -> None:
        # Changed in place: Lightning's wrapper of an optimizer shares its attributes.
        self._warned: set[object] = set()

    def warn(self, kind: str, of: object = None) -> None:
        """Warns of a mistake, unless it has been reported."""
        if (kind, of) not in self._warned:
            self._warned.add((kind, of))
            warnings.warn(TEXTS[kind].format(of), stacklevel=_frames_to_the_user())


def _frames_to_the_user() -> int:
    """Counts the frames up to the first one outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    return level
