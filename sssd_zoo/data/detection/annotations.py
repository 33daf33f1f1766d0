"""Annotated images and their objects in one form, and tolerant readers for the text, boxes and file names in them."""

import codecs
import hashlib
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import EncodedImages, quiet_pillow
from sssd_zoo.data.opening import Encoded, encoded, opened


@dataclass(frozen=True)
class Object:
    """An object as annotated: its class, its box (xyxy in pixels), and whether it is difficult or a crowd."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class Annotated:
    """An image with its name, its file or row, its objects, and the width and height that its annotation states.

    `file` is the file that a row names, if any.
    """

    name: str
    image: Path | tuple[EncodedImages, int]
    objects: list[Object]
    stated: tuple[int, int] | None
    file: str | None = None

    def identity(self, digest: str) -> str:
        """What tells the image from others: its file, or the digest and the name of a row that holds it."""
        file = self.image if isinstance(self.image, Path) else self.file
        return f"{digest} {self.name}" if file is None else os.path.realpath(file)

    def read(self) -> Encoded:
        """The encoded image."""
        if isinstance(self.image, Path):
            return encoded(self.name, {"bytes": None, "path": str(self.image)})
        return self.image[0].read([self.image[1]])[0]


@dataclass(frozen=True)
class Header:
    """Of an image: width and height as stored, EXIF orientation, 1 for upright, and SHA-256 of the encoded bytes."""

    size: tuple[int, int]
    orientation: int
    digest: str

    def size_as(self, turned: bool) -> tuple[int, int]:
        """Width and height of the picture as stored, or as EXIF turns it."""
        return self.size[::-1] if turned and self.orientation >= 5 else self.size

    def turned(self, stated: tuple[int, int] | None) -> bool | None:
        """Whether an annotation that states this size is of the turned picture; None if it may be of either.

        Raises:
            CorruptImageError: if it fits neither.
        """
        as_stored, as_turned = (stated in (None, self.size_as(turned)) for turned in (False, True))
        if stated is not None and not as_stored and not as_turned:
            (width, height), (stored_width, stored_height) = stated, self.size
            raise CorruptImageError(
                f"its annotation states {width} x {height} pixels, the image has {stored_width} x {stored_height}"
            )
        if as_stored and as_turned and self.orientation > 1:
            return None
        return not as_stored


@dataclass
class Annotations:
    """The annotated images of a source, its class names, and what in it is unusable."""

    images: list[Annotated] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def read_header(image: Annotated, max_pixels: int) -> Header:
    """Reads the header of an image without decoding it.

    Raises:
        CorruptImageError: if it cannot be opened, or has too many pixels.
    """
    data = image.read()
    if data.error is not None:
        raise CorruptImageError(data.error)
    try:
        with quiet_pillow(), opened(data.data, max_pixels) as picture:
            return Header(picture.size, _orientation(picture), hashlib.sha256(data.data).hexdigest())
    except CorruptImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        raise CorruptImageError(f"it cannot be opened: {type(error).__name__}") from error


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 for upright; Pillow rotates TIFF images itself."""
    if not picture.info.get("exif"):
        return 1
    try:
        number = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, which the pixels do not need
        return 1
    return number if isinstance(number, int) and 2 <= number <= 8 else 1


def decoded_text(data: bytes) -> str:
    """The text of a file from any editor: UTF-8 or UTF-16, with or without a byte-order mark, or Latin-1."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    for encoding in ("utf-8-sig", "cp1252"):  # Windows' Latin-1, which has a few characters more, but not all bytes
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def clean_name(text: Any) -> str:
    """A class name without surrounding spaces, in composed Unicode: macOS and Linux write the same name differently."""
    return unicodedata.normalize("NFC", str(text)).strip()


def is_set(value: Any) -> bool:
    """Whether `difficult` or `iscrowd` is set, whether stored as a number, text or a boolean."""
    return str(value).strip().lower() in ("1", "1.0", "true", "yes")


def to_corners(box: Any, box_format: str) -> tuple[float, float, float, float] | None:
    """A box as xyxy, None if it is not four numbers."""
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError, OverflowError):
        return None
    return (left, top, left + right, top + bottom) if box_format == "xywh" else (left, top, right, bottom)


def stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """Width and height as the annotation states them, None if it does not: some tools write 0 for unknown sizes."""
    try:
        size = int(float(width)), int(float(height))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def find_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that exists in the folder, in any Unicode form and with either kind of slash."""
    for name in names:
        paths = (name, name.replace("\\", "/"))
        ways = dict.fromkeys(
            [*paths, *(unicodedata.normalize(form, path) for path in paths for form in ("NFC", "NFD"))]
        )
        for way in ways:
            if os.path.isfile(folder / way):  # noqa: PTH113  Path.is_file raises for some names
                return folder / way
    return None
