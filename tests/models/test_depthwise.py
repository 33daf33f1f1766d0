"""Depthwise convolutions of training on a CPU against torch's own."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.models.cpu_convolutions import cpu_convolutions
from sssd_zoo.models.depthwise import DepthwiseConv2d

ROUNDING = {torch.float32: {"atol": 1e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}


def gradients(conv: nn.Conv2d, images: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The output of a convolution and the gradients of images and parameters, for a loss of these weights."""
    images = images.detach().requires_grad_()
    output = conv(images)
    return output, *torch.autograd.grad(output, [images, *conv.parameters()], weights.to(output.dtype))


def by_torch(conv: nn.Conv2d, images: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The same by `F.conv2d` in float64, which no kernel of oneDNN computes."""
    images, *parameters = (tensor.detach().double().requires_grad_() for tensor in (images, *conv.parameters()))
    output = F.conv2d(images, *parameters, stride=conv.stride, padding=conv.padding, groups=conv.groups)
    return output, *torch.autograd.grad(output, [images, *parameters], weights.double())


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], rounding: dict[str, float]) -> None:
    """Compares in units of the largest value of each tensor, as rounding errors of a sum are of that size."""
    for tensor, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(tensor.double() / scale, other / scale, **rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("sides", [(8, 8), (7, 9), (4, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 4, 5, 7, 9])
def test_values_and_gradients_are_those_of_a_convolution(kernel, stride, sides, outputs, dtype):
    torch.manual_seed(0)
    conv = timm.layers.create_conv2d(6, 6 * outputs, kernel, stride=stride, depthwise=True, bias=outputs == 2).to(dtype)
    images = torch.randn(4, 6, *sides, dtype=dtype)
    expected = by_torch(conv, images, weights := torch.randn(conv(images).shape, dtype=dtype))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        with cpu_convolutions(conv):
            slow = kernel > 3 or stride > 1 or outputs > 1
            assert type(conv) is (DepthwiseConv2d if slow else nn.Conv2d)
            found = gradients(conv, images.contiguous(memory_format=memory_format), weights)
        assert type(conv) is nn.Conv2d
        assert all(tensor.dtype == dtype for tensor in found)
        assert_close(found, expected, ROUNDING[dtype])


@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1)},
        {"kernel_size": (7, 1), "padding": (3, 0), "stride": (1, 3)},
        {"kernel_size": 5, "stride": 3},
    ],
)
def test_rows_and_columns_may_differ(shape):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 5, groups=5, **shape).bfloat16()
    images = torch.randn(3, 5, 11, 14, dtype=torch.bfloat16)
    weights = torch.randn_like(conv(images))
    with cpu_convolutions(conv):
        assert type(conv) is DepthwiseConv2d
        found = gradients(conv, images, weights)
    assert_close(found, by_torch(conv, images, weights), ROUNDING[torch.bfloat16])


def test_a_convolution_used_twice_under_autocast_learns_in_float32_from_both():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 5, padding=2, groups=16)
    images = torch.randn(4, 16, 8, 8)
    weights = torch.randn(4, 16, 8, 8)
    found = []
    for used in (conv, nn.ModuleList()):  # taken over, and not
        conv.zero_grad()
        with cpu_convolutions(used), torch.autocast("cpu", torch.bfloat16):
            output = conv(conv(images))
        assert output.dtype == torch.bfloat16
        (output * weights).sum().backward()
        assert conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32
        found.append((output.detach(), conv.weight.grad.clone(), conv.bias.grad.clone()))
    ours, torchs = found
    assert_close(ours, tuple(tensor.double() for tensor in torchs), ROUNDING[torch.bfloat16])


def test_what_needs_no_gradient_has_none():
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4).requires_grad_(False)
    images = torch.randn(2, 4, 6, 6, requires_grad=True)
    with cpu_convolutions(conv):
        conv(images).sum().backward()
        conv.requires_grad_(True)
        with torch.no_grad():
            assert not conv(images).requires_grad
        conv(images.detach()).sum().backward()
    assert images.grad is not None
    assert conv.weight.grad is not None


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, 5, groups=2),
        nn.Conv2d(4, 4, 5, groups=4, dilation=2),
        nn.Conv2d(4, 4, 5, groups=4, padding="same"),
        nn.Conv2d(4, 4, 5, groups=4, padding=2, padding_mode="circular"),
        timm.layers.Conv2dSame(4, 4, 5, stride=2, groups=4),
    ],
)
def test_other_convolutions_are_left_alone(other):
    kind = type(other)
    with cpu_convolutions(nn.ModuleList([other])):
        assert type(other) is kind


def test_a_whole_network_has_the_same_gradients():
    torch.manual_seed(0)
    network = timm.create_model("sssd_mobilenetv4_conv_small_cifar", num_classes=3).eval()
    names, images = list(network.state_dict()), torch.randn(2, 3, 32, 32)
    found = []
    for used in (network, nn.ModuleList()):
        with cpu_convolutions(used):
            assert any(type(module) is DepthwiseConv2d for module in network.modules()) is (used is network)
            assert list(network.state_dict()) == names
            output = network(images)
            found.append((output, *torch.autograd.grad(output[:, 0].sum(), list(network.parameters()))))
    ours, torchs = found
    for tensor, other in zip(ours, torchs, strict=True):
        atol = 1e-5 + 1e-3 * float(other.detach().abs().max())
        torch.testing.assert_close(tensor, other, atol=atol, rtol=1e-3)


def test_resnets_have_none_of_them():
    network = timm.create_model("sssd_resnet18_cifar")
    with cpu_convolutions(network):
        assert not any(isinstance(module, DepthwiseConv2d) for module in network.modules())
