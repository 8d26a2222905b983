"""The one error that the programs report to their user."""


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it."""
