"""Every method's step on torch's meta device: it has no numbers, but refuses tensors of two devices, as a GPU does."""

from typing import Any

import pytest
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.configs import AnchoredConfig, ContrastiveConfig, MoCoConfig, SEEDConfig, SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.models.maps import MapShape
from sssd_zoo.tasks import (
    SEED,
    AnchoredClusterFit,
    AnchoredSelfDistillation,
    ClusterFit,
    ContrastiveSelfDistillation,
    FrozenEncoder,
    MoCo,
    SelfDistillation,
    Task,
)

SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}
SPEC = InputSpec(32, (0.5,) * 3, (0.25,) * 3)
LARGER = InputSpec(40, (0.4,) * 3, (0.3,) * 3)
PLAIN = SelfDistillationConfig()


def trunk() -> torch.nn.Module:
    return timm.create_model("sssd_resnet18", num_classes=0, output="final", **SMALL)


def student() -> torch.nn.Module:
    return timm.create_model("sssd_resnet18", num_classes=5, **SMALL)


def anchored() -> Task:
    encoder = FrozenEncoder(trunk(), LARGER, torch.zeros(64), torch.ones(64))
    return AnchoredSelfDistillation(student(), encoder, AnchoredConfig(anchor=4.0), SPEC)


def anchored_clusterfit() -> Task:
    encoder = FrozenEncoder(trunk(), LARGER, torch.zeros(64), torch.ones(64))
    model = timm.create_model("resnet18", num_classes=5, **SMALL)
    return AnchoredClusterFit(model, encoder, AnchoredConfig(anchor=4.0), SPEC)


def dense() -> Task:
    moments = torch.zeros(64 + 64 * 4), torch.ones(64 + 64 * 4)
    encoder = FrozenEncoder(trunk(), LARGER, *moments, MapShape(64, 2))
    return AnchoredSelfDistillation(student(), encoder, AnchoredConfig(anchor=4.0, dense=True), SPEC)


def moco(**settings: Any) -> Task:
    return MoCo(trunk(), MoCoConfig(queue_size=32, splits=4, **settings), SPEC)


TASKS = {
    "moco": moco,
    "moco, asymmetric, blurred": lambda: moco(symmetric=False, blur=0.5),
    "seed": lambda: SEED(trunk(), trunk(), SEEDConfig(queue_size=32), SPEC, LARGER),
    "sssd": lambda: SelfDistillation(student(), PLAIN, SPEC),
    "sssd, resized crops": lambda: SelfDistillation(student(), SelfDistillationConfig(crop="resized"), SPEC),
    "contrastive": lambda: ContrastiveSelfDistillation(student(), ContrastiveConfig(queue_size=32), SPEC),
    "anchored": anchored,
    "anchored, dense": dense,
    "clusterfit, anchored": anchored_clusterfit,
    "clusterfit": lambda: ClusterFit(timm.create_model("resnet18", num_classes=5, **SMALL), PLAIN, SPEC),
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_step_keeps_to_one_device(name, soft):
    task = TASKS[name]().to("meta").train()
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    task.before_step()
    batch = task.views(images, BatchRandom(0, 0))
    batch["labels"] = torch.zeros(8, 5, device="meta") if soft else torch.zeros(8, dtype=torch.long, device="meta")
    parts = task(batch)
    parts["loss"].backward()
    assert {value.device.type for value in parts.values()} == {"meta"}
    grads = [parameter.grad for parameter in task.parameters() if parameter.requires_grad]
    assert grads
    assert all(grad is not None and grad.device.type == "meta" for grad in grads)
