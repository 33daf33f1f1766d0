"""How a command ends, whatever happens to it: with one line, a status that says why, and no traceback.

0: done; 1: an error that nobody foresaw, whose traceback is in the file that the line names; 2: the user's to fix;
130: Ctrl-C; 141: whoever read the output has closed it (`| head`); 143: SIGTERM.
"""

import atexit
import errno
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sssd_zoo.configs.ranges import SettingsError
from sssd_zoo.errors import UserError
from sssd_zoo.errors.memory import full_memory, full_shared_memory, lost_worker
from sssd_zoo.files import RUN_MARK

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10  # seconds from a signal to the end
READER_LEFT = 141  # as a shell has it of a program that SIGPIPE ended


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints `error: message` on one line of stderr and exits with this status."""
    rank = os.environ.get("RANK", "0")
    print(("" if rank == "0" else f"[process {rank}] ") + "error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


class Guard:
    """What a command has met so far.

    Attributes:
        problems: errors of writing to stdout and stderr.
        signals: numbers of the signals that came.
        out: the command's run folder, once it is known.
        again: how it goes on after a signal.
    """

    def __init__(self) -> None:
        self.problems: list[OSError] = []
        self.signals: list[int] = []
        self.out: Path | None = None
        self.again = "run the same command again"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns whatever the block raises into one line and an exit status.

        With SSSD_DEBUG set, the traceback of every error is printed too.

        Raises:
            SystemExit: where the block did not end well.
        """
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if os.environ.get("SSSD_DEBUG"):
                traceback.print_exc()
            # Libraries that Ctrl-C interrupts, faiss for one, may raise errors of their own.
            if self.signals or isinstance(error, KeyboardInterrupt):
                number = self.signals[0] if self.signals else signal.SIGINT
                threading.excepthook = lambda _: None  # of threads that lose what they worked for
                say_stopped(number, self.again)
                # An interrupt within `exec`, of which imports are full, makes `python -m` end by the signal instead of
                # with this status, though it was caught; `exec` of nothing makes it forget that.
                exec("")
                raise SystemExit(128 + number) from None
            if self.problems and isinstance(error, OSError):
                end_without_output(self.problems[0])
            if isinstance(error, UserError) and error.told:
                raise SystemExit(2) from None
            if isinstance(error, (UserError, SettingsError)):
                fail(str(error))
            if not isinstance(error, Exception):
                raise
            if (lost := full_shared_memory(error) or lost_worker(error)) is not None:
                fail(str(lost))
            if (reason := full_memory(error)) is not None:
                fail(
                    f"not enough memory ({reason}): give a smaller --batch_size or --image_size where the command has "
                    "one, or stop other programs that use this memory"
                )
            unforeseen(error, self.out)


@contextmanager
def guarded() -> Iterator[Guard]:
    """Turns whatever the block raises, and the signals that it gets, into one line and an exit status; see `Guard`."""
    for name in ("stdout", "stderr"):  # None where they were closed before Python began (`>&-`)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  for the whole process
    guard = Guard()
    with watched_output(guard.problems), stop_signals(guard), guard.told():
        yield guard
        print(end="", flush=True)  # so that what cannot be written is known now


def say_stopped(number: int, again: str) -> None:
    """Says in one line that a signal ended the command, and how it goes on; the main process says it for all."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(1.5)  # by then a main process that got it, too, has said so and ended this one
    how = "stopped" if number == signal.SIGINT else "terminated"
    who = "" if rank == "0" else f"[process {rank}] "
    print(f"\n{who}{how}; {again}", file=sys.stderr, flush=True)


def unforeseen(error: Exception, out: Path | None) -> NoReturn:
    """Writes the traceback into a file, says in one line what happened and where that lies, and exits with status 1.

    Args:
        error: that nobody foresaw.
        out: folder for the file, if this package made it; else it is a temporary one.
    """
    what = f"unexpected {type(error).__name__}: {str(error)[:300]}"
    try:
        path = write_traceback(error, out)
    except OSError as no_file:
        fail(f"{what}; its traceback could not be written ({no_file.strerror}): SSSD_DEBUG=1 prints it", status=1)
    fail(f"{what}; its traceback is in {path}", status=1)


def write_traceback(error: Exception, out: Path | None) -> str:
    """Writes a traceback into `out`, where this package made that folder, else into a temporary file; says where."""
    if out is not None and (out / RUN_MARK).is_file():
        rank = os.environ.get("RANK", "0")
        path = str(out / ("traceback.txt" if rank == "0" else f"traceback-{rank}.txt"))
    else:
        descriptor, path = tempfile.mkstemp(prefix="sssd-traceback-", suffix=".txt")
        os.close(descriptor)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123  may be no UTF-8
        traceback.print_exception(error, file=file)
    return path


@contextmanager
def watched_output(problems: list[OSError]) -> Iterator[None]:
    """Lets the block print names that the console has no signs for, as escapes; notes what kept it from printing."""
    streams: list[Any] = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    errors = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
        # Only here can a pipe that its reader closed be told from any other pipe.
        for name in ("write", "flush"):
            setattr(stream, name, _noting(getattr(stream, name), stream, problems))
    try:
        yield
    finally:
        for stream, before in zip(streams, errors, strict=True):
            with suppress(OSError):
                stream.flush()
            del stream.write, stream.flush
            stream.reconfigure(errors=before)


def _noting(method: Callable[..., Any], stream: Any, problems: list[OSError]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except OSError as error:
            problems.append(error)
            # What is left in the buffer would be written once more when Python ends, which would complain.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            raise

    return call


def end_without_output(problem: OSError) -> NoReturn:
    """Ends a command whose output cannot be written: quietly where whoever read it has closed it."""
    if problem.errno in (errno.EPIPE, errno.EINVAL):  # EINVAL on Windows
        raise SystemExit(READER_LEFT)
    fail(f"cannot write the output: {problem.strerror}")


@contextmanager
def stop_signals(guard: Guard) -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does, in this process alone; notes the signals that come.

    Forked workers are left to their parent: a terminal sends Ctrl-C to all of them, and each would print a traceback.
    A second signal ends this process at once, and so does the first after `GRACE` seconds: imports and finalisers, for
    two, swallow what it raises.
    """
    received = guard.signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, hook = os.getpid(), sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        received.append(number)
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises errors for workers that end
            signal.signal(signal.SIGALRM, too_late)
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        raise KeyboardInterrupt

    def too_late(number: int, frame: FrameType | None) -> None:
        say_stopped(received[0], guard.again)
        os._exit(128 + received[0])

    def swallowed(problem: Any) -> None:
        if not received:  # what finalisers complain of after it is of no use to anybody
            hook(problem)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    sys.unraisablehook = swallowed
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # when all is done, Ctrl-C needs no traceback either
    try:
        yield
    finally:
        if not received:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)
