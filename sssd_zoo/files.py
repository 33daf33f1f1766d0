"""Atomic writes: every file or folder of a run is written under a temporary name and renamed when it is complete.

A reader therefore sees the old content or the new, never half of one, whatever kills the writer. A full disk is the
user's to mend, so it surfaces as a `UserError`, with nothing left behind.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sssd_zoo.errors import UserError
from sssd_zoo.ranges import problems

RUN_MARK = ".sssd-zoo.json"  # in every folder that a command creates: what it holds is never read as data


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk under `path` into a `UserError`; other errors pass."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
        errno.EFBIG: "the file is larger than the file-size limit",
    }
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None:
            # safetensors and torch.save raise exceptions of their own, with the system's error in the text.
            number = next((code for code in reasons if f"os error {code})" in str(error)), None)
        if number is None and "PytorchStreamWriter failed" in str(error):
            number = errno.ENOSPC
        if number not in reasons:
            raise
        raise UserError(f"cannot write {path}: {reasons[number]}; nothing half written was left") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _sync(path: Path) -> None:
    # Without this a power cut after the rename can leave an empty file under the final name.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all; makes the parent folders."""
    path = Path(path)
    temporary = _temporary(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all; what UTF-8 has no bytes for, as an escape."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, kind: Any = Any) -> Any:
    """Reads a JSON file.

    Args:
        path: of the file.
        kind: what it is to hold, most often a `TypedDict`; see `ranges.problems`.

    Raises:
        UserError: if the file is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    check_content(path, content, kind)
    return content


def check_content(path: str | Path, content: Any, kind: Any) -> None:
    """Raises `UserError` if what was read from a file is not of the type `kind`; see `ranges.problems`."""
    if wrong := problems(content, kind):
        raise UserError(f"{path} is not as this package writes it: {wrong[0]}")


def publish_dir(temporary: Path, path: Path) -> None:
    """Renames the complete folder `temporary` onto `path`, its files safely on disk first; an old `path` is removed."""
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            _sync(file)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    An older folder at `path` is replaced; for an instant between two renames neither is there, so readers that must
    always find one keep more than one (checkpoints do).
    """
    path = Path(path)
    temporary = _temporary(path)
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            publish_dir(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
