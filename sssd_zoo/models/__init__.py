"""The multi-exit networks that timm sees, their outputs, and what each exit costs."""

from sssd_zoo.models import resnet as _registered  # noqa: F401  registers the networks with timm
from sssd_zoo.models.cost import StageCosts, activations, multiply_adds, stage_costs
from sssd_zoo.models.exits import (
    EarlyExits,
    Exit,
    Exits,
    classifiers,
    confidence,
    early_logits,
    ensemble_logits,
    exits_asked,
    exits_taken,
    stages_and_heads,
)
from sssd_zoo.models.multi_exit_resnet import SSSDResNet

__all__ = [
    "EarlyExits",
    "Exit",
    "Exits",
    "SSSDResNet",
    "StageCosts",
    "activations",
    "classifiers",
    "confidence",
    "early_logits",
    "ensemble_logits",
    "exits_asked",
    "exits_taken",
    "multiply_adds",
    "stage_costs",
    "stages_and_heads",
]
