"""`--augment`: what each setting does to a batch, that the defaults change nothing, and what is refused."""

import pytest
import torch

from sssd_zoo.configs import AugmentConfig, MoCoConfig, SEEDConfig, SelfDistillationConfig, SettingsError
from sssd_zoo.configs.augment import STRENGTHS
from sssd_zoo.data import augment
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.training.runs import settings_of

CROPS = ["pad", "resized"]
JITTER = (tuple(STRENGTHS.values()), 0.8)


def batch(count=64, channels=3, side=16, dtype=torch.uint8):
    high = 256 if dtype == torch.uint8 else 65536
    numbers = torch.randint(0, high, (count, channels, side, side), generator=torch.Generator().manual_seed(0))
    return numbers.to(dtype)


def supervised(images, config, crop="resized", size=None, seed=0):
    settings = config.resolved(contrastive=False, channels=images.shape[1])
    views = augment.draw_views(
        BatchRandom(seed, 0), len(images), images.shape[-1], crop=crop, scale=(1.0, 1.0), augment=settings
    )
    return views, augment.supervised_view(images, views, size or images.shape[-1], crop=crop)


def contrastive(images, config, seed=0):
    settings = config.resolved(contrastive=True, channels=images.shape[1])
    return augment.contrastive_view(images, BatchRandom(seed, 0), images.shape[-1], scale=(1.0, 1.0), augment=settings)


STILL = {"flip": 0.0, "jitter": 0.0, "grey": 0.0}


class TestOrientation:
    @pytest.mark.parametrize("crop", CROPS)
    def test_quarter_turns_and_flips_are_those_of_torch(self, crop):
        images = batch()
        config = AugmentConfig(vertical_flip=0.5, quarter_turns=True)
        views, found = supervised(images, config, crop)
        if crop == "pad":  # without the shift, which is tested elsewhere
            views[:, :2] = 0
            found = augment.supervised_view(images, views, 16, crop=crop)
        kinds = set()
        for image, view, ours in zip(images, views, found, strict=True):
            flip, vertical, quarters = (
                int(view[column]) for column in (augment.FLIP, augment.VERTICAL, augment.QUARTERS)
            )
            expected = image.float() / 255
            expected = expected.flip(-1) if flip else expected
            expected = torch.rot90(expected.flip(-2) if vertical else expected, quarters, (1, 2))
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
            kinds.add((flip, vertical, quarters))
        assert len(kinds) > 12, "of the 16 combinations"

    @pytest.mark.parametrize("crop", CROPS)
    def test_16_bits_turn_alike(self, crop):
        config = AugmentConfig(vertical_flip=0.5, quarter_turns=True)
        _, found = supervised(batch(dtype=torch.uint16), config, crop)
        _, rough = supervised((batch(dtype=torch.uint16).float() / 257).round().byte(), config, crop)
        torch.testing.assert_close(found, rough, atol=0.003, rtol=0)

    @pytest.mark.parametrize("crop", CROPS)
    def test_rotation_keeps_the_centre_and_moves_the_rest(self, crop):
        images = torch.zeros(32, 3, 17, 17, dtype=torch.uint8)
        images[:, :, 8, 8] = images[:, :, 8, 14] = 255
        views, found = supervised(images, AugmentConfig(flip=0.0, rotation=90), crop)
        views[:, :2] = 0
        found = augment.supervised_view(images, views, 17, crop=crop)
        assert (found[:, :, 8, 8] > 0.9).all()
        degrees = views[:, augment.DEGREES]
        assert degrees.min() < -30
        assert degrees.max() > 30
        # The right-hand spot of a picture turned counter-clockwise goes up.
        weights = found[:, 0].clone()
        weights[:, 7:10, 7:10] = 0
        rows = (weights * torch.arange(17).view(1, -1, 1)).sum((1, 2)) / weights.sum((1, 2))
        expected = 8 - 6 * torch.sin(torch.deg2rad(degrees))
        torch.testing.assert_close(rows, expected, atol=0.3, rtol=0)

    def test_contrastive_views_turn(self):
        image = torch.zeros(256, 3, 16, 16, dtype=torch.uint8)
        image[:, :, :4, :4] = 255
        quarters = AugmentConfig(**STILL, quarter_turns=True)
        view = contrastive(image, quarters)
        corners = torch.stack([view[:, 0, r, c] for r in (0, 15) for c in (0, 15)], 1) > 0.5
        assert (corners.sum(1) == 1).all()
        assert (corners.float().mean(0) - 0.25).abs().max() < 0.1
        upright = contrastive(image, AugmentConfig(**STILL))
        assert (upright[:, 0, 0, 0] > 0.5).all()
        upside_down = contrastive(image, AugmentConfig(**STILL, vertical_flip=1.0))
        assert (upside_down[:, 0, 15, 0] > 0.5).all()
        flipped = contrastive(image, AugmentConfig(**{**STILL, "flip": 1.0}))
        assert (flipped[:, 0, 0, 15] > 0.5).all()


class TestColours:
    @pytest.mark.parametrize(
        ("settings", "changed"),
        [
            ({"jitter": 1.0}, 1.0),
            ({"jitter": 0.5}, 0.5),
            ({"grey": 0.3}, 0.3),
            ({"blur": 0.7}, 0.7),
            ({"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}, 0.0),
        ],
    )
    @pytest.mark.parametrize("crop", CROPS)
    def test_the_fraction_of_images_that_change(self, settings, changed, crop):
        images = batch(256) // 2 + 64
        views, found = supervised(images, AugmentConfig(flip=0.0, **settings), crop)
        plain = augment.supervised_view(images, views[:, :5], 16, crop=crop)
        different = ((found - plain).abs().flatten(1).max(1).values > 1e-3).float().mean()
        assert abs(float(different) - changed) < 0.1
        if "grey" in settings:
            greys = (found[:, 0] == found[:, 1]).flatten(1).all(1).float().mean()
            assert abs(float(greys) - 0.3) < 0.1

    def test_an_encoder_sees_the_same_colours(self):
        """Views of several sizes of the same random numbers, as anchored self distillation takes them."""
        coarse = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        images = (torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).byte()
        views, small = supervised(images, AugmentConfig(jitter=1.0, grey=0.5, quarter_turns=True), size=16)
        large = augment.supervised_view(images, views, 64, crop="resized")
        difference = (augment.resize(large, 16) - small).abs().flatten(1).mean(1)
        assert difference.max() < 0.02

    @pytest.mark.parametrize("channels", [1, 2, 4, 16])
    def test_other_channels_have_brightness_and_contrast(self, channels):
        images = batch(256, channels) // 2 + 64
        view = contrastive(images, AugmentConfig(flip=0.0))
        plain = images.float() / 255
        changed = ((view - plain).abs().flatten(1).max(1).values > 1e-3).float().mean()
        assert 0.7 < changed < 0.9
        assert view.shape == plain.shape
        dense = augment.colour_jitter_dense(plain.clone(), *augment.draw_jitter(BatchRandom(0, 0), 256, *JITTER))
        sparse = augment.colour_jitter(plain.clone(), *augment.draw_jitter(BatchRandom(0, 0), 256, *JITTER))
        torch.testing.assert_close(dense, sparse)


class TestDefaults:
    def test_a_view_of_the_defaults_draws_what_it_always_drew(self):
        """The numbers that version 0.1 drew for these seeds."""
        images = batch(4, 3, 8)
        view = augment.contrastive_view(images, BatchRandom(3, 5), 8)
        random = BatchRandom(3, 5)
        boxes, flip = augment.crop_boxes(random, 4, 8, (0.2, 1.0)), random.uniform(4) < 0.5
        amounts, order = augment.draw_jitter(random, 4, *JITTER)
        to_grey = random.uniform(4) < 0.2
        expected = augment.colour_jitter(augment.crop_resize(augment.to_float(images), boxes, flip, 8), amounts, order)
        expected[to_grey] = augment.grey(expected[to_grey]).expand(-1, 3, -1, -1)
        assert torch.equal(view, expected)
        views, _ = supervised(images, AugmentConfig(), "pad")
        assert views.shape == (4, 5)

    @pytest.mark.parametrize("config", [MoCoConfig, SEEDConfig, SelfDistillationConfig])
    def test_runs_of_earlier_versions_are_not_repeated(self, config):
        assert "augment" not in settings_of(config())
        assert "augment" in settings_of(config(augment=AugmentConfig(flip=0.4)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "arguments", "message"),
        [
            ({"hue": 0.1}, {"contrastive": True, "channels": 4}, "augment.hue is for RGB images.*4 channels"),
            ({"grey": 0.1}, {"contrastive": True, "channels": 1}, "augment.grey is for RGB images.*1 channel:"),
            ({"brightness": 0.2}, {"contrastive": False}, "give augment.jitter above 0 too"),
            ({"jitter": 0.0, "hue": 0.2}, {"contrastive": True}, "give augment.jitter above 0 too"),
            ({"blur": 0.1}, {"contrastive": True, "blur": 0.5}, "contradict each other"),
        ],
    )
    def test_contradictions(self, settings, arguments, message):
        with pytest.raises(SettingsError, match=message):
            AugmentConfig(**settings).resolved(**arguments)

    @pytest.mark.parametrize("settings", [{"flip": 1.5}, {"rotation": 200}, {"hue": 0.6}, {"quarter_turns": 2}])
    def test_ranges(self, settings):
        with pytest.raises(SettingsError):
            AugmentConfig(**settings)

    def test_asking_for_no_colours_of_images_that_have_none_is_fine(self):
        config = AugmentConfig(hue=0.0, grey=0.0, saturation=0.0).resolved(contrastive=True, channels=4)
        assert (config.hue, config.grey, config.jitter) == (0.0, 0.0, 0.8)

    def test_methods_check_theirs_when_they_are_made(self):
        with pytest.raises(SettingsError, match="contradict"):
            MoCoConfig(blur=0.5, augment=AugmentConfig(blur=0.1))
        assert MoCoConfig(augment=AugmentConfig(blur=0.1)).augment.blur == 0.1
