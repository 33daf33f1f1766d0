"""The exception for mistakes of the user."""

from sssd_zoo.errors.text import plain

LONGEST = 10_000  # characters of a message, as names in it may have any length


class UserError(ValueError):
    """A foreseeable mistake in what the user gave: its text is one line that says what is wrong, where, and what to do.

    The `sssd` command and the scripts print it as ``error: ...`` and exit with status 2; no traceback is shown.

    Attributes:
        told: whether another process of the same command reports it.
    """

    told = False

    def __init__(self, message: str) -> None:
        super().__init__(plain(" ".join(message.split()), longest=LONGEST))
