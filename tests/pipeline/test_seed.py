"""`sssd seed`: teachers of other kinds than ResNets."""

import math

import timm

from helpers.data import load
from sssd_zoo.configs import RuntimeConfig, SEEDConfig
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.seed import seed_network
from sssd_zoo.training.runs import RunSpec


def test_a_transformer_teaches_at_another_size(folder_of_images, tmp_path):
    teacher = tmp_path / "teacher"
    save_network(teacher, timm.create_model("vit_tiny_patch16_224", num_classes=2), "vit_tiny_patch16_224")
    measured = seed_network(
        load(folder_of_images),
        str(teacher),
        SEEDConfig(epochs=1, batch_size=16, queue_size=16),
        RuntimeConfig(device="cpu", precision="fp32"),
        RunSpec(arch="sssd_resnet18", size=32, out=tmp_path / "run"),
        teacher_size=32,
    )
    assert math.isfinite(measured["loss"])
