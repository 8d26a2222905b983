"""The one error that the programs report to their user."""


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it."""

    def __init__(self, message: str) -> None:
        # Names of files and other libraries' messages may hold line breaks.
        super().__init__(" ".join(message.splitlines()))
