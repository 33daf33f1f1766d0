"""Convolutions that torch computes slowly on a CPU, and that are replaced while a network trains there."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sssd_zoo.models.depthwise import DepthwiseConv2d, is_slow_depthwise
from sssd_zoo.models.small_maps import SmallMapConv2d, is_eligible


@contextmanager
def cpu_convolutions(model: nn.Module) -> Iterator[None]:
    """Lets a model on a CPU compute its depthwise convolutions and those of small maps in faster ways meanwhile.

    The results are the same to rounding, and so is its state dict.
    """
    replaced: dict[nn.Module, type[nn.Conv2d]] = {
        **{module: SmallMapConv2d for module in model.modules() if is_eligible(module)},
        **{module: DepthwiseConv2d for module in model.modules() if is_slow_depthwise(module)},
    }
    for module, kind in replaced.items():
        module.__class__ = kind
    try:
        yield
    finally:
        for module in replaced:
            module.__class__ = nn.Conv2d
