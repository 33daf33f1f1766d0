"""Running trained networks: classifiers in float32 whatever their names."""

import pytest
import timm
import torch
from torch import nn

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.evaluation.features import feature_moments, float32_classifiers, read_batches


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


@pytest.mark.parametrize(("fitting", "tried"), [(8, [8, 8, 5]), (5, [8, 4, 4, 4, 4, 4, 1]), (1, [8, 4, 2, *[1] * 21])])
def test_batches_that_do_not_fit_into_the_memory_are_run_in_parts(fitting, tried):
    seen = []

    def read(model, images):
        seen.append(len(images))
        if len(images) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.mean((2, 3)).unsqueeze(0)

    images = torch.randint(0, 256, (21, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = [(index, images[index]) for index in torch.arange(21).split(8)]
    spec = InputSpec(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    values = torch.cat([part for _, part in read_batches(nn.Conv2d(3, 1, 1), batches, spec, read=read)], dim=1)
    assert seen == tried
    torch.testing.assert_close(values, images.float().div(255).mean((2, 3)).unsqueeze(0))


def test_one_image_that_does_not_fit_is_an_error():
    def read(model, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    batches = [(torch.arange(3), torch.zeros(3, 3, 4, 4, dtype=torch.uint8))]
    with pytest.raises(torch.OutOfMemoryError):
        list(read_batches(nn.Conv2d(3, 1, 1), batches, InputSpec(4, (0.0,) * 3, (1.0,) * 3), read=read))
