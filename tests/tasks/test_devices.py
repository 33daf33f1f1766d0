"""Every method's step on torch's meta device: it has no numbers, but refuses tensors of two devices, as a GPU does."""

import pytest
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.tasks import SEED, AnchoredSelfDistillation, ClusterFit, MoCo, SelfDistillation, Task

SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}
VIEWS = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def trunk() -> torch.nn.Module:
    return timm.create_model("sssd_resnet18", num_classes=0, output="final", **SMALL)


def student() -> torch.nn.Module:
    return timm.create_model("sssd_resnet18", num_classes=5, **SMALL)


def teacher() -> dict[str, object]:
    return {"teacher_size": 40, "teacher_mean": (0.4, 0.4, 0.4), "teacher_std": (0.3, 0.3, 0.3)}


def anchored() -> Task:
    encoder = {"encoder_size": 40, "encoder_mean": (0.4, 0.4, 0.4), "encoder_std": (0.3, 0.3, 0.3)}
    moments = {"feature_mean": torch.zeros(64), "feature_std": torch.ones(64)}
    return AnchoredSelfDistillation(student(), trunk(), weight=4.0, **encoder, **moments, **VIEWS)


TASKS = {
    "moco": lambda: MoCo(trunk(), queue_size=32, splits=4, **VIEWS),
    "moco, asymmetric, blurred": lambda: MoCo(trunk(), queue_size=32, splits=4, symmetric=False, blur=0.5, **VIEWS),
    "seed": lambda: SEED(trunk(), trunk(), queue_size=32, **teacher(), **VIEWS),
    "sssd": lambda: SelfDistillation(student(), **VIEWS),
    "sssd, resized crops": lambda: SelfDistillation(student(), crop="resized", **VIEWS),
    "anchored": anchored,
    "clusterfit": lambda: ClusterFit(timm.create_model("resnet18", num_classes=5, **SMALL), **VIEWS),
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
