"""Faster backward passes of depthwise convolutions, for training on a CPU: the same sums by kernels that oneDNN has.

In channels-last, oneDNN computes three things of a depthwise convolution tens to hundreds of times slower than its
forward pass, as it has no kernel of its own for them: the gradient of a weight wider than 3; in bf16, the gradient of
the images for a stride; and everything where a channel has several outputs. So wide weights are cut into columns of at
most 3, a stride becomes a convolution of the gradient with zeros between, and several outputs become several
convolutions. What oneDNN does well is left to it: other kernels, in fp32 any with a stride, and grouped convolutions
with several channels in a group.

`python eval/benchmark.py moco --model sssd_efficientnet_lite0_cifar` measures what that gives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST = 3  # columns of a weight for whose gradient oneDNN has a kernel of its own; the rows may be any number
Pair = tuple[int, int]


def _own_gradients(
    gradient: Tensor, images: Tensor, weight: Tensor, stride: Pair, padding: Pair, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Torch's own gradients of the images and of the weight, of which only those that are `wanted` are computed."""
    images, weight, _ = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), [*wanted, False]
    )
    return images, weight


def _gradient_of_images(gradient: Tensor, images: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """For a stride in bf16, the gradient with zeros between its values, convolved with the weight turned around."""
    if stride == (1, 1) or gradient.dtype == torch.float32:
        return _own_gradients(gradient, images, weight, stride, padding, (True, False))[0]
    (batch, channels, rows, columns), (height, width) = images.shape, weight.shape[2:]
    spread = gradient.new_zeros(batch, rows + height - 1, columns + width - 1, channels).permute(0, 3, 1, 2)
    grid = spread[:, :, height - 1 - padding[0] :: stride[0], width - 1 - padding[1] :: stride[1]]
    grid[:, :, : gradient.shape[2], : gradient.shape[3]] = gradient
    return F.conv2d(spread, weight.flip(2, 3), groups=channels)


def _gradient_of_weight(gradient: Tensor, images: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """For a wide weight in columns, each of which sees a part of the images."""
    width = weight.shape[3]
    if width <= WIDEST or (stride != (1, 1) and gradient.dtype == torch.float32):
        return _own_gradients(gradient, images, weight, stride, padding, (False, True))[1]
    padded = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    reach = stride[1] * (gradient.shape[3] - 1)  # from the first position of the kernel to the last
    parts, first = [], 0
    for part in weight.tensor_split(-(-width // WIDEST), dim=3):
        seen = padded[:, :, :, first : first + reach + part.shape[3]]
        parts.append(_own_gradients(gradient, seen, part, stride, (0, 0), (False, True))[1])
        first += part.shape[3]
    return torch.cat(parts, dim=3)


class Depthwise(torch.autograd.Function):
    """A depthwise convolution with one output for each channel: [B, C, H, W] to [B, C, T, U]."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        """Torch's own."""
        images = images.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(images, weight)
        ctx.geometry = stride, padding
        return F.conv2d(images, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the images, the weight and the bias, where they need one."""
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        operands = gradient, *ctx.saved_tensors, *ctx.geometry
        images, weight, bias = ctx.needs_input_grad[:3]
        return (
            _gradient_of_images(*operands) if images else None,
            _gradient_of_weight(*operands) if weight else None,
            gradient.sum((0, 2, 3)) if bias else None,
            None,
            None,
        )


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that `cpu_convolutions` has taken over."""

    def forward(self, images: Tensor) -> Tensor:
        """As a convolution, float [B, C, H, W] to [B, O, T, U]."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        outputs, geometry = self.out_channels // self.in_channels, (self.stride, self.padding)
        if outputs == 1:
            return Depthwise.apply(images, weight, bias, *geometry)  # type: ignore[no-any-return]
        maps = [
            Depthwise.apply(images, weight[number::outputs], None if bias is None else bias[number::outputs], *geometry)
            for number in range(outputs)
        ]
        return torch.stack([one.permute(0, 2, 3, 1) for one in maps], dim=4).flatten(3).permute(0, 3, 1, 2)


def is_slow_depthwise(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution of the kinds that oneDNN computes slowly."""
    return (
        torch.backends.mkldnn.is_available()
        and type(module) is nn.Conv2d
        and module.groups == module.in_channels > 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(pad < size for pad, size in zip(module.padding, module.kernel_size, strict=True))
        and (module.kernel_size[1] > WIDEST or module.stride != (1, 1) or module.out_channels > module.in_channels)
    )
