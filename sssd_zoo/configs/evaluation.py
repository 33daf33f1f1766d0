"""How a trained network is run and measured."""

from dataclasses import dataclass
from typing import Literal

from sssd_zoo.configs.ranges import Checked, Count, LearningRate, ProperFraction, Weight


@dataclass(kw_only=True)
class ProbeConfig(Checked):
    """Linear probes: one linear layer per exit on frozen features.

    Args:
        probe_epochs: passes over the features.
        probe_lr: learning rate at its height, falling to 0 by a cosine.
        probe_weight_decay: of the layers' weights.
        holdout: share of the images kept from the probes to measure them, where the data have no split for that.
    """

    probe_epochs: Count = 30
    probe_lr: LearningRate = 1e-2
    probe_weight_decay: Weight = 0.05
    holdout: ProperFraction = 0.2


@dataclass(kw_only=True)
class ForwardConfig(Checked):
    """How a trained network is run over images.

    Args:
        batch_size: images per forward pass.
        precision: of the forward pass; 'auto' takes bf16 where the hardware has it, else fp32.
        device: 'auto' takes the GPU if there is one.
    """

    batch_size: Count = 256
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
