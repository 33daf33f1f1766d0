"""`ACCELERATE_USE_CPU`-launched runs: starting the other processes of a run on CPUs, and ending with them."""

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

from sssd_zoo.distributed import world_size
from sssd_zoo.errors import UserError

_POLL = 0.5  # seconds between looks at the other processes

_PARENT = "SSSD_ZOO_PARENT"  # in the environment of the processes that `start_other_processes` starts


def start_other_processes() -> list[subprocess.Popen[bytes]]:
    """Starts the processes that `accelerate launch --cpu --num_processes N` was asked for; this one is the first.

    Without MPI, Accelerate's launcher (seen in 1.15) starts a single process for `--cpu`, whatever N, which would then
    train on alone without a word. It leaves MASTER_PORT in the environment, but no rank; N stands on its command line.
    Other launchers (torchrun, MPI, Accelerate's own for GPUs) set the ranks themselves, end all processes when one
    fails, and are left alone.

    From here on every process watches those that it depends on, and ends when one of them is lost: a collective that
    waits for a lost process returns after the timeout of the group, which is a day, because the main process clusters
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
    words = [part for word in launcher.cmdline() for part in word.split("=", 1)]
    names = ("--num_processes", "--num-processes")
    asked = next((int(value) for name, value in pairwise(words) if name in names), 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(asked), "LOCAL_WORLD_SIZE": str(asked), "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(asked)]
    os.environ.update(ranks[0])
    environment = {**os.environ, _PARENT: str(os.getpid())}
    command = [sys.executable, *sys.orig_argv[1:]]
    others = [subprocess.Popen(command, env={**environment, **own}) for own in ranks[1:]]
    Thread(target=_watch, args=(launcher.pid, others), daemon=True).start()
    return others


@contextmanager
def others_tell_first() -> Iterator[None]:
    """Delays errors that nobody foresaw: of a lost process, a collective tells that a connection was closed.

    Until then the watch, or the launcher, has ended this process, too, and what is printed is the cause.
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
    """Waits for the processes that were started; where this one of several failed, ends it and them at once.

    Args:
        others: from `start_other_processes`.
        error: what ends this process, whose cause has been printed if it is a `SystemExit`; None if all went well.
    """
    if error is None:
        for number, process in enumerate(others, start=1):
            if process.wait():
                _end_for(number, process)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        # Not by the interpreter's own end, in which NCCL's would wait for the other processes.
        _end(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _watch(parent: int, others: list[subprocess.Popen[bytes]]) -> None:
    """Ends this process as soon as its parent is gone, or one of those that it started has failed."""
    while True:
        time.sleep(_POLL)
        for number, process in enumerate(others, start=1):
            if process.poll():
                _end_for(number, process)
        if os.getppid() != parent:
            _end(1, f"the process that started process {os.environ['RANK']} was lost, so that this one ends, too")


def _end_for(number: int, process: subprocess.Popen[bytes]) -> NoReturn:
    """Ends this process as the one of that number ended; of one that was killed, which could not tell, says so."""
    status = process.returncode
    if status > 0:
        _end(status)
    name = signal.Signals(-status).name
    _end(128 - status, f"process {number} was ended by {name}, so that all end; run the command again to resume")


def _end(status: int, message: str | None = None) -> NoReturn:
    """Ends this process and all that it started, whatever its threads wait for."""
    if message is not None:
        print(f"\nerror: {message}", file=sys.stderr)  # below the progress bar of the main thread
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed terminal or pipe
            stream.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)
