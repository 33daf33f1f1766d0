"""The last map of a network, in one layout, and with its pooled features as one vector: what `--dense` predicts."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.data.inputs import input_channels
from sssd_zoo.errors import UserError


def spatial_map(last: Tensor, network: Any) -> Tensor:
    """The result of a network's `forward_features` as a map [B, C, h, w].

    Args:
        last: the result, of any layout: a map, or tokens [B, N, C].
        network: it says how its maps lie, and how many tokens are of no place.

    Raises:
        UserError: if it has no places, or tokens that form no square.
    """
    if last.ndim == 4:
        return last.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else last
    if last.ndim == 3:
        places = last[:, int(getattr(network, "num_prefix_tokens", 0)) :].transpose(1, 2)
        side = math.isqrt(places.shape[2])
        if side**2 == places.shape[2]:
            return places.reshape(*places.shape[:2], side, side)
    raise UserError(f"a {type(network).__name__} has features of shape {list(last.shape)}, no square map: remove dense")


def features_and_map(network: Any, images: Tensor, side: int) -> Tensor:
    """The pooled features of a network, and its last map averaged to `side` x `side` places.

    Args:
        network: a timm network with `num_classes=0`.
        images: [B, C, H, W], as it wants them.
        side: of the map; 0 leaves it out.

    Returns:
        [B, D + side * side * channels of the map]; the map's part is [channels, side, side], flattened.
    """
    if not side:
        pooled: Tensor = network(images)
        return pooled
    last = network.forward_features(images)
    averaged = F.adaptive_avg_pool2d(spatial_map(last, network), side)
    return torch.cat([network.forward_head(last, pre_logits=True), averaged.flatten(1)], dim=1)


def map_shape(network: Any, size: int) -> tuple[int, int]:
    """Channels and side of a network's last map, of images of `size` pixels.

    Raises:
        UserError: see `spatial_map`.
    """
    shapes = copy.deepcopy(network).to("meta").eval()  # computes nothing
    images = torch.zeros(1, input_channels(network), size, size, device="meta")
    found = spatial_map(shapes.forward_features(images), network)
    return found.shape[1], found.shape[2]


def common_map(student: Any, size: int, encoder: Any, encoder_size: int) -> tuple[int, int]:
    """Side of the smaller of two networks' last maps, and channels of the encoder's.

    Args:
        student: a network.
        size: side of its images in pixels.
        encoder: a network.
        encoder_size: side of its images in pixels.

    Raises:
        UserError: if that is a single place, which is no map; see also `spatial_map`.
    """
    _, mine = map_shape(student, size)
    channels, theirs = map_shape(encoder, encoder_size)
    if min(mine, theirs) < 2:
        raise UserError(
            f"dense needs maps of several places, and at these sizes the student's last map has {mine} x {mine}, the "
            f"encoder's {theirs} x {theirs}: give a larger --image_size or --teacher_size, or a network with the stem "
            "for small images (one that ends in _cifar)"
        )
    return min(mine, theirs), channels
