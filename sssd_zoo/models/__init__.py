"""The multi-exit networks that timm sees, their outputs, and what each exit costs."""

from sssd_zoo.models import backbones as _backbones  # noqa: F401  registers networks with timm
from sssd_zoo.models import resnet as _resnets  # noqa: F401  and these
from sssd_zoo.models.cost import StageCosts, activations, multiply_adds, stage_costs
from sssd_zoo.models.exits import (
    EarlyExits,
    Exit,
    Exits,
    confidence,
    early_logits,
    ensemble_logits,
    exits_asked,
    exits_taken,
)
from sssd_zoo.models.multi_exit import MultiExit, classifier_names, classifiers, feature_width, stages_and_heads
from sssd_zoo.models.multi_exit_resnet import SSSDResNet

__all__ = [
    "EarlyExits",
    "Exit",
    "Exits",
    "MultiExit",
    "SSSDResNet",
    "StageCosts",
    "activations",
    "classifier_names",
    "classifiers",
    "confidence",
    "early_logits",
    "ensemble_logits",
    "exits_asked",
    "exits_taken",
    "feature_width",
    "multiply_adds",
    "stage_costs",
    "stages_and_heads",
]
