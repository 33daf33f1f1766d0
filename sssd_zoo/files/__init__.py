"""Atomic writes: every file or folder of a run is written under a temporary name and renamed when it is complete.

So a reader sees the old content or the new, never a part of it, whatever kills the writer. A full disk is for the user
to fix, so it is a `UserError`, and nothing is left behind.
"""

import csv
import errno
import hashlib
import io
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

RUN_MARK = ".sssd-zoo.json"  # in every folder that a command creates; such folders are never read as data
# What a killed writer leaves behind: an incomplete file or folder, the one being replaced, or its features. The names
# are such as no other program gives.
LITTER = re.compile(r"\.(?P<name>.+)\.sssd-((tmp|old)-(?P<pid>\d+)|features\.npy(\.partial)?)")


def expand_home(path: str) -> str:
    """A path with `~` or `~user` expanded as by the shell, also after `local-dir:`.

    Raises:
        UserError: if there is no such user.
    """
    prefix, path = ("local-dir:", path[10:]) if path.startswith("local-dir:") else ("", path)
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises RuntimeError, and drops a last slash
    if expanded.startswith("~"):
        raise UserError(
            f"{path}: there is no user '{path[1:].split('/')[0]}' here; for a file of that name give ./{path}"
        )
    return prefix + expanded


@contextmanager
def disk_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Turns a full or read-only disk under `path` into a `UserError`, whose end `remedy` is; other errors pass."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.ENOTDIR: "a parent of it is a file, not a folder",
        errno.EEXIST: "a parent of it is a file, not a folder",
        errno.EFBIG: "the file is larger than the file-size limit",
        errno.ENAMETOOLONG: "the name is too long",
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
            raise UserError(
                f"cannot write {path}: its folder was removed while the command ran; run the command again"
            ) from error
        if number not in reasons:
            raise
        if (other := _file_elsewhere(error, path)) is not None:
            raise UserError(f"cannot open {other}: {reasons[number]}") from error
        raise UserError(f"cannot write {path}: {reasons[number]}; no incomplete file is left{remedy}") from error


def _file_elsewhere(error: Exception, path: Path) -> str | None:
    """The file that an error is about, if it is neither beside `path` nor a parent of it that was to be made."""
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, bytes, Path)):
        return None
    file, target = Path(os.fsdecode(name)).absolute(), path.absolute()
    return None if file.is_relative_to(target.parent) or target.is_relative_to(file) else str(file)


def temporary_name(path: Path) -> Path:
    """The temporary path at which this process writes `path`."""
    return path.with_name(f".{path.name}.sssd-tmp-{os.getpid()}")


def old_name(path: Path, process: int | str) -> Path:
    """Where a process puts what it replaces at `path`, until the new is there."""
    return path.with_name(f".{path.name}.sssd-old-{process}")


def _sync(path: Path) -> None:
    # Without this a power cut after the rename can leave an empty file under the final name.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | Path, data: bytes, *, follow_link: bool = False) -> None:
    """Writes `data` to `path`, completely or not at all; creates its parent folders.

    Args:
        path: the file to write.
        data: its content.
        follow_link: of a link write the file that it names, as for a file that the user named; else replace the link.
    """
    path = Path(path).resolve() if follow_link else Path(path)
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


def atomic_write_text(path: str | Path, text: str, *, follow_link: bool = False) -> None:
    """Writes `text` as UTF-8, unencodable characters as escapes; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"), follow_link=follow_link)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, completely or not at all."""
    atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def int8_beside(path: Path) -> Path:
    """Where `sssd export --int8` writes the int8 form of the graph in a file."""
    return path.with_name(path.name.removesuffix(".onnx") + ".int8.onnx")


def csv_text(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV, its lines ended by a line feed alone; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def read_json(path: str | Path, kind: Any = Any) -> Any:
    """Reads a JSON file.

    Args:
        path: the file to read.
        kind: type of its content, most often a `TypedDict`; see `ranges.problems`.

    Raises:
        UserError: if the file is missing, is not JSON, or holds another type.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    check_content(path, content, kind)
    return content


def check_content(path: str | Path, content: Any, kind: Any) -> None:
    """Raises `UserError` if what was read from a file is not of the type `kind`; see `ranges.problems`."""
    if invalid := problems(content, kind):
        raise UserError(f"{path} is not as this package writes it: {invalid[0]}")


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of files in a folder, by their relative paths; `damage` compares such a record with the files."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}


def recorded_sha256(record: Any, names: Iterable[str]) -> dict[str, str]:
    """The sha256 that an untrusted record, which may have any form, states for these files."""
    stated = record.get("sha256") if isinstance(record, dict) else None
    return {name: str(stated[name]) for name in names if name in stated} if isinstance(stated, dict) else {}


def damage(folder: Path, recorded: Mapping[str, str]) -> str | None:
    """What is wrong with the first damaged file among those whose sha256 is recorded, or None.

    Args:
        folder: the folder with the files.
        recorded: see `sha256_of`; empty for records of versions that had none.
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
    """Syncs the complete folder `temporary` to disk and renames it to `path`; an old `path` is removed.

    It is for folders that hold only files of this package; see `run_folder.replace` for others.
    """
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            _sync(file)
    old = old_name(path, os.getpid())
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)
