"""The learning rate over the optimiser steps."""

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

from sssd_zoo.configs import OptimConfig


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Timm's scheduler, counted in optimiser steps; it has no state but the step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    common: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False}
    if config.schedule == "step":
        # timm's step scheduler decays one step early (it asks for the rate after the step): one more makes it exact.
        milestones = [epoch * steps_per_epoch - warmup + 1 for epoch in config.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=config.gamma, **common)
    total = config.epochs * steps_per_epoch - warmup
    return CosineLRScheduler(optimizer, t_initial=max(1, total), **common)
