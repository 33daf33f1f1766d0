"""What the files of a split's images tell without decoding them: their names, and which are the same."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_zoo.data.images import EncodedImages

CHUNK = 1024  # rows that are read at a time


def image_names(images: EncodedImages, rows: NDArray[np.int64]) -> list[str]:
    """What images are called: their paths below the folder that holds them all, or 'row 12' where they have none.

    Args:
        images: of a split.
        rows: int64 [N], row numbers of the split.
    """
    paths: list[str | None] = []
    for column in _columns(images, rows):
        paths += column.field("path").to_pylist()
    folders = {os.path.dirname(path) for path in paths if path}  # noqa: PTH120  100,000 of them, some of them URLs
    absolute = bool(folders) and all(map(os.path.isabs, folders))
    above = os.path.commonpath(folders) if absolute else ""
    return [
        (os.path.relpath(path, above) if absolute else path) if path else f"row {row}"
        for path, row in zip(paths, rows.tolist(), strict=True)
    ]


def identical(images: EncodedImages, rows: NDArray[np.int64]) -> list[list[int]]:
    """Images whose files have the same bytes. Only files of the same size are read.

    Args:
        images: of a split.
        rows: int64 [N], row numbers of the split.

    Returns:
        Groups of at least two positions in `rows`, each in order, the group of the first image first.
    """
    sizes = np.concatenate([_sizes(column) for column in _columns(images, rows)])
    _, kind, count = np.unique(sizes, return_inverse=True, return_counts=True)
    alike = np.flatnonzero((count[kind] > 1) & (sizes > 0))
    groups: dict[bytes, list[int]] = defaultdict(list)
    for start in range(0, len(alike), CHUNK):
        places = alike[start : start + CHUNK]
        for place, image in zip(places.tolist(), images.read(rows[places]), strict=True):
            if image.error is None:
                groups[hashlib.blake2b(image.data, digest_size=16).digest()].append(place)
    return sorted(group for group in groups.values() if len(group) > 1)


def _columns(images: EncodedImages, rows: NDArray[np.int64]) -> Iterator[Any]:
    """The undecoded images as Arrow structs of `bytes` and `path`, some rows at a time."""
    for start in range(0, len(rows), CHUNK):
        table = images.rows[rows[start : start + CHUNK].tolist()]
        yield table.column(images.column).combine_chunks()


def _sizes(column: Any) -> NDArray[np.int64]:
    """The images' sizes in bytes; 0 of a file that cannot be looked at."""
    inside = [None if value is None else len(value) for value in column.field("bytes").to_pylist()]
    paths = column.field("path").to_pylist()
    return np.array([_size_of(path) if size is None else size for size, path in zip(inside, paths, strict=True)])


def _size_of(path: str | None) -> int:
    try:
        return Path(path or "").stat().st_size if path else 0
    except OSError:  # removed since, or the address of a streamed file
        return 0
