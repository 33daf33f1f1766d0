"""Loaders of the training loop: they yield each process's part of every global batch, from memory or a stream."""

from collections.abc import Iterator
from itertools import islice

from torch import Tensor

from sssd_zoo.data.loading import GlobalBatches, ImageData
from sssd_zoo.data.streaming import StreamingImages
from sssd_zoo.distributed import rank, world_size
from sssd_zoo.errors import UserError


class EpochLoader:
    """Feeds the engine from a data set with row numbers: each process gets its part of every global batch.

    Args:
        data: the images.
        batch_size: images per step, over all processes.
        seed: random seed of the order.
        positions: int64, positions of the images to use; by default all.
    """

    def __init__(self, data: ImageData, batch_size: int, seed: int, positions: Tensor | None = None) -> None:
        self.data, self.positions = data, positions
        count = len(data) if positions is None else len(positions)
        self.order = GlobalBatches(count, batch_size, seed, rank=rank(), world=world_size())
        self.steps_per_epoch = self.order.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from its step `start` on."""
        order = self.order.epoch(epoch, start)
        yield from self.data.batches(order if self.positions is None else (self.positions[index] for index in order))
        self.data.share_corrupt()


class StreamLoader:
    """Feeds the engine from a stream.

    Args:
        data: the stream.
        batch_size: images per step, over all processes.
        seed: random seed of the order.
        steps_per_epoch: steps that count as one epoch; by default from the stream's length.

    Raises:
        UserError: if neither gives the length of an epoch.
    """

    def __init__(self, data: StreamingImages, batch_size: int, seed: int, steps_per_epoch: int | None) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        if steps_per_epoch is None and data.count is None:
            raise UserError(f"the stream of {data.name} has an unknown length; give --steps_per_epoch")
        self.steps_per_epoch = steps_per_epoch or (data.count or 0) // batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from its step `start` on."""
        stream = self.data.batches(self.batch_size, self.seed, epoch, start, rank(), world_size())
        yield from islice(stream, self.steps_per_epoch - start)
        self.data.share_corrupt()
