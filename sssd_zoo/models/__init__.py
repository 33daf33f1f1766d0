"""The multi-exit networks that timm sees, their outputs, and what each exit costs."""

from sssd_zoo.models.cost import StageCosts, multiply_adds, stage_costs
from sssd_zoo.models.exits import EarlyExits, Exit, Exits, ensemble_logits
from sssd_zoo.models.resnet import SSSDResNet

__all__ = [
    "EarlyExits",
    "Exit",
    "Exits",
    "SSSDResNet",
    "StageCosts",
    "ensemble_logits",
    "multiply_adds",
    "stage_costs",
]
