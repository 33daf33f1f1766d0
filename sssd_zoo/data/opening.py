"""Reads the bytes of an image, and opens them without decoding more than is permitted."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from sssd_zoo.configs.data import MAX_PIXELS
from sssd_zoo.data import containers
from sssd_zoo.data.formats import LFS_POINTER, CorruptImageError, regular_file

# Formats whose header does not bound the memory for decoding: containers of other files, or programs for Ghostscript.
UNBOUNDED = frozenset(("BLP", "DCX", "EPS", "FPX", "ICNS", "ICO", "IPTC", "MIC"))

LARGE = 2**24  # pixels; larger images are decoded one at a time in a process, however many threads it has

_one_large = Lock()


class Encoded(NamedTuple):
    """One encoded image of a data set: its path or row number, its bytes, and the reason if these are missing."""

    name: int | str
    data: bytes
    error: str | None


def encoded(name: int | str, image: dict[str, Any] | None, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Turns the `{'bytes', 'path'}` of an undecoded `Image` feature into an `Encoded`; reads the file if necessary.

    Args:
        name: row number, for images that are no files.
        image: the bytes, or the path; `page` is which page of the file to take, where it is not the whole file.
        max_pixels: largest number of pixels of a page.
    """
    if image is None:
        return Encoded(name, b"", "the row has no image")
    if image["bytes"] is not None:
        return Encoded(name, image["bytes"], None)
    path = image["path"]
    if path is None:
        return Encoded(name, b"", "the row has no image")
    if image.get("page") is not None:
        return _encoded_page(Path(path), image["page"], max_pixels)
    try:
        # Streamed folders hold URLs, chains of them for archives.
        if "://" in path:
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb") as file:
                return Encoded(path, file.read(), None)
        data = regular_file(Path(path)).read_bytes()
    except (OSError, ValueError) as error:
        return Encoded(path, b"", _reason(error))
    if data.startswith(LFS_POINTER):
        return Encoded(path, b"", "it is a git-lfs pointer, not an image: run `git lfs pull`")
    return Encoded(path, data, None)


def _encoded_page(path: Path, page: int, max_pixels: int) -> Encoded:
    name = f"{path}, page {page + 1}"
    try:
        return Encoded(name, containers.read_page(regular_file(path), page, max_pixels), None)
    except CorruptImageError as error:
        return Encoded(name, b"", str(error))
    except (OSError, ValueError) as error:
        return Encoded(name, b"", _reason(error))


def _reason(error: OSError | ValueError) -> str:
    """Why a file cannot be read."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"no file can have this name: {error}"  # a null character, half a surrogate pair


def side_lengths(data: bytes) -> tuple[int, int]:
    """Width and height that an encoded image states; whatever its parser raises, if that is damaged."""
    if containers.is_array(data):
        return containers.header_of(data)[:2]
    try:
        with open_picture(data) as picture:
            return picture.size
    except UnidentifiedImageError:
        if not containers.is_tiff(data):
            raise
        return containers.tiff_header(data)[:2]


def pages_of(data: bytes) -> int:
    """How many pages a TIFF or DICOM file states; 1 for any other, and for one that is damaged."""
    try:
        if containers.is_dicom(data):
            return containers.frames_of(data)
        if containers.is_tiff(data):
            with open_picture(data) as picture:
                return int(getattr(picture, "n_frames", 1))
    except Exception:  # decoding reports it
        return 1
    return 1


def open_picture(data: bytes) -> Image.Image:
    """An encoded image as Pillow opens it, not decoded, if it is of a format whose header bounds its size."""
    Image.init()  # all formats that Pillow and its plugins know
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # callers check `max_pixels`, and tell
        return Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name not in UNBOUNDED])


def format_of(data: bytes) -> str | None:
    """The format of an encoded image as Pillow names it, such as 'JPEG'; None where it cannot tell."""
    try:
        with open_picture(data) as picture:
            return picture.format
    except Exception:  # Pillow's plugins raise whatever their parsers run into
        return None


def within_limit(image: Encoded, size: int, max_pixels: int) -> Encoded:
    """The image, with a reason in place of its bytes where decoding it for this size would decode too many pixels.

    Args:
        image: as it is stored.
        size: side in pixels that it is decoded for.
        max_pixels: largest number of pixels that may be decoded, see `opened`.
    """
    if image.error is not None or containers.is_array(image.data):  # arrays are counted whole at every size
        return image
    try:
        with opened(image.data, max_pixels, shrink_to=size):
            return image
    except CorruptImageError as error:
        return Encoded(image.name, b"", str(error))
    except Exception:  # decoding reports it
        return image


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS, shrink_to: int | None = None) -> Iterator[Image.Image]:
    """Opens an encoded image without decoding it, if its header states a permitted size.

    So a small file never expands to a huge image in memory, whatever its format and mode.

    Args:
        data: the encoded image.
        max_pixels: largest number of pixels that may be decoded.
        shrink_to: where the format can be decoded at a fraction of its size, as JPEG can, the shorter side may shrink
            to twice this; pixels are counted after that.

    Raises:
        CorruptImageError: if it has more pixels.
    """
    if containers.is_array(data):
        yield containers.picture_of(containers.array_of(data, max_pixels, bits=8))
        return
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # otherwise Pillow itself would refuse what the user allows
    try:
        picture = open_picture(data)
    except Image.DecompressionBombError:
        raise CorruptImageError(f"it has more pixels than --max_pixels {max_pixels} allows") from None
    with picture:
        width, height = picture.size
        # A JPEG decoder can halve the image up to three times at no cost; the filter then resizes from twice the size.
        if shrink_to is not None and min(picture.size) > 2 * shrink_to:
            picture.draft("RGB", (2 * shrink_to, 2 * shrink_to))
        # A progressive JPEG is decoded whole before it shrinks.
        pixels = width * height if picture.info.get("progressive") else picture.width * picture.height
        if pixels > max_pixels:
            raise CorruptImageError(f"its {width} x {height} pixels are more than --max_pixels {max_pixels} allows")
        with _one_large if pixels > LARGE else nullcontext():
            yield picture
