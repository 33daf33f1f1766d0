"""Images that Pillow does not read: arrays of NumPy, DICOM, and TIFF files of several channels or pages.

All become arrays of 8 or 16 bits, without loss where their values are whole numbers of up to 16 bits. DICOM needs
pydicom and TIFF needs tifffile, which the extra `dicom` brings.
"""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from sssd_zoo.data.formats import DICOM, TIFF, CorruptImageError
from sssd_zoo.errors import UserError

NUMPY = b"\x93NUMPY"
MOST_SAMPLES = 64  # channels that a file may have to be opened
REDUCED, MASK = 1, 4  # bits of a TIFF page's type: a smaller copy of another page, a mask of it

Pixels = NDArray[Any]  # uint8 or uint16 [H, W, C]


def need(package: str, what: str) -> Any:
    """The module of a package that is not always installed.

    Raises:
        UserError: that says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from error


def is_dicom(data: bytes) -> bool:
    """Whether these are the bytes of a DICOM file, whatever its name."""
    return data[128:132] == b"DICM"


def is_tiff(data: bytes) -> bool:
    """Whether these are the bytes of a TIFF or BigTIFF file."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_array(data: bytes) -> bool:
    """Whether `array_of` reads these bytes, rather than Pillow."""
    return data.startswith(NUMPY) or is_dicom(data)


def header_of(data: bytes) -> tuple[int, int, int]:
    """Width, height and bits per channel (8, or 16 for all more) that an array or a DICOM file states.

    Raises:
        CorruptImageError: if it is neither, or its header is damaged.
    """
    if data.startswith(NUMPY):
        shape, dtype = _npy_header(io.BytesIO(data))
        height, width = (shape[1:] if len(shape) == 3 and shape[0] < shape[-1] else shape)[:2]
        return width, height, 8 if dtype in (np.uint8, np.bool_) else 16
    file = _dicom(data, stop_before_pixels=True)
    return int(file.Columns), int(file.Rows), 8 if int(file.BitsStored) <= 8 else 16


def frames_of(data: bytes) -> int:
    """How many frames a DICOM file states."""
    return int(_dicom(data, stop_before_pixels=True).get("NumberOfFrames", 1) or 1)


def array_of(data: bytes, max_pixels: int, channels: int | None = None, bits: int = 16) -> Pixels:
    """The pixels of a NumPy array or the first frame of a DICOM file.

    Args:
        data: the file.
        max_pixels: largest number of pixels that may be decoded.
        channels: how many channels are wanted, which tells [C, H, W] from [H, W, C].
        bits: 8 or 16, that an array of floats of 0 to 1 gets.

    Raises:
        CorruptImageError: if it cannot be decoded.
    """
    if not data.startswith(NUMPY):
        return dicom_frame(_dicom(data), 0, max_pixels)
    file = io.BytesIO(data)
    shape, _ = _npy_header(file)
    if int(np.prod(shape[:2])) > max_pixels * MOST_SAMPLES:
        raise CorruptImageError(f"its array of {shape} is more than --max_pixels {max_pixels} allows")
    file.seek(0)
    return whole(channels_last(np.load(file, allow_pickle=False), channels), bits)


def channels_last(array: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """An array [H, W], [H, W, C] or [C, H, W] as [H, W, C].

    Args:
        array: of an image.
        channels: C, where it is known; otherwise 1, 3 or 4.

    Raises:
        CorruptImageError: if it has other axes.
    """
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise CorruptImageError(f"its array has {array.ndim} axes, and an image has 2 or 3")
    first, last = array.shape[0], array.shape[-1]
    known = (1, 3, 4) if channels is None else (channels,)
    crossed = first in known and last not in known
    return np.moveaxis(array, 0, -1) if crossed else array


def whole(array: NDArray[Any], bits: int = 16) -> Pixels:
    """Values of any type in 8 or 16 bits: whole numbers as they are, floats of 0 to 1 over the range of `bits`.

    Values that are no numbers (NaN) become 0. Floats above 1 are levels, and are rounded.

    Raises:
        CorruptImageError: if values lie outside of what 16 bits hold, or rounding would leave less of them than 8 bits.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise CorruptImageError(f"its values are of the type {array.dtype}")
    floats = array.dtype.kind == "f"
    # In float64: half precision has no 65535.
    values = np.nan_to_num(array.astype(np.float64), nan=0.0) if floats else array
    least, greatest = values.min(initial=0), values.max(initial=0)
    if least < 0 or greatest > 65535:
        raise CorruptImageError(
            f"its values run from {least:g} to {greatest:g}: --channels takes whole numbers of 0 to 65535 and "
            "fractions of 0 to 1"
        )
    if floats and greatest <= 1:
        fractions: Pixels = np.rint(values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
        return fractions
    levels: Pixels = np.rint(values).astype(np.uint16)
    if floats and greatest < 255 and (levels != values).any():
        raise CorruptImageError(
            f"its values are fractions of up to {greatest:g}: give fractions of 0 to 1, or whole numbers of 0 to 65535"
        )
    return levels


def _npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], Any]:
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise CorruptImageError(f"its header is damaged: {error}") from error
    if dtype.hasobject or len(shape) not in (2, 3) or 0 in shape:
        raise CorruptImageError(f"its array of {dtype} with the shape {shape} is no image")
    return shape, dtype


def _dicom(data: bytes, **kwargs: Any) -> Any:
    pydicom = need("pydicom", "DICOM")
    try:
        file = pydicom.dcmread(io.BytesIO(data), **kwargs)
    except Exception as error:  # its parsers raise whatever they run into
        raise CorruptImageError(f"its DICOM header is damaged: {error}") from error
    if not all(name in file for name in ("Rows", "Columns", "BitsStored")):
        raise CorruptImageError("it is a DICOM file without an image")
    return file


def dicom_frame(file: Any, frame: int, max_pixels: int) -> Pixels:
    """A frame of a DICOM file, [H, W, 1 or 3], over the full range of its stored bits.

    The rescale slope and intercept are applied, and the range that the stored bits then span is mapped to all of 8 or
    16 bits: windows and levels, which are for a person's eye, are not. MONOCHROME1, whose least value is white, is
    inverted.

    Args:
        file: of `pydicom.dcmread`.
        frame: from 0.
        max_pixels: largest number of pixels that may be decoded.

    Raises:
        CorruptImageError: if it cannot be decoded.
    """
    pixels = need("pydicom.pixels", "DICOM")
    if int(file.Rows) * int(file.Columns) > max_pixels:
        raise CorruptImageError(f"its {file.Columns} x {file.Rows} pixels are more than --max_pixels {max_pixels}")
    try:
        array = pixels.pixel_array(file, index=frame)
        kind = str(file.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            return whole(pixels.apply_color_lut(array, file))
        if array.ndim == 3:
            return whole(array)
        values = pixels.apply_rescale(array, file).astype(np.float64)
        low, high = sorted(pixels.apply_rescale(_stored_range(file), file).astype(np.float64).tolist())
    except Exception as error:  # of its decoders, of which some are packages of their own
        raise CorruptImageError(f"its DICOM pixels cannot be decoded: {error}") from error
    fractions = (values - low) / (high - low)
    if kind == "MONOCHROME1":
        fractions = 1 - fractions
    shallow = int(file.BitsStored) <= 8
    levels = np.rint(fractions.clip(0, 1) * (255 if shallow else 65535))
    result: Pixels = levels.astype(np.uint8 if shallow else np.uint16)
    return result[:, :, None]


def _stored_range(file: Any) -> NDArray[np.int64]:
    """The least and the greatest value that the stored bits can hold."""
    span = 2 ** int(file.BitsStored)
    return np.array([-span // 2, span // 2 - 1] if int(file.PixelRepresentation) else [0, span - 1])


def tiff_pixels(data: bytes, max_pixels: int, channels: int) -> Pixels:
    """A TIFF file that Pillow does not read without loss: the channels of its first page, or a page for each channel.

    Raises:
        CorruptImageError: if it cannot be decoded.
    """
    tifffile = need("tifffile", "TIFF of several channels")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            pages = _full_pages(file)
            first = _page_array(pages[0], max_pixels, channels)
            if first.shape[2] == 1 and len(pages) == channels > 1:
                others = [_page_array(page, max_pixels, 1) for page in pages[1:]]
                first = np.concatenate([first, *others], axis=2)
    except CorruptImageError:
        raise
    except Exception as error:  # its parsers raise whatever they run into
        raise CorruptImageError(f"tifffile cannot decode it: {error}") from error
    return whole(first)


def tiff_header(data: bytes) -> tuple[int, int, int]:
    """Width, height and bits per channel (8, or 16 for all more) of a TIFF file's first page."""
    with need("tifffile", "TIFF of several channels").TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        return page.imagewidth, page.imagelength, 8 if page.dtype in (np.uint8, np.bool_) else 16


def _full_pages(file: Any) -> list[Any]:
    """The pages that are images of their own, of a `TiffFile`."""
    pages = [page for page in file.pages if not int(page.subfiletype) & (REDUCED | MASK)]
    return pages or list(file.pages)[:1]


def _page_array(page: Any, max_pixels: int, channels: int | None) -> NDArray[Any]:
    page = page.aspage()
    if page.imagewidth * page.imagelength > max_pixels or page.samplesperpixel > MOST_SAMPLES:
        raise CorruptImageError(
            f"its {page.imagewidth} x {page.imagelength} pixels of {page.samplesperpixel} channels are more than "
            f"--max_pixels {max_pixels} allows"
        )
    array: NDArray[Any] = page.asarray()
    if page.axes == "SYX":
        return np.moveaxis(array, 0, -1)
    return channels_last(array, channels)


def count_pages(path: Path) -> int:
    """How many images a TIFF or DICOM file holds; 1 for any other, and for one that decoding will report."""
    ending = path.suffix.lower()
    if ending not in (*TIFF, *DICOM):
        return 1
    what = "reading all pages of TIFF" if ending in TIFF else "DICOM"
    package = need("tifffile" if ending in TIFF else "pydicom", what)
    try:
        if ending in TIFF:
            with package.TiffFile(path) as file:
                return len(_full_pages(file))
        return frames_of(path.read_bytes())
    except Exception:  # decoding reports it
        return 1


def read_page(path: Path, page: int, max_pixels: int) -> bytes:
    """A page of a TIFF file or a frame of a DICOM file, as the bytes of an array's .npy file.

    Raises:
        CorruptImageError: if it cannot be decoded.
        OSError: if the file cannot be read.
    """
    if path.suffix.lower() in DICOM:
        array = dicom_frame(_dicom(path.read_bytes()), page, max_pixels)
    else:
        tifffile = need("tifffile", "reading all pages of TIFF")
        try:
            with tifffile.TiffFile(path) as file:
                array = whole(_page_array(_full_pages(file)[page], max_pixels, None))
        except (CorruptImageError, OSError):
            raise
        except Exception as error:  # its parsers raise whatever they run into
            raise CorruptImageError(f"tifffile cannot decode it: {error}") from error
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def picture_of(array: Pixels) -> Image.Image:
    """An array [H, W, C] as what Pillow would have read: grey of 8 or 16 bits, or RGB.

    Raises:
        CorruptImageError: if it has neither 1 nor 3 channels, or 3 of 16 bits.
    """
    height, width, channels = array.shape
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(array[:, :, 0]))
    if channels != 3:
        raise CorruptImageError(
            f"it has {channels} channels, and RGB has 3: convert it, or train a network with --channels {channels}"
        )
    if array.dtype == np.uint16:
        raise CorruptImageError(
            "its colours have 16 bits, and RGB is read in 8: convert it, or train a network with --channels 3"
        )
    return Image.frombuffer("RGB", (width, height), np.ascontiguousarray(array).tobytes())
