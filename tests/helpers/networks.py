"""The registered names, and seeded networks of them."""

import copy
from functools import lru_cache
from pathlib import Path

import timm
import torch
from torch import nn

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.models import SSSDResNet
from sssd_zoo.models.saving import save_network

NAMES = timm.list_models("sssd_resnet*", exclude_filters="sssd_resnet50d*")  # `SSSDResNet`s
BACKBONES = [name for name in timm.list_models("sssd_*") if name not in NAMES]  # timm's other networks, with exits
SHORT = {"layers": (1, 1, 1, 1)}


def create(name="sssd_resnet18", **kwargs) -> SSSDResNet:
    """A seeded network of one's own in eval mode."""
    return copy.deepcopy(_created(name, **kwargs))


@lru_cache(maxsize=6)  # making the weights takes longer than copying them
def _created(name, **kwargs):
    """BatchNorms are not the identity, so that no test passes by symmetry."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 7, **kwargs})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight.device.type != "meta":
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval()


def save_tiny(folder: Path, classes: int, **kwargs) -> Path:
    """A folder with a network of one block a stage and new weights, with so many classes and no thresholds.

    `kwargs` are those of `save_network`.
    """
    save_network(folder, timm.create_model("sssd_resnet18", num_classes=classes, **SHORT), "sssd_resnet18", **kwargs)
    return folder


def poisoned(network: Path, folder: Path) -> Path:
    """A folder with the same network, one of whose BatchNorms gives NaN."""
    model = timm.create_model(f"local-dir:{network}", pretrained=True)
    with torch.no_grad():
        model.layer1[0].bn2.weight.fill_(float("nan"))
    save_network(folder, model, "sssd_resnet18", input_size=32, label_names=model.pretrained_cfg.get("label_names"))
    return folder
