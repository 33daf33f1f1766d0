"""ClusterFit against a loop over images and classes."""

import math

import pytest
import torch
from torch import nn

from sssd_zoo.configs import SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks import ClusterFit


def test_loss_equals_loops():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    task = ClusterFit(model, SelfDistillationConfig(), InputSpec(8, (0.5,) * 3, (0.25,) * 3))
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    batch = {**task.views(images, BatchRandom(0, 0)), "labels": torch.tensor([0, 1, 2, 3, 4, 0])}
    out = task(batch)
    total, hits = 0.0, 0
    for image, label in zip(batch["images"], batch["labels"].tolist(), strict=True):
        scores = model(image.unsqueeze(0))[0].tolist()
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
        hits += scores.index(max(scores)) == label
    assert out["loss"].item() == pytest.approx(total / 6, rel=1e-5)
    assert out["label_top1"].item() == pytest.approx(hits / 6)
    out["loss"].backward()
    assert model[1].weight.grad.abs().sum() > 0
