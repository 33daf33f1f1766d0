"""The exception for mistakes of the user, and a quiet end for a start that is interrupted."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

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


@contextmanager
def quiet_start() -> Iterator[None]:
    """Makes Ctrl-C end a program with one line instead of a traceback while the block imports modules for seconds.

    `KeyboardInterrupt` can still be caught; only an uncaught one is reported in one line. Imports that swallow it, as
    torch's import of NumPy does, leave modules partly initialised, so it is raised again after them.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    default = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if default:
            signal.signal(signal.SIGINT, note)
        yield
    finally:
        if default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if received:
            sys.excepthook = _end_quietly
            raise KeyboardInterrupt from None


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("\nstopped while starting", file=sys.stderr)
    raise SystemExit(130)
