"""Views of images that were looked at before: an encoder's features of several views of every image, kept in a file.

A large encoder costs more than the training of a small network. Run once over a few fixed views of every image, it
costs that pass alone, however many epochs follow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import ImageData

VIEWS, FEATURES, RECORD = "views.npy", "features.npy", "views.json"


@dataclass(frozen=True)
class ViewBatch:
    """Images, the view that is to be taken of each, and an encoder's features of that view.

    Attributes:
        images: uint8 or uint16 [B, C, S, S].
        views: float32 [B, 5] or [B, 18], see `augment.draw_views`.
        features: float16 [B, D]; with the encoder's feature map at their end where that is learnt.
    """

    images: Tensor
    views: Tensor
    features: Tensor

    def chunk(self, chunks: int) -> list["ViewBatch"]:
        """The batch in parts, cut as `Tensor.chunk` cuts."""
        parts = (tensor.chunk(chunks) for tensor in (self.images, self.views, self.features))
        return [ViewBatch(*part) for part in zip(*parts, strict=True)]

    def to(self, device: torch.device, *, non_blocking: bool) -> "ViewBatch":
        """The batch on a device, but for its views, which the host reads: what they draw is put there by `augment`."""
        images, features = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.features))
        return ViewBatch(images, self.views, features)


class CachedViewLoader(EpochLoader):
    """Feeds the engine with `ViewBatch`es: in epoch e, every image is seen in its view number e mod V.

    Args:
        folder: of the views, float32 [V, N, 5 or 18], and their features, float16 [V * N, D], as .npy files.
        write: writes them, called before the first epoch.
        data: the images.
        batch_size: images per step, over all processes.
        seed: random seed of the order.
    """

    def __init__(self, folder: Path, write: Callable[[], None], data: ImageData, batch_size: int, seed: int) -> None:
        super().__init__(data, batch_size, seed)
        self.folder, self.write = folder, cache(write)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ViewBatch]]:  # type: ignore[override]
        """The batches of an epoch from its step `start` on."""
        self.write()
        all_views, all_features = (np.load(self.folder / name, mmap_mode="r") for name in (VIEWS, FEATURES))
        number = epoch % len(all_views)
        for positions, images in super().epoch(epoch, start):
            rows = positions.cpu().numpy()
            views = torch.from_numpy(all_views[number, rows])
            features = torch.from_numpy(all_features[number * len(self.data) + rows])
            yield positions, ViewBatch(images, views, features)
