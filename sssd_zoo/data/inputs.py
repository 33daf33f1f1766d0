"""Turns encoded images into network inputs exactly as accuracy is measured: stored first, then resized."""

from itertools import chain
from typing import Any, NamedTuple

import torch
from timm.models._input import get_model_args
from torch import Tensor

from sssd_zoo.configs.data import MAX_PIXELS
from sssd_zoo.data.augment import normalise, resize, to_float
from sssd_zoo.data.images import decode, natural_size
from sssd_zoo.data.opening import Encoded
from sssd_zoo.data.pixels import PixelFormat

CACHED = 2**18  # numbers that are prepared at a time: a mebibyte of float32, which a core's own cache holds


class InputSpec(NamedTuple):
    """What a network wants of its images: side in pixels, and the channels' mean and std to normalise by."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def storage_default(image_size: int | None) -> int:
    """The side that larger images are stored at: 8/7 of the views' side, which is 224 px by default."""
    return round((image_size or 224) * 8 / 7)


def pixels_of(network: Any) -> PixelFormat | None:
    """The channels and bits that a network's images are read with; None for RGB of 8 bits.

    Networks of this package record the bits where their images were read by `--channels`. Others take what their
    channels say: RGB, or grey made of RGB, for 3 or 1; for any other number, images with so many, of 16 bits or fewer.
    """
    channels = input_channels(network)
    bits = getattr(network, "bits", get_model_args(network).get("bits"))
    if bits is None and channels in (1, 3):
        return None
    return PixelFormat(channels, bits or 16)


def input_channels(network: Any) -> int:
    """How many channels the images of a timm network have."""
    return int(get_model_args(network).get("in_chans", 3))


def input_spec(network: Any, size: int | None = None) -> InputSpec:
    """What a timm network wants of its images.

    For a network with one input channel, mean and std have one entry: `normalise` then makes the images grey.

    Args:
        network: it.
        size: side in pixels that takes the place of the one that the network was trained with.
    """
    config = network.pretrained_cfg
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if input_channels(network) == 1:  # its configuration may still be that of the RGB network it was made from
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return InputSpec(size or int(config["input_size"][-1]), mean, std)


def network_input(stored: Tensor, spec: InputSpec) -> Tensor:
    """Stored images, uint8 or uint16 [B, C, S, S], resized and normalised: float32 [B, C, size, size], channels-last.

    On a CPU a few at a time, which gives the same numbers, and is faster where images are large: these stay cached.
    """

    def of(part: Tensor) -> Tensor:
        return normalise(resize(to_float(part), spec.size), spec.mean, spec.std)

    count = max(1, CACHED // stored.shape[1:].numel())
    if stored.device.type != "cpu" or len(stored) <= count:
        return of(stored)
    parts = map(of, stored.split(count))
    first = next(parts)
    inputs = torch.empty(len(stored), *first.shape[1:], memory_format=torch.channels_last)
    for place, part in zip(inputs.split(count), chain([first], parts), strict=True):
        place.copy_(part)
    return inputs


def prepared(stored: Tensor, network: Any) -> Tensor:
    """Stored images, uint8 or uint16 [B, C, S, S], as a network's input, float32 [B, C, size, size], normalised."""
    return network_input(stored, input_spec(network))


def prepare(image: Encoded, network: Any, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decodes one image to a network's input, float32 [1, C, size, size] on its device.

    It is read with the channels and bits that the network was trained on, see `pixels_of`, and stored at the size at
    which the network's accuracy was measured. Networks that do not record it (of earlier versions, or bundled) were
    measured on small square images at their own size, on others at `storage_default`.

    Raises:
        CorruptImageError: if it cannot be decoded, or its header states more than `max_pixels` pixels.
    """
    default = storage_default(input_spec(network).size)
    side = getattr(network, "storage_size", None) or natural_size([image]) or default
    stored = torch.from_numpy(decode(image, side, max_pixels, pixels_of(network)).copy()).unsqueeze(0)
    return prepared(stored.to(next(network.parameters()).device), network)
