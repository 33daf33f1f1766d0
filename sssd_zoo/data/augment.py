"""Augmentation of whole batches on the device, with random parameters per image and no Python loop over images.

torchvision's v2 transforms draw one set of parameters for a whole batch, which is wrong for contrastive learning;
per-image transforms are an order of magnitude slower. The distributions here are those of torchvision's
RandomResizedCrop, ColorJitter (operations in a random order per image, every result clamped), RandomGrayscale,
GaussianBlur, RandomHorizontalFlip and RandomCrop with padding. Resized crops are bilinear without antialiasing: images
are stored only little larger than the views, so a crop shrinks by an eighth at most, unless settings ask for more
(`storage_size`, `teacher_size`, `sizes`). Images stay uint8 until they are augmented.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.configs.augment import AugmentConfig

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of PIL and torchvision

SIGMA = (0.1, 2.0)  # smallest and largest standard deviation of the blur in pixels, MoCo v2's at 224 px

# The columns of a view of `draw_views`. Those from VERTICAL on are there only where a setting asks for them.
BOX, FLIP, VERTICAL, QUARTERS, DEGREES = slice(0, 4), 4, 5, 6, 7
AMOUNTS, ORDER, GREY, BLUR = slice(8, 12), slice(12, 16), 16, 17


class BatchRandom:
    """Random numbers for one training step, stateless and independent of the number of processes.

    Every draw is made for the global batch from a generator seeded by (seed, step) and cut to the rank's slice. So a
    resumed run needs no generator state, and two processes see the numbers that one would.

    Args:
        seed: random seed of the run, >= 0.
        step: the number of the training step, >= 0.
        rank: this process's number, 0..world-1.
        world: the number of processes.
    """

    def __init__(self, seed: int, step: int, rank: int = 0, world: int = 1) -> None:
        # Two odd multipliers keep (seed, step) pairs apart in the low 32 bits, which are all that torch's Mersenne
        # twister is seeded from.
        self.generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77 + 1) % 2**63)
        self.rank, self.world = rank, world

    def _rank_slice(self, numbers: Tensor) -> Tensor:
        return numbers.chunk(self.world)[self.rank]

    def uniform(self, batch: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Float32 [batch, *shape], uniform in [low, high)."""
        return self._rank_slice(torch.rand(batch * self.world, *shape, generator=self.generator)) * (high - low) + low

    def integers(self, batch: int, *shape: int, high: int) -> Tensor:
        """Int64 [batch, *shape], uniform in 0..high-1."""
        return self._rank_slice(torch.randint(high, (batch * self.world, *shape), generator=self.generator))

    def permutation(self, batch: int) -> Tensor:
        """Int64 [batch * world]: a permutation of the GLOBAL batch, the same in every process."""
        return torch.randperm(batch * self.world, generator=self.generator)


def put(tensor: Tensor, images: Tensor) -> Tensor:
    """A small tensor moved to the device of `images` asynchronously, so that a GPU's queue of kernels stays full."""
    return tensor.to(images.device, non_blocking=True)


def to_float(images: Tensor) -> Tensor:
    """Uint8 or uint16 [B, C, H, W] to float32 in [0, 1]."""
    return images.to(torch.float32).div_(65535.0 if images.dtype == torch.uint16 else 255.0)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 [B, C, H, W] in [0, 1] to zero mean and unit std per channel, channels-last in memory.

    With the mean and std of a single channel, as networks for grey images have, RGB images become grey: [B, 1, H, W].
    """
    if len(mean) == 1 and images.shape[1] == 3:
        images = grey(images)
    shift = put(torch.tensor(mean, dtype=images.dtype), images).view(1, -1, 1, 1)
    scale = put(torch.tensor(std, dtype=images.dtype), images).view(1, -1, 1, 1)
    return (images - shift).div_(scale).contiguous(memory_format=torch.channels_last)


def resize(images: Tensor, size: int) -> Tensor:
    """Float [B, C, S, S] to [B, C, size, size], bilinear, with antialiasing where it shrinks."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    shrinks = images.shape[-1] > size
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)


def crop_boxes(random: BatchRandom, batch: int, size: int, scale: tuple[float, float]) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop with aspect ratios 3/4 to 4/3.

    Args:
        random: random numbers of the step.
        batch: number of boxes.
        size: side of the square source images in pixels.
        scale: smallest and largest fraction of the image's area.

    Returns:
        Float32 [batch, 4]: left, top, width, height in whole pixels.
    """
    attempts = 10  # as in torchvision: a box that does not fit is redrawn
    area = random.uniform(batch, attempts, low=scale[0], high=scale[1]) * (size * size)
    ratio = torch.exp(random.uniform(batch, attempts, low=math.log(3 / 4), high=math.log(4 / 3)))
    width, height = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
    fits = (width > 0) & (height > 0) & (width <= size) & (height <= size)
    first = torch.where(fits.any(1), fits.to(torch.uint8).argmax(1), 0).unsqueeze(1)
    # If none of the ten fits, torchvision uses the largest centred box: on a square image, the whole image.
    whole = ~fits.any(1)
    width = torch.where(whole, size, width.gather(1, first).squeeze(1))
    height = torch.where(whole, size, height.gather(1, first).squeeze(1))
    place = random.uniform(batch, 2)
    left = torch.floor(place[:, 0] * (size - width + 1))
    top = torch.floor(place[:, 1] * (size - height + 1))
    return torch.stack([left, top, width, height], dim=1)


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int, orientation: Tensor | None = None) -> Tensor:
    """Cuts one box out of each image, flips it or not, and resizes it bilinearly.

    Args:
        images: float [B, C, S, S].
        boxes: float [B, 4]: left, top, width, height in pixels; on the images' device.
        flip: bool [B], likewise.
        size: side of the result in pixels.
        orientation: float [B, 2, 2] of `orientation_matrices`, likewise. Where a turned box ends, the image goes on.

    Returns:
        Float [B, C, size, size].
    """
    side = images.shape[-1]
    scale = boxes[:, 2:] / side
    centre = (2 * boxes[:, :2] + boxes[:, 2:]) / side - 1
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(flip, -scale[:, 0], scale[:, 0])
    theta[:, 1, 1] = scale[:, 1]
    theta[:, :, 2] = centre
    if orientation is not None:
        theta[:, :, :2] = theta[:, :, :2] @ orientation
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def draw_orientation(random: BatchRandom, batch: int, augment: AugmentConfig) -> Tensor:
    """How each image is turned: float32 [batch, 3], 1 for a vertical flip, then quarter turns, then degrees more."""
    vertical = (random.uniform(batch) < augment.vertical_flip).float()
    quarters = random.integers(batch, high=4 if augment.quarter_turns else 1).float()
    degrees = random.uniform(batch, low=-augment.rotation, high=augment.rotation)
    return torch.stack([vertical, quarters, degrees], dim=1)


def orientation_matrices(orientation: Tensor) -> Tensor:
    """What `crop_resize` turns images by: float32 [B, 2, 2], of `draw_orientation`; counter-clockwise."""
    vertical, quarters, degrees = orientation.unbind(1)
    angle = torch.deg2rad(90 * quarters + degrees)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # A pixel of the turned image is looked up where it came from; rows count downwards.
    up = 1 - 2 * vertical
    return torch.stack([cosine, -sine, up * sine, up * cosine], dim=1).view(-1, 2, 2)


def grey(images: Tensor) -> Tensor:
    """Luma of float [B, 3, H, W], or the mean of other channels, as [B, 1, H, W]."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return LUMA[0] * images[:, 0:1] + LUMA[1] * images[:, 1:2] + LUMA[2] * images[:, 2:3]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Float [B, C, H, W] in [0, 1] times factor [B, 1, 1, 1], clamped."""
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image with its mean luma, clamped; factor [B, 1, 1, 1], 1 leaves it."""
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each pixel with its luma, clamped; factor [B, 1, 1, 1], 1 leaves it."""
    return torch.lerp(grey(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotates the hue by shift [B, 1, 1, 1], in turns (-0.5..0.5), in HSV as torchvision does."""
    value, minimum = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - minimum
    red, green, blue = images.split(1, dim=1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    # Hue in sixths of a turn, by which channel is the largest.
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * shift
    # HSV to RGB in closed form: channel n = V - C max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6, n = 5, 3, 1.
    offsets = torch.arange(5, 0, -2, dtype=hue.dtype, device=hue.device).view(1, 3, 1, 1)
    k = torch.remainder(hue + offsets, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def operations(channels: int) -> Sequence[Callable[[Tensor, Tensor], Tensor]]:
    """Those of `OPERATIONS` that images of so many channels have: all for RGB, brightness and contrast for others."""
    return OPERATIONS if channels == 3 else OPERATIONS[:2]


def draw_jitter(
    random: BatchRandom,
    batch: int,
    strength: tuple[float, float, float, float],
    probability: float,
) -> tuple[Tensor, Tensor]:
    """The random numbers of torchvision's RandomApply([ColorJitter(*strength)], probability), drawn per image.

    Args:
        random: random numbers of the step.
        batch: number of images.
        strength: strength of brightness, contrast, saturation and hue jitter.
        probability: probability of jittering an image at all.

    Returns:
        The amounts, float32 [batch, 4], one for each of `OPERATIONS`; and their order, int64 [batch, 4]: which one
        comes in each turn, -1 for none.
    """
    low = torch.tensor([1 - strength[0], 1 - strength[1], 1 - strength[2], -strength[3]])
    high = torch.tensor([1 + strength[0], 1 + strength[1], 1 + strength[2], strength[3]])
    amounts = low + random.uniform(batch, 4) * (high - low)
    order = random.uniform(batch, 4).argsort(dim=1)
    order[random.uniform(batch) >= probability] = -1
    return amounts, order


def colour_jitter(images: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """Jitters each image with the operations in its order; computes only the chosen ones, which is fast on a CPU.

    Args:
        images: float [B, C, H, W] in [0, 1]; changed in place.
        amounts: float32 [B, 4], of `draw_jitter`.
        order: int64 [B, 4], of `draw_jitter`.

    Returns:
        Float [B, C, H, W] in [0, 1].
    """
    for turn in range(4):
        for number, operation in enumerate(operations(images.shape[1])):
            chosen = (order[:, turn] == number).nonzero().squeeze(1)
            if len(chosen):
                images[chosen] = operation(images[chosen], amounts[chosen, number].view(-1, 1, 1, 1))
    return images


def colour_jitter_dense(images: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """`colour_jitter` with static shapes: computes every operation for every image.

    That is four times the arithmetic, but a GPU need not synchronise for a count, and torch.compile fuses it.
    """
    for turn in range(4):
        changed = images
        for number, operation in enumerate(operations(images.shape[1])):
            chosen = (order[:, turn] == number).view(-1, 1, 1, 1)
            changed = torch.where(chosen, operation(images, amounts[:, number].view(-1, 1, 1, 1)), changed)
        images = changed
    return images


def draw_blur(random: BatchRandom, batch: int, probability: float) -> Tensor:
    """The sigma of each image's blur, uniform in `SIGMA` with `probability`, otherwise 0: float32 [batch]."""
    sigmas = random.uniform(batch, 1, low=SIGMA[0], high=SIGMA[1]).squeeze(1)
    return torch.where(random.uniform(batch) < probability, sigmas, 0.0)


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blurs each image by a Gaussian of its sigma in pixels, not at all where that is 0; reflects edges.

    Args:
        images: float [B, C, H, W]; changed in place.
        sigmas: float32 [B], of `draw_blur`, on the CPU.

    Returns:
        Float [B, C, H, W].
    """
    _, channels, height, width = images.shape
    chosen = sigmas.nonzero().squeeze(1)
    if not len(chosen):
        return images
    radius = min(math.ceil(3 * SIGMA[1]), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigmas[chosen].unsqueeze(1)) ** 2)
    kernels = put((kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0).to(images.dtype), images)
    chosen = put(chosen, images)
    planes = images[chosen].reshape(1, -1, height, width)
    planes = F.pad(planes, (radius,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=len(kernels))
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=len(kernels))
    images[chosen] = planes.view(-1, channels, height, width)
    return images


CONTRASTIVE = AugmentConfig().resolved(contrastive=True)


def contrastive_view(
    images: Tensor,
    random: BatchRandom,
    size: int,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    augment: AugmentConfig = CONTRASTIVE,
    compiled: bool = False,
) -> Tensor:
    """One MoCo v2 view: resized crop, flip, colour jitter (0.4, 0.4, 0.4, 0.1; p = 0.8), greyscale (p = 0.2), blur.

    Args:
        images: uint8 or uint16 [B, C, S, S].
        random: the step's random numbers; two calls with the same object give two different views.
        size: side of the view in pixels.
        scale: fraction of the area that a crop keeps.
        augment: the rest, resolved for images of C channels; MoCo v2's at 224 px has a blur of 0.5.
        compiled: compile the view with torch.compile on a GPU.

    Returns:
        Float32 [B, C, size, size] in [0, 1]. Source: Chen et al., arXiv:2003.04297, and its reference code.
    """
    batch = len(images)
    boxes = put(crop_boxes(random, batch, images.shape[-1], scale), images)
    flip = put(random.uniform(batch) < augment.flip, images)
    amounts, order = draw_jitter(random, batch, jitter_strength(augment), augment.jitter or 0.0)
    to_grey = random.uniform(batch) < (augment.grey or 0.0)
    turned = None
    if augment.orients:
        turned = put(orientation_matrices(draw_orientation(random, batch, augment)), images)
    if images.device.type == "cpu":
        view = crop_resize(to_float(images), boxes, flip, size, turned)
        view = turn_grey(colour_jitter(view, amounts, order), to_grey)
    else:
        make = compiled_function(_dense_view) if compiled else _dense_view
        colours = put(amounts, images), put(order, images), put(to_grey, images)
        view = make(images, boxes, flip, turned, *colours, size)
    if augment.blur:
        view = gaussian_blur(view, draw_blur(random, batch, augment.blur))
    return view


def jitter_strength(augment: AugmentConfig) -> tuple[float, float, float, float]:
    """Strength of brightness, contrast, saturation and hue jitter of resolved settings."""
    return augment.brightness or 0.0, augment.contrast or 0.0, augment.saturation or 0.0, augment.hue or 0.0


def turn_grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Turns the images where `chosen`, bool [B], grey: float [B, C, H, W], changed in place."""
    index = chosen.nonzero().squeeze(1)
    if len(index):
        images[index] = grey(images[index]).expand(-1, images.shape[1], -1, -1)
    return images


def _dense_view(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    turned: Tensor | None,
    amounts: Tensor,
    order: Tensor,
    to_grey: Tensor,
    size: int,
) -> Tensor:
    """`contrastive_view` before the blur, with static shapes."""
    view = colour_jitter_dense(crop_resize(to_float(images), boxes, flip, size, turned), amounts, order)
    return torch.where(to_grey.view(-1, 1, 1, 1), grey(view), view)


@functools.cache
def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by torch.compile for fixed shapes, once per process."""
    return torch.compile(function, dynamic=False)


def shifted(images: Tensor, offsets: Tensor, flip: Tensor, padding: int, turns: Tensor | None = None) -> Tensor:
    """Shifts each image by whole pixels, with zeros from outside of it, and flips it or not.

    With random offsets that is RandomCrop(S, padding) and RandomHorizontalFlip of torchvision.

    Args:
        images: uint8 or uint16 [B, C, S, S].
        offsets: int64 [B, 2] in -padding..padding: row and column of the image that become the first.
        flip: bool [B].
        padding: the largest offset.
        turns: [B, 2]: whether each image is flipped vertically too, and by how many quarters it is then turned
            counter-clockwise.
    """
    if images.dtype == torch.uint16:  # which few operations of a GPU know
        return shifted(images.view(torch.int16), offsets, flip, padding, turns).view(torch.uint16)
    batch, channels, side, _ = images.shape
    start, steps = offsets + padding, torch.arange(side, device=offsets.device)
    first, second, crossed = steps, torch.where(flip.unsqueeze(1), steps.flip(0), steps), None
    if turns is not None:
        first, second, crossed = _turned_steps(turns.long(), steps, flip)
    rows = put(start[:, :1] + first, images)
    columns = put(start[:, 1:] + second, images)
    padded = F.pad(images, (padding,) * 4)
    wide = side + 2 * padding
    # Expanded on the images' device: at 32 px the index is 32 times as large as its factors, too much to transfer.
    index = rows[:, :, None] * wide + columns[:, None, :]
    if crossed is not None:
        index = torch.where(put(crossed, images).view(-1, 1, 1), index.transpose(1, 2), index)
    index = index.reshape(batch, 1, -1)
    return padded.flatten(2).gather(2, index.expand(-1, channels, -1)).view(batch, channels, side, side)


def _turned_steps(turns: Tensor, steps: Tensor, flip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of an image's rows and of its columns, int64 [B, side] each, and whether to swap the two, bool [B].

    A quarter turn is a swap of rows and columns and a flip of one of them; half a turn flips both.
    """
    vertical, quarters = turns.unbind(1)
    rows = vertical.bool() ^ (quarters >= 2)
    columns = flip ^ (quarters == 1) ^ (quarters == 2)
    orders = [torch.where(backwards.unsqueeze(1), steps.flip(0), steps) for backwards in (rows, columns)]
    return orders[0], orders[1], quarters % 2 == 1


def draw_views(
    random: BatchRandom,
    batch: int,
    side: int,
    *,
    crop: str,
    scale: tuple[float, float],
    augment: AugmentConfig,
) -> Tensor:
    """The random numbers of a classifier's training view, a random crop and a flip, drawn per image.

    Args:
        random: random numbers of the step.
        batch: number of images.
        side: of the stored images in pixels.
        crop: 'pad' shifts by up to an eighth of the side (4 at 32 px, the CIFAR protocol), 'resized' cuts
            boxes of `scale` of the area (the ImageNet protocol).
        scale: for 'resized'.
        augment: the rest, resolved.

    Returns:
        Float32 [batch, 5]: left, top, width and height of the part of the image that is seen, in whole pixels, and 1
        where it is flipped. Where `augment` asks for more than a flip, [batch, 18]: then come the three numbers of
        `draw_orientation`, the amounts and the order of `draw_jitter`, 1 where the image turns grey, and the sigma of
        `draw_blur`.
    """
    if crop == "pad":
        padding = shift_of(side)
        top_left = random.integers(batch, 2, high=2 * padding + 1) - padding
        boxes = torch.cat([top_left.flip(1), torch.full((batch, 2), side)], dim=1).float()
    else:
        boxes = crop_boxes(random, batch, side, scale)
    flip = (random.uniform(batch) < augment.flip).float()
    views = torch.cat([boxes, flip.unsqueeze(1)], dim=1)
    if not (augment.orients or augment.jitter or augment.grey or augment.blur):
        return views
    orientation = draw_orientation(random, batch, augment)
    amounts, order = draw_jitter(random, batch, jitter_strength(augment), augment.jitter or 0.0)
    to_grey = (random.uniform(batch) < (augment.grey or 0.0)).float().unsqueeze(1)
    sigmas = draw_blur(random, batch, augment.blur or 0.0).unsqueeze(1)
    return torch.cat([views, orientation, amounts, order.float(), to_grey, sigmas], dim=1)


def shift_of(side: int) -> int:
    """How far 'pad' shifts an image at most, in pixels: 4 at 32 px, the CIFAR protocol."""
    return max(1, side // 8)


def supervised_view(images: Tensor, views: Tensor, size: int, *, crop: str) -> Tensor:
    """The training view of a classifier: a random crop and a flip, and more where `views` say so.

    Args:
        images: uint8 or uint16 [B, C, S, S].
        views: float32 [B, 5] or [B, 18], of `draw_views`.
        size: side of the view in pixels.
        crop: as `draw_views` had it.

    Returns:
        Float32 [B, C, size, size] in [0, 1].
    """
    more = views.shape[1] > VERTICAL
    flip = views[:, FLIP] > 0
    if crop == "pad":
        offsets, turns = views[:, [1, 0]].long(), views[:, VERTICAL:DEGREES] if more else None
        view = resize(to_float(shifted(images, offsets, flip, shift_of(images.shape[-1]), turns)), size)
        if more and views[:, DEGREES].any():
            view = rotated(view, views[:, DEGREES])
    else:
        turned = put(orientation_matrices(views[:, VERTICAL : DEGREES + 1]), images) if more else None
        view = crop_resize(to_float(images), put(views[:, BOX], images), put(flip, images), size, turned)
    return coloured(view, views) if more else view


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates each image about its centre by degrees, float32 [B], counter-clockwise; its edge pixels go on outside."""
    side = images.shape[-1]
    whole = images.new_tensor([0, 0, side, side]).expand(len(images), -1)
    orientation = F.pad(degrees.unsqueeze(1), (2, 0))
    return crop_resize(
        images,
        whole,
        torch.zeros(len(images), dtype=torch.bool, device=images.device),
        side,
        put(orientation_matrices(orientation), images),
    )


def coloured(images: Tensor, views: Tensor) -> Tensor:
    """Jitters, turns grey and blurs images as their views say.

    Args:
        images: float [B, C, H, W] in [0, 1]; may be changed in place.
        views: float32 [B, 18], of `draw_views`.
    """
    views = views.cpu()  # cached ones come with the images
    amounts, order, to_grey = views[:, AMOUNTS], views[:, ORDER].long(), views[:, GREY] > 0
    if images.device.type == "cpu":
        images = turn_grey(colour_jitter(images, amounts, order), to_grey)
    else:
        if (order >= 0).any():
            images = colour_jitter_dense(images, put(amounts, images), put(order, images))
        if to_grey.any():
            images = torch.where(put(to_grey, images).view(-1, 1, 1, 1), grey(images), images)
    return gaussian_blur(images, views[:, BLUR])
