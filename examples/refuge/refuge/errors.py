"""The error for mistakes in what a user gave, and how the programs report it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(Exception):
    """Says in one line which file, argument or value cannot be used, and why.

    Args:
        message: The line.
        others: Further errors that were found at the same time.
    """

    def __init__(self, message: str, others: Sequence[InputError] = ()) -> None:
        # File names and other libraries' messages may contain line breaks.
        super().__init__(" ".join(message.splitlines()))
        self.others = tuple(others)

    def lines(self) -> list[str]:
        """Returns the lines of this error and of the others."""
        return [str(self), *(line for other in self.others for line in other.lines())]


def attempt(
    report: Callable[[InputError], object], call: Callable[..., T], *arguments: Any
) -> T | None:
    """Returns what a call returns; reports its error and returns None if there is one."""
    try:
        return call(*arguments)
    except InputError as error:
        report(error)
        return None


def raise_all(errors: Sequence[InputError]) -> None:
    """Raises the first of several errors, which carries the others; none if there are none."""
    if errors:
        raise InputError(str(errors[0]), (*errors[0].others, *errors[1:]))


def report_errors(program: str, body: Callable[[], object]) -> int:
    """Runs a program's body; reports an error in one line and returns the exit code."""
    try:
        body()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0
