"""Faster convolutions on the smallest feature maps, for training on a CPU: the same sums, as matrix products.

oneDNN loses most of its rate on maps of a few pixels, as the deepest stage of a ResNet has at 16 px. On a map of 2x2
pixels, 20 of the 36 products of a tap with a pixel are with the padding: one matrix over the whole map leaves them out.
On a single pixel only the centre of the kernel is ever used. With a stride of 2, patches cut out and multiplied are
faster than the convolution. `python eval/benchmark.py moco --size 16` measures what that gives.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDED = 8  # side of the largest map on which a strided convolution is slower than the product of its patches
Shape = tuple[int, ...]


class OnePixel(torch.autograd.Function):
    """A 3x3 convolution with padding 1 of maps of one pixel: [B, C, 1, 1] to [B, O, 1, 1]."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        """The product with the kernel's centre."""
        vectors, centre = images.flatten(1), weight[:, :, 1, 1].contiguous()
        ctx.save_for_backward(vectors, centre)
        return F.linear(vectors, centre)[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of the images and the weight, which has none but at its centre."""
        vectors, centre = ctx.saved_tensors
        gradient = gradient.flatten(1)
        weight = gradient.new_zeros(*centre.shape, 3, 3)
        weight[:, :, 1, 1] = gradient.T @ vectors
        return (gradient @ centre)[:, :, None, None], weight


class FourPixels(torch.autograd.Function):
    """A 3x3 convolution with padding 1 of maps of 2x2 pixels: [B, C, 2, 2] to [B, O, 2, 2]."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        """The product of all values of a map with one matrix [4 O, 4 C]."""
        batch, channels = images.shape[:2]
        vectors = images.permute(0, 2, 3, 1).reshape(batch, 4 * channels)
        taps = weight.permute(2, 3, 0, 1)
        matrix = weight.new_empty(2, 2, len(weight), 2, 2, channels)
        for y_out, x_out, y_in, x_in in product(range(2), repeat=4):
            matrix[y_out, x_out, :, y_in, x_in] = taps[y_in - y_out + 1, x_in - x_out + 1]
        matrix = matrix.view(4 * len(weight), 4 * channels)
        ctx.save_for_backward(vectors, matrix)
        return F.linear(vectors, matrix).view(batch, 2, 2, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of the images and the weight: each tap has the sum over the pairs of pixels that it joins."""
        vectors, matrix = ctx.saved_tensors
        batch, outputs = gradient.shape[:2]
        gradient = gradient.permute(0, 2, 3, 1).reshape(batch, 4 * outputs)
        images = (gradient @ matrix).view(batch, 2, 2, -1).permute(0, 3, 1, 2)
        pairs = (gradient.T @ vectors).view(2, 2, outputs, 2, 2, -1)
        taps = pairs.new_zeros(3, 3, outputs, pairs.shape[-1])
        for y_out, x_out, y_in, x_in in product(range(2), repeat=4):
            taps[y_in - y_out + 1, x_in - x_out + 1] += pairs[y_out, x_out, :, y_in, x_in]
        return images, taps.permute(2, 3, 0, 1)


class Patches(torch.autograd.Function):
    """A convolution with an odd square kernel, padded by half of it: [B, C, S, S] to [B, O, T, T]."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int) -> Tensor:
        """The product of every patch with the kernel."""
        outputs, channels, kernel, _ = weight.shape
        side = (images.shape[-1] - 1) // stride + 1
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *[kernel // 2] * 4))
        along = padded.stride()
        patches = padded.as_strided(
            (len(images), side, side, kernel, kernel, channels),
            (along[0], along[1] * stride, along[2] * stride, along[1], along[2], along[3]),
        ).reshape(len(images) * side * side, -1)
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
        ctx.save_for_backward(patches, matrix)
        ctx.shapes = images.shape, weight.shape, stride
        return F.linear(patches, matrix).view(len(images), side, side, outputs).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of the images, where patches overlap, and the weight."""
        patches, matrix = ctx.saved_tensors
        (batch, channels, size, _), (outputs, _, kernel, _), stride = ctx.shapes
        side, padding = gradient.shape[-1], kernel // 2
        gradient = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        weight = (gradient.T @ patches).view(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)
        by_tap = (gradient @ matrix).view(batch, side, side, kernel, kernel, channels)
        padded = gradient.new_zeros(batch, size + 2 * padding, size + 2 * padding, channels)
        for row, column in product(range(kernel), repeat=2):
            ends = slice(row, row + stride * side, stride), slice(column, column + stride * side, stride)
            padded[:, *ends] += by_tap[:, :, :, row, column]
        images = padded[:, padding : padding + size, padding : padding + size]
        return images.permute(0, 3, 1, 2), weight, None


class SmallMapConv2d(nn.Conv2d):
    """A convolution that `cpu_convolutions` has taken over."""

    def forward(self, images: Tensor) -> Tensor:
        """As a convolution, float [B, C, S, S] to [B, O, T, T]."""
        (height, side), kernel, stride = images.shape[-2:], self.kernel_size[0], self.stride[0]
        if height != side or side > STRIDED:
            return super().forward(images)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), weight.to(dtype)
        if kernel == 3 and side == stride == 1:
            return OnePixel.apply(images, weight)  # type: ignore[no-any-return]
        if kernel == 3 and side == 2 and stride == 1:
            return FourPixels.apply(images, weight)  # type: ignore[no-any-return]
        if stride == 2:
            return Patches.apply(images, weight, stride)  # type: ignore[no-any-return]
        return super().forward(images)


def is_eligible(module: nn.Module) -> bool:
    """Whether a module is a plain convolution of the kinds that are replaced on small maps."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size in ((1, 1), (3, 3))
        and module.padding == (module.kernel_size[0] // 2,) * 2
        and module.stride in ((1, 1), (2, 2))
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.bias is None
        and module.padding_mode == "zeros"
    )
