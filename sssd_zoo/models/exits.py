"""Exit heads: each turns the map of an early stage into features and the logits of its own classifier."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Exits(NamedTuple):
    """The outputs of all four exits in order, the final classifier last.

    Attributes:
        logits: four tensors [B, num_classes], q_1..q_3 and q_C before the softmax.
        features: four tensors [B, D], F_1..F_3 and F_C, pooled, as they are before the dropout in front of the
            classifiers. D is the width of the classifiers' input (`head_hidden_size` where timm's network has one, else
            `num_features`). In ResNets they are non-negative, as they come out of a ReLU. With `global_pool=''` they
            are maps.
    """

    logits: list[Tensor]
    features: list[Tensor]


class EarlyExits(NamedTuple):
    """The logits of a batch whose images left at different exits.

    Attributes:
        logits: float32 [B, num_classes], of the exit that each image took; at exit 4, of the ensemble of all heads that
            ran on the way.
        exit: int64 [B] in 1..4.
    """

    logits: Tensor
    exit: Tensor


def ensemble_logits(logits: list[Tensor]) -> Tensor:
    """The log of the mean of the exits' softmax outputs, float32 [B, num_classes].

    Its softmax is that mean, so it serves as the logits of the ensemble; every exit has a gradient. Computed in float32
    from log-softmaxes, so that it holds in half precision and for probabilities that underflow.

    Args:
        logits: of the exits, [B, num_classes] each, of any floating type.
    """
    log_probabilities = torch.stack([F.log_softmax(exit_logits, dim=1, dtype=torch.float32) for exit_logits in logits])
    return torch.logsumexp(log_probabilities, dim=0) - math.log(len(logits))


def exits_asked(thresholds: Sequence[float]) -> list[int]:
    """The exits, of 1 to 4, whose heads run on an image that none of them lets go; one whose threshold is 1 does not.

    Args:
        thresholds: of the exits 1 to 3, in 0..1.
    """
    return [number for number, threshold in enumerate([*thresholds, 0], start=1) if threshold < 1]


def confidence(logits: Tensor) -> Tensor:
    """The greatest softmax probability, which an exit's threshold is compared with: [..., C] to [...]."""
    return logits.softmax(-1).amax(-1)


def exits_taken(confidences: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The exit, int64 [N] in 1..4, that each image leaves at: the first with a confidence above its threshold, or 4.

    Args:
        confidences: of the exits 1 to 3, or of all four, float [3 or 4, N].
        thresholds: of the exits 1 to 3, in 0..1.
    """
    leaves = confidences[:3] > torch.tensor(thresholds).unsqueeze(1)
    last = torch.ones_like(leaves[:1])
    return torch.cat([leaves, last]).to(torch.uint8).argmax(0) + 1


def early_logits(logits: Tensor, thresholds: Sequence[float]) -> EarlyExits:
    """What `MultiExit.forward_early` gives, from the logits of exits that all ran: a slow but plain statement of it.

    Args:
        logits: of all exits, float [4, N, C].
        thresholds: of the exits 1 to 3, in 0..1.
    """
    taken = exits_taken(confidence(logits), thresholds)
    last = ensemble_logits([logits[number - 1] for number in exits_asked(thresholds)])
    answers = torch.cat([logits[:3].float(), last.unsqueeze(0)])
    return EarlyExits(answers[taken - 1, torch.arange(len(taken))], taken)


def bottleneck_layer(
    in_chs: int,
    out_chs: int,
    stride: int,
    *,
    narrow: bool,
    norm_layer: Callable[..., nn.Module],
    act_layer: Callable[..., nn.Module],
    **dd: Any,
) -> nn.Sequential:
    """A layer that takes a map [B, in_chs, H, W] to [B, out_chs, ceil(H / stride), ceil(W / stride)].

    The stride comes before the widening: exit 1 of a 32 px network is bound by the memory that its full-resolution map
    moves, so that map is read once and never written wide.

    Args:
        in_chs: channels of the map.
        out_chs: channels of the result.
        stride: of the 3x3 convolution.
        narrow: squeeze to in_chs / 8 by a 1x1 convolution before the 3x3, for the four times wider maps of Bottleneck
            trunks; otherwise the 3x3 convolution itself goes to in_chs / 2.
        norm_layer: makes a normalisation of a number of channels.
        act_layer: makes an activation.
        dd: device and dtype of the parameters.
    """
    width = in_chs // 8 if narrow else in_chs // 2
    shapes = [(in_chs, width, 1, 1)] if narrow else []
    shapes += [(width if narrow else in_chs, width, 3, stride), (width, out_chs, 1, 1)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (chs, next_chs, kernel, step) in enumerate(shapes, start=1):
        conv = nn.Conv2d(chs, next_chs, kernel, stride=step, padding=kernel // 2, bias=False, **dd)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm does in the trunk
        layers |= {f"conv{i}": conv, f"bn{i}": norm_layer(next_chs, **dd), f"act{i}": act_layer(inplace=True)}
    return nn.Sequential(layers)


class Attention(nn.Module):
    """Weighs every number of a map [B, chs, H, W] by a mask in 0..1 that is computed from the map.

    The attention of exits in the follow-up of BYOT (Zhang, Bao and Ma, TPAMI 2022, reference 26 of the SSSD paper;
    first in SCAN, NeurIPS 2019): the mask is the sigmoid of a stride-2 depthwise separable convolution of the map,
    resized to the map's size. Theirs is followed by separable
    convolutions; here the bottleneck layers of the plain exits stay, so that attention is all that differs. It costs
    (9 + chs) * chs * H * W / 4 MACs.

    Args:
        chs: channels of the map.
        norm_layer: makes a normalisation of a number of channels.
        act_layer: makes an activation.
        dd: device and dtype of the parameters.
    """

    def __init__(
        self, chs: int, *, norm_layer: Callable[..., nn.Module], act_layer: Callable[..., nn.Module], **dd: Any
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(chs, chs, 3, stride=2, padding=1, groups=chs, bias=False, **dd)
        self.bn1 = norm_layer(chs, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv_pw = nn.Conv2d(chs, chs, 1, bias=False, **dd)
        self.bn2 = norm_layer(chs, **dd)
        for conv in (self.conv_dw, self.conv_pw):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, chs, H, W] to the same shape."""
        mask = self.bn2(self.conv_pw(self.act1(self.bn1(self.conv_dw(x)))))
        mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * mask.sigmoid()


class Exit(nn.Module):
    """An exit: bottleneck layers that bring a stage's map to the last stage's width and size, and a classifier.

    One layer stands for each stage that is skipped, with that stage's stride and width. `forward` gives the map
    [B, num_features, h, w]; the network pools it and applies `fc`, as it does with its own last map.

    Args:
        chs: channels of this stage's map and of all after it, so a layer for every entry but the first.
        strides: of the stages after this one.
        fc: the classifier, or an identity.
        narrow: see `bottleneck_layer`.
        attention: start with an `Attention` on the stage's map.
        norm_layer: makes a normalisation of a number of channels.
        act_layer: makes an activation.
        dd: device and dtype of the parameters.
    """

    def __init__(
        self,
        chs: Sequence[int],
        strides: Sequence[int],
        fc: nn.Module,
        *,
        narrow: bool,
        attention: bool,
        norm_layer: Callable[..., nn.Module],
        act_layer: Callable[..., nn.Module],
        **dd: Any,
    ) -> None:
        super().__init__()
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        if attention:
            blocks["attention"] = Attention(chs[0], norm_layer=norm_layer, act_layer=act_layer, **dd)
        for i, stride in enumerate(strides):
            blocks[str(i)] = bottleneck_layer(
                chs[i], chs[i + 1], stride, narrow=narrow, norm_layer=norm_layer, act_layer=act_layer, **dd
            )
        self.blocks = nn.Sequential(blocks)
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        """The map of the stage, [B, C_i, H, W], to [B, num_features, h, w]."""
        x = self.blocks(x)
        return x
