"""Loads images as batches of uint8 tensors.

Data sets that fit in memory are decoded once into one tensor; others are decoded batch by batch in DataLoader workers.
Both give the same images in the same order, which `GlobalBatches` alone decides.
"""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sssd_zoo.configs import DataConfig
from sssd_zoo.data import columns, sources
from sssd_zoo.data.images import (
    CHUNK,
    Corrupt,
    EncodedImages,
    decode_batch,
    empty,
    fingerprint,
    natural_size,
    quiet_pillow,
    spaced,
    take,
)
from sssd_zoo.data.opening import Encoded, pages_of, within_limit
from sssd_zoo.data.pixels import Channelled, PixelFormat, moments, pixel_format, shown
from sssd_zoo.data.several import open_data
from sssd_zoo.data.walk import warn_once
from sssd_zoo.distributed import gather_lists, rank
from sssd_zoo.distributed.hardware import decoding_workers
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.errors.memory import full_shared_memory, lost_worker
from sssd_zoo.errors.text import listed, plural
from sssd_zoo.files import expand_home

Batch = TypeVar("Batch")

logger = logging.getLogger("sssd_zoo")

NAMED = 10  # corrupt images that a message names; all of them are in `ImageData.corrupt`

SAMPLED_SIZES = 256  # evenly spaced images whose sizes decide the storage size


MEASURED, MEASURED_BATCH = 10_000, 256  # images whose mean and std stand for those of all

# Small images from which processes decode all of them, not threads: only the codec runs without Python's lock, so that
# threads decode small images no faster than one of them would.
IN_PROCESSES = 20_000

MOST_SHARED = 2**19  # bytes of images that a process hands over at a time: containers have little shared memory


class Statistics(NamedTuple):
    """Mean and std of each channel, of values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics_of(batches: Iterable[Tensor], channels: int) -> Statistics:
    """Mean and std over images, uint8 or uint16 [B, C, S, S] each; the std of a constant channel is 1."""
    count, total, squares = 0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for images in batches:
        sums = moments(images)
        count += len(images) * images.shape[2] * images.shape[3]
        total, squares = total + sums[0], squares + sums[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std < 1e-6, 1.0, std)
    return Statistics(*(tuple(float(f"{value:.6g}") for value in values.tolist()) for values in (mean, std)))


class CorruptTally:
    """Counts and names corrupt images, each once, and raises an error if there are too many.

    Args:
        origin: name of the data, for messages.
        limit: number of images that may be skipped.
    """

    def __init__(self, origin: str, limit: int) -> None:
        self.origin, self.limit = origin, limit
        self.corrupt: list[Corrupt] = []

    def add(self, corrupt: list[Corrupt], tried: int, *, shared: bool = False) -> None:
        """Adds the corrupt ones of `tried` images; if all processes find the same (`shared`), only one reports them.

        Raises:
            UserError: if the limit is exceeded, or all of them are corrupt.
        """
        known = set(self.corrupt)
        new = [image for image in dict.fromkeys(corrupt) if image not in known]
        self.corrupt += new
        told = shared and rank() != 0
        self._check(told=told)
        if corrupt and len(corrupt) == tried:
            raise _told(
                f"none of {tried} images of {self.origin} can be decoded ({_named(corrupt)}): check that they are "
                "complete, or give other data",
                told,
            )
        if new and not told:
            total = len(self.corrupt)
            logger.warning("skipped %d corrupt images of %s, %d so far (%s)", len(new), self.origin, total, _named(new))

    def share(self) -> None:
        """Adds what the tallies of the other processes hold, which have told of it; every process calls this.

        Raises:
            UserError: if the limit is exceeded by all of them together.
        """
        known = set(self.corrupt)
        self.corrupt += [image for image in dict.fromkeys(gather_lists(self.corrupt)) if image not in known]
        self._check(told=rank() != 0)

    def _check(self, *, told: bool) -> None:
        if len(self.corrupt) > self.limit:
            raise _told(
                f"{plural(len(self.corrupt), 'image')} of {self.origin} cannot be decoded, more than max_corrupt "
                f"{self.limit} ({_named(self.corrupt)}): fix or remove them, or raise --max_corrupt to skip them",
                told,
            )


@dataclass(frozen=True)
class OpenedImages(Channelled):
    """A split that is open, its images counted and none of them decoded yet; `open_images` makes it.

    Attributes:
        name: see `ImageData`.
        split: see `ImageData`.
        encoded: the images.
        labels: of all rows, or None.
        size: side of the images when they are stored.
        config: which images, and how to read them.
        pixels: see `ImageData`.
        small: whether the files themselves are small, by a sample.
    """

    name: str
    split: str
    encoded: EncodedImages
    labels: columns.Labels | None
    size: int
    config: DataConfig
    pixels: PixelFormat | None
    small: bool = False

    @property
    def statistics(self) -> None:
        """Known once the images are decoded."""
        return None

    def __len__(self) -> int:
        return len(self.encoded)

    def load(self, *, verify: bool = True, progress: bool = True) -> "ImageData":
        """Computes the fingerprint and decodes the images; see `load_images`."""
        config, encoded, progress = self.config, self.encoded, progress and rank() == 0
        digest = fingerprint(encoded, progress=progress)
        keep = config.in_memory
        if keep is None:
            values = 3 if self.pixels is None else self.pixels.channels * self.pixels.bits // 8
            keep = fits_in_memory(len(encoded) * self.size * self.size * values)
        rows = np.arange(len(encoded))
        kept: Tensor | None = None
        tally = CorruptTally(f"{self.name} ({self.split})", config.max_corrupt)
        if keep or verify:
            decoder = _Decoder(encoded, rows, self.size, config.max_pixels, self.pixels, check=not keep)
            workers = decoding_workers(config.workers, None)
            run = decode_in_processes if self.small and len(encoded) >= IN_PROCESSES else decode_in_threads
            kept, rows, corrupt = decode_all(decoder, run, keep=keep, workers=workers, progress=progress)
            tally.add(corrupt, len(encoded), shared=True)
        return ImageData(self, fingerprint=digest, rows=rows, tally=tally, kept=kept)


class ImageData(Channelled):
    """A split's images, labels where it has them, and the fingerprint that pseudo labels are checked against.

    `load_images` makes it. Positions 0..len-1 count the kept images; `rows` maps them to row numbers of the split.

    Attributes:
        name: name of the data: the Hub id, or the name of the file or folder.
        split: the split's name.
        fingerprint: SHA-256 of the encoded images in their order, the same for every storage size and backend.
        rows: int64 [N], the row number of each kept image.
        labels: int64 [N] in 0..C-1, or None.
        class_names: the C names, or None.
        size: side S of the stored images.
        pixels: channels and bits of the images; None for RGB of 8 bits.
        corrupt: row number or path, and reason, of each undecodable image that is left out.
        in_memory: whether all images are decoded and kept in memory.
        encoded: the images as they are stored, by row number.
    """

    def __init__(
        self,
        source: OpenedImages,
        *,
        fingerprint: str,
        rows: NDArray[np.int64],
        tally: CorruptTally,
        kept: Tensor | None,
    ) -> None:
        self.name, self.split, self.fingerprint = source.name, source.split, fingerprint
        self.rows, self.size, self.pixels = rows, source.size, source.pixels
        labels = source.labels
        self.labels = None if labels is None else labels.values[rows]
        self.class_names = None if labels is None else labels.names
        self.corrupt = tally.corrupt
        self.in_memory = kept is not None
        self.encoded = source.encoded
        config = source.config
        self._tally, self._workers, self._kept = tally, config.workers, kept
        self._device = torch.device("cpu")
        self._root = Path(expand_home(config.data)) if isinstance(config.data, str) else None
        self._decoder = _Decoder(source.encoded, rows, source.size, config.max_pixels, source.pixels)

    def __len__(self) -> int:
        return len(self.rows)

    def shown(self, index: Tensor) -> Tensor:
        """The images at `index` for a person's eye: uint8 [B, 3, S, S], see `pixels.shown`."""
        images, statistics = self.gather(index), self.statistics
        return images if statistics is None else shown(images, statistics.mean, statistics.std)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the images from others, for the check on resume."""
        how = {} if self.pixels is None else self.pixels.identity
        return {"data": self.fingerprint, "images": len(self), "storage_size": self.size, **how}

    @cached_property
    def statistics(self) -> Statistics | None:
        """Mean and std of the channels over at most 10,000 of the images; None for RGB of 8 bits, which has ImageNet's.

        Raises:
            UserError: if too many images are corrupt.
        """
        if self.pixels is None:
            return None
        positions = torch.from_numpy(spaced(len(self), MEASURED)).split(MEASURED_BATCH)
        with progress_bar(sum(map(len, positions)), "mean and std", "img", disable=rank() != 0) as bar:
            return statistics_of(self._measured(positions, bar), self.pixels.channels)

    def _measured(self, positions: Iterable[Tensor], bar: Any) -> Iterator[Tensor]:
        for index in positions:
            yield self.gather(index)
            bar.update(len(index))

    @property
    def count(self) -> int:
        """The number of images; of a stream it may be unknown, see `StreamingImages`."""
        return len(self)

    def move(self, device: torch.device) -> None:
        """Tells where the network runs; moves the decoded images to a GPU if they fit, for good."""
        self._device = device
        if self._kept is not None and not self._kept.is_cuda and fits_on_gpu(self._kept, device):
            self._kept = self._kept.to(device)

    def gather(self, index: Tensor) -> Tensor:
        """The images at `index`, int64 [B] positions: uint8 [B, 3, S, S], or as `pixels` says.

        They are decoded now unless they are in memory.
        """
        if self._kept is not None:
            return take(self._kept, index.to(self._kept.device)).cpu()
        return self._completed(*self._decoder[index.numpy()])[1]

    def paths(self, index: NDArray[np.int64] | None = None) -> list[str | None]:
        """The files of the images at `index`, int64 [B] positions; by default of all.

        Returns:
            Paths relative to the folder of the data, with '/' between their parts; of files that lie elsewhere, and of
            several sources, as the data have them. None for an image that is no file of its own, such as a row of a
            parquet file.
        """
        files = self.encoded.files(self.rows if index is None else self.rows[index])
        roots = () if self._root is None else (self._root, self._root.absolute())
        return [None if file is None else relative_path(file, roots) for file in files]

    def batches(
        self, order: Iterable[Tensor], *, workers: int | None = None, leave_out: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Reads batches in the order given.

        Args:
            order: int64 [B] positions for each batch, as `GlobalBatches.epoch` gives them.
            workers: DataLoader processes if the images are not in memory; by default those of the configuration.
            leave_out: leave corrupt images out of their batches, which may become empty.

        Yields:
            The positions, int64 [B], and their images, uint8 [B, 3, S, S] or as `pixels` says, on the device that
            `move` put them on. A corrupt image is replaced, in both, by another of its batch, or, if all of that are
            corrupt, by the first that is not, unless `leave_out`.

        Raises:
            UserError: if more than `max_corrupt` images are corrupt.
        """
        if self._kept is not None:
            for index in order:
                yield index, take(self._kept, index.to(self._kept.device, non_blocking=True))
            return
        workers = decoding_workers(self._workers if workers is None else workers, self._device)
        for index, images, corrupt in read_in_order(self._decoder, order, workers):
            if leave_out:
                self._tally.add(corrupt, len(self))
                yield without_corrupt(index, images, corrupt)
            else:
                yield self._completed(index, images, corrupt)

    def _completed(self, index: Tensor, images: Tensor, corrupt: list[Corrupt]) -> tuple[Tensor, Tensor]:
        """A batch of the decoder, its corrupt images counted; if all of them are, another image stands for each."""
        self._tally.add(corrupt, len(self))
        if not corrupt or len(corrupt) < len(index):
            return index, images
        position, image = self._first_good
        return torch.full_like(index, position), image.expand_as(images).clone()

    @cached_property
    def _first_good(self) -> tuple[int, Tensor]:
        """Position of the first image that can be decoded, and the image: the same whenever a run is resumed."""
        found: list[Corrupt] = []
        for position in range(len(self)):
            _, image, corrupt = self._decoder[np.array([position])]
            if not corrupt:
                return position, image
            found += corrupt
            self._tally.add(found, len(self))
        raise UserError(f"{self.name} ({self.split}) has no images: choose another split")

    def share_corrupt(self) -> None:
        """Counts the corrupt images that the other processes met; every process calls it.

        Raises:
            UserError: if all processes together met more than `max_corrupt`.
        """
        self._tally.share()


def load_images(
    config: DataConfig,
    *,
    default_size: int = 224,
    require_labels: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> ImageData:
    """Opens a split, reads its labels, computes its fingerprint and decodes its images, kept in memory if they fit.

    Images that do not fit in memory are decoded once at the lowest resolution of their format to find corrupt ones, so
    that every step works on the same rows.

    Args:
        config: which images.
        default_size: storage size of images that are not small, square and equal in size.
        require_labels: make missing labels, and classes without rows, errors.
        verify: look for corrupt images now, even if they do not fit in memory. Otherwise `ImageData.batches` finds them
            while it reads, which is enough for pretraining.
        progress: show progress bars in the main process.

    Raises:
        UserError: if the data cannot be found or read, a column or split does not exist, labels are required but
            missing, or more than `max_corrupt` images are corrupt.
    """
    opened = open_images(config, default_size=default_size, require_labels=require_labels, progress=progress)
    return opened.load(verify=verify, progress=progress)


def other_split(config: DataConfig, data: ImageData, split: str | None) -> DataConfig:
    """How to read another split as `data` was: at its size and with its bits, which may be chosen by its images."""
    bits = config.bits if config.channels is None else 8 if data.pixels is None else data.pixels.bits
    return replace(config, split=split, storage_size=data.size, bits=cast(Any, bits))


def open_images(
    config: DataConfig, *, default_size: int = 224, require_labels: bool = False, progress: bool = True
) -> OpenedImages:
    """Opens a split, counts its images and reads its labels, and decodes nothing; see `load_images`.

    Args:
        config: which images, and how to read them.
        default_size: side of larger images as stored.
        require_labels: refuse images without labels.
        progress: show the bars of downloads.

    Raises:
        UserError: if the data cannot be opened, have no images, or lack labels that are required.
    """
    if config.streaming:
        raise UserError("streaming is for pretraining only, as other steps need row numbers: drop --streaming")
    if config.unlabelled and (require_labels or config.label_column is not None):
        raise UserError("--unlabelled leaves out the labels, which this step or --label_column needs: drop one of them")
    name = sources.short_name(config.data)
    splits = open_data(config, progress=progress and rank() == 0)
    splits, split = columns.take_split(splits, config.split, name)
    if len(splits[split]) == 0:
        raise UserError(f"{name} ({split}) has no rows: choose another split")
    encoded = open_encoded(splits[split], config.image_column, name, config.max_pixels)
    labels = None
    if not config.unlabelled:
        labels = columns.read_labels(splits, split, config.label_column, name, required=require_labels)
    sample = encoded.read(spaced(len(encoded), SAMPLED_SIZES))
    pixels = pixel_format(config, sample)
    if config.pages == "first":
        _tell_of_pages(sample, name, config.channels)
    size = config.storage_size or natural_size(sample) or default_size
    return OpenedImages(name, split, encoded, labels, size, config, pixels, natural_size(sample) is not None)


def _tell_of_pages(sample: Sequence[Encoded], name: str, channels: int | None) -> None:
    """Warns of files with several pages, of which one is read; those with a page for each channel are read whole."""
    several = [str(image.name) for image in sample if pages_of(image.data) not in (1, channels)]
    if several:
        warn_once(
            f"{len(several)} of {len(sample)} sampled files of {name} have several pages ({listed(several)}): the "
            "first of each is read; --pages all makes an image of every page"
        )


def split_names(config: DataConfig) -> list[str]:
    """The splits that the data set has, in its order; raises `UserError` as `load_images` does."""
    return list(open_data(config, progress=rank() == 0))


def has_labels(config: DataConfig) -> bool:
    """Whether the split that `load_images` would read has labels; no image is read."""
    if config.unlabelled:
        return False
    name = sources.short_name(config.data)
    splits = open_data(config, progress=rank() == 0)
    splits, split = columns.take_split(splits, config.split, name)
    return columns.read_labels(splits, split, config.label_column, name, required=False) is not None


def open_encoded(rows: Any, image_column: str | None, name: str, max_pixels: int) -> EncodedImages:
    """The encoded images of a split, however its image column is stored.

    Args:
        rows: the split, a `datasets.Dataset`.
        image_column: name of the column; by default the one of images.
        name: of the data set, for errors.
        max_pixels: largest number of pixels of a page of a file.

    Raises:
        UserError: if there is no such column, or several may be meant.
    """
    from datasets import Image

    column = columns.image_column(rows.features, image_column, name)
    return EncodedImages(rows.cast_column(column, Image(decode=False)), column, max_pixels)


class GlobalBatches:
    """The samples of each step: a function of (seed, epoch, step), independent of the number of processes.

    Each epoch has an order of its own, and leaves out an incomplete last batch.

    Args:
        n: number of samples.
        batch_size: samples per step, over all processes.
        seed: random seed of the order.
        rank: number of this process, 0..world-1: it gets the rank-th contiguous part of every global batch.
        world: number of processes.

    Raises:
        UserError: if the batch size is not a multiple of the processes, or exceeds the number of samples.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch_size {batch_size} must be a positive multiple of the {world} processes")
        if n < batch_size:
            raise UserError(f"batch_size {batch_size} is larger than the data set, {n} images: choose a smaller one")
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.steps_per_epoch = n // batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Yields this process's positions, int64 [batch_size / world], for the steps from `start` on."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + epoch * 0x85EBCA77) % 2**63)
        order = torch.randperm(self.n, generator=generator)
        for step in range(start, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            part = self.batch_size // self.world
            yield batch[self.rank * part : (self.rank + 1) * part]


class _Decoder(Dataset[tuple[Tensor, Tensor, list[Corrupt]]]):
    """Batches as items, for DataLoader workers: positions in; positions, images and corrupt images out.

    With `check` the images are decoded only to find the corrupt ones, those of `size` px: to a single pixel, for which
    a JPEG is decoded at the lowest of its resolutions.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        rows: NDArray[np.int64],
        size: int,
        max_pixels: int,
        pixels: PixelFormat | None,
        *,
        check: bool = False,
    ) -> None:
        self.encoded, self.rows, self.max_pixels, self.pixels = encoded, rows, max_pixels, pixels
        self.size = 1 if check else size
        self.checked_for = size if check else None

    def __getitem__(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor, list[Corrupt]]:
        with quiet_pillow():
            images = self.encoded.read(self.rows[positions])
            if self.checked_for is not None:
                images = [within_limit(image, self.checked_for, self.max_pixels) for image in images]
            decoded, places, corrupt = decode_batch(images, self.size, max_pixels=self.max_pixels, pixels=self.pixels)
        return torch.from_numpy(positions[places]), decoded, corrupt


def without_corrupt(positions: Tensor, images: Tensor, corrupt: list[Corrupt]) -> tuple[Tensor, Tensor]:
    """A batch of `_Decoder` without what stands in for its corrupt images; the positions are in order, if any is."""
    if not corrupt:
        return positions, images
    # A corrupt image has the place of another, which the batch then holds twice; if all are, none is real.
    count = len(positions) if len(corrupt) < len(positions) else 0
    first = torch.from_numpy(np.unique(positions.numpy()[:count], return_index=True)[1])
    return positions[first], take(images, first)


# What is decoded of a chunk of images: the places of the good ones in the split, and the corrupt ones.
Decoded = tuple[Tensor, list[Corrupt]]


def decode_in_threads(decoder: _Decoder, kept: Tensor | None, workers: int) -> Iterator[Decoded]:
    """Decodes all images into `kept`, chunk by chunk, in threads."""

    def decode_chunk(positions: Tensor) -> Decoded:
        return keep_good(kept, *decoder[positions.numpy()])

    with quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        yield from pool.map(decode_chunk, torch.arange(len(decoder.rows)).split(CHUNK))


def decode_in_processes(decoder: _Decoder, kept: Tensor | None, workers: int) -> Iterator[Decoded]:
    """The same in processes, where they can be forked and there are several."""
    if workers < 2 or multiprocessing.get_start_method() != "fork":
        yield from decode_in_threads(decoder, kept, workers)
        return
    image = empty(1, decoder.size, decoder.pixels)
    chunks = torch.arange(len(decoder.rows)).split(max(1, min(CHUNK, MOST_SHARED // image.nbytes)))
    for batch in read_in_order(decoder, chunks, workers):
        yield keep_good(kept, *batch)


def keep_good(kept: Tensor | None, positions: Tensor, images: Tensor, corrupt: list[Corrupt]) -> Decoded:
    """Copies a batch of `_Decoder` to its places in `kept`, without what stands in for corrupt images."""
    positions, images = without_corrupt(positions, images, corrupt)
    if kept is not None:
        kept.numpy()[positions.numpy()] = images.numpy()  # torch indexes no uint16
    return positions, corrupt


def decode_all(
    decoder: _Decoder,
    run: Callable[[_Decoder, Tensor | None, int], Iterator[Decoded]],
    *,
    keep: bool,
    workers: int,
    progress: bool,
) -> tuple[Tensor | None, NDArray[np.int64], list[Corrupt]]:
    """Decodes a whole split, to keep its images or only to find corrupt ones.

    Args:
        decoder: of the N images, each at its row number.
        run: `decode_in_threads` or `decode_in_processes`.
        keep: return the images.
        workers: number of threads or processes.
        progress: show a progress bar.

    Returns:
        The images that could be decoded, uint8 [M, 3, S, S] or as the decoder's `pixels` say, if kept; their row
        numbers, int64 [M]; the corrupt ones.
    """
    count = len(decoder.rows)
    kept = empty(count, decoder.size, decoder.pixels) if keep else None
    good = np.zeros(count, dtype=bool)
    all_corrupt: list[Corrupt] = []
    with progress_bar(count, "decode" if keep else "check", "img", disable=not progress) as bar:
        for index, corrupt in run(decoder, kept, workers):
            good[index.numpy()] = True
            all_corrupt += corrupt
            bar.update(len(index) + len(corrupt))
    rows = np.flatnonzero(good)
    return (take(kept, torch.from_numpy(rows)) if kept is not None and all_corrupt else kept), rows, all_corrupt


def read_in_order(dataset: Dataset[Batch], order: Iterable[Tensor], workers: int) -> Iterator[Batch]:
    """Reads batches of a dataset that is indexed by positions, int64 [B], in this order in DataLoader workers.

    A `UserError` of a worker, whose text torch replaces by its traceback, has its own text again.

    Raises:
        UserError: that, for workers without enough shared memory, and for one that the system ended.
    """
    batches: Any = None
    try:
        with warnings.catch_warnings():  # of more workers than CPUs, which were asked for
            warnings.filterwarnings("ignore", "This DataLoader will create")
            batches = iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    sampler=(positions.numpy() for positions in order),
                    num_workers=workers,
                    collate_fn=_shared if workers else _unchanged,
                    generator=torch.Generator(),  # otherwise it would draw from, and so advance, the global generator
                )
            )
        yield from batches
    except UserError as error:
        raise UserError(str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]) from error
    except RuntimeError as error:
        if (problem := full_shared_memory(error) or lost_worker(error)) is None:
            raise
        raise problem from error
    finally:
        # torch leaves this to the garbage collector. After an error, that would close the pipes to the workers while a
        # thread of torch's closes them, too: a file that got the number of one in between would be closed instead.
        if workers and batches is not None:
            batches._shutdown_workers()


def _unchanged(batch: Batch) -> Batch:
    return batch


def _shared(batch: Batch) -> Batch:
    """Moves a batch into shared memory in its worker, so that an error is raised with the batch.

    torch would do so in the thread that sends it, whose errors the main process never hears of: it would wait for good.
    """
    for part in batch if isinstance(batch, tuple) else ():
        targets = [tensor for target in getattr(part, "targets", ()) for tensor in target.values()]
        for tensor in [part] if isinstance(part, Tensor) else [*getattr(part, "images", ()), *targets]:
            tensor.share_memory_()
    return batch


def relative_path(file: str, roots: Iterable[Path]) -> str:
    """A file's path relative to the first of the folders that it lies in, with '/' between its parts."""
    path = Path(file)
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return path.as_posix() if root is None else path.relative_to(root).as_posix()


def fits_in_memory(size: int) -> bool:
    """Whether `size` bytes in each process of this machine take at most half of the free memory."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    fits = [bool(size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= free // 2)]
    if dist.is_available() and dist.is_initialized():
        # All processes must decide alike: corrupt images are left out of a data set in memory, but not of the other.
        dist.broadcast_object_list(fits)
    return fits[0]


def fits_on_gpu(tensor: Tensor, device: torch.device) -> bool:
    """Whether `device` is a GPU and `tensor` would take at most a quarter of its free memory."""
    return device.type == "cuda" and tensor.nbytes <= torch.cuda.mem_get_info(device)[0] // 4


def _told(message: str, told: bool) -> UserError:
    """An error, which the main process may have told of already."""
    error = UserError(message)
    error.told = told
    return error


def _named(corrupt: list[Corrupt]) -> str:
    names: dict[str, list[str]] = {}  # by the reason
    for name, reason in corrupt[:NAMED]:
        names.setdefault(reason, []).append(f"row {name}" if isinstance(name, int) else str(name))
    parts = [f"{', '.join(alike)}: {reason}" for reason, alike in names.items()]
    return "; ".join([*parts, *([f"and {len(corrupt) - NAMED} more"] if len(corrupt) > NAMED else [])])
