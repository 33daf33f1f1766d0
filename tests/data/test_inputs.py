"""Stored images as a network's inputs."""

import pytest
import torch

from sssd_zoo.data.augment import normalise, resize, to_float
from sssd_zoo.data.inputs import CACHED, InputSpec, network_input


@pytest.mark.parametrize(("channels", "mean"), [(3, (0.5, 0.4, 0.3)), (3, (0.5,)), (1, (0.5,)), (5, (0.1,) * 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_images_a_few_at_a_time_are_those_all_at_once(channels, mean, dtype):
    stored = torch.randint(0, 256, (200, channels, 40, 40)).to(dtype)
    assert len(stored) > CACHED // stored[0].numel()
    spec = InputSpec(32, mean, tuple(value / 2 for value in mean))
    inputs = network_input(stored, spec)
    assert torch.equal(inputs, normalise(resize(to_float(stored), 32), spec.mean, spec.std))
    assert inputs.shape == (200, len(mean), 32, 32)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(network_input(stored[:1], spec), inputs[:1])
    assert network_input(stored[:0], spec).shape == (0, len(mean), 32, 32)
