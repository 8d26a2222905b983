"""The error for mistakes in what a user gave, and how the programs report it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(Exception):
    """Says in one line which file, argument or value cannot be used, and why."""

    def __init__(self, message: str) -> None:
        # File names and other libraries' messages may contain line breaks.
        super().__init__(" ".join(message.splitlines()))


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
