"""Images with boxes: Pascal VOC trees, COCO's JSON and `datasets` with a column of objects, one or several joined.

Boxes are xyxy in pixels, the continuous coordinates of torchvision: a box over a whole image of W x H is 0, 0, W, H.
VOC counts pixels from 1 and includes the last one, so its xmin and ymin lose 1. Pictures are not turned by EXIF: boxes
are those of the stored pixels. What cannot be used is left out, named and counted, see `DetectionDataConfig.max_bad`.
"""

import hashlib
import io
import logging
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sssd_zoo.data import sources
from sssd_zoo.data.columns import pick_split
from sssd_zoo.data.images import Encoded, EncodedImages, encoded, quiet_pillow, to_rgb
from sssd_zoo.data.loading import NAMED, GlobalBatches, open_encoded
from sssd_zoo.distributed import rank, world_size
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json
from sssd_zoo.ranges import Checked, CountOrZero, DistinctNames, Names, Workers

logger = logging.getLogger("sssd_zoo")


@dataclass(kw_only=True)
class DetectionDataConfig(Checked):
    """Which images with boxes to read, and how.

    Args:
        data: one or several, joined: roots of Pascal VOC trees (Annotations, ImageSets/Main, JPEGImages), COCO JSON
            files, Hub ids, parquet files or `save_to_disk` folders with a column of objects.
        split: a list of ImageSets/Main, or a split of `datasets`; several are joined by '+', as in train+val.
        image_folder: of COCO's images; by default the JSON file's own folder or one beside it.
        objects_column: of `datasets`: holds `bbox`, and `category`, `label` or `labels`, for each object.
        box_format: of `datasets`: 'xywh' as COCO has them, or 'xyxy'.
        classes: their names; by default those that the data have. Objects of others cannot be used.
        max_bad: how many images without file or annotation and objects without area or of unknown classes may be left
            out; each one is named.
        workers: processes that decode.
    """

    data: Names
    split: str | None = None
    image_folder: str | None = None
    objects_column: str = "objects"
    box_format: Literal["xywh", "xyxy"] = "xywh"
    classes: DistinctNames | None = None
    max_bad: CountOrZero = 0
    workers: Workers = 2


@dataclass(frozen=True)
class Object:
    """One object of an annotation, as it stands there: its class, its box, whether it is difficult or a crowd."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class Annotated:
    """An image and what is in it: its name, its file or its row, and its objects."""

    name: str
    image: Path | tuple[EncodedImages, int]
    objects: list[Object]

    def read(self) -> Encoded:
        """The encoded image."""
        if isinstance(self.image, Path):
            return encoded(self.name, {"bytes": None, "path": str(self.image)})
        return self.image[0].read([self.image[1]])[0]


@dataclass
class Found:
    """What a source holds: images, the names of its classes, and what is wrong with it."""

    images: list[Annotated] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass
class DetectionBatch:
    """Images of different sizes with their objects; to the engine it is what a tensor is for images of one size.

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
        name: what to call the data.
        class_names: the C names; label l of a box is `class_names[l - 1]`, 0 is the background.
        names: of the images.
        targets: as in `DetectionBatch`.
        bad: what was left out, and why.
        fingerprint: SHA-256 over the images' names and sizes and their boxes.
    """

    def __init__(self, name: str, found: Found, class_names: list[str], config: DetectionDataConfig) -> None:
        self.name, self.class_names, self.bad = name, class_names, found.bad
        self.workers = config.workers
        self.names: list[str] = []
        self.targets: list[dict[str, Tensor]] = []
        self._images: list[Annotated] = []
        digest = hashlib.sha256(repr(class_names).encode())
        number = {class_name: label for label, class_name in enumerate(class_names, start=1)}
        for image in found.images:
            size = _size(image)
            if isinstance(size, str):
                self.bad.append(f"{image.name}: {size}")
                continue
            target = self._target(image, size, number)
            self.names.append(image.name)
            self.targets.append(target)
            self._images.append(image)
            digest.update(repr((image.name, size)).encode())
            for value in target.values():
                digest.update(value.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        _decide(self.bad, name, config.max_bad)
        if not self.names:
            raise UserError(f"{name} has no image that can be used")

    def _target(self, image: Annotated, size: tuple[int, int], number: dict[str, int]) -> dict[str, Tensor]:
        boxes, labels, difficult = [], [], []
        for thing in image.objects:
            left, top, right, bottom = thing.box
            clipped = (max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom))
            if thing.name not in number:
                self.bad.append(f"{image.name}: an object of the unknown class '{thing.name}'")
            elif not all(map(math.isfinite, thing.box)) or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
                self.bad.append(f"{image.name}: a box of '{thing.name}' without area, {thing.box}")
            else:
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
        """A batch by positions, int64 [b]; it is what DataLoader workers run, so an error goes back as its text."""
        images: list[Tensor] = []
        with quiet_pillow():
            for place in index:
                data = self._images[place].read()
                try:
                    with Image.open(io.BytesIO(data.data)) as picture:
                        pixels = np.array(to_rgb(picture, upright=False)).transpose(2, 0, 1).copy()
                except Exception as error:  # Pillow's plugins raise whatever their parsers run into
                    return torch.from_numpy(index), DetectionBatch([], []), f"{data.name}: {data.error or error}"
                images.append(torch.from_numpy(pixels))
        return torch.from_numpy(index), DetectionBatch(images, [self.targets[place] for place in index]), None

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, DetectionBatch]]:
        """Reads batches in the order given: int64 [b] positions each.

        Raises:
            UserError: at an image that cannot be decoded.
        """
        loader: DataLoader[tuple[Tensor, DetectionBatch, str | None]] = DataLoader(
            self,
            batch_size=None,
            sampler=(index.numpy() for index in order),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it would draw from, and so move, the global generator
        )
        for index, batch, error in loader:
            if error is not None:
                raise UserError(f"an image of {self.name} cannot be decoded ({error}); mend it or take it off the list")
            yield index, batch


class DetectionLoader:
    """Feeds the engine, each process its part of every global batch.

    Args:
        data: images with boxes.
        batch_size: images per step, over all processes.
        seed: of the order.
    """

    def __init__(self, data: DetectionData, batch_size: int, seed: int) -> None:
        self.data = data
        self.order = GlobalBatches(len(data), batch_size, seed, rank=rank(), world=world_size())
        self.steps_per_epoch = self.order.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, DetectionBatch]]:
        """The batches of an epoch from its step `start` on."""
        return self.data.batches(self.order.epoch(epoch, start))


def load_detection(config: DetectionDataConfig, *, classes: list[str] | None = None) -> DetectionData:
    """Reads the annotations of all sources and looks at every image's header.

    Args:
        config: which images.
        classes: names of the classes, where a detector knows them already.

    Raises:
        UserError: if a source or a split is not there, or more than `max_bad` images and objects cannot be used.
    """
    if not config.data:
        raise UserError("give at least one --data")
    if config.max_bad < 0 or config.workers < 0:
        raise UserError("max_bad and workers must not be negative")
    joined = Found()
    for source in config.data:
        found = _read(source, config)
        joined.images += found.images
        joined.bad += found.bad
        joined.classes += [name for name in found.classes if name not in joined.classes]
    names = classes or config.classes or joined.classes
    if len(set(names)) < len(names):
        raise UserError(f"a class is named twice: {', '.join(names)}")
    split = f" ({config.split})" if config.split else ""
    name = " + ".join(sources.short_name(source) for source in config.data) + split
    if not names:
        raise UserError(f"{name} has no objects")
    data = DetectionData(name, joined, list(names), config)
    counts = torch.bincount(torch.cat([target["labels"] for target in data.targets]), minlength=len(names) + 1)[1:]
    empty = [class_name for class_name, count in zip(names, counts.tolist(), strict=True) if not count]
    if empty and rank() == 0:
        logger.warning("%s has no objects of %d classes: %s", name, len(empty), ", ".join(empty[:NAMED]))
    return data


def has_split(config: DetectionDataConfig, split: str) -> bool:
    """Whether every source has a split of that name; a COCO file has none."""
    for source in config.data:
        path = Path(source).expanduser()
        if path.suffix == ".json" or (_is_voc(path) and not (path / "ImageSets/Main" / f"{split}.txt").is_file()):
            return False
        if not _is_voc(path) and split not in sources.open_splits(source):
            return False
    return True


def _decide(bad: list[str], name: str, limit: int) -> None:
    named = "; ".join(bad[:NAMED] + ([f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []))
    if len(bad) > limit:
        raise UserError(
            f"{len(bad)} images or objects of {name} cannot be used, more than max_bad {limit} ({named}): mend them, "
            "or raise max_bad to leave them out"
        )
    if bad and rank() == 0:
        logger.warning("left out %d images or objects of %s (%s)", len(bad), name, named)


def _size(image: Annotated) -> tuple[int, int] | str:
    """Width and height from the image's header, or why there are none."""
    data = image.read()
    if data.error is not None:
        return data.error
    try:
        with quiet_pillow(), Image.open(io.BytesIO(data.data)) as picture:
            return picture.size
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        return f"it cannot be opened: {type(error).__name__}"


def _is_voc(path: Path) -> bool:
    return (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()


def _read(source: str, config: DetectionDataConfig) -> Found:
    path = Path(source).expanduser()
    if path.suffix == ".json":
        return _read_coco(path, config.image_folder)
    if _is_voc(path):
        return _read_voc(path, config.split or "trainval")
    return _read_datasets(source, config)


def _read_voc(root: Path, split: str) -> Found:
    """A Pascal VOC tree (Everingham et al. 2010): ImageSets/Main/SPLIT.txt names the images."""
    found, names = Found(), set()
    for part in split.split("+"):
        listed = root / "ImageSets" / "Main" / f"{part}.txt"
        if not listed.is_file():
            there = ", ".join(sorted(file.stem for file in listed.parent.glob("*.txt")))
            raise UserError(f"{root} has no split '{part}': ImageSets/Main has {there or 'no lists'}")
        for line in listed.read_text(encoding="utf-8").splitlines():
            if not line.split():
                continue
            identifier = line.split()[0]
            try:
                tree = ElementTree.parse(root / "Annotations" / f"{identifier}.xml")
                objects = [_voc_object(element) for element in tree.iter("object")]
            except (OSError, ElementTree.ParseError, ValueError) as error:
                found.bad.append(f"{identifier}: its annotation cannot be read ({error})")
                continue
            names |= {thing.name for thing in objects}
            image = root / "JPEGImages" / f"{identifier}.jpg"
            stated = root / "JPEGImages" / (tree.findtext("filename") or image.name)
            found.images.append(Annotated(identifier, image if image.exists() else stated, objects))
    found.classes = sorted(names)
    return found


def _voc_object(element: ElementTree.Element) -> Object:
    name = (element.findtext("name") or "").strip()
    corners = [float(element.findtext(f"bndbox/{corner}") or "nan") for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = corners
    # Equal corners are a slip of the hand, not a box one pixel wide: it keeps no area, so that it is named.
    shift = 1.0 if right > left and bottom > top else 0.0
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return Object(name, (left - shift, top - shift, right, bottom), difficult)


def _read_coco(path: Path, image_folder: str | None) -> Found:
    """COCO's JSON (Lin et al. 2014): a crowd is kept as difficult, which is not trained on and not counted."""
    content = read_json(path)
    try:
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        objects: dict[Any, list[Object]] = {image: [] for image in files}
        found = Found(classes=list(categories.values()))
        for thing in content["annotations"]:
            if thing["image_id"] not in objects:
                found.bad.append(f"annotation {thing.get('id')}: there is no image {thing['image_id']}")
                continue
            left, top, width, height = map(float, thing["bbox"])
            name = categories.get(thing["category_id"], str(thing["category_id"]))
            box = (left, top, left + width, top + height)
            objects[thing["image_id"]].append(Object(name, box, bool(thing.get("iscrowd", 0))))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not COCO's JSON of images, annotations and categories: {error!r}") from error
    split = path.stem.removeprefix("instances_")
    candidates = (
        [Path(image_folder)] if image_folder else [path.parent, path.parent.parent / split, path.parent / split]
    )
    first = next(iter(files.values()), "")
    folder = next((candidate for candidate in candidates if (candidate / first).is_file()), candidates[0])
    found.images = [Annotated(file, folder / file, objects[image]) for image, file in files.items()]
    return found


def _read_datasets(source: str, config: DetectionDataConfig) -> Found:
    """Splits of `datasets` with an image and, for each row, a list of objects or an object of lists."""
    splits = sources.open_splits(source, progress=rank() == 0)
    found, name = Found(), sources.short_name(source)
    for part in config.split.split("+") if config.split else [None]:
        split = pick_split(splits, part, name)
        rows, column = splits[split], config.objects_column
        if column not in rows.features:
            raise UserError(f"{name} has no column '{column}' of objects: it has {', '.join(rows.features)}")
        feature = _fields(rows.features[column])
        label = next((key for key in ("category", "label", "labels", "category_id") if key in feature), None)
        if label is None or "bbox" not in feature:
            raise UserError(f"column '{column}' of {name} needs bbox and category; it has {', '.join(feature)}")
        names: list[str] | None = getattr(_inner(feature[label]), "names", None)
        images = open_encoded(rows, None, name)
        for row, things in enumerate(rows.select_columns([column])[column]):
            if isinstance(things, dict):
                keys = list(things)
                things = [dict(zip(keys, values, strict=True)) for values in zip(*things.values(), strict=True)]
            objects = []
            for thing in things:
                left, top, right, bottom = map(float, thing["bbox"])
                if config.box_format == "xywh":
                    right, bottom = left + right, top + bottom
                value = thing[label]
                known = isinstance(value, int) and 0 <= value < len(names or ())
                text = names[value] if names and known else str(value)
                difficult = bool(thing.get("difficult") or thing.get("iscrowd") or False)
                objects.append(Object(text, (left, top, right, bottom), difficult))
            found.images.append(Annotated(f"{split} {row}", (images, row), objects))
        here = list(names) if names else sorted({thing.name for image in found.images for thing in image.objects})
        found.classes += [class_name for class_name in here if class_name not in found.classes]
    return found


def _inner(feature: Any) -> Any:
    """The feature inside of lists."""
    return _inner(feature.feature) if hasattr(feature, "feature") else feature


def _fields(feature: Any) -> dict[str, Any]:
    """The fields of a column of objects, whether it is a list of structs or a struct of lists."""
    inner = _inner(feature)
    return dict(inner) if isinstance(inner, dict) else {}


def _as_it_is(batch: Any) -> Any:
    return batch
