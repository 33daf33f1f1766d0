"""Convolutions of small maps against torch's own."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.models.cpu_convolutions import cpu_convolutions
from sssd_zoo.models.small_maps import SmallMapConv2d


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "side"),
    [(3, 1, 1), (3, 1, 2), (3, 1, 3), (3, 2, 1), (3, 2, 2), (3, 2, 5), (3, 2, 8), (3, 2, 9), (1, 2, 4), (1, 2, 7)],
)
def test_values_and_gradients_are_those_of_a_convolution(kernel, stride, side, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, kernel, stride, kernel // 2, bias=False)
    images = torch.randn(4, 5, side, side).contiguous(memory_format=memory_format).requires_grad_()
    expected = F.conv2d(images, conv.weight, stride=stride, padding=kernel // 2)
    weights = torch.randn_like(expected)
    by_hand = torch.autograd.grad((expected * weights).sum(), [images, conv.weight])
    with cpu_convolutions(conv):
        assert type(conv) is SmallMapConv2d
        output = conv(images)
        gradients = torch.autograd.grad((output * weights).sum(), [images, conv.weight])
    assert type(conv) is nn.Conv2d
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for gradient, other in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)


def test_autocast_is_followed_and_the_weights_learn_in_float32():
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    images = torch.randn(8, 64, 2, 2)
    with cpu_convolutions(conv), torch.autocast("cpu", torch.bfloat16):
        output = conv(images)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    expected = F.conv2d(images, conv.weight, padding=1)
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)


def test_a_whole_network_is_as_before_and_other_convolutions_are_left_alone():
    torch.manual_seed(0)
    network = timm.create_model("sssd_resnet18_cifar", num_classes=5, channels=(8, 16, 32, 64), layers=(1, 1, 1, 1))
    network.eval()
    wide = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    with torch.no_grad(), cpu_convolutions(wide):
        assert wide(torch.zeros(1, 3, 2, 8)).shape == (1, 4, 1, 4), "maps that are not square are left to torch"
    others = nn.ModuleList([nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)])
    images, names = torch.randn(2, 3, 16, 16), list(network.state_dict())
    with torch.no_grad():
        before = network.forward_exits(images).logits
        with cpu_convolutions(nn.ModuleList([network, others])):
            inside = network.forward_exits(images).logits
            assert all(type(module) is nn.Conv2d for module in others)
            assert list(network.state_dict()) == names
    for ours, theirs in zip(inside, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
