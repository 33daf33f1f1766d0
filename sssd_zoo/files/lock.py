"""A lock lets one command at a time write into a folder; it names its process, so that a dead one does not hold it."""

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
    """Locks a folder for this process; a lock of a process that is gone is taken over.

    Raises:
        UserError: naming the process that holds this folder, a parent or a sub-folder of it.
    """
    path = folder / LOCK
    for _ in range(100):
        # The file itself is locked only while it is inspected, so that two commands cannot both take over.
        with path.open("a+", encoding="utf-8") as file:
            with suppress(OSError):  # file systems without file locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # its holder has just released it: this is no longer the file of that name
            refuse_if_held(path)
            file.truncate(0)
            file.write(json.dumps(_this_process()))
        break
    else:
        raise UserError(f"cannot lock {path}: other commands keep taking it; try again, or give another --out")
    try:
        for other in (*(above / LOCK for above in folder.absolute().parents), *folder.rglob(f"*/{LOCK}")):
            refuse_if_held(other)
    except UserError:
        release(folder)
        raise


def release(folder: Path) -> None:
    """Releases the lock if it is this process's."""
    content = _read(folder / LOCK)
    if content is not None and _is_this_process(content):
        (folder / LOCK).unlink(missing_ok=True)


def refuse_if_held(path: Path) -> None:
    """Raises `UserError` if a lock file names another running process, or one on another machine."""
    content = _read(path)
    if content is None or _is_this_process(content):
        return
    who = f"{path.parent} is in use by `{content['command']}`, process {content['pid']} on {content['host']}"
    if content["host"] != platform.node():
        raise UserError(f"{who}: wait for it or give another --out; if that process is gone, delete {path}")
    if _runs(**content):
        raise UserError(f"{who}: wait for it or give another --out")


def alive(pid: int) -> bool:
    """Whether another process of this machine has this id."""
    return pid != os.getpid() and bool(psutil.pid_exists(pid))


def _this_process() -> dict[str, Any]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": psutil.Process().create_time(),
        "command": command,
    }


def _is_this_process(content: dict[str, Any]) -> bool:
    return content["host"] == platform.node() and content["pid"] == os.getpid() and _runs(**content)


def _runs(pid: int, started: float, **_: Any) -> bool:
    """Whether the process that started then still runs; its id may have been reused since."""
    try:
        process = psutil.Process(pid)
        # The start time varies by fractions of a second as the system clock is corrected.
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a lock file; None if there is none, or its writer was killed before writing it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds: dict[str, Any] = {"pid": int, "host": str, "started": (int, float), "command": str}
    whole = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    return content if whole else None
