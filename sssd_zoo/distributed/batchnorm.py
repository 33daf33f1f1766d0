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


class CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """The same for timm's norm with a dropout and an activation of its own."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalises [B, C, H, W] as if the batches of all processes were one, and activates it."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


SYNCHRONISED: dict[type[nn.Module], type[CPUSyncBatchNorm]] = {
    nn.BatchNorm2d: CPUSyncBatchNorm,
    BatchNormAct2d: CPUSyncBatchNormAct,
}


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Makes every BatchNorm2d of `module` use the global batch's statistics; parameters and buffers are kept."""
    if world_size() == 1:
        return module
    if device.type != "cpu":
        converted: nn.Module = convert_sync_batchnorm(module)  # torch's own would lose timm's activations
        return converted
    for layer in module.modules():
        if type(layer) in SYNCHRONISED:
            layer.__class__ = SYNCHRONISED[type(layer)]
    return module
