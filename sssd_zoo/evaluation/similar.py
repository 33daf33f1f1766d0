"""Images that look alike by their features and pixels, and images that show nothing."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DARK = 20.0  # of 255: the mean brightness below which an image counts as dark
CONSTANT = 3.0  # of 255: the standard deviation of each channel below which an image counts as of one colour
ALIKE = 0.985  # correlation of the pixels of two copies, resized or compressed anew
COMPARED = 16  # side in pixels at which copies are compared

_ROWS = 1024  # features that are compared with all others at a time

Pixels = NDArray[np.uint8]


def nearest(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest neighbours of every image among all, itself left out, by the cosine of their features.

    Args:
        features: float32 [N, D].
        count: neighbours of each image; fewer where there are fewer images.

    Returns:
        Positions, int64 [N, count], the nearest first, and cosines, float32 [N, count].
    """
    unit = torch.nn.functional.normalize(features)
    count = min(count, len(features) - 1)
    found = []
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, own + start] = -torch.inf
        found.append(cosines.topk(count))
    return torch.cat([top.indices for top in found]), torch.cat([top.values for top in found])


def brightness(thumbnails: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of images, uint8 [N, S, S, 3], the mean and the largest standard deviation of a channel, float32 [N], 0..255."""
    means, spans = np.empty(len(thumbnails), np.float32), np.empty(len(thumbnails), np.float32)
    for start in range(0, len(thumbnails), _ROWS):
        pixels = thumbnails[start : start + _ROWS].astype(np.float32)
        means[start : start + _ROWS] = pixels.mean((1, 2, 3))
        spans[start : start + _ROWS] = pixels.std((1, 2)).max(1)
    return means, spans


def copies(thumbnails: Pixels, neighbours: Tensor, groups: list[list[int]]) -> list[list[int]]:
    """Groups of images that show the same picture.

    Two images do if their files are the same, or if they are neighbours and their pixels correlate by `ALIKE`. An image
    of one colour correlates with nothing.

    Args:
        thumbnails: uint8 [N, S, S, 3].
        neighbours: int64 [N, k], see `nearest`.
        groups: positions of images with the same files.

    Returns:
        Groups of at least two positions, each in order.
    """
    _, spans = brightness(thumbnails)
    pixels = torch.from_numpy(thumbnails).permute(0, 3, 1, 2)
    small = torch.cat(
        [torch.nn.functional.adaptive_avg_pool2d(part.float(), COMPARED).flatten(1) for part in pixels.split(_ROWS)]
    )
    small = torch.nn.functional.normalize(small - small.mean(1, keepdim=True))
    leader = list(range(len(thumbnails)))

    def first(place: int) -> int:
        while leader[place] != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    pairs = [(group[0], other) for group in groups for other in group[1:]]
    for column in neighbours.T:
        correlated = ((small * small[column]).sum(1) > ALIKE).numpy() & (spans > CONSTANT)
        pairs += [(place, int(column[place])) for place in np.flatnonzero(correlated).tolist()]
    for one, other in pairs:
        low, high = sorted((first(one), first(other)))
        leader[high] = low
    members: dict[int, list[int]] = {}
    for place in range(len(thumbnails)):
        members.setdefault(first(place), []).append(place)
    return [group for group in members.values() if len(group) > 1]
