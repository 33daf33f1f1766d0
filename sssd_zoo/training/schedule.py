"""The learning rate over the optimiser steps."""

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

from sssd_zoo.configs import OptimConfig


def make_scheduler(config: OptimConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Timm's scheduler of a run's learning rate.

    Args:
        config: its schedule, warm-up and length, in epochs.
        optimizer: whose groups' rates it sets.
        steps_per_epoch: optimiser steps.

    Returns:
        A scheduler whose `step_update(step)` sets the rates for the step of that number, from 0; it has no other state.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    common: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False}
    if config.schedule == "step":
        # timm's step scheduler decays one step early (it asks for the rate after the step): one more makes it exact.
        milestones = [epoch * steps_per_epoch - warmup + 1 for epoch in config.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=config.gamma, **common)
    after_warmup = config.epochs * steps_per_epoch - warmup
    # A single step has the full rate either way, and timm would warn of a length of 1.
    return CosineLRScheduler(optimizer, t_initial=max(2, after_warmup), **common)
