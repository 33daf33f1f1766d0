"""Features on disk: a .npy file that all processes write, each its own rows, and that is read a part at a time.

Both map no more of the file than a part, so that a process's memory does not grow with the file: at the paper's
largest, 1.28 million x 2048, it holds 10.5 GB.
"""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sssd_zoo.distributed import barrier, rank, world_size
from sssd_zoo.errors import UserError
from sssd_zoo.files import disk_errors
from sssd_zoo.labels.kmeans import normalise

FloatArray = npt.NDArray[np.float32]


def shard(batches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's part of the batches: whole ones, so that every row is computed as one process would."""
    part = -(-len(batches) // world_size())
    return batches[rank() * part : (rank() + 1) * part]


def write_features(
    path: Path, count: int, batches: Iterator[tuple[Tensor, Tensor]], *, dtype: type = np.float32, unit: bool = True
) -> None:
    """Writes the features of all images into one .npy file, [count, D], whole or not at all.

    Every process calls it with its own batches, and all must see the same file system. The file gets its name once the
    last row is in it; one that a killed run left half written is written anew.

    Args:
        path: file to write.
        count: N, images of all processes together.
        batches: this process's positions, int64 [B] in 0..count-1, and features, float32 [E, B, D], of which the last
            exit's are kept. The main process has at least one.
        dtype: of the file.
        unit: divide the features of each image by their L2 norm.

    Raises:
        UserError: if the disk is full or not writable, or a process does not see the file of the main one.
    """
    partial = _partial(path)
    first = next(batches, None)
    with disk_errors(path):
        try:
            if rank() == 0:
                assert first is not None
                _reserve(partial, (count, first[1].shape[2]), dtype)
            barrier()
            for positions, features in chain([first] if first is not None else [], batches):
                # A mapping of its own for each batch: what is written does not stay in this process's memory.
                values = features[-1].numpy()
                _opened(partial)[positions.numpy()] = normalise(values) if unit else values
            barrier()
            if rank() == 0:
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
                partial.replace(path)
            barrier()
        finally:
            if rank() == 0:
                partial.unlink(missing_ok=True)


def remove_features(path: Path) -> None:
    """Removes a file of features, and what a killed run left half written of it."""
    path.unlink(missing_ok=True)
    _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _reserve(path: Path, shape: tuple[int, int], dtype: type) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A hole in a mapped file that the full disk cannot fill would kill the process by a signal, without a word.
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _opened(path: Path) -> Any:
    try:
        return np.lib.format.open_memmap(path, mode="r+")
    except FileNotFoundError as error:
        raise UserError(
            f"process {rank()} does not see {path}, which the main process made: give an --out on a file system that "
            "all nodes share"
        ) from error


class FeatureFile:
    """The rows of a .npy file, a part at a time.

    Args:
        path: of float32 [N, D].

    Attributes:
        shape: N and D.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            array = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the features in {self.path}: {error}; make them again") from error
        if array.dtype != np.float32 or array.ndim != 2:
            raise UserError(f"{self.path} holds {array.dtype} {list(array.shape)}; features are float32 [N, D]")
        self.shape: tuple[int, int] = array.shape
        self._begin: int = array.offset

    def part(self, place: slice) -> FloatArray:
        """Rows next to one another: a mapping, in memory only as long as it is used."""
        found: FloatArray = np.load(self.path, mmap_mode="c")[place]  # copy-on-write: the file stays as it is
        return found

    def rows(self, numbers: npt.NDArray[np.integer]) -> FloatArray:
        """Rows from anywhere, a copy. They are read, not mapped: a mapping would bring in much of what lies around."""
        found = np.empty((len(numbers), self.shape[1]), dtype=np.float32)
        with self.path.open("rb", buffering=0) as file:
            for row, number in zip(found, numbers.tolist(), strict=True):
                file.seek(self._begin + number * row.nbytes)
                file.readinto(row.data)
        return found

    def chunks(self, size: int, least: int = 1) -> Iterator[tuple[slice, FloatArray]]:
        """All rows in order, `size` at a time: their place, and float32 [size, D].

        Args:
            size: of a chunk.
            least: a remainder of fewer rows goes with the chunk before it.
        """
        n = self.shape[0]
        starts = [start for start in range(0, n, size) if start == 0 or n - start >= least]
        for start, stop in zip(starts, [*starts[1:], n], strict=True):
            place = slice(start, stop)
            yield place, self.part(place)
