"""Encoded images to uint8 arrays of one size, by one path for every format.

Pillow decodes all of them. torchvision's decode_jpeg took 0.4 of its time at 32 px (22,700 against 8,600 images/s on
one core of an EPYC, one run on a busy machine), but it is deprecated since 0.29 and knows JPEG only, and the images are
decoded once. The codec runs without Python's lock, the rest of the work does not: threads are for large images.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from sssd_zoo.data.formats import LFS_POINTER, regular_file

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST_NATURAL = 96  # images up to this side are kept as they are, larger ones are resized to what the caller asks
CHUNK = 64  # images that a thread decodes at a time
FULL_FINGERPRINT = 200_000  # rows up to which the fingerprint covers all of them
SAMPLED_FINGERPRINT = 20_000  # rows of larger sets that it covers

Corrupt = tuple[int | str, str]  # row number, or path where the image is a file; and the reason


class Encoded(NamedTuple):
    """One image as it lies in the data set: its path or row number, its bytes, and why these are missing, if so."""

    name: int | str
    data: bytes
    error: str | None


class CorruptImageError(Exception):
    """An image that cannot be decoded; the text is the reason."""


class EncodedImages:
    """Reads the encoded images of a split by row number.

    Args:
        rows: a split with the column.
        column: its images, of the feature `Image` without decoding.
    """

    def __init__(self, rows: "Dataset", column: str) -> None:
        self.column = column
        self.rows = rows.select_columns([column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Sequence[int] | NDArray[np.int64]) -> list[Encoded]:
        """Reads rows in the order asked for; one that cannot be read carries the reason."""
        images = self.rows[list(map(int, index))][self.column].to_pylist()
        return [encoded(int(row), image) for row, image in zip(index, images, strict=True)]


def encoded(name: int | str, image: dict[str, Any] | None) -> Encoded:
    """Turns the `{'bytes', 'path'}` of an undecoded `Image` feature into an `Encoded`; reads the file if need be."""
    if image is None:
        return Encoded(name, b"", "the row has no image")
    if image["bytes"] is not None:
        return Encoded(name, image["bytes"], None)
    path = image["path"]
    if path is None:
        return Encoded(name, b"", "the row has no image")
    try:
        # Streamed folders hold URLs, chains of them for archives.
        if "://" in path:
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb") as file:
                return Encoded(path, file.read(), None)
        data = regular_file(Path(path)).read_bytes()
    except OSError as error:
        return Encoded(path, b"", error.strerror or str(error))
    if data.startswith(LFS_POINTER):
        return Encoded(path, b"", "it is a git-lfs pointer, not an image: run `git lfs pull`")
    return Encoded(path, data, None)


def decode(image: Encoded, size: int) -> NDArray[np.uint8]:
    """Decodes an image to the stored form: RGB, upright by its EXIF tag, a centred square resized to size x size.

    Of an image that is not square, the middle is kept: the shorter side becomes `size` (bilinear, antialiased), the
    longer one is cropped. Alpha is dropped, grey is repeated, 16-bit grey keeps its upper 8 bits, of several frames the
    first is taken.

    Args:
        image: the encoded image.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size].

    Raises:
        CorruptImageError: if it cannot be read or decoded whole.
    """
    if image.error is not None:
        raise CorruptImageError(image.error)
    if not image.data:
        raise CorruptImageError("it is empty")
    try:
        with Image.open(io.BytesIO(image.data)) as picture:
            # A JPEG decoder can halve the image up to three times for free; twice the size leaves the filter its part.
            if min(picture.size) > 2 * size:
                picture.draft("RGB", (2 * size, 2 * size))
            rgb = to_rgb(picture)
        if rgb.size != (size, size):
            rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    except UnidentifiedImageError:
        raise CorruptImageError("it is not an image of a known format") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from error
    return np.frombuffer(rgb.tobytes(), np.uint8).reshape(size, size, 3).transpose(2, 0, 1)


def to_rgb(picture: Image.Image, *, upright: bool = True) -> Image.Image:
    """Decodes an opened picture to RGB, see `decode`; `upright` turns it as its EXIF tag says."""
    picture.load()
    # Of EXIF the orientation matters only; looking for it in images without EXIF would cost a tenth of the decoding.
    if upright and (picture.info.get("exif") or picture.format == "TIFF"):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16 bit: Pillow's own conversion clips all above 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture))
        scale = 255.0 if values.size and values.max() <= 1.0 else 1.0
        picture = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    elif picture.mode == "P":
        picture = picture.convert("RGBA")  # straight to RGB, Pillow would warn of palettes with transparency
    return picture.convert("RGB")


def natural_size(images: Sequence[Encoded]) -> int | None:
    """The side that all images share, if they are square and at most 96 px; otherwise None. Broken ones are ignored."""
    sizes = set()
    for image in images:
        try:
            with Image.open(io.BytesIO(image.data)) as picture:
                sizes.add(picture.size)
        except Exception:  # decoding will name it
            continue
    if len(sizes) != 1:
        return None
    width, height = sizes.pop()
    return width if width == height <= LARGEST_NATURAL else None


def fingerprint(images: EncodedImages, *, progress: bool) -> str:
    """Names a data set by its content and order, whatever it is stored in and however it is decoded.

    Args:
        images: all rows of the split, readable or not.
        progress: show a bar.

    Returns:
        SHA-256 in hex over the number of rows and, for each row, length and encoded bytes; of more than 200,000 rows,
        20,000 evenly spaced ones are read.
    """
    count = len(images)
    rows = np.arange(count) if count <= FULL_FINGERPRINT else spaced(count, SAMPLED_FINGERPRINT)
    digest = hashlib.sha256(count.to_bytes(8, "little"))
    with tqdm(total=len(rows), desc="fingerprint", unit="img", disable=not progress, leave=False) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = images.read(rows[start : start + CHUNK])
            for image in chunk:
                digest.update(len(image.data).to_bytes(8, "little"))
                digest.update(image.data)
            bar.update(len(chunk))
    return digest.hexdigest()


def spaced(count: int, wanted: int) -> NDArray[np.int64]:
    """Evenly spaced row numbers, first and last included: all of them if there are no more than `wanted`."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def decode_all(
    images: EncodedImages, size: int, *, keep: bool, workers: int, progress: bool
) -> tuple[Tensor | None, NDArray[np.int64], list[Corrupt]]:
    """Decodes a whole split in threads, to keep its images or only to find the corrupt ones.

    Args:
        images: the N encoded images.
        size: side S of the images kept; images only looked at are decoded at the lowest resolution their format has.
        keep: whether to return the images.
        workers: threads.
        progress: show a bar.

    Returns:
        The images that could be decoded, uint8 [M, 3, S, S], if kept; their row numbers, int64 [M]; the corrupt ones.
    """
    count = len(images)
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8) if keep else None
    into = None if pixels is None else pixels.numpy()
    good = np.ones(count, dtype=bool)

    def work(start: int) -> tuple[int, list[Corrupt]]:
        chunk, corrupt = images.read(np.arange(start, min(start + CHUNK, count))), []
        for row, image in enumerate(chunk, start):
            try:
                if into is None:
                    decode(image, 1)
                else:
                    into[row] = decode(image, size)
            except CorruptImageError as error:
                good[row] = False
                corrupt.append((image.name, str(error)))
        return len(chunk), corrupt

    found: list[Corrupt] = []
    with (
        quiet_pillow(),
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=count, desc="decode" if keep else "check", unit="img", disable=not progress) as bar,
    ):
        for done, corrupt in pool.map(work, range(0, count, CHUNK)):
            found += corrupt
            bar.update(done)
    rows = np.flatnonzero(good)
    return (pixels[torch.from_numpy(rows)] if pixels is not None and found else pixels), rows, found


def decode_batch(
    images: Sequence[Encoded],
    size: int,
    run: Callable[[Callable[[Encoded], Any], Iterable[Encoded]], Iterable[Any]] = map,
) -> tuple[Tensor, NDArray[np.int64], list[Corrupt]]:
    """Decodes a batch; each corrupt image is replaced by a good one of the batch.

    Args:
        images: the B encoded images.
        size: side S of the result.
        run: `map`, or that of an executor.

    Returns:
        uint8 [B, 3, S, S]; int64 [B], which image of the batch lies in each place; the corrupt ones. If all are
        corrupt, the images are black.
    """

    def attempt(image: Encoded) -> NDArray[np.uint8] | CorruptImageError:
        try:
            return decode(image, size)
        except CorruptImageError as error:
            return error

    pixels = torch.zeros(len(images), 3, size, size, dtype=torch.uint8)
    into, places, corrupt = pixels.numpy(), np.arange(len(images)), []
    good, bad = [], []
    for place, result in enumerate(run(attempt, images)):
        if isinstance(result, CorruptImageError):
            corrupt.append((images[place].name, str(result)))
            bad.append(place)
        else:
            into[place] = result
            good.append(place)
    if good:
        places[bad] = np.resize(good, len(bad))
        into[bad] = into[places[bad]]
    return pixels, places, corrupt


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keeps Pillow's remarks on odd metadata out of the progress bars; what matters raises and is counted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
