"""One command at a time writes into a folder: a lock that names its process, so that a dead one does not hold it."""

import fcntl
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sssd_zoo.errors import UserError

LOCK = ".sssd-zoo.lock"


def take(folder: Path) -> None:
    """Takes a folder's lock for this process; that of a process that is gone is taken over.

    Raises:
        UserError: that names the process holding this folder, one above it or one in it.
    """
    path = folder / LOCK
    for _ in range(100):
        # The file itself is locked only for as long as it is looked at, so that two commands cannot both take over.
        with path.open("a+", encoding="utf-8") as file:
            with suppress(OSError):  # file systems without such locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # its holder has just released it: this is no longer the file of that name
            refuse_if_held(path)
            file.truncate(0)
            file.write(json.dumps(_this_process()))
        break
    else:
        raise UserError(f"cannot lock {path}")
    try:
        for other in (*(above / LOCK for above in folder.absolute().parents), *folder.rglob(f"*/{LOCK}")):
            refuse_if_held(other)
    except UserError:
        release(folder)
        raise


def release(folder: Path) -> None:
    """Gives the lock back, where it is this process's."""
    content = _read(folder / LOCK)
    if content is not None and _is_this_process(content):
        (folder / LOCK).unlink(missing_ok=True)


def refuse_if_held(path: Path) -> None:
    """Raises `UserError` if a lock file names another process that lives, or one of another machine."""
    content = _read(path)
    if content is None or _is_this_process(content):
        return
    who = f"{path.parent} is in use by `{content['command']}`, process {content['pid']} on {content['host']}"
    if content["host"] != platform.node():
        raise UserError(f"{who}: wait for it or give another --out; if that process is gone, delete {path}")
    if _runs(**content):
        raise UserError(f"{who}: wait for it or give another --out")


def alive(pid: int) -> bool:
    """Whether another process of this machine has that number."""
    return pid != os.getpid() and bool(psutil.pid_exists(pid))


def _this_process() -> dict[str, Any]:
    words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": psutil.Process().create_time(),
        "command": words,
    }


def _is_this_process(content: dict[str, Any]) -> bool:
    return content["host"] == platform.node() and content["pid"] == os.getpid() and _runs(**content)


def _runs(pid: int, started: float, **_: Any) -> bool:
    """Whether the process that started then still runs: its number may have gone to another one since."""
    try:
        process = psutil.Process(pid)
        # Of one process, too, it moves by fractions of a second, as the clock it is counted from is corrected.
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock file says; None if there is none, or its writer was killed before it had written it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if {"pid", "host", "started", "command"} <= content.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
