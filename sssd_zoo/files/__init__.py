"""Atomic writes: every file or folder of a run is written under a temporary name and renamed when it is complete.

A reader therefore sees the old content or the new, never half of one, whatever kills the writer. A full disk is the
user's to mend, so it surfaces as a `UserError`, with nothing left behind.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sssd_zoo.configs.ranges import problems
from sssd_zoo.errors import UserError

RUN_MARK = ".sssd-zoo.json"  # in every folder that a command creates: what it holds is never read as data
# What a killed writer leaves: half of a file or folder, the one that it was about to replace, or its features.
LITTER = re.compile(r"\.(?P<name>.+)\.((tmp|old)-(?P<pid>\d+)|features\.npy(\.partial)?)")


def expand_home(path: str) -> str:
    """A path with its `~` or `~user`, behind `local-dir:` too, as the shell would expand it.

    Raises:
        UserError: if there is no such user.
    """
    prefix, path = ("local-dir:", path[10:]) if path.startswith("local-dir:") else ("", path)
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises RuntimeError, and drops a last slash
    if expanded.startswith("~"):
        raise UserError(f"{path}: there is no user '{path[1:].split('/')[0]}' here; a file of that name is ./{path}")
    return prefix + expanded


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
        if number is None and any(words in str(error) for words in ("PytorchStreamWriter failed", "unexpected pos")):
            number = errno.ENOSPC
        if number == errno.ENOENT and not path.parent.exists():
            raise UserError(f"cannot write {path}: its folder was removed while the command ran") from error
        if number not in reasons:
            raise
        raise UserError(f"cannot write {path}: {reasons[number]}; nothing half written was left") from error


def temporary_name(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
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
    temporary = temporary_name(path)
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


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of files in a folder, by their paths in it: what a record keeps for `damage` to compare with."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}


def recorded_sha256(record: Any, names: Iterable[str]) -> dict[str, str]:
    """What a record that may be a stranger's, of any shape and naming any files, tells of these files."""
    told = record.get("sha256") if isinstance(record, dict) else None
    return {name: str(told[name]) for name in names if name in told} if isinstance(told, dict) else {}


def damage(folder: Path, recorded: Mapping[str, str]) -> str | None:
    """What is wrong with the files of a folder whose sha256 a record tells: the first of them, or None.

    Args:
        folder: that holds them.
        recorded: see `sha256_of`; empty for a record from before there were any.
    """
    for name, expected in recorded.items():
        try:
            if sha256(folder / name) != expected:
                return f"{name} is not as it was written (its sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def publish_dir(temporary: Path, path: Path) -> None:
    """Renames the complete folder `temporary` onto `path`, its files safely on disk first; an old `path` is removed.

    It is for folders that hold nothing of others'; see `run_folder.replace` for those that may.
    """
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
