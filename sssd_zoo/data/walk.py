"""Finds the images in a folder, for training and for `sssd predict`: each regular file once, despite links."""

import logging
import os
import stat
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath

from sssd_zoo.data.formats import ARRAYS, EXTENSIONS, LFS_POINTER, SHARDS, UNREAD
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plural
from sssd_zoo.files import RUN_MARK

logger = logging.getLogger("sssd_zoo")

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of the Hub's image folders
# Folders that operating systems create: they hold thumbnails, deleted images or unreadable files.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@dataclass
class FolderContent:
    """What a folder and its sub-folders hold: sorted paths relative to it.

    Attributes:
        root: the folder.
        images: files with an image's extension, also if they cannot be opened: decoding reports those.
        parquet: parquet files, without `metadata`.
        metadata: files of `METADATA_NAMES`.
        shards: tar files, which may be WebDataset's.
        endings: of what counts as an image.
        unread: number of images in unsupported formats, by extension.
        others: number of other files.
        left_out: paths that were skipped, by reason.
    """

    root: Path
    images: list[PurePath] = field(default_factory=list)
    parquet: list[PurePath] = field(default_factory=list)
    metadata: list[PurePath] = field(default_factory=list)
    shards: list[PurePath] = field(default_factory=list)
    endings: tuple[str, ...] = EXTENSIONS
    unread: Counter[str] = field(default_factory=Counter)
    others: int = 0
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def warn(self) -> None:
        """Warns, in the main process, about what looks like data but is not read."""
        if self.describe():
            warn_once(f"not read in {self.root}: {self.describe()}")

    def describe(self) -> str:
        """What looks like data but is not read, on one line; '' if there is nothing."""
        beside = bool(self.shards and (self.images or self.parquet))
        parts = (
            [f"{plural(len(self.shards), '.tar file')} (unpack them, or give the folder of those alone)"]
            if beside
            else []
        )
        parts += [
            f"{plural(count, f'{ending} file')} ({UNREAD[ending]})" for ending, count in self.unread.most_common()
        ]
        parts += [f"{len(names)} {reason} ({listed(names)})" for reason, names in self.left_out.items()]
        return "; ".join(parts)

    def no_images(self) -> UserError:
        """The error to raise if there is nothing to read."""
        if self.unread or self.left_out:
            return UserError(f"{self.root} holds no images that can be read: {self.describe()}")
        if others := self.others + len(self.parquet) + len(self.metadata):
            return UserError(
                f"{self.root} holds no images: none of its {others} files ends in {' '.join(self.endings)}"
            )
        return UserError(f"{self.root} is empty: give a folder with images or parquet files")


def walk(root: Path, *, arrays: bool = False) -> FolderContent:
    """Looks through a folder and its sub-folders, except hidden files and folders.

    Each file and folder is taken once, by device and inode, and under its own name even if links lead to it. Links out
    of the folder are followed, except to a parent of it. Run folders of this package are not data.

    Args:
        root: the folder.
        arrays: count files of NumPy arrays as images.

    Raises:
        UserError: if it, or a folder below it, cannot be read, or if it is a run folder.
    """
    content = FolderContent(root, endings=EXTENSIONS + ARRAYS if arrays else EXTENSIONS)
    if not _is_text(str(root)):
        raise UserError(f"the name of {printable(root)} is not UTF-8: rename it")
    if (root / RUN_MARK).exists():
        raise UserError(
            f"{root} is a run folder of this package ({RUN_MARK} marks it), not data: give a folder of images"
        )
    inside = root.resolve()
    seen = {_identity(folder.stat()) for folder in (inside, *inside.parents)}
    folders, links = [PurePath()], deque[PurePath]()
    title = f"looking through {root.name}"
    counted = progress_bar(None, title, "files", delay=2, leave=False, disable=rank() != 0)
    while folders or links:
        # Links come last, so that what can be reached both ways is taken under its own name.
        if not folders:
            link = links.popleft()
            if _take(link, root / link, content, seen, linked=True):
                folders.append(link)
            continue
        folder = folders.pop()
        for entry in _entries(folder, content):
            counted.update(1)
            path = folder / entry.name
            if entry.is_symlink():
                links.append(path)
            elif _take(path, entry, content, seen, linked=False):
                folders.append(path)
    counted.close()
    for files in (content.images, content.parquet, content.metadata, content.shards):
        files.sort(key=PurePath.as_posix)
    return content


def _entries(folder: PurePath, content: FolderContent) -> list["os.DirEntry[str]"]:
    """The entries of a folder, sorted; none for a run folder."""
    try:
        with os.scandir(content.root / folder) as opened:
            entries = {entry.name: entry for entry in opened}
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    # Runs of earlier versions have no mark.
    old_run = folder.parts and "config.yaml" in entries and not {"steps", "checkpoints"}.isdisjoint(entries)
    if RUN_MARK in entries or old_run:
        content.left_out["run folders of this package"].append(folder.as_posix())
        return []
    return [entries[name] for name in sorted(entries) if not name.startswith(".") and name not in SYSTEM_FOLDERS]


def _take(
    path: PurePath,
    entry: "Path | os.DirEntry[str]",
    content: FolderContent,
    seen: set[tuple[int, int]],
    *,
    linked: bool,
) -> bool:
    """Adds a file to `content`; returns True for a folder to look through."""
    ending = path.suffix.lower()
    files = (
        content.metadata
        if path.name in METADATA_NAMES
        else content.images
        if ending in content.endings
        else content.parquet
        if ending == ".parquet"
        else content.shards
        if ending in SHARDS
        else None
    )
    status: os.stat_result | None
    try:
        status = entry.stat()
    except OSError:  # a broken link, or a file that has just gone
        status = None
    folder = status is not None and stat.S_ISDIR(status.st_mode)
    if not folder and files is None:
        if ending in UNREAD:
            content.unread[ending] += 1
        else:
            content.others += 1
    elif not _is_text(path.name):
        content.left_out["names that are not UTF-8, rename them"].append(printable(path))
    elif status is None and files is content.images:
        files.append(path)  # decoding reports it with the reason
    elif status is None:
        content.left_out["broken links"].append(path.as_posix())
    elif not folder and not stat.S_ISREG(status.st_mode):
        content.left_out["pipes, sockets or devices"].append(path.as_posix())
    elif _identity(status) in seen and (folder or linked or status.st_nlink > 1):
        content.left_out["links to what is read already"].append(path.as_posix())
    else:
        seen.add(_identity(status))
        if files is not None and not folder:
            files.append(path)
        return folder
    return False


def refuse_pointers(files: list[Path], origin: Path) -> None:
    """Raises `UserError` if files are still git-lfs pointers."""
    pointers = []
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                pointers.append(file.name)
    if pointers:
        raise UserError(
            f"{len(pointers)} of {len(files)} files of {origin} are git-lfs pointers, not data ({listed(pointers)}): "
            "run `git lfs pull` in the data set's folder"
        )


@cache
def warn_once(text: str) -> None:
    """Warns in the main process, only once: a command opens its data set once per split."""
    if rank() == 0:
        logger.warning("%s", text)


def printable(path: PurePath) -> str:
    """A path with bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
