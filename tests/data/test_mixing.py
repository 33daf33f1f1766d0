"""MixUp and CutMix, pixel by pixel."""

import pytest
import torch

from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.mixing import blend, blend_labels, draw_mixing


def test_mixup_weighs_every_pixel_of_an_image_alike():
    own = draw_mixing(BatchRandom(0, 0), 64, 8, "mixup")
    assert own.shape == (64, 1, 8, 8)
    assert all(len(image.unique()) == 1 for image in own)
    assert 0.4 < float(own.mean()) < 0.6
    assert float(own.min()) >= 0
    assert float(own.max()) <= 1


def test_cutmix_replaces_one_box_whose_area_is_uniform_but_for_the_edges():
    own = draw_mixing(BatchRandom(0, 0), 512, 32, "cutmix")
    assert set(own.unique().tolist()) == {0.0, 1.0}
    for image in (1 - own[:, 0]).bool():
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert int(image.sum()) == len(rows) * len(columns), "a box"
        if len(rows):
            assert rows[-1] - rows[0] + 1 == len(rows)
    # Boxes that cross the edge are cut off: their mean area is below that of Beta(1, 1).
    replaced = float(1 - own.mean())
    assert 0.25 < replaced < 0.45


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_by_the_same_fraction(mix):
    own = draw_mixing(BatchRandom(3, 1), 6, 8, mix)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    mixed, soft = blend(images, own), blend_labels(labels, own.mean((1, 2, 3)), 4)
    for image in range(6):
        partner = 5 - image
        expected = own[image] * images[image] + (1 - own[image]) * images[partner]
        torch.testing.assert_close(mixed[image], expected)
        fraction = float(own[image].mean())
        by_hand = [0.0] * 4
        by_hand[int(labels[image])] += fraction
        by_hand[int(labels[partner])] += 1 - fraction
        assert soft[image].tolist() == pytest.approx(by_hand)


def test_soft_labels_are_mixed_too():
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert blend_labels(soft, torch.tensor([0.5, 1.0]), 3).tolist() == [[0.25, 0.25, 0.5], [0.0, 0.0, 1.0]]
