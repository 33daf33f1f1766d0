"""Rows of image files that are named one by one: lists of files, and the pages of files with several."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from sssd_zoo.data.containers import count_pages
from sssd_zoo.data.layout import split_of_parquet
from sssd_zoo.data.pixels import PAGE
from sssd_zoo.data.walk import walk, warn_once
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plural
from sssd_zoo.files import expand_home

LIST = ".txt"
LARGEST_LIST = 2**30  # bytes


def listed_files(file: Path, *, arrays: bool) -> dict[str, Any]:
    """The images that a text file names, one path per line, as a split: the one in the list's name, or 'train'.

    Paths are relative to the list's folder. A folder stands for all images below it, without labels. A file that is
    named twice, under whatever name, is read once, and that is told.

    Args:
        file: the list, in UTF-8.
        arrays: count files of NumPy arrays as images of folders.

    Raises:
        UserError: if it cannot be read, or names nothing.
    """
    from datasets import Dataset, Features, Image

    images: list[Path] = []
    for line in _lines(file):
        path = file.parent / Path(expand_home(line))
        if path.is_dir():
            found = walk(path, arrays=arrays)
            if not found.images:
                raise found.no_images()
            found.warn()
            images += [path / image for image in found.images]
        else:
            images.append(path)  # decoding reports one that is not there
    if not images:
        raise UserError(f"{file} names no images: write one path on each line")
    kept, again = without_repeats([str(image) for image in images])
    if again:
        warn_once(f"{file} names {plural(len(again), 'image')} more than once ({listed(again)}): each is read once")
    rows = Dataset.from_dict({"image": kept}, features=Features(image=Image(decode=False)))
    return {split_of_parquet(PurePath(file.name)): rows}


def _lines(file: Path) -> list[str]:
    try:
        if file.stat().st_size > LARGEST_LIST:
            raise UserError(f"{file} is no list of files: it has more than {LARGEST_LIST:,} bytes")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no list of files, or not in UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    lines = [line.strip() for line in text.splitlines()]
    if bad := [line for line in lines if "\0" in line]:
        raise UserError(f"{file} is no list of files: {len(bad)} of its lines contain a NUL character")
    return [line for line in lines if line]


def without_repeats(paths: list[str]) -> tuple[list[str], list[str]]:
    """The paths that lead to different files, in order, and those that lead to one of an earlier path."""
    seen: set[Any] = set()
    kept: list[str] = []
    again: list[str] = []
    for path in paths:
        try:
            status = Path(path).stat()
            identity: Any = (status.st_dev, status.st_ino)
        except OSError:  # decoding reports it
            identity = path
        (again if identity in seen else kept).append(path)
        seen.add(identity)
    return kept, again


def paged(splits: Mapping[str, Any], data: str) -> dict[str, Any]:
    """The splits of a folder or a list of files with a row for each page of its TIFF and DICOM files.

    The column `PAGE` has its number, from 0, and none where a file has only one.

    Args:
        splits: as they are opened.
        data: what the user called the data.

    Raises:
        UserError: if the images are no files.
    """
    from datasets import Dataset, Features, Value

    result = {}
    for split, rows in splits.items():
        if not isinstance(rows, Dataset) or rows.cache_files or "image" not in rows.features:
            raise UserError(f"--pages all is for folders and lists of image files, and {data} is none: remove it")
        table = rows.with_format("arrow")[:]
        paths = [image["path"] for image in table["image"].to_pylist()]
        counts = []
        with progress_bar(len(paths), "pages", "file", delay=2, leave=False, disable=rank() != 0) as bar:
            for path in paths:
                counts.append(count_pages(Path(path)))
                bar.update(1)
        source = [number for number, count in enumerate(counts) for _ in range(count)]
        pages = [page if count > 1 else None for count in counts for page in range(count)]
        columns = {name: table[name].take(source).to_pylist() for name in table.column_names}
        features = Features({**rows.features, PAGE: Value("int32")})
        result[split] = Dataset.from_dict({**columns, PAGE: pages}, features=features)
    return result
