"""Multi-exit ResNets: timm's ResNet with an exit after each stage.

Source: Chen and Chu, "SSSD: Self-Supervised Self Distillation", after BYOT (Zhang et al. 2019): a classifier per stage,
of which the deepest teaches the others.

`sssd export --format transformers` puts this file and those that it imports into folders that load without this
package: of it they import each other and `UserError`, nothing else.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.resnet import ResNet
from torch import Tensor, nn

from sssd_zoo.errors import UserError
from sssd_zoo.models.exits import Exit, Exits, ensemble_logits
from sssd_zoo.models.multi_exit import MultiExit

CLASSIFIERS = ("fc.", "exit1.fc.", "exit2.fc.", "exit3.fc.")


class SSSDResNet(MultiExit, ResNet):
    """A timm ResNet with four exits: one after each of the stages 1 to 3, and the final classifier.

    The trunk's state-dict keys are timm's own, so a plain timm resnet's weights load into it and back; `exit1` to
    `exit3` come after it. `output` decides what `forward` returns, and so what is built:

    - 'ensemble': all is built. `forward` gives the log of the mean softmax of the four exits, computed in float32, in
      the images' type. `forward_features` is the last stage's map, `forward_head` the final classifier's logits alone.
    - 'final' (or 4): the plain ResNet, without exits.
    - 1, 2 or 3: the stages up to that exit, and the exit. `forward_features` includes the exit's bottleneck layers, so
      that it gives [B, num_features, h, w] at every `output`; `forward_head` pools that and applies the exit's
      classifier. `feature_info` ends at the exit's stage.

    Without classifiers (`num_classes=0`) the `forward` of an 'ensemble' network gives F_C, the trunk's pooled vector
    [B, num_features], or its map where `global_pool=''`; `forward_exits` gives every exit's.

    Args:
        block: timm's BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: of every classifier; 0 for none.
        output: 'ensemble', 'final', or the number of an exit, 1 to 4 (as a number or as text).
        exits: 'plain', or 'attention' for exits that first weigh their map by an `Attention`.
        cifar_stem: a 3x3 stride-1 first convolution and no max-pool, for images of about 32 px.
        thresholds: of the exits 1 to 3, which `forward_early` takes by default: `sssd early-exit` calibrates them and
            stores them in config.json, so that timm gives them here. New classifiers drop them.
        storage_size: side in pixels of the square that images were stored as before they were resized to the input, in
            training and where accuracy was measured; config.json keeps it for `sssd predict`. No part of the network.
        bits: 8 or 16 where the images were read as they are stored (`--channels`), with so many bits per channel mapped
            to 0..1; None where they were read as RGB of 8 bits. config.json keeps it as well. No part of the network.
        kwargs: the other arguments of timm's ResNet (in_chans, global_pool, act_layer, norm_layer, device, dtype, ...).

    Raises:
        UserError: for an `output` or `exits` that do not exist, a stem that contradicts `cifar_stem`, or wrong
            `thresholds`.
    """

    __constants__ = ("ensemble",)  # so that TorchScript compiles only the branches whose exits there are
    if TYPE_CHECKING:  # set by name, by timm or because not every network has them
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential
        exit1: Exit
        exit2: Exit
        exit3: Exit
        feature_info: list[dict[str, Any]]
        pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        block: Any,
        layers: tuple[int, ...],
        num_classes: int = 1000,
        *,
        output: str | int = "ensemble",
        exits: str = "plain",
        cifar_stem: bool = False,
        thresholds: Sequence[float] | None = None,
        storage_size: int | None = None,
        bits: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(block, layers, num_classes, **kwargs)
        if exits not in ("plain", "attention"):
            raise UserError(f"there are no exits={exits!r}: choose 'plain' or 'attention'")
        self.set_output(output, thresholds, storage_size, bits)
        self.cifar_stem = cifar_stem
        if cifar_stem:
            self._replace_stem()
        self._add_exits(
            narrow=block.expansion > 1,
            attention=exits == "attention",
            norm_layer=get_norm_layer(kwargs.get("norm_layer", nn.BatchNorm2d)),
            act_layer=get_act_layer(kwargs.get("act_layer", nn.ReLU)),
        )
        if self.output in ("1", "2", "3"):
            self._truncate(int(self.output))

    def _replace_stem(self) -> None:
        """A 3x3 stride-1 convolution without max-pool, for small images."""
        if not isinstance(self.conv1, nn.Conv2d) or not isinstance(self.maxpool, nn.MaxPool2d):
            raise UserError("cifar_stem=True is a stem of its own: drop stem_type, replace_stem_pool and aa_layer")
        weight, channels = self.conv1.weight, self.conv1.out_channels
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        conv1 = nn.Conv2d(self.conv1.in_channels, channels, 3, stride=1, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", conv1)
        self.add_module("maxpool", nn.Identity())
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)

    def _add_exits(self, **kwargs: Any) -> None:
        """Adds the exits that `output` needs; `kwargs` are what all of them take of the arguments of `Exit`."""
        parameter, stages = next(self.parameters()), self.feature_info[1:]
        chs = [stage["num_chs"] for stage in stages]
        strides = [after["reduction"] // before["reduction"] for before, after in pairwise(stages)]
        for number in self.exit_numbers():
            exit_head = Exit(
                chs[number - 1 :],
                strides[number - 1 :],
                self._new_classifier(),
                device=parameter.device,
                dtype=parameter.dtype,
                **kwargs,
            )
            self.add_module(f"exit{number}", exit_head)

    def _truncate(self, depth: int) -> None:
        """Removes the stages after exit `depth` and the final classifier."""
        for number in range(depth + 1, 5):
            setattr(self, f"layer{number}", nn.Sequential())
        self.fc = nn.Identity()
        self.feature_info = self.feature_info[: depth + 1]

    def _exits(self) -> list[Exit]:
        return [module for module in self.children() if isinstance(module, Exit)]

    def _new_classifier(self) -> nn.Module:
        parameter = next(self.parameters())
        pool, device, dtype = self.global_pool.pool_type, parameter.device, parameter.dtype
        _, fc = create_classifier(self.num_features, self.num_classes, pool, device=device, dtype=dtype)
        return fc  # type: ignore[no-any-return]

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier behind `forward_head`: `fc`, or a truncated network's `exit{i}.fc`.

        Args:
            name_only: give its name instead.
        """
        name = f"exit{self.output}.fc" if self.output in ("1", "2", "3") else "fc"
        return name if name_only else self.get_submodule(name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers of all exits by new ones.

        Args:
            num_classes: of the new classifiers; 0 for none.
            global_pool: the new pooling, '' for none; by default it stays.
        """
        super().reset_classifier(num_classes, global_pool)
        self.thresholds = None  # they were those of the old classifiers
        if self.output in ("1", "2", "3"):
            self.fc = nn.Identity()
        for exit_head in self._exits():
            exit_head.fc = self._new_classifier().train(self.training)

    def part_of(self, module: str) -> str:
        """See `MultiExit`."""
        top = module.partition(".")[0]
        if top.startswith("layer"):
            return f"stage{top[5:]}"
        return top if top.startswith("exit") else "head" if top == "fc" else "stage1"

    def left_out(self) -> tuple[str, ...]:
        """See `MultiExit`."""
        optional = [f"layer{i}." for i in (2, 3, 4)] + [f"exit{i}." for i in (1, 2, 3)] + list(CLASSIFIERS)
        ours = self.state_dict().keys()
        return tuple(prefix for prefix in optional if not any(key.startswith(prefix) for key in ours))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As in timm: the maps of the stem and the stages, and the result of `forward_features`.

        Args:
            x: images, [B, in_chans, H, W].
            indices: which maps: the last n for a number, all for None. A truncated network has those up to its exit.
            norm: no effect, as in timm's ResNet.
            stop_early: stop after the last map asked for.
            output_fmt: 'NCHW'.
            intermediates_only: leave the final map out.

        Returns:
            The maps as a list, or the final map and that list. With `stop_early` that map is the last computed.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        result = super().forward_intermediates(x, taken, norm, stop_early, output_fmt, intermediates_only)
        if self.ensemble or intermediates_only or (stop_early and last + 1 < len(self.feature_info)):
            return result
        final, maps = result
        for exit_head in self._exits():
            final = exit_head(final)
        return final, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in timm: removes what comes after the last map asked for; then, or with `prune_head`, also the exits.

        Args:
            indices: which maps, see `forward_intermediates`.
            prune_norm: no effect, as in timm's ResNet.
            prune_head: remove the exits and classifiers even if all stages stay.

        Returns:
            The indices as numbers from 0.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if prune_head or last + 1 < len(self.feature_info):
            for number in (1, 2, 3):
                if hasattr(self, f"exit{number}"):
                    delattr(self, f"exit{number}")
            self.output, self.ensemble = "final", False
            super().prune_intermediate_layers(taken, prune_norm, prune_head)
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map: [B, in_chans, H, W] to [B, num_features, h, w], after a truncated network's exit."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        else:
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if not self.ensemble:
            if hasattr(self, "exit1"):
                x = self.exit1(x)
            if hasattr(self, "exit2"):
                x = self.exit2(x)
            if hasattr(self, "exit3"):
                x = self.exit3(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the last map and classifies it, by the final classifier or by a truncated network's exit.

        Args:
            x: [B, num_features, h, w] from `forward_features`.
            pre_logits: stop before the classifier.

        Returns:
            [B, num_classes], or [B, num_features] before the classifier.
        """
        x = self.dropped(self.global_pool(x))
        if pre_logits:
            return x
        if not self.ensemble:
            if hasattr(self, "exit1"):
                x = self.exit1.fc(x)
            if hasattr(self, "exit2"):
                x = self.exit2.fc(x)
            if hasattr(self, "exit3"):
                x = self.exit3.fc(x)
        x = self.fc(x)  # an identity in a truncated network
        return x

    def dropped(self, features: Tensor) -> Tensor:
        """See `MultiExit`."""
        if self.drop_rate:
            features = F.dropout(features, p=float(self.drop_rate), training=self.training)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """What `output` asks for (see the class): images [B, in_chans, H, W] to [B, num_classes]."""
        if self.ensemble and self.num_classes > 0:
            return ensemble_logits(self.forward_exits(x).logits).to(x.dtype)
        return self.forward_head(self.forward_features(x))

    def exits_and_map(self, x: Tensor) -> tuple[Exits, Tensor]:
        """See `MultiExit`."""
        self.check_all_exits()
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        # Each exit right after its stage, so that without gradients no map outlives its use.
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.layer1, x)
            f1 = self.global_pool(checkpoint_seq(self.exit1.blocks, x))
            x = checkpoint_seq(self.layer2, x)
            f2 = self.global_pool(checkpoint_seq(self.exit2.blocks, x))
            x = checkpoint_seq(self.layer3, x)
            f3 = self.global_pool(checkpoint_seq(self.exit3.blocks, x))
            x = checkpoint_seq(self.layer4, x)
        else:
            x = self.layer1(x)
            f1 = self.global_pool(self.exit1(x))
            x = self.layer2(x)
            f2 = self.global_pool(self.exit2(x))
            x = self.layer3(x)
            f3 = self.global_pool(self.exit3(x))
            x = self.layer4(x)
        f4 = self.global_pool(x)
        logits = [
            self.exit1.fc(self.dropped(f1)),
            self.exit2.fc(self.dropped(f2)),
            self.exit3.fc(self.dropped(f3)),
            self.fc(self.dropped(f4)),
        ]
        return Exits(logits, [f1, f2, f3, f4]), x

    def stage(self, number: int, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        if number == 1:
            x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        maps: Tensor = (self.layer1, self.layer2, self.layer3, self.layer4)[number - 1](x)
        return maps

    def exit_map(self, number: int, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        maps: Tensor = (self.exit1, self.exit2, self.exit3)[number - 1](x)
        return maps

    def pooled_exit(self, number: int, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        return self.last_features(x)

    def last_features(self, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        features: Tensor = self.global_pool(x)
        return features
