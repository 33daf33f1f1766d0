"""The exception for mistakes of the user."""

from collections.abc import Iterator

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


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it, the outermost first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        yield cause
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
