"""MixUp and CutMix of whole batches, with random numbers per image: each image is mixed with its mirror in the batch.

MixUp: Zhang et al., arXiv:1710.09412; CutMix: Yun et al., arXiv:1905.04899. Both with Beta(1, 1), the uniform
distribution. That an image's partner is the one at the mirrored place, as in timm, makes no difference: batches are
shuffled.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.data.augment import BatchRandom

Mix = Literal["none", "mixup", "cutmix"]


def draw_mixing(random: BatchRandom, batch: int, size: int, mix: Mix) -> Tensor:
    """How much of each pixel is the image's own.

    Args:
        random: random numbers of the step.
        batch: number of images.
        size: side of the views in pixels.
        mix: 'mixup' blends whole images, 'cutmix' replaces a box that lies anywhere and is cut off at the edges.

    Returns:
        Float32 [batch, 1, size, size] in 0..1.
    """
    own = random.uniform(batch)
    if mix == "mixup":
        return own.view(-1, 1, 1, 1).expand(-1, 1, size, size)
    half = (1 - own).sqrt() * size / 2
    centre = random.integers(batch, 2, high=size)
    pixels = torch.arange(size)
    near = [(pixels - centre[:, axis : axis + 1]).abs() < half[:, None] for axis in range(2)]
    return 1 - (near[0][:, :, None] & near[1][:, None, :]).float().unsqueeze(1)


def blend(values: Tensor, own: Tensor) -> Tensor:
    """Mixes each row of a batch with its mirror.

    Args:
        values: float [B, ...].
        own: float, the weight of the row itself in 0..1; of a shape that broadcasts to that of `values`.
    """
    return torch.lerp(values.flip(0), values, own.to(values.dtype))


def blend_labels(labels: Tensor, own: Tensor, classes: int) -> Tensor:
    """Mixes labels, int64 [B] or soft, float32 [B, K], into soft ones, float32 [B, classes]; `own` is float32 [B]."""
    soft = F.one_hot(labels, classes).float() if labels.ndim == 1 else labels
    return blend(soft, own[:, None])
