"""Starts the other processes of `accelerate launch --cpu`, and ends every process of a run when one is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from threading import Thread
from typing import NoReturn

import psutil

from sssd_zoo.distributed import leave, world_size
from sssd_zoo.errors import UserError

_POLL = 0.5  # seconds between checks of the other processes

_PARENT = "SSSD_ZOO_PARENT"  # in the environment of the processes that `start_other_processes` starts


def start_other_processes() -> list[subprocess.Popen[bytes]]:
    """Starts the other processes of `accelerate launch --cpu --num_processes N`; this one has rank 0.

    Without MPI, Accelerate's launcher (seen in 1.15) starts a single process for `--cpu`, whatever N is, which would
    silently train alone. It sets MASTER_PORT in the environment, but no rank; N is on its command line. Other launchers
    (torchrun, MPI, Accelerate's own for GPUs) set the ranks and end all processes when one fails; they need no help.

    From here on every process watches those that it depends on, and ends when one of them is lost: a collective that
    waits for a lost process returns only after the timeout of the group, which is a day, as the main process clusters
    and measures alone for hours.
    """
    if parent := os.environ.get(_PARENT):
        Thread(target=_watch, args=(int(parent), []), daemon=True).start()
        return []
    if "TORCHELASTIC_RUN_ID" in os.environ:
        Thread(target=_watch, args=(os.getppid(), []), daemon=True).start()
        return []
    ranked = {"RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys()
    if ranked or "MASTER_PORT" not in os.environ or "ACCELERATE_USE_CPU" not in os.environ:
        return []
    launcher = psutil.Process().parent()
    arguments = [part for argument in launcher.cmdline() for part in argument.split("=", 1)]
    flags = ("--num_processes", "--num-processes")
    processes = next((int(value) for flag, value in pairwise(arguments) if flag in flags), 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(processes)]
    os.environ.update(ranks[0])
    environment = {**os.environ, _PARENT: str(os.getpid())}
    command = [sys.executable, *sys.orig_argv[1:]]
    others = [subprocess.Popen(command, env={**environment, **rank}) for rank in ranks[1:]]
    Thread(target=_watch, args=(launcher.pid, others), daemon=True).start()
    return others


@contextmanager
def others_tell_first() -> Iterator[None]:
    """Delays unexpected errors: if a process is lost, a collective reports only that a connection was closed.

    By then the watching thread or the launcher has ended this process as well, and only the cause is printed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception:
        if world_size() > 1:
            time.sleep(6 * _POLL)
        raise


def end_other_processes(others: list[subprocess.Popen[bytes]], error: BaseException | None) -> None:
    """Leaves the group and waits for the processes that were started; if this one failed, ends it and them at once.

    Args:
        others: from `start_other_processes`.
        error: the exception that ends this process, already reported if it is a `SystemExit`; None if there is none.
    """
    if error is None:
        leave()
        for number, process in enumerate(others, start=1):
            if process.wait():
                _end_for(number, process)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        # Not by a normal exit, in which NCCL would wait for the other processes.
        _end(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _watch(parent: int, others: list[subprocess.Popen[bytes]]) -> None:
    """Ends this process as soon as its parent is gone, or a process that it started has failed."""
    while True:
        time.sleep(_POLL)
        for number, process in enumerate(others, start=1):
            if process.poll():
                _end_for(number, process)
        if os.getppid() != parent:
            _end(
                1,
                f"the parent of process {os.environ['RANK']} was lost, so it ends; run the command again to resume",
            )


def _end_for(number: int, process: subprocess.Popen[bytes]) -> NoReturn:
    """Ends this process with the status of the one with that number; reports it if that one was killed by a signal."""
    status = process.returncode
    if status > 0:
        _end(status)
    name = signal.Signals(-status).name
    _end(128 - status, f"process {number} was ended by {name}, so all processes end; run the command again to resume")


def _end(status: int, message: str | None = None) -> NoReturn:
    """Ends this process and all that it started, even if its threads are blocked."""
    if message is not None:
        print(f"\nerror: {message}", file=sys.stderr)  # below the progress bar of the main thread
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed terminal or pipe
            stream.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)
