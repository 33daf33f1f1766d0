"""BatchNorm synchronised over all processes, on CPUs as well as GPUs."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from sssd_zoo.distributed import world_size


@torch.no_grad()
def average_batchnorm(module: nn.Module) -> None:
    """Replaces every running mean and variance by its average over the processes.

    Each process tracks the statistics of its own samples; as the moving average is linear, this equals what a single
    process would have tracked over all of them.
    """
    if world_size() == 1:
        return
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for buffer in (layer.running_mean, layer.running_var):
                if buffer is not None:
                    dist.all_reduce(buffer)
                    buffer.div_(world_size())


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of the global batch on CPUs: torch's SyncBatchNorm is for GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises [B, C, H, W] as if the batches of all processes were one."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        variances, means = torch.stack(
            dist_nn.all_gather(torch.stack(torch.var_mean(values, dim=(0, 2, 3), correction=0)))
        ).unbind(1)
        mean = means.mean(0)
        # Not E[x^2] - E[x]^2, which loses all digits where the mean is much larger than the standard deviation.
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            count = values.numel() / values.shape[1] * world_size()
            momentum = 0.1 if self.momentum is None else self.momentum
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        output: Tensor = values * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)
        return output.to(input.dtype)


class Activated(nn.BatchNorm2d):
    """The dropout and the activation of timm's `BatchNormAct2d`, after the norm of the next class in line."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to the same, normalised and activated."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


class CPUSyncBatchNormAct(Activated, CPUSyncBatchNorm):
    """`CPUSyncBatchNorm` for timm's norm with an activation."""


def replace_batchnorms(
    module: nn.Module, norm: type[nn.BatchNorm2d], with_activation: type[nn.BatchNorm2d]
) -> list[nn.Module]:
    """Gives every BatchNorm2d of `module`, and timm's with an activation, another class; parameters and buffers stay.

    Returns:
        The layers.
    """
    kinds: dict[type[nn.Module], type[nn.BatchNorm2d]] = {nn.BatchNorm2d: norm, BatchNormAct2d: with_activation}
    replaced = [layer for layer in module.modules() if type(layer) in kinds]
    for layer in replaced:
        layer.__class__ = kinds[type(layer)]
    return replaced


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Makes every BatchNorm2d of `module` use the global batch's statistics; parameters and buffers are kept."""
    if world_size() == 1:
        return module
    if device.type != "cpu":
        converted: nn.Module = convert_sync_batchnorm(module)  # torch's own would lose timm's activations
        return converted
    replace_batchnorms(module, CPUSyncBatchNorm, CPUSyncBatchNormAct)
    return module
