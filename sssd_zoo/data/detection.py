"""Images with boxes: Pascal VOC trees, COCO's JSON and `datasets` with a column of objects, one or several joined.

Boxes are xyxy in pixels, the continuous coordinates of torchvision: a box over a whole image of W x H is 0, 0, W, H.
VOC counts pixels from 1 and includes the last one, so its xmin and ymin lose 1. What cannot be used is left out, named
and counted, see `DetectionDataConfig.max_bad`.

Where EXIF turns a picture, the width and height in its annotation tell whether the boxes are those of the turned or of
the stored picture. Where they do not (a half turn, a square, no size given), it is what most others of the data are, or
stored, with a warning.
"""

import codecs
import hashlib
import json
import logging
import math
import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sssd_zoo.configs import DetectionDataConfig
from sssd_zoo.data import sources
from sssd_zoo.data.columns import pick_split
from sssd_zoo.data.formats import EXTENSIONS
from sssd_zoo.data.images import CorruptImageError, Encoded, EncodedImages, encoded, opened, quiet_pillow, to_rgb
from sssd_zoo.data.loading import NAMED, GlobalBatches, open_encoded
from sssd_zoo.distributed import rank, world_size
from sssd_zoo.errors import UserError

logger = logging.getLogger("sssd_zoo")

LOOKED_FOR = 100  # of COCO's images, which tell where all of them lie


@dataclass(frozen=True)
class Object:
    """One object of an annotation, as it stands there: its class, its box, whether it is difficult or a crowd."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class Annotated:
    """An image and what is in it: its name, its file or its row, its objects, and its annotation's width and height."""

    name: str
    image: Path | tuple[EncodedImages, int]
    objects: list[Object]
    stated: tuple[int, int] | None

    def read(self) -> Encoded:
        """The encoded image."""
        if isinstance(self.image, Path):
            return encoded(self.name, {"bytes": None, "path": str(self.image)})
        return self.image[0].read([self.image[1]])[0]


@dataclass(frozen=True)
class Header:
    """What the header of an image says: width and height as stored, and how EXIF turns it, 1 for not at all."""

    size: tuple[int, int]
    orientation: int

    def size_as(self, turned: bool) -> tuple[int, int]:
        """Width and height of the picture as stored, or as EXIF turns it."""
        return self.size[::-1] if turned and self.orientation >= 5 else self.size

    def turned(self, stated: tuple[int, int] | None) -> bool | None:
        """Whether an annotation of that size, if it says one, is of the turned picture; None where it may be of either.

        Raises:
            CorruptImageError: if it is of neither.
        """
        as_stored, as_turned = (stated in (None, self.size_as(turned)) for turned in (False, True))
        if stated is not None and not as_stored and not as_turned:
            (width, height), (stored_width, stored_height) = stated, self.size
            raise CorruptImageError(
                f"its annotation is of {width} x {height} pixels, the image has {stored_width} x {stored_height}"
            )
        if as_stored and as_turned and self.orientation > 1:
            return None
        return not as_stored


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
        self.workers, self._max_pixels = config.workers, config.max_pixels
        self.names: list[str] = []
        self.targets: list[dict[str, Tensor]] = []
        self._images: list[Annotated] = []
        self._turned: list[bool] = []
        self._cut = 0  # boxes that reach out of their image by more than rounding
        digest = hashlib.sha256(repr(class_names).encode())
        number = {class_name: label for label, class_name in enumerate(class_names, start=1)}
        for image, header, turned in self._usable(found.images):
            size = header.size_as(turned)
            target = self._target(image, size, number)
            self.names.append(image.name)
            self.targets.append(target)
            self._images.append(image)
            self._turned.append(turned)
            digest.update(repr((image.name, size)).encode())
            for value in target.values():
                digest.update(value.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        _decide(self.bad, name, config.max_bad)
        if not self.names:
            raise UserError(f"{name} has no image that can be used")
        if self._cut and rank() == 0:
            logger.warning("cut %d boxes of %s that reach out of their images", self._cut, name)

    def _usable(self, images: list[Annotated]) -> list[tuple[Annotated, Header, bool]]:
        """The images that can be used, each once, with their headers and whether EXIF is to turn them."""
        usable: list[tuple[Annotated, Header, bool | None]] = []
        files: set[str] = set()
        for image in images:
            file = os.path.realpath(image.image) if isinstance(image.image, Path) else None
            try:
                if file in files:
                    raise CorruptImageError("its file is listed twice")
                header = _header(image, self._max_pixels)
                usable.append((image, header, header.turned(image.stated)))
            except CorruptImageError as error:
                self.bad.append(f"{image.name}: {error}")
            if file is not None:
                files.add(file)
        told = [turned for _, header, turned in usable if turned is not None and header.orientation > 1]
        rest = sum(told) * 2 > len(told)
        unknown = sum(turned is None for _, _, turned in usable)
        if unknown and rank() == 0:
            logger.warning(
                "EXIF turns %d images of %s, and their annotations do not tell whether boxes are those of the turned "
                "or of the stored picture: they are taken as those of the %s one",
                unknown,
                self.name,
                "turned" if rest else "stored",
            )
        return [(image, header, rest if turned is None else turned) for image, header, turned in usable]

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
        """A batch by positions, int64 [b]; it is what DataLoader workers run, so an error goes back as its text."""
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
    parts = (config.split or "").split("+")
    if len(set(parts)) < len(parts):
        raise UserError(f"--split {config.split} names a split twice")
    joined = Found()
    for source in config.data:
        found = _read(source, config)
        joined.images += found.images
        joined.bad += found.bad
        joined.classes += [name for name in found.classes if name not in joined.classes]
    names = [_class_name(name) for name in classes or config.classes or joined.classes]
    if len(set(names)) < len(names):
        raise UserError(f"a class is named twice: {', '.join(names)}")
    split = f" ({config.split})" if config.split else ""
    name = " + ".join(sources.short_name(source) for source in config.data) + split
    if not names:
        raise UserError(f"{name} has no objects")
    data = DetectionData(name, joined, names, config)
    boxes = torch.cat([target["boxes"] for target in data.targets])
    if len(boxes) and boxes.max() <= 1:
        raise UserError(
            f"all boxes of {name} lie within the first pixel: give them in pixels, not as parts of the image"
        )
    counts = torch.bincount(torch.cat([target["labels"] for target in data.targets]), minlength=len(names) + 1)[1:]
    empty = [class_name for class_name, count in zip(names, counts.tolist(), strict=True) if not count]
    if empty and rank() == 0:
        logger.warning("%s has no objects of %d classes: %s", name, len(empty), ", ".join(empty[:NAMED]))
    return data


def has_split(config: DetectionDataConfig, split: str) -> bool:
    """Whether every source has a split of that name; a COCO file has none."""
    for source in config.data:
        path = Path(source).expanduser()
        if _is_coco(path) or (_is_voc(path) and not (path / "ImageSets/Main" / f"{split}.txt").is_file()):
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


def _header(image: Annotated, max_pixels: int) -> Header:
    """Looks at an image without decoding it.

    Raises:
        CorruptImageError: if it cannot be opened, or has too many pixels.
    """
    data = image.read()
    if data.error is not None:
        raise CorruptImageError(data.error)
    try:
        with quiet_pillow(), opened(data.data, max_pixels) as picture:
            return Header(picture.size, _orientation(picture))
    except CorruptImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        raise CorruptImageError(f"it cannot be opened: {type(error).__name__}") from error


def _orientation(picture: Image.Image) -> int:
    """EXIF's number of how to turn a picture, 1 for not at all; Pillow turns TIFF itself, size and all."""
    if not picture.info.get("exif"):
        return 1
    try:
        number = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, which the pixels do not need
        return 1
    return number if isinstance(number, int) and 2 <= number <= 8 else 1


def _is_coco(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _is_voc(path: Path) -> bool:
    return (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()


def _read(source: str, config: DetectionDataConfig) -> Found:
    path = Path(source).expanduser()
    if _is_coco(path):
        return _read_coco(path, config.image_folder)
    if _is_voc(path):
        return _read_voc(path, config.split or "trainval")
    return _read_datasets(source, config)


def _decoded(data: bytes) -> str:
    """The text of a file that any editor may have saved: UTF-8 or UTF-16, with a byte-order mark or not, or Latin-1."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    for encoding in ("utf-8-sig", "cp1252"):  # Windows' Latin-1, which has a few characters more, but not all bytes
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def _class_name(text: Any) -> str:
    """A class's name without spaces around it, in composed Unicode: macOS and Linux write the same name in two ways."""
    return unicodedata.normalize("NFC", str(text)).strip()


def _flag(value: Any) -> bool:
    """Whether `difficult` or `iscrowd` is set, as a number, as text or as true and false."""
    return str(value).strip().lower() in ("1", "1.0", "true", "yes")


def _corners(box: Any, box_format: str) -> tuple[float, float, float, float] | None:
    """A box as xyxy, None where it is not four numbers."""
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError, OverflowError):
        return None
    return (left, top, left + right, top + bottom) if box_format == "xywh" else (left, top, right, bottom)


def _stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """Width and height as an annotation says, None where it does not: tools that do not know them write 0."""
    try:
        size = int(float(width)), int(float(height))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _find(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that is in the folder, however its name is written: in Unicode, or with backslashes."""
    for name in names:
        paths = (name, name.replace("\\", "/"))
        ways = dict.fromkeys(
            [*paths, *(unicodedata.normalize(form, path) for path in paths for form in ("NFC", "NFD"))]
        )
        for way in ways:
            if os.path.isfile(folder / way):  # noqa: PTH113  Path.is_file raises for some names
                return folder / way
    return None


def _read_voc(root: Path, split: str) -> Found:
    """A Pascal VOC tree (Everingham et al. 2010): ImageSets/Main/SPLIT.txt names the images."""
    found, names = Found(), set()
    for part in split.split("+"):
        listed = root / "ImageSets" / "Main" / f"{part}.txt"
        if not listed.is_file():
            there = ", ".join(sorted(file.stem for file in listed.parent.glob("*.txt")))
            raise UserError(f"{root} has no split '{part}': ImageSets/Main has {there or 'no lists'}")
        for line in _decoded(listed.read_bytes()).splitlines():
            if not line.strip():
                continue
            identifier, annotation = _voc_annotation(root / "Annotations", line.strip())
            try:
                tree = _xml(annotation)
                objects = [_voc_object(element) for element in tree.iter("object")]
            except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
                found.bad.append(f"{identifier}: its annotation cannot be read ({error})")
                continue
            names |= {thing.name for thing in objects if thing.name}
            stated = (tree.findtext("filename") or "").replace("\\", "/").rsplit("/", 1)[-1].strip()
            suffixes = [suffix for known in EXTENSIONS for suffix in (known, known.upper())]
            image = _find(root / "JPEGImages", [*(f"{identifier}{suffix}" for suffix in suffixes), stated])
            found.images.append(
                Annotated(
                    identifier,
                    image or root / "JPEGImages" / f"{identifier}.jpg",
                    objects,
                    _stated_size(tree.findtext("size/width"), tree.findtext("size/height")),
                )
            )
    found.classes = sorted(names)
    return found


def _voc_annotation(folder: Path, line: str) -> tuple[str, Path]:
    """The image that a line of a list names, and its annotation.

    In the list of a class each name is followed by 1, 0 or -1, whether the image shows the class, which its annotation
    tells better. A name may have spaces, and end like that too ("photo 1"): what is there decides.
    """
    bare = re.sub(r"\s+(-1|0|1)$", "", line)
    for name in (line, bare):
        if file := _find(folder, [f"{name}.xml"]):
            return name, file
    return bare, folder / f"{bare}.xml"


def _xml(path: Path) -> ElementTree.Element:
    """The root of an XML file, whose encoding may not be what it says."""
    data = path.read_bytes()
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        return ElementTree.fromstring(_decoded(data))


def _voc_object(element: ElementTree.Element) -> Object:
    name = _class_name(element.findtext("name") or "")
    corners = [float(element.findtext(f"bndbox/{corner}") or "nan") for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = corners
    # Equal corners are a slip of the hand, not a box one pixel wide: it keeps no area, so that it is named.
    shift = 1.0 if right > left and bottom > top else 0.0
    return Object(name, (left - shift, top - shift, right, bottom), _flag(element.findtext("difficult")))


def _read_coco(path: Path, image_folder: str | None) -> Found:
    """COCO's JSON (Lin et al. 2014): a crowd is kept as difficult, which is not trained on and not counted."""
    try:
        content = json.loads(_decoded(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    found = Found()
    try:
        categories = _by_id(content["categories"], "name", path, found)
        files = _by_id(content["images"], "file_name", path, found)
        sizes = {str(image["id"]): _stated_size(image.get("width"), image.get("height")) for image in content["images"]}
        objects: dict[str, list[Object]] = {key: [] for key in files}
        for place, thing in enumerate(content["annotations"]):
            key, category, box = str(thing.get("image_id")), str(thing.get("category_id")), thing.get("bbox")
            where = f"annotation {thing.get('id', f'number {place}')} of {files.get(key, 'no image')}"
            corners = _corners(box, "xywh")
            if key not in files:
                found.bad.append(f"{where}: there is no image {key}")
            elif category not in categories:
                found.bad.append(f"{where}: there is no category {category}")
            elif corners is None:
                found.bad.append(f"{where}: {'it has no box' if not box else f'its box is not four numbers, {box}'}")
            else:
                objects[key].append(Object(_class_name(categories[category]), corners, _flag(thing.get("iscrowd"))))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not COCO's JSON of images, annotations and categories: {error!r}") from error
    found.classes = [_class_name(name) for name in categories.values()]
    folder = _coco_folder(path, image_folder, list(files.values()))
    for key, file in files.items():
        found.images.append(Annotated(file, _find(folder, [file]) or folder / file, objects[key], sizes[key]))
    return found


def _by_id(entries: list[dict[str, Any]], field_name: str, path: Path, found: Found) -> dict[str, str]:
    """A field of COCO's images or categories by their id; ids may be numbers or text.

    Raises:
        UserError: if two of them have the same id, as in files joined by hand: whose boxes are whose is lost then.
    """
    values: dict[str, str] = {}
    for entry in entries:
        key, value = str(entry["id"]), str(entry[field_name])
        if values.get(key, value) != value:
            raise UserError(
                f"{path} has two entries of id {key}, {values[key]} and {value}, so that nothing tells whose boxes are "
                "whose: number them anew, and the annotations by them"
            )
        if key in values:
            found.bad.append(f"{value}: it is listed twice")
        values[key] = value
    return values


def _coco_folder(path: Path, image_folder: str | None, files: list[str]) -> Path:
    """The folder of COCO's images: as asked, else the JSON file's own or one beside it, whichever has most of them."""
    if image_folder is not None:
        return Path(image_folder).expanduser()
    split = path.stem.removeprefix("instances_")
    candidates = [path.parent, path.parent.parent / split, path.parent / split]
    some = files[:: max(1, len(files) // LOOKED_FOR)]
    return max(candidates, key=lambda candidate: sum(_find(candidate, [file]) is not None for file in some))


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
        read = [column, *(size for size in ("width", "height") if size in rows.features)]
        for row, values in enumerate(rows.select_columns(read)):
            where, objects = f"{split} {row}", []
            try:
                things = _listed(values[column])
            except ValueError:
                found.bad.append(f"{where}: its lists of objects are of different lengths")
                continue
            for thing in things:
                box, value = _corners(thing.get("bbox"), config.box_format), thing.get(label)
                known = isinstance(value, int) and 0 <= value < len(names or ())
                if box is None:
                    found.bad.append(f"{where}: an object has no box of four numbers")
                elif value is None or (names and not known):
                    found.bad.append(f"{where}: an object is of no known class, {value}")
                else:
                    text = _class_name(names[value] if names else value)
                    objects.append(Object(text, box, _flag(thing.get("difficult")) or _flag(thing.get("iscrowd"))))
            stated = _stated_size(values.get("width"), values.get("height"))
            found.images.append(Annotated(where, (images, row), objects, stated))
        here = list(names) if names else sorted({thing.name for image in found.images for thing in image.objects})
        found.classes += [class_name for class_name in here if class_name not in found.classes]
    return found


def _listed(things: Any) -> list[dict[str, Any]]:
    """The objects of a row, whether it has a list of objects, an object of lists, or none.

    Raises:
        ValueError: if the lists are of different lengths.
    """
    if isinstance(things, dict):
        keys, columns = list(things), [values or [] for values in things.values()]
        return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
    return [thing or {} for thing in things or []]


def _inner(feature: Any) -> Any:
    """The feature inside of lists."""
    return _inner(feature.feature) if hasattr(feature, "feature") else feature


def _fields(feature: Any) -> dict[str, Any]:
    """The fields of a column of objects, whether it is a list of structs or a struct of lists."""
    inner = _inner(feature)
    return dict(inner) if isinstance(inner, dict) else {}


def _as_it_is(batch: Any) -> Any:
    return batch
