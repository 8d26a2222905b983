"""The one error that the programs report to their user, and how."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it."""

    def __init__(self, message: str) -> None:
        # Names of files and other libraries' messages may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


def report_errors(program: str, body: Callable[[], object]) -> int:
    """Runs a program's body; returns the exit code, after one line where it could not end."""
    try:
        body()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0
