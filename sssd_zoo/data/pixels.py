"""Images of 1 to 16 channels and of 8 or 16 bits per channel, as they are stored: what `--channels` reads."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sssd_zoo.configs import DataConfig
from sssd_zoo.data import containers
from sssd_zoo.data.containers import Pixels
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.opening import Encoded, open_picture, opened
from sssd_zoo.errors import UserError

PAGE = "__page__"  # column with the number of a file's page, where a file holds several images
SINGLE = ("L", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow's modes of one channel, with all their bits


class PixelFormat(NamedTuple):
    """How images are kept, where not as RGB of 8 bits.

    Attributes:
        channels: 1 to 16.
        bits: of each channel, 8 or 16.
    """

    channels: int
    bits: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the images' tensors."""
        return torch.uint8 if self.bits == 8 else torch.uint16

    @property
    def identity(self) -> dict[str, int]:
        """What tells runs on such images from others."""
        return {"channels": self.channels, "bits": self.bits}


class Channelled:
    """What images of any form have in common.

    Attributes:
        pixels: channels and bits of the images; None for RGB of 8 bits.
    """

    pixels: PixelFormat | None

    @property
    def channels(self) -> int:
        """Of the images."""
        return 3 if self.pixels is None else self.pixels.channels


def pixel_format(config: DataConfig, sample: Sequence[Encoded]) -> PixelFormat | None:
    """How to keep the images; None for RGB of 8 bits, which is what is kept without `--channels`, too.

    Args:
        config: what was asked for.
        sample: some of the images: if one has more than 8 bits per channel, all are kept in 16.
    """
    if config.channels is None:
        return None
    bits: int = config.bits or max((_bits(image.data) for image in sample), default=8)
    return None if (config.channels, bits) == (3, 8) else PixelFormat(config.channels, bits)


def _bits(data: bytes) -> int:
    """Bits per channel of an encoded image, 8 or 16 for all more; 8 for one that cannot be read."""
    try:
        if containers.is_array(data):
            return containers.header_of(data)[2]
        try:
            with open_picture(data) as picture:
                return 16 if picture.mode[0] in "IF" or _deep_colour(picture) else 8
        except UnidentifiedImageError:
            return containers.tiff_header(data)[2] if containers.is_tiff(data) else 8
    except UserError:
        raise
    except Exception:  # decoding reports it
        return 8


def stored(data: bytes, size: int, max_pixels: int, pixels: PixelFormat) -> Pixels:
    """Decodes an image with all its channels and bits; one of size x size pixels without any loss.

    Others are centre-cropped and resized channel by channel, as RGB images are. Grey images are repeated where three
    channels are asked for, colour becomes luma where one is, and alpha is dropped unless there is room for it.

    Args:
        data: the encoded image.
        size: side of the result in pixels.
        max_pixels: largest number of pixels that may be decoded.
        pixels: what to keep.

    Returns:
        uint8 or uint16 [channels, size, size], by the bits of `pixels`.

    Raises:
        CorruptImageError: if it cannot be decoded, or has other channels or more bits.
    """
    if containers.is_array(data):
        array = containers.array_of(data, max_pixels, pixels.channels)
    else:
        array = _decoded(data, size, max_pixels, pixels)
    array = _with_bits(_with_channels(array, pixels.channels), pixels.bits)
    if array.shape[:2] != (size, size):
        top = np.iinfo(array.dtype).max
        planes = [
            ImageOps.fit(Image.fromarray(plane.astype(np.float32)), (size, size), Image.Resampling.BILINEAR)
            for plane in np.moveaxis(array, -1, 0)
        ]
        resized: Pixels = np.rint(np.stack([np.asarray(plane) for plane in planes])).clip(0, top).astype(array.dtype)
        return resized
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))


def _decoded(data: bytes, size: int, max_pixels: int, pixels: PixelFormat) -> Pixels:
    """An image of any format but NumPy's and DICOM, [H, W, C]."""
    try:
        with opened(data, max_pixels, shrink_to=size) as picture:
            single = picture.mode in SINGLE or len(picture.getbands()) == 1
            stacked = single and pixels.channels > 1 and getattr(picture, "n_frames", 1) == pixels.channels
            deep = _deep_colour(picture)
            if not (picture.format == "TIFF" and (stacked or (deep and picture.mode not in ("RGB", "RGBA")))):
                array = _deep_pixels(data, picture) if deep else _shallow_pixels(picture)
                has_alpha = picture.mode in ("LA", "RGBA") and array.shape[2] in (2, 4)
                return array[:, :, :-1] if has_alpha and array.shape[2] != pixels.channels else array
    except UnidentifiedImageError:
        if not containers.is_tiff(data):
            raise
    return containers.tiff_pixels(data, max_pixels, pixels.channels)


def _shallow_pixels(picture: Image.Image) -> Pixels:
    """A picture of 8 bits per channel, or of one channel with any."""
    picture.load()
    if picture.info.get("exif") or picture.format == "TIFF":
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode in SINGLE:
        return containers.whole(np.asarray(picture))[:, :, None]
    if picture.mode == "1":
        return np.asarray(picture.convert("L"))[:, :, None]
    if picture.mode == "P" or picture.mode not in ("LA", "RGB", "RGBA", "RGBX"):
        picture = picture.convert("RGB")
    return np.asarray(picture)


def _deep_colour(picture: Image.Image) -> bool:
    """Whether Pillow would keep the upper 8 of 16 bits of several channels."""
    tiles: Any = getattr(picture, "tile", ())
    return len(picture.getbands()) > 1 and any(";16" in str(tile[3]) for tile in tiles)


def _deep_pixels(data: bytes, picture: Image.Image) -> Pixels:
    """A picture of several channels of 16 bits, of which Pillow decodes only the upper 8.

    So it is decoded once more with the bytes of each value taken the other way round, which gives the lower 8.
    """
    tiles: Any = picture.tile  # type: ignore[attr-defined]  # of a file
    if str(tiles[0].args).startswith("LA;"):
        raise CorruptImageError("it is grey with alpha in 16 bits, which is not read: save it without alpha")
    with open_picture(data) as again:
        again.tile = [  # type: ignore[attr-defined]
            tile._replace(args=_other_way_round(tile.args)) for tile in tiles
        ]
        low = np.asarray(again).astype(np.uint16)
    return np.asarray(picture).astype(np.uint16) * 256 + low


def _other_way_round(args: Any) -> Any:
    """Pillow's arguments of a tile, with the order of bytes reversed ('RGB;16B' to 'RGB;16L')."""
    if isinstance(args, tuple):
        return tuple(_other_way_round(each) for each in args)
    if not isinstance(args, str) or ";16" not in args:
        return args
    layout, order = args.split(";16")
    little = order == "L" or (order != "B" and sys.byteorder == "little")
    return f"{layout};16{'B' if little else 'L'}"


def _with_channels(array: Pixels, channels: int) -> Pixels:
    """An image [H, W, C] with the channels asked for, see `stored`."""
    found = array.shape[2]
    if found == channels:
        return array
    if found == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if channels == 1 and found == 3:
        luma: Pixels = np.rint(array @ np.array([0.299, 0.587, 0.114])).astype(array.dtype)
        return luma[:, :, None]
    raise CorruptImageError(f"it has {found} channel{'s' * (found != 1)}, and --channels asks for {channels}")


def _with_bits(array: Pixels, bits: int) -> Pixels:
    """An image in 8 or 16 bits per channel; 255 of 8 bits is 65535 of 16."""
    if array.dtype == np.uint8:
        return array if bits == 8 else array.astype(np.uint16) * 257
    if bits == 8:
        raise CorruptImageError("it has 16 bits per channel, and the images are read in 8: give --bits 16")
    return array


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over images, uint8 or uint16 [B, C, S, S], of values in 0..1 and of their squares: float64 [C] each."""
    top = 65535.0 if images.dtype == torch.uint16 else 255.0
    values = images.to(torch.float32).div_(top).double()
    return values.sum((0, 2, 3)), values.square().sum((0, 2, 3))


def shown(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images of any channels and bits for a person's eye: uint8 [B, 3, S, S] of the first three channels, or the first.

    Args:
        images: uint8 or uint16 [B, C, S, S].
        mean: of the channels, in 0..1.
        std: likewise; two of them below the mean are black, two above are white.
    """
    channels = [0, 1, 2] if images.shape[1] >= 3 else [0, 0, 0]
    top = 65535.0 if images.dtype == torch.uint16 else 255.0
    values = images.to(torch.float32)[:, channels] / top
    centre = torch.tensor(mean)[channels].view(1, 3, 1, 1)
    spread = torch.tensor(std)[channels].view(1, 3, 1, 1).clamp(min=1e-6)
    return (((values - centre) / (4 * spread) + 0.5) * 255).clamp(0, 255).byte()
