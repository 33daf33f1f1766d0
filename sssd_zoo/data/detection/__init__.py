"""Images with boxes from Pascal VOC trees, COCO JSON and `datasets` with a column of objects, alone or concatenated.

Boxes are xyxy in pixels, the continuous coordinates of torchvision: a box over a whole image of W x H is 0, 0, W, H.
VOC counts pixels from 1 and includes the last one, so 1 is subtracted from its xmin and ymin. Unusable images and
objects are left out, named and counted, see `DetectionDataConfig.max_bad`.

If an image has an EXIF rotation, the width and height in its annotation tell whether its boxes refer to the rotated or
the stored image. If they do not (a half turn, a square, no size stated), the majority of the other images decides, or
else the stored image is used, with a warning.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sssd_zoo.configs import DetectionDataConfig
from sssd_zoo.data import sources
from sssd_zoo.data.detection import coco, rows, voc
from sssd_zoo.data.detection.annotations import Annotated, Annotations, Header, clean_name, read_header
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import quiet_pillow, to_rgb
from sssd_zoo.data.loading import NAMED, GlobalBatches, read_in_order
from sssd_zoo.data.opening import opened
from sssd_zoo.distributed import rank, world_size
from sssd_zoo.distributed.hardware import compute_device, decoding_workers
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.files import expand_home

__all__ = [
    "DetectionBatch",
    "DetectionData",
    "DetectionDataConfig",
    "DetectionLoader",
    "default_test_splits",
    "load_detection",
]

logger = logging.getLogger("sssd_zoo")

THINNEST = 0.01  # pixels: a thinner box has no area once its float32 corners are scaled


@dataclass
class DetectionBatch:
    """Images of different sizes with their objects; the engine treats it like a tensor of images of one size.

    Attributes:
        images: uint8 [3, H, W] each.
        targets: for each image `boxes`, float32 [n, 4]; `labels`, int64 [n] in 1..C; `difficult`, bool [n].
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]

    def chunk(self, chunks: int, /) -> list["DetectionBatch"]:
        """The batch in parts, cut as `Tensor.chunk` cuts."""
        part = -(-len(self.images) // chunks)
        starts = range(0, len(self.images), part)
        return [DetectionBatch(self.images[at : at + part], self.targets[at : at + part]) for at in starts]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "DetectionBatch":
        """The batch on a device."""
        images = [image.to(device, non_blocking=non_blocking) for image in self.images]
        targets = [
            {name: value.to(device, non_blocking=non_blocking) for name, value in target.items()}
            for target in self.targets
        ]
        return DetectionBatch(images, targets)


class DetectionData(Dataset[tuple[Tensor, DetectionBatch, str | None]]):
    """Images with boxes; `load_detection` makes it.

    Attributes:
        name: name of the data.
        class_names: the C names; label l of a box is `class_names[l - 1]`, 0 is the background.
        names: the names of the images.
        targets: as in `DetectionBatch`.
        bad: the images and objects left out, and why.
        sizes: width and height of the images, turned as their boxes are.
        fingerprint: SHA-256 over the images' names and sizes and their boxes.
    """

    def __init__(
        self,
        name: str,
        annotations: Annotations,
        class_names: list[str],
        config: DetectionDataConfig,
        device: Literal["auto", "cpu"],
    ) -> None:
        self.name, self.class_names, self.bad = name, class_names, annotations.bad
        self.workers, self._max_pixels = decoding_workers(config.workers, compute_device(device)), config.max_pixels
        self.names: list[str] = []
        self.targets: list[dict[str, Tensor]] = []
        self.sizes: list[tuple[int, int]] = []
        self._images: list[Annotated] = []
        self._identities: list[str] = []
        self._turned: list[bool] = []
        self._cut = 0  # boxes that extend beyond their image by more than rounding
        digest = hashlib.sha256(repr(class_names).encode())
        number = {class_name: label for label, class_name in enumerate(class_names, start=1)}
        for image, header, turned in self._usable(annotations.images):
            size = header.size_as(turned)
            target = self._target(image, size, number)
            self.names.append(image.name)
            self.targets.append(target)
            self.sizes.append(size)
            self._images.append(image)
            self._identities.append(image.identity(header.digest))
            self._turned.append(turned)
            digest.update(repr((image.name, size, header.digest)).encode())
            for value in target.values():
                digest.update(value.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        _refuse_too_many(self.bad, name, config.max_bad)
        if not self.names:
            raise UserError(f"{name} has no usable image: give other data, or another --split")
        if self._cut and rank() == 0:
            logger.warning("clipped %d boxes of %s that extend beyond their images", self._cut, name)

    def _usable(self, images: list[Annotated]) -> list[tuple[Annotated, Header, bool]]:
        """The usable images, each once, with their headers and whether to apply the EXIF rotation."""
        usable: list[tuple[Annotated, Header, bool | None]] = []
        seen: set[str] = set()
        for image in images:
            try:
                header = read_header(image, self._max_pixels)
                identity = image.identity(header.digest)
                # Rows of one source may name a file several times, with different objects of it.
                if identity in seen and image.file is None:
                    raise CorruptImageError("it is listed twice")
                seen.add(identity)
                usable.append((image, header, header.turned(image.stated)))
            except CorruptImageError as error:
                self.bad.append(f"{image.name}: {error}")
        told = [turned for _, header, turned in usable if turned is not None and header.orientation > 1]
        majority_turned = sum(told) * 2 > len(told)
        unknown = sum(turned is None for _, _, turned in usable)
        if unknown and rank() == 0:
            logger.warning(
                "%d images of %s have an EXIF rotation, and their annotations do not tell whether boxes refer to the "
                "rotated or the stored image: they are taken to refer to the %s one",
                unknown,
                self.name,
                "rotated" if majority_turned else "stored",
            )
        return [(image, header, majority_turned if turned is None else turned) for image, header, turned in usable]

    def _target(self, image: Annotated, size: tuple[int, int], number: dict[str, int]) -> dict[str, Tensor]:
        boxes, labels, difficult = [], [], []
        for thing in image.objects:
            left, top, right, bottom = thing.box
            clipped = (max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom))
            if thing.name not in number:
                self.bad.append(f"{image.name}: an object of the unknown class '{thing.name}'")
            elif not all(map(math.isfinite, thing.box)) or min(np.subtract(clipped[2:], clipped[:2])) < THINNEST:
                self.bad.append(f"{image.name}: a box of '{thing.name}' without area, {thing.box}")
            else:
                self._cut += min(left, top) < -1 or right > size[0] + 1 or bottom > size[1] + 1
                boxes.append(clipped)
                labels.append(number[thing.name])
                difficult.append(thing.difficult)
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.long),
            "difficult": torch.tensor(difficult, dtype=torch.bool),
        }

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: NDArray[np.int64]) -> tuple[Tensor, DetectionBatch, str | None]:
        """A batch by positions, int64 [b]; it runs in DataLoader workers, so an error is returned as its text."""
        images: list[Tensor] = []
        with quiet_pillow():
            for place in index:
                data = self._images[place].read()
                try:
                    with opened(data.data, self._max_pixels) as picture:
                        pixels = np.array(to_rgb(picture, upright=self._turned[place])).transpose(2, 0, 1).copy()
                except Exception as error:  # Pillow's plugins raise whatever their parsers run into
                    return torch.from_numpy(index), DetectionBatch([], []), f"{data.name}: {data.error or error}"
                images.append(torch.from_numpy(pixels))
        return torch.from_numpy(index), DetectionBatch(images, [self.targets[place] for place in index]), None

    def check(self, long_side: int, purpose: str) -> None:
        """Refuses what no detector can be trained or measured on.

        Args:
            long_side: maximum of the images' long side in pixels, to which they are resized.
            purpose: 'trained on' or 'measured on', for errors.

        Raises:
            UserError: if no image has an object that counts, or the short side of one would have no pixel.
        """
        if all(bool(target["difficult"].all()) for target in self.targets):
            raise UserError(f"{self.name} has no object to find, so nothing can be {purpose} it: give other images")
        narrow = [name for name, size in zip(self.names, self.sizes, strict=True) if max(size) > long_side * min(size)]
        if narrow:
            raise UserError(
                f"{len(narrow)} images of {self.name} ({listed(narrow, NAMED)}) are less than 1 px wide or high once "
                f"their long side is resized to {long_side} px: remove or cut them"
            )

    def shared_with(self, other: "DetectionData") -> list[str]:
        """The names of the images that other data hold too: the same files, or rows of one name with the same bytes."""
        theirs = {*other._identities}
        return [name for name, identity in zip(self.names, self._identities, strict=True) if identity in theirs]

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, DetectionBatch]]:
        """Reads batches in the order given: int64 [b] positions each.

        Raises:
            UserError: at an image that cannot be decoded.
        """
        for index, batch, error in read_in_order(self, order, self.workers):
            if error is not None:
                raise UserError(
                    f"an image of {self.name} cannot be decoded ({error}): fix it or remove it from the split"
                )
            yield index, batch


class DetectionLoader:
    """Feeds the engine: each process gets its part of every global batch.

    Args:
        data: images with boxes.
        batch_size: images per step, over all processes.
        seed: random seed of the order.
    """

    def __init__(self, data: DetectionData, batch_size: int, seed: int) -> None:
        self.data = data
        self.order = GlobalBatches(len(data), batch_size, seed, rank=rank(), world=world_size())
        self.steps_per_epoch = self.order.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, DetectionBatch]]:
        """The batches of an epoch from its step `start` on."""
        return self.data.batches(self.order.epoch(epoch, start))


def load_detection(
    config: DetectionDataConfig, *, classes: list[str] | None = None, device: Literal["auto", "cpu"] = "auto"
) -> DetectionData:
    """Reads the annotations of all sources and every image's header.

    Args:
        config: which images.
        classes: class names, if a detector already has them.
        device: that a network runs on while the images are decoded, see `compute_device`.

    Raises:
        UserError: if a source or a split does not exist, or more than `max_bad` images and objects are unusable.
    """
    if not config.data:
        raise UserError("give at least one --data")
    parts = (config.split or "").split("+")
    if len(set(parts)) < len(parts):
        raise UserError(f"--split {config.split} names a split twice: name each once")
    if config.split and all(coco.is_coco(Path(expand_home(source))) for source in config.data):
        raise UserError(
            f"{listed(config.data)}: COCO files have no splits, so none is called {config.split}: give the file of the "
            "split by --data, or the one to measure a training on by --test_data"
        )
    joined = Annotations()
    for source in config.data:
        annotations = _read(source, config)
        joined.images += annotations.images
        joined.bad += annotations.bad
        joined.classes += [name for name in annotations.classes if name not in joined.classes]
    names = [clean_name(name) for name in classes or config.classes or joined.classes]
    if len(set(names)) < len(names):
        raise UserError(f"a class is named twice: {', '.join(names)}; name each once by --classes")
    split = f" ({config.split})" if config.split else ""
    name = " + ".join(sources.short_name(source) for source in config.data) + split
    if not names:
        raise UserError(f"{name} has no objects: give annotated images")
    data = DetectionData(name, joined, names, config, device)
    boxes = torch.cat([target["boxes"] for target in data.targets])
    if len(boxes) and boxes.max() <= 1:
        raise UserError(
            f"all boxes of {name} lie within the first pixel: give them in pixels, not as fractions of the image size"
        )
    counts = torch.bincount(torch.cat([target["labels"] for target in data.targets]), minlength=len(names) + 1)[1:]
    empty = [class_name for class_name, count in zip(names, counts.tolist(), strict=True) if not count]
    if empty and rank() == 0:
        logger.warning("%s has no objects of %d classes: %s", name, len(empty), listed(empty, NAMED))
    return data


def default_test_splits(config: DetectionDataConfig) -> list[str]:
    """Those of the splits 'test' and 'val' (or 'validation') that every source has; a COCO file has none."""
    return [split for split in ("test", "val", "validation") if _has_split(config, split)]


def split_to_measure(config: DetectionDataConfig) -> str | None:
    """The split to measure a detector on: 'test' or 'val'; None for COCO files, and `datasets` sources with one.

    COCO files have no splits, so they are measured whole whatever the others have.

    Raises:
        UserError: if there are splits, and neither 'test' nor 'val' is in every source that has any.
    """
    chosen = [source for source in config.data if not coco.is_coco(Path(expand_home(source)))]
    if not chosen:
        return None
    for split in default_test_splits(replace(config, data=chosen)):
        return split
    for source in chosen:
        if voc.is_voc(Path(expand_home(source))) or len(sources.open_splits(source)) > 1:
            raise UserError(f"{listed(chosen)}: no split 'test' or 'val' to measure on: give another by --split")
    return None


def _has_split(config: DetectionDataConfig, split: str) -> bool:
    for source in config.data:
        path = Path(expand_home(source))
        if coco.is_coco(path) or (voc.is_voc(path) and not (path / "ImageSets/Main" / f"{split}.txt").is_file()):
            return False
        if not voc.is_voc(path) and split not in sources.open_splits(source):
            return False
    return True


def _read(source: str, config: DetectionDataConfig) -> Annotations:
    path = Path(expand_home(source))
    if coco.is_coco(path):
        return coco.read_coco(path, config.image_folder)
    if voc.is_voc(path):
        return voc.read_voc(path, config.split or "trainval")
    return rows.read_rows(source, config)


def _refuse_too_many(bad: list[str], name: str, limit: int) -> None:
    named = listed(bad, NAMED, "; ")
    if len(bad) > limit:
        raise UserError(
            f"{len(bad)} images or objects of {name} cannot be used, more than max_bad {limit} ({named}): fix them, "
            "or raise --max_bad to leave them out"
        )
    if bad and rank() == 0:
        logger.warning("left out %d images or objects of %s (%s)", len(bad), name, named)
