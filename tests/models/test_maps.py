"""The last map of a network, whatever its layout, and what it has in common with that of another."""

import pytest
import timm
import torch
import torch.nn.functional as F

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.errors import UserError
from sssd_zoo.models.maps import MapShape, feature_map, features_and_map, map_shape, shared_map

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
    found = feature_map(last, network)
    assert found.shape[2:] == expected.shape[2:]
    assert map_shape(network, 160) == (found.shape[1], found.shape[2])
    if found.shape[1] == expected.shape[1]:  # timm's intermediate map of an EfficientNet comes before its last layer
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_features_and_a_smaller_map_lie_one_after_the_other(network):
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        both = features_and_map(network, images, side=2)
        pooled, last = network(images), feature_map(network.forward_features(images), network)
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


def test_what_is_learnt_is_as_large_as_the_smaller_map():
    student = timm.create_model("sssd_resnet18_cifar", num_classes=5)
    encoder = timm.create_model("test_vit", num_classes=0)
    shape = map_shape(encoder, 160)
    assert map_shape(student, 32) == MapShape(channels=512, side=4)
    assert shared_map(student, [32], encoder, 160) == MapShape(shape.channels, 4)
    assert shared_map(student, [32, 16, 32], encoder, 160) == MapShape(shape.channels, 4)
    assert shared_map(student, [160], encoder, 160) == shape
    assert shape.numbers == shape.channels * 100
    with pytest.raises(UserError, match="the student has one at 8 px: give larger views"):
        shared_map(student, [32, 8, 32], encoder, 160)
    with pytest.raises(UserError, match="the encoder has one at 32 px: give it larger images"):
        shared_map(student, [32], timm.create_model("test_resnet", num_classes=0), 32)


def test_a_network_without_a_square_map_is_refused():
    network = timm.create_model("test_vit", num_classes=0)
    for output in (torch.zeros(2, 7), torch.zeros(2, 7, 64), [torch.zeros(2, 64, 4, 4)]):
        with pytest.raises(UserError, match="a VisionTransformer has no square feature map for dense"):
            feature_map(output, network)


def test_images_that_a_network_cannot_take_are_one_line():
    with pytest.raises(UserError, match="a VisionTransformer gives no feature map of 100 px: "):
        map_shape(timm.create_model("test_vit", num_classes=0), 100)
