"""The one exception a user of sssd-zoo is meant to read."""

from sssd_zoo.text import plain

LONGEST = 2000  # characters of a message: names in it can be as long as a stranger likes


class UserError(Exception):
    """A foreseeable mistake in what the user gave: its text is one line that says what is wrong, where, and what to do.

    The `sssd` command and the scripts print it as ``error: ...`` and exit with status 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(" ".join(message.split()), longest=LONGEST))
