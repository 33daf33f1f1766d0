"""Augmentation of batches against torchvision's transforms of single images, and its independence of processes."""

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from sssd_zoo.configs import AugmentConfig
from sssd_zoo.configs.augment import STRENGTHS
from sssd_zoo.data import augment
from sssd_zoo.data.augment import BatchRandom

JITTER = (tuple(STRENGTHS.values()), 0.8)
PLAIN = AugmentConfig().resolved(contrastive=False)


@pytest.fixture
def images() -> Tensor:
    """Eight random images, smooth enough that interpolation matters little."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(8, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)


def factors(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (augment.adjust_brightness, tv.adjust_brightness, [0.6, 0.8, 1.0, 1.4]),
        (augment.adjust_contrast, tv.adjust_contrast, [0.6, 0.8, 1.0, 1.4]),
        (augment.adjust_saturation, tv.adjust_saturation, [0.6, 0.8, 1.0, 1.4]),
        (augment.adjust_hue, tv.adjust_hue, [-0.1, -0.03, 0.0, 0.1]),
    ],
)
def test_colour_ops_are_torchvisions(images, ours, theirs, values):
    batch = images[:4]
    expected = torch.stack([theirs(image, value) for image, value in zip(batch, values, strict=True)])
    # torchvision's luma rounds the weight of red to 0.2989.
    torch.testing.assert_close(ours(batch, factors(values)), expected, atol=1e-4, rtol=1e-3)


def test_grey_is_torchvisions(images):
    torch.testing.assert_close(augment.grey(images), tv.rgb_to_grayscale(images), atol=1e-3, rtol=1e-3)


def test_hue_keeps_greys_and_full_turns():
    grey = torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    torch.testing.assert_close(augment.adjust_hue(grey, factors([0.1, -0.1])), grey)
    colours = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(augment.adjust_hue(colours, factors([1.0])), colours, atol=1e-5, rtol=1e-5)


def test_jitter_draws_per_image_and_in_every_order():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(64, 1, 1, 1)
    jittered = augment.colour_jitter(image.clone(), *augment.draw_jitter(BatchRandom(0, 0), 64, *JITTER))
    changed = (jittered != image).flatten(1).any(1)
    assert 0.6 < changed.float().mean() < 0.97, "p = 0.8 of the images change"
    assert len(torch.unique(jittered[changed].flatten(1), dim=0)) == changed.sum(), "one draw per image, not per batch"
    assert jittered.min() >= 0
    assert jittered.max() <= 1


def test_crop_resize_cuts_the_box(images):
    boxes = torch.tensor([[4.0, 8.0, 16.0, 12.0]]).repeat(8, 1)
    flip = torch.tensor([False, True] * 4)
    ours = augment.crop_resize(images, boxes, flip, 24)
    for index, image in enumerate(images):
        expected = tv.resize(tv.crop(image, 8, 4, 12, 16), [24, 24], antialias=False)
        expected = expected.flip(-1) if flip[index] else expected
        inner = slice(2, -2)  # at the box's border torchvision clamps where we see the image go on
        torch.testing.assert_close(ours[index][:, inner, inner], expected[:, inner, inner], atol=2e-3, rtol=1e-2)


def test_crop_boxes_follow_torchvisions_distribution():
    boxes = augment.crop_boxes(BatchRandom(0, 0), 20_000, 32, (0.2, 1.0))
    left, top, width, height = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 32).all()
    assert (top + height <= 32).all()
    theirs = torch.tensor([_torchvision_box(seed) for seed in range(3000)])
    ours = torch.stack([width * height / 1024, width / height, left, top], 1)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.25, rtol=0.05)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.25, rtol=0.08)


def _torchvision_box(seed: int) -> tuple[float, float, float, float]:
    import torchvision.transforms as transforms

    torch.manual_seed(seed)
    top, left, height, width = transforms.RandomResizedCrop.get_params(
        torch.zeros(3, 32, 32), [0.2, 1.0], [3 / 4, 4 / 3]
    )
    return width * height / 1024, width / height, left, top


def test_boxes_that_never_fit_take_the_whole_image():
    boxes = augment.crop_boxes(BatchRandom(0, 0), 4, 32, (3.0, 4.0))
    assert boxes.tolist() == [[0, 0, 32, 32]] * 4


def test_shifts_and_flips_move_whole_pixels():
    images = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    views = augment.draw_views(BatchRandom(5, 6), 64, 16, crop="pad", scale=(1.0, 1.0), augment=PLAIN)
    crops = augment.shifted(images, views[:, [1, 0]].long(), views[:, 4] > 0, padding=2)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    seen = set()
    for image, crop in zip(padded, crops, strict=True):
        matches = [
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if torch.equal(crop.flip(-1) if flip else crop, image[:, row : row + 16, column : column + 16])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20


def test_blur_is_torchvisions(images):
    sigmas = augment.draw_blur(BatchRandom(1, 2), 8, 0.5)
    assert 0 < int((sigmas == 0).sum()) < 8
    blurred = augment.gaussian_blur(images.clone(), sigmas)
    for image, sigma, ours in zip(images, sigmas, blurred, strict=True):
        expected = tv.gaussian_blur(image, [13, 13], [float(sigma)] * 2) if sigma else image
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_contrastive_views_differ_and_repeat():
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    random, blurred = BatchRandom(0, 7), AugmentConfig().resolved(contrastive=True, blur=0.5)
    first = augment.contrastive_view(images, random, 48, augment=blurred)
    second = augment.contrastive_view(images, random, 48, augment=blurred)
    assert first.shape == (16, 3, 48, 48)
    assert not torch.equal(first, second)
    assert torch.equal(first, augment.contrastive_view(images, BatchRandom(0, 7), 48, augment=blurred))
    assert not torch.equal(first, augment.contrastive_view(images, BatchRandom(0, 8), 48, augment=blurred))
    assert not torch.equal(first, augment.contrastive_view(images, BatchRandom(1, 7), 48, augment=blurred))


def test_two_processes_draw_what_one_would():
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    whole = augment.contrastive_view(images, BatchRandom(3, 4), 16)
    halves = [augment.contrastive_view(images[6 * r : 6 * r + 6], BatchRandom(3, 4, r, 2), 16) for r in range(2)]
    torch.testing.assert_close(torch.cat(halves), whole)
    assert torch.equal(BatchRandom(3, 4).permutation(12), BatchRandom(3, 4, 1, 2).permutation(6))


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_supervised_view_has_the_asked_size(crop):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    views = augment.draw_views(BatchRandom(0, 0), 4, 32, crop=crop, scale=(0.3, 1.0), augment=PLAIN)
    view = augment.supervised_view(images, views, 64, crop=crop)
    assert view.shape == (4, 3, 64, 64)
    assert 0 <= view.min() <= view.max() <= 1


def test_dense_jitter_of_accelerators_equals_that_of_cpus():
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    numbers = augment.draw_jitter(BatchRandom(3, 1), 64, *JITTER)
    sparse = augment.colour_jitter(images.clone(), *numbers)
    assert torch.equal(augment.colour_jitter_dense(images, *numbers), sparse)
    assert not torch.equal(sparse, images)


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_contrastive_view_on_another_device(blur):
    """The meta device has no numbers, but refuses a tensor of another device, as a GPU does."""
    images = torch.zeros(6, 3, 40, 40, dtype=torch.uint8, device="meta")
    settings = AugmentConfig().resolved(contrastive=True, blur=blur)
    view = augment.contrastive_view(images, BatchRandom(0, 0), 32, augment=settings)
    assert view.device.type == "meta"
    assert view.shape == (6, 3, 32, 32)
