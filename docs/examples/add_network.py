"""ResNet-10 with four exits: one block per stage. `python docs/examples/add_network.py` prints what its exits cost."""

from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

from sssd_zoo.models import SSSDResNet, multiply_adds
from sssd_zoo.models.resnet import checkpoint_filter_fn

default_cfgs = generate_default_cfgs(
    {
        "sssd_resnet10": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": ("fc", "exit1.fc", "exit2.fc", "exit3.fc"),
        }
    }
)


@register_model  # finds `default_cfgs` of this file by the function's name
def sssd_resnet10(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-10 with four exits."""
    if kwargs.get("features_only"):
        kwargs.setdefault("output", "final")  # a backbone needs no exits
    return build_model_with_cfg(
        SSSDResNet,
        "sssd_resnet10",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # weights of all exits load into a network of one
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), **kwargs.pop("feature_cfg", {})},
        **{"block": BasicBlock, "layers": (1, 1, 1, 1), **kwargs},
    )


if __name__ == "__main__":
    model = timm.create_model("sssd_resnet10", num_classes=10).eval()
    for answer, macs in multiply_adds(model, (3, 224, 224)).items():
        print(f"{answer:>8}: {macs / 1e6:7.1f} million MACs")
    print(model.forward_exits(torch.randn(2, 3, 224, 224)).logits[0].shape)
