"""Running trained networks: classifiers in float32 whatever their names."""

import pytest
import timm
import torch
from torch import nn

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.evaluation.features import feature_moments, float32_classifiers


@pytest.mark.parametrize("name", ["sssd_resnet18_cifar", "sssd_mobilenetv4_conv_small_cifar", "vit_tiny_patch16_224"])
def test_all_classifiers_compute_in_float32_under_autocast(name):
    torch.manual_seed(0)
    small = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=5, **small).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    network = float32_classifiers(model)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 5]
    seen = []
    for module in linear:
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        network(images)
    assert seen == [torch.float32] * len(linear)
    torch.testing.assert_close(network(images), expected)


def test_moments_of_batches_are_those_of_all_images():
    features = torch.randn(3, 23, 7, generator=torch.Generator().manual_seed(0)) * 5 + 100
    features[:, :, 2] = 100.1  # never moves
    batches = [(index, features[:, index]) for index in torch.arange(23).split(5)]
    mean, std = feature_moments(batches)
    torch.testing.assert_close(mean, features[-1].double().mean(0).float())
    torch.testing.assert_close(std, features[-1].double().std(0).float(), atol=1e-7, rtol=1e-6)
    assert std[2] == 0
