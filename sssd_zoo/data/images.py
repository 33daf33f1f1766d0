"""Decodes images of any format to uint8 arrays of one size.

Pillow decodes all of them. torchvision's decode_jpeg took 0.4 of its time at 32 px (22,700 against 8,600 images/s on
one core of an EPYC, one run on a busy machine), but it is deprecated since 0.29 and reads JPEG only, and each
image is decoded once.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sssd_zoo.configs.data import MAX_PIXELS
from sssd_zoo.data.containers import Pixels, is_tiff
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.opening import Encoded, encoded, opened, side_lengths
from sssd_zoo.data.pixels import PAGE, PixelFormat, stored
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

STRIP = 2**20  # pixels of a deep image that are scaled at a time

# Usual maxima of deep pixels, and the factors to 0..255: the first range that holds all values is used.
USUAL = {"float": ((1.0, 255.0), (255.0, 1.0)), "integer": ((255.0, 1.0), (65535.0, 1 / 256))}

LARGEST_NATURAL = 96  # images up to this side keep their size, larger ones are resized as the caller asks

GDAL_NODATA, SAMPLE_FORMAT = 42113, 339  # tags of TIFF

CHUNK = 64  # images that are read at a time when all are

FULL_FINGERPRINT = 200_000  # rows up to which the fingerprint covers all of them

SAMPLED_FINGERPRINT = 20_000  # rows of larger sets that it covers

Corrupt = tuple[int | str, str]  # row number, or path where the image is a file; and the reason


class EncodedImages:
    """Reads the encoded images of a split by row number.

    Args:
        rows: a split with the column.
        column: its images, of the feature `Image` without decoding; a column `PAGE` says which page of a file each is.
        max_pixels: largest number of pixels of a page.
    """

    def __init__(self, rows: "Dataset", column: str, max_pixels: int = MAX_PIXELS) -> None:
        self.column, self.max_pixels = column, max_pixels
        self.paged = PAGE in rows.column_names
        self.rows = rows.select_columns([column, PAGE] if self.paged else [column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Sequence[int] | NDArray[np.int64]) -> list[Encoded]:
        """Reads rows in the order given; an unreadable one carries the reason."""
        table = self.rows[list(map(int, index))]
        images = table[self.column].to_pylist()
        if self.paged:
            images = [{**image, "page": page} for image, page in zip(images, table[PAGE].to_pylist(), strict=True)]
        return [encoded(int(row), image, self.max_pixels) for row, image in zip(index, images, strict=True)]

    def page(self, row: int) -> int | None:
        """Which page of its file a row is, from 0; None for a whole file, and for a row that holds its image itself."""
        page: int | None = self.rows[[row]][PAGE].to_pylist()[0] if self.paged else None
        return page

    def files(self, index: NDArray[np.int64]) -> list[str | None]:
        """The paths of the files that these rows are, or are pages of; None for a row that holds its image itself."""
        import pyarrow.compute as pc

        found: list[str | None] = []
        for start in range(0, len(index), 1000):
            few = index[start : start + 1000]
            # A slice, which copies nothing: the rows of parquet files hold the images.
            images = self.rows[int(few.min()) : int(few.max()) + 1][self.column]
            held = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
            paths = pc.struct_field(images, "path").to_pylist()
            found += [None if held[row] else paths[row] for row in (few - few.min()).tolist()]
        return found


def decode(image: Encoded, size: int, max_pixels: int = MAX_PIXELS, pixels: PixelFormat | None = None) -> Pixels:
    """Decodes an image to its stored form: RGB, rotated by its EXIF tag, centre-cropped and resized to size x size.

    The shorter side is resized to `size` (bilinear, antialiased), the longer one is centre-cropped. Alpha is dropped,
    grey is repeated over the channels, and the first of several frames is used. Pixels of more than 8 bits are scaled,
    see `to_rgb`.

    Args:
        image: the encoded image.
        size: side of the result in pixels.
        max_pixels: largest number of pixels that may be decoded, see `opened`.
        pixels: channels and bits to keep, see `pixels.stored`; by default RGB of 8 bits.

    Returns:
        uint8 [3, size, size], or what `pixels` says.

    Raises:
        CorruptImageError: if it cannot be read or fully decoded, or has too many pixels.
    """
    if image.error is not None:
        raise CorruptImageError(image.error)
    if not image.data:
        raise CorruptImageError("it is empty")
    try:
        if pixels is not None:
            return stored(image.data, size, max_pixels, pixels)
        with opened(image.data, max_pixels, shrink_to=size) as picture:
            rgb = to_rgb(picture)
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    except (CorruptImageError, UserError, MemoryError):  # a full memory says nothing of the image
        raise
    except UnidentifiedImageError:
        hint = "; if it has other channels than RGB, give --channels" if is_tiff(image.data) else ""
        raise CorruptImageError(
            f"it is not an image of a known format, or of pixels that Pillow does not read{hint}"
        ) from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from error
    return np.frombuffer(rgb.tobytes(), np.uint8).reshape(size, size, 3).transpose(2, 0, 1)


def to_rgb(picture: Image.Image, *, upright: bool = True) -> Image.Image:
    """Decodes an opened picture to RGB; `upright` applies its EXIF rotation (Pillow always applies that of TIFF).

    Deep pixels, that is 16- and 32-bit integers and floats, have no defined black and white. The first of the ranges
    0..1 (floats), 0..255 and 0..65535 (integers) that holds all values is mapped to 0..255; values that lie in none of
    them, or use less than a tenth of it, are scaled from their minimum to their maximum, as in ImageJ and matplotlib.
    NaN and the "no data" value of a GeoTIFF become 0, infinities 0 or 255, and none of them counts for the range.
    Pillow keeps the upper 8 bits of 16-bit colour, which must use more than a tenth of their range.

    Raises:
        CorruptImageError: if no value is a finite number, or 16-bit colour would become nearly black.
    """
    deep_colour = len(picture.getbands()) > 1 and any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
    picture.load()
    if deep_colour and _brightest(picture) < 255 / 10:
        raise CorruptImageError("its 16-bit colours use less than a tenth of their range: save it in 8 bits")
    # Only the EXIF orientation matters; looking for it in images without EXIF would add a tenth to the decoding time.
    if upright and (picture.info.get("exif") or picture.format == "TIFF"):
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _scaled(picture)
    elif picture.mode == "P":
        picture = picture.convert("RGBA")  # straight to RGB, Pillow would warn of palettes with transparency
    return picture.convert("RGB")


def _brightest(picture: Image.Image) -> float:
    """The largest value of its colour channels."""
    extrema: Any = picture.getextrema()  # of several bands
    return max(float(greatest) for band, (_, greatest) in zip(picture.getbands(), extrema, strict=True) if band != "A")


def _scaled(picture: Image.Image) -> Image.Image:
    """A deep picture in 8 bits, see `to_rgb`; strip by strip, as NumPy copies of the whole take too much memory."""
    tags = getattr(picture, "tag_v2", {})
    no_data = _number(tags.get(GDAL_NODATA))
    # Pillow reads uint32, the default of TIFF, as int32.
    unsigned = picture.mode == "I" and bool(tags) and tags.get(SAMPLE_FORMAT, (1,)) == (1,)

    def strips() -> Iterator[NDArray[np.float64]]:
        rows = max(1, STRIP // picture.width)
        for top in range(0, picture.height, rows):
            strip = np.asarray(picture.crop((0, top, picture.width, min(top + rows, picture.height))))
            values = (strip.view(np.uint32) if unsigned else strip).astype(np.float64)
            if no_data is not None:
                values[strip == no_data] = np.nan
            yield values

    least, greatest = np.inf, -np.inf
    for values in strips():
        finite = values[np.isfinite(values)]
        least, greatest = min(least, finite.min(initial=np.inf)), max(greatest, finite.max(initial=-np.inf))
    if least > greatest:
        raise CorruptImageError("none of its values is a finite number")
    usual = USUAL["float" if picture.mode == "F" else "integer"]
    top, factor = next(((top, factor) for top, factor in usual if least >= 0 and greatest <= top), (None, usual[-1][1]))
    span = greatest - least
    stretch = span > 0 and (top is None or span < top / 10)
    result = Image.new("L", picture.size)
    line = 0
    for values in strips():
        levels = (values - least) / span * 255 if stretch else values * factor
        levels = np.nan_to_num(levels, nan=0, posinf=255, neginf=0).clip(0, 255).astype(np.uint8)
        result.paste(Image.fromarray(levels), (0, line))
        line += len(levels)
    return result


def _number(text: Any) -> np.float32 | None:
    """The value in a GeoTIFF's "no data" tag, rounded like the picture's values."""
    try:
        return np.float32(text)
    except (TypeError, ValueError):
        return None


def natural_size(images: Sequence[Encoded]) -> int | None:
    """The common side of the images if they are square and at most 96 px, otherwise None. Corrupt ones are ignored."""
    sizes = set()
    for image in images:
        try:
            sizes.add(side_lengths(image.data))
        except Exception:  # decoding reports it
            continue
    if len(sizes) != 1:
        return None
    width, height = sizes.pop()
    return width if width == height <= LARGEST_NATURAL else None


def fingerprint(images: EncodedImages, *, progress: bool) -> str:
    """Identifies a data set by its content and order, however it is stored and decoded.

    Args:
        images: all rows of the split, readable or not.
        progress: show a progress bar.

    Returns:
        SHA-256 in hex over the number of rows and, for each row, length and encoded bytes; of more than 200,000 rows,
        20,000 evenly spaced ones are read.
    """
    count = len(images)
    rows = np.arange(count) if count <= FULL_FINGERPRINT else spaced(count, SAMPLED_FINGERPRINT)
    digest = hashlib.sha256(count.to_bytes(8, "little"))
    with progress_bar(len(rows), "fingerprint", "img", disable=not progress, leave=False) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = images.read(rows[start : start + CHUNK])
            for image in chunk:
                digest.update(len(image.data).to_bytes(8, "little"))
                digest.update(image.data)
            bar.update(len(chunk))
    return digest.hexdigest()


def spaced(count: int, samples: int) -> NDArray[np.int64]:
    """Evenly spaced row numbers, first and last included: all of them if there are at most `samples`."""
    return np.unique(np.linspace(0, count - 1, min(count, samples)).round().astype(np.int64))


def decode_batch(
    images: Sequence[Encoded],
    size: int,
    run: Callable[[Callable[[Encoded], Any], Iterable[Encoded]], Iterable[Any]] = map,
    max_pixels: int = MAX_PIXELS,
    pixels: PixelFormat | None = None,
) -> tuple[Tensor, NDArray[np.int64], list[Corrupt]]:
    """Decodes a batch; each corrupt image is replaced by a good one of the batch.

    Args:
        images: the B encoded images.
        size: side S of the result.
        run: `map`, or that of an executor.
        max_pixels: largest number of pixels of an image, see `decode`.
        pixels: channels and bits to keep, see `decode`.

    Returns:
        uint8 [B, 3, S, S], or as `pixels` says; int64 [B], which image of the batch lies in each place; the corrupt
        ones. If all are corrupt, the images are black.
    """

    def attempt(image: Encoded) -> Pixels | CorruptImageError:
        try:
            return decode(image, size, max_pixels, pixels)
        except CorruptImageError as error:
            return error

    batch = empty(len(images), size, pixels).zero_()
    into, places, corrupt = batch.numpy(), np.arange(len(images)), []
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
    return batch, places, corrupt


def empty(count: int, size: int, pixels: PixelFormat | None) -> Tensor:
    """A tensor for images: uint8 [count, 3, size, size], or as `pixels` says."""
    if pixels is None:
        return torch.empty(count, 3, size, size, dtype=torch.uint8)
    return torch.empty(count, pixels.channels, size, size, dtype=pixels.dtype)


def take(images: Tensor, index: Tensor) -> Tensor:
    """The images at these places; torch indexes uint16 on no GPU."""
    if images.dtype == torch.uint16:
        return images.view(torch.int16)[index].view(torch.uint16)
    return images[index]


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silences Pillow's warnings about metadata; errors that matter raise and are counted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
