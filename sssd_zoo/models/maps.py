"""The last feature map of a network in one layout, alone or behind its pooled features: what a dense anchor learns."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.data.inputs import input_channels
from sssd_zoo.errors import UserError


class MapShape(NamedTuple):
    """Of a square feature map."""

    channels: int
    side: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return self.channels * self.side**2


def feature_map(output: Any, network: Any) -> Tensor:
    """What a network's `forward_features` gave, as a map [B, C, h, w].

    Args:
        output: a map in the network's own layout, or tokens [B, N, C].
        network: it knows how its maps lie, and how many of its tokens belong to no position.

    Raises:
        UserError: if it is neither, or the tokens cannot be arranged as a square.
    """
    if isinstance(output, Tensor) and output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else output
    if isinstance(output, Tensor) and output.ndim == 3:
        tokens = output[:, int(getattr(network, "num_prefix_tokens", 0)) :].transpose(1, 2)
        side = math.isqrt(tokens.shape[2])
        if side and side**2 == tokens.shape[2]:
            return tokens.reshape(*tokens.shape[:2], side, side)
    raise UserError(f"a {type(network).__name__} has no square feature map for dense: give another network")


def averaged(maps: Tensor, side: int) -> Tensor:
    """Maps [B, C, h, w] average-pooled to [B, C, side, side]."""
    return maps if maps.shape[-1] == side else F.adaptive_avg_pool2d(maps, side)


def features_and_map(network: Any, images: Tensor, side: int) -> Tensor:
    """The pooled features of a network, followed by its last feature map.

    Args:
        network: a timm network with `num_classes=0`.
        images: [B, C, H, W], as it wants them.
        side: that the map is average-pooled to; 0 leaves it out.

    Returns:
        [B, D + channels * side * side]; the map's part is [channels, side, side], flattened.
    """
    if not side:
        pooled: Tensor = network(images)
        return pooled
    output = network.forward_features(images)
    maps = averaged(feature_map(output, network), side)
    return torch.cat([network.forward_head(output, pre_logits=True), maps.flatten(1)], dim=1)


def map_shape(network: Any, size: int) -> MapShape:
    """Of a network's last feature map, for images of `size` pixels.

    Raises:
        UserError: if it has none, or cannot take such images.
    """
    shapes = copy.deepcopy(network).to("meta").eval()  # computes nothing
    images = torch.zeros(1, input_channels(network), size, size, device="meta")
    try:
        output = shapes.forward_features(images)
    except Exception as error:  # every architecture refuses in its own way
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"a {type(network).__name__} gives no feature map of {size} px: {reason}") from error
    found = feature_map(output, network)
    return MapShape(found.shape[1], found.shape[2])


def shared_map(student: Any, sizes: Sequence[int], encoder: Any, encoder_size: int) -> MapShape:
    """What a student learns of an encoder's last feature map: its channels, and the side of the smaller of their maps.

    Args:
        student: a network.
        sizes: sides of its images in pixels: first the one that counts, then those that training goes through.
        encoder: a network.
        encoder_size: side of its images in pixels.

    Raises:
        UserError: if one of the maps has a single position; see also `map_shape`.
    """
    own, other = [map_shape(student, size) for size in sizes], map_shape(encoder, encoder_size)
    too_small = "dense needs feature maps of at least 2 x 2 positions, and the"
    if min(shape.side for shape in own) < 2:
        raise UserError(
            f"{too_small} student has one at {min(sizes)} px: give larger views, or a network with the stem for small "
            "images (one that ends in _cifar)"
        )
    if other.side < 2:
        raise UserError(f"{too_small} encoder has one at {encoder_size} px: give it larger images, or another encoder")
    return MapShape(other.channels, min(own[0].side, other.side))
