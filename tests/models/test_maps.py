"""The last map of a network, whatever its layout, and what it has in common with that of another."""

import pytest
import timm
import torch
import torch.nn.functional as F

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.errors import UserError
from sssd_zoo.models.maps import common_map, features_and_map, map_shape, spatial_map

NAMES = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_mambaout"]


@pytest.fixture(params=NAMES)
def network(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=0).eval()


def test_a_map_of_any_layout_is_that_of_timm(network):
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        last = network.forward_features(images)
        _, (expected,) = network.forward_intermediates(images, indices=1, norm=True)
    found = spatial_map(last, network)
    assert found.shape[2:] == expected.shape[2:]
    assert map_shape(network, 160) == (found.shape[1], found.shape[2])
    if found.shape[1] == expected.shape[1]:  # timm's intermediate map of an EfficientNet comes before its last layer
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_features_and_a_smaller_map_lie_one_after_the_other(network):
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        both = features_and_map(network, images, side=2)
        pooled, last = network(images), spatial_map(network.forward_features(images), network)
    places = both[:, pooled.shape[1] :].unflatten(1, (-1, 2, 2))
    torch.testing.assert_close(both[:, : pooled.shape[1]], pooled)
    torch.testing.assert_close(places, F.adaptive_avg_pool2d(last, 2))
    with torch.no_grad():
        assert torch.equal(features_and_map(network, images, side=0), pooled)


@pytest.mark.parametrize(
    "name", ["sssd_resnet18_cifar", "sssd_mobilenetv4_conv_small_cifar", "sssd_vit_tiny_patch16_224"]
)
def test_the_map_beside_the_exits_is_the_last_one(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_rate=0.0).eval()
    images = torch.rand(2, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        exits, last = model.exits_and_map(images)
        torch.testing.assert_close(last, model.forward_features(images))
        again = model.forward_exits(images)
    assert all(torch.equal(one, other) for one, other in zip(exits.features, again.features, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(exits.logits, again.logits, strict=True))


def test_two_networks_have_the_smaller_map_in_common():
    student = timm.create_model("sssd_resnet18_cifar", num_classes=5)
    encoder = timm.create_model("test_vit", num_classes=0)
    channels, side = map_shape(encoder, 160)
    assert map_shape(student, 32) == (512, 4)
    assert common_map(student, 32, encoder, 160) == (4, channels)
    assert common_map(student, 160, encoder, 160) == (side, channels)
    with pytest.raises(UserError, match="the student's last map has 1 x 1, the encoder's 10 x 10: give a larger"):
        common_map(student, 8, encoder, 160)


def test_what_is_no_map_is_refused():
    network = timm.create_model("test_vit", num_classes=0, global_pool="avg")
    for shape in ((2, 7), (2, 7, 64)):
        with pytest.raises(UserError, match="no square map: remove dense"):
            spatial_map(torch.zeros(shape), network)
