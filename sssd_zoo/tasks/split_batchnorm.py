"""BatchNorm with statistics of parts of the batch, as if each were on a GPU of its own: MoCo's shuffle is for those.

The convolutions between see the whole batch, which is faster than a pass for each part. The literature calls it ghost
batch normalisation (Hoffer et al. 2017, arXiv:1705.08741); timm's `SplitBatchNorm2d` is something else, BatchNorms of
their own for kinds of images (AdvProp). lightly's `SplitBatchNorm` folds the parts into the channels, which copies a
batch that lies channels-last, as ours do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.distributed.batchnorm import Activated, replace_batchnorms


class _GhostBatchNorm(torch.autograd.Function):
    """`torch.batch_norm` of each part, written straight into its place in the whole."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor],
        splits: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out = torch.empty_like(images)
        moments = weight.new_empty(2, splits, len(weight))
        for part, part_out, mean, invstd in zip(images.chunk(splits), out.chunk(splits), *moments, strict=True):
            torch.native_batch_norm(
                part,
                weight,
                bias,
                *running,
                True,
                momentum,
                eps,
                out=(part_out, mean, invstd),
            )
        ctx.save_for_backward(images, weight, moments)
        ctx.splits, ctx.eps = splits, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        images, weight, moments = ctx.saved_tensors
        out = torch.empty_like(images)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        parts = (tensor.chunk(ctx.splits) for tensor in (grads[0], images, out))
        for grad, part, part_out, mean, invstd in zip(*parts, *moments, strict=True):
            grad_part, more_weight, more_bias = torch.ops.aten.native_batch_norm_backward(
                grad, part, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
            )
            part_out.copy_(grad_part)
            grad_weight += more_weight
            grad_bias += more_bias
        return out, grad_weight, grad_bias, None, None, None, None


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises each of `splits` equal parts of the batch by its own statistics while it trains."""

    splits: int

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to the same; B is a multiple of `splits` in training mode."""
        if not self.training:
            return super().forward(input)
        # The running statistics move once for each part: a fraction of the momentum keeps their window in steps.
        momentum = (0.1 if self.momentum is None else self.momentum) / self.splits
        if torch.compiler.is_compiling():  # it makes kernels of its own, and cannot see through the function above
            return self._all_parts_at_once(input, momentum)
        if input.device.type != "cpu":
            parts = [
                F.batch_norm(
                    part, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
                )
                for part in input.chunk(self.splits)
            ]
            return torch.cat(parts)
        running = self.running_mean, self.running_var
        normalised: Tensor = _GhostBatchNorm.apply(
            input, self.weight, self.bias, running, self.splits, momentum, self.eps
        )
        return normalised

    def _all_parts_at_once(self, images: Tensor, momentum: float) -> Tensor:
        """The same in a few operations whatever the number of parts, which torch.compile fuses into few kernels."""
        channels = images.shape[1]
        values = images.unflatten(0, (self.splits, -1)).float()
        variance, mean = torch.var_mean(values, dim=(1, 3, 4), correction=0, keepdim=True)
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            count = values.numel() / (self.splits * channels)
            # The moving average after one part after the other, in closed form.
            powers = torch.arange(self.splits - 1, -1, -1, device=images.device)
            weights = momentum * (1 - momentum) ** powers[:, None]
            for running, moment in (
                (self.running_mean, mean.detach()),
                (self.running_var, variance.detach() * (count / (count - 1))),
            ):
                moved = (weights * moment.view(self.splits, channels)).sum(0)  # autocast would round a matrix product
                running.mul_((1 - momentum) ** self.splits).add_(moved)
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(1, 1, -1, 1, 1)
        output: Tensor = (values - mean) * scale + self.bias.view(1, 1, -1, 1, 1)
        return output.flatten(0, 1).to(images.dtype)


class GhostBatchNormAct2d(Activated, GhostBatchNorm2d):
    """`GhostBatchNorm2d` for timm's norm with an activation."""


def split_batchnorm(module: nn.Module, splits: int) -> None:
    """Makes every BatchNorm2d in `module` normalise `splits` parts of the batch apart; parameters and buffers stay."""
    if splits > 1:
        for layer in replace_batchnorms(module, GhostBatchNorm2d, GhostBatchNormAct2d):
            layer.__dict__["splits"] = splits
