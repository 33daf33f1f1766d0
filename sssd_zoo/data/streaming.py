"""Streams data sets that are too large to store, split by process and shuffled in a buffer.

This is for pretraining, which needs neither labels nor row numbers; every other step needs both.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from sssd_zoo.configs import DataConfig
from sssd_zoo.data import columns, sources
from sssd_zoo.data.images import Corrupt, decode_batch, natural_size
from sssd_zoo.data.loading import CorruptTally, Statistics, statistics_of
from sssd_zoo.data.opening import Encoded, encoded
from sssd_zoo.data.pixels import Channelled, pixel_format
from sssd_zoo.data.several import open_data
from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.errors.network import lost_connection

BUFFER = 4096  # encoded images from which the next one is drawn
SAMPLED_SIZES = 16  # first images, whose sizes decide the storage size
MEASURED, PART = 1024, 64  # first images, whose mean and std stand for those of all, and how many at a time
SHARDS = 64  # parts of a local data set, read in a different order each epoch


class StreamingImages(Channelled):
    """A stream of images without labels; `load_streaming` makes it.

    Attributes:
        name: name of the data.
        split: the split's name.
        revision: of the data set on the Hub, as it was given.
        size: side S of the images.
        count: number of rows if that is known, else None.
        pixels: channels and bits of the images; None for RGB of 8 bits.
        corrupt: path or hash, and reason, of each image that this process could not decode.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        config: DataConfig,
        name: str,
        split: str,
        *,
        count: int | None,
        default_size: int,
    ) -> None:
        self.name, self.split, self.revision, self.count = name, split, config.revision, count
        self._rows, self._column, self._workers = rows, column, max(1, 2 if config.workers is None else config.workers)
        self._max_pixels = config.max_pixels
        self._tally = CorruptTally(f"{name} ({split})", config.max_corrupt)
        first = [_encoded(row[column]) for row in rows.take(SAMPLED_SIZES)]
        if not first:
            raise UserError(f"{name} ({split}) has no rows: choose another split")
        self.pixels = pixel_format(config, first)
        self.size = config.storage_size or natural_size(first) or default_size
        digests = (hashlib.sha256(image.data).digest() for image in first)
        self._first = hashlib.sha256(b"".join(digests)).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the images from others, for the check on resume: their number and the first of them."""
        how = {} if self.pixels is None else self.pixels.identity
        where = {"data": self.name, "split": self.split, "revision": self.revision, "images": self.count}
        return {**where, "first_images": self._first, "storage_size": self.size, **how}

    @cached_property
    def statistics(self) -> Statistics | None:
        """Mean and std of the channels over the first 1,024 images; None for RGB of 8 bits, which has ImageNet's."""
        if self.pixels is None:
            return None
        rows = (_encoded(row[self._column]) for row in self._rows.take(MEASURED))
        return statistics_of(map(self._decoded, iter(lambda: list(islice(rows, PART)), [])), self.pixels.channels)

    def _decoded(self, images: list[Encoded]) -> Tensor:
        batch, _, corrupt = decode_batch(images, self.size, map, self._max_pixels, self.pixels)
        self._tally.add(corrupt, len(images), shared=True)
        return batch

    def move(self, device: torch.device) -> None:
        """Nothing: a stream is never in memory."""

    @property
    def corrupt(self) -> list[Corrupt]:
        """The corrupt images found so far."""
        return self._tally.corrupt

    def batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches without end: after the last row the stream restarts in a new order.

        So processes with different numbers of rows never wait for one another; the caller decides how long an epoch is.

        Args:
            batch_size: images per step, over all processes.
            seed: random seed of the order.
            epoch: the order is a function of seed, epoch, rank and world.
            start: steps to skip: their rows are read, but not decoded.
            rank: number of this process.
            world: number of processes; each gets its own shards if they divide evenly, else every world-th row.

        Yields:
            The position of each image in this process's stream, int64 [batch_size / world], and the images, uint8
            [batch_size / world, 3, S, S] or as `pixels` says. A corrupt image is replaced, in both, by another of
            its batch; a batch of corrupt images alone is replaced by the first that is not.

        Raises:
            UserError: if the batch size is not a multiple of the processes, too many images are corrupt, or the
                connection to the data is lost.
        """
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch_size {batch_size} must be a positive multiple of the {world} processes")
        part = batch_size // world
        rows = islice(self._endless(seed, epoch, rank, world), start * part, None)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self._workers) as pool:

            def read() -> tuple[Tensor, Any, list[Corrupt]]:
                with self._connected():
                    images = [_encoded(row) for row in islice(rows, part)]
                return decode_batch(images, self.size, pool.map, self._max_pixels, self.pixels)

            ahead = reader.submit(read)
            for step in count(start):
                images, places, corrupt = ahead.result()
                ahead = reader.submit(read)
                self._tally.add(corrupt, part + 1)
                if corrupt and len(corrupt) == part:
                    images = self._first_good.expand_as(images).clone()
                yield torch.from_numpy(places) + step * part, images

    @cached_property
    def _first_good(self) -> Tensor:
        """The first image that can be decoded, of those whose sizes are looked at."""
        found: list[Corrupt] = []
        for row in self._rows.take(SAMPLED_SIZES):
            image, _, corrupt = decode_batch(
                [_encoded(row[self._column])], self.size, map, self._max_pixels, self.pixels
            )
            if not corrupt:
                return image
            found += corrupt
        self._tally.add(found, len(found))
        raise AssertionError("all of them are corrupt, which the tally refuses")

    def share_corrupt(self) -> None:
        """Counts the corrupt images that the other processes met; every process calls it.

        Raises:
            UserError: if all processes together met more than `max_corrupt`.
        """
        self._tally.share()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Says what to do where the connection to the data is lost in the block."""
        try:
            yield
        except Exception as error:  # of any client
            if (reason := lost_connection(error)) is None:
                raise
            raise UserError(
                f"the connection to {self._tally.origin} was lost ({reason}): run the same command with --resume to go "
                "on from the last checkpoint"
            ) from error

    def _endless(self, seed: int, epoch: int, rank: int, world: int) -> Iterator[Any]:
        from datasets.distributed import split_dataset_by_node

        for again in count():
            # One seed, as `set_epoch` is lost when `datasets` splits by process. Odd factors keep triples distinct.
            mixed = (seed * 0x9E3779B1 + epoch * 0x85EBCA77 + again * 0xC2B2AE3D) % 2**63
            rows = self._rows.shuffle(seed=mixed, buffer_size=BUFFER)
            row = None
            for row in split_dataset_by_node(rows, rank, world):
                yield row[self._column]
            if row is None:
                raise UserError(f"{self._tally.origin} has fewer rows than there are processes, {world}: start fewer")


def load_streaming(config: DataConfig, *, default_size: int = 224, progress: bool = True) -> StreamingImages:
    """Opens a split as a stream.

    Args:
        config: which images; `in_memory`, `label_column` and `unlabelled` are ignored.
        default_size: storage size of images that are not small, square and equal in size.
        progress: show the progress bars of downloads.

    Raises:
        UserError: if the data cannot be found or read, or the split or column does not exist.
    """
    from datasets import Dataset, Image

    if "[" in (config.split or ""):
        raise UserError(f"split {config.split!r}: a stream has no row numbers, so no part of a split; drop --streaming")
    name = sources.short_name(config.data)
    splits = open_data(config, progress=progress and rank() == 0, streaming=True)
    split = columns.pick_split(splits, config.split, name)
    rows = splits[split]
    stated = rows.info.splits
    count = stated[split].num_examples if stated and split in stated else None
    if isinstance(rows, Dataset):
        count = len(rows)
        rows = rows.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(rows))))
    if rows.features is None:
        rows = rows._resolve_features()
    column = columns.image_column(rows.features, config.image_column, name)
    rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
    return StreamingImages(rows, column, config, name, split, count=count, default_size=default_size)


def _encoded(image: dict[str, Any] | None) -> Encoded:
    """An encoded image, named by its path or else its hash, as streams have no row numbers."""
    name = (
        image["path"] or f"image {hashlib.sha256(image['bytes'] or b'').hexdigest()[:12]}" if image else "an empty row"
    )
    return encoded(name, image)
