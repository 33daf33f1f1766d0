"""Exits for any timm network that runs in stages.

The class of a network is made of `StagedMultiExit` and timm's own class, so that everything that timm's class can do
is left as it is, and its weights keep their names.

`sssd export --format transformers` puts this file into folders that load without this package, as it does with those
that it imports.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, SelectAdaptivePool2d, trunc_normal_
from timm.models import checkpoint, is_model, model_entrypoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from sssd_zoo.errors import UserError
from sssd_zoo.models.exits import Exits, ensemble_logits
from sssd_zoo.models.multi_exit import MultiExit, classifier_names
from sssd_zoo.models.stages import (
    CLASSES,
    METHODS,
    SIDE,
    Structure,
    check_arguments,
    exit_widths,
    link_of,
    side_of,
    structure_of_stages,
)

SMALL = 4  # by how much less the stem for small images divides the side of a map
SMALL_SIDE = 32  # pixels of the images that a transformer with that stem is built for
# Networks with names of their own, whose stages the tests compare with timm. Any other is compared when it is built.
TESTED = (
    "mobilenetv4_conv_small",
    "mobilenetv3_small_100",
    "efficientnet_lite0",
    "tf_efficientnet_lite0",
    "convnextv2_atto",
    "regnety_004",
    "resnet50d",
    "edgenext_xx_small",
    "fastvit_t8",
    "vit_tiny_patch16_224",
)


class SeparableLayer(nn.Sequential):
    """A depthwise 3x3 convolution with a stride and a pointwise one, each with BatchNorm and ReLU.

    [B, in_chs, H, W] to [B, out_chs, ceil(H / stride), ceil(W / stride)]. Like `bottleneck_layer` it stands for a stage
    that an exit skips, at a cost that fits networks which are made of such layers themselves.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, **dd: Any) -> None:
        conv_dw = nn.Conv2d(in_chs, in_chs, 3, stride=stride, padding=1, groups=in_chs, bias=False, **dd)
        conv_pw = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        for conv in (conv_dw, conv_pw):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__()
        self.add_module("conv_dw", conv_dw)
        self.add_module("bn1", nn.BatchNorm2d(in_chs, **dd))
        self.add_module("act1", nn.ReLU(inplace=True))
        self.add_module("conv_pw", conv_pw)
        self.add_module("bn2", nn.BatchNorm2d(out_chs, **dd))
        self.add_module("act2", nn.ReLU(inplace=True))


class MapExit(nn.Module):
    """An exit on a map: separable layers, pooling, a linear layer to the width of the network's features, a classifier.

    The linear layer has an activation where it widens: otherwise the classifier would see no more than the pooled map.
    Elsewhere it has none, so that F_i can come near an F_C of any sign.

    Args:
        widths: channels of this stage's map and of the separable layers' maps.
        strides: of the separable layers.
        pool: global pooling of a map, to [B, C, 1, 1].
        features: length of F_i.
        fc: the classifier, or an identity.
        channels_last: whether the stage's map is [B, H, W, C].
        dd: device and dtype of the parameters.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        pool: SelectAdaptivePool2d,
        features: int,
        fc: nn.Module,
        *,
        channels_last: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        layers = [SeparableLayer(*pair, stride, **dd) for pair, stride in zip(pairwise(widths), strides, strict=True)]
        self.blocks = nn.Sequential(*layers)
        self.channels_last, self.width = channels_last, widths[-1]
        self.pool = pool
        self.neck = nn.Conv2d(self.width * pool.feat_mult(), features, 1, **dd)
        self.act = nn.Hardswish() if self.width < features else nn.Identity()
        self.flatten = nn.Flatten(1) if pool.pool_type else nn.Identity()
        self.fc = fc

    def set_pool(self, pool: SelectAdaptivePool2d, features: int) -> None:
        """Changes the pooling; where that changes how many numbers it gives, the linear layer behind it is new."""
        self.pool = pool
        self.flatten = nn.Flatten(1) if pool.pool_type else nn.Identity()
        pooled, weight = self.width * pool.feat_mult(), self.neck.weight
        if tuple(weight.shape[:2]) != (features, pooled):
            self.neck = nn.Conv2d(pooled, features, 1, device=weight.device, dtype=weight.dtype)
            self.neck.requires_grad_(weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """The stage's map to the map that is pooled, [B, C, h, w]."""
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        x = self.blocks(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """F_i, [B, D], of the map that is pooled; without pooling [B, D, h, w]."""
        x = self.flatten(self.act(self.neck(self.pool(x))))
        return x


class TokenExit(nn.Module):
    """An exit on a transformer's tokens: the pooled token, a residual MLP of two layers, a norm, a classifier.

    Args:
        chs: length of a token.
        pool: [B, N, chs] to [B, chs].
        features: length of F_i.
        fc: the classifier, or an identity.
        dd: device and dtype of the parameters.
    """

    def __init__(self, chs: int, pool: nn.Module, features: int, fc: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.pool = pool
        self.norm1 = nn.LayerNorm(chs, **dd)
        self.fc1 = nn.Linear(chs, 4 * chs, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * chs, chs, **dd)
        self.neck = nn.Identity() if chs == features else nn.Linear(chs, features, **dd)
        self.norm2 = nn.LayerNorm(features, **dd)
        self.fc = fc
        for layer in (self.fc1, self.fc2):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def set_pool(self, pool: nn.Module, features: int) -> None:
        """Changes the pooling."""
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """The tokens as they are."""
        return x

    def features(self, x: Tensor) -> Tensor:
        """F_i, [B, D], of the tokens."""
        x = self.pool(x)
        x = x + self.fc2(self.act(self.fc1(self.norm1(x))))
        x = self.norm2(self.neck(x))
        return x


class PoolTokens(nn.Module):
    """timm's pooling of tokens, [B, N, C] to [B, C]; the mean where the network itself pools by attention ('map')."""

    def __init__(self, pool_type: str, prefix: int) -> None:
        super().__init__()
        self.pool_type = pool_type if pool_type in ("", "token", "avg", "max", "avgmax") else "avg"
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """Without pooling the tokens as they are."""
        x = global_pool_nlc(x, self.pool_type, self.prefix)
        return x


class Scriptable(nn.Module):
    """A network with exits in the form that TorchScript compiles: the same modules, without names to look up."""

    def __init__(self, stages: Sequence[nn.Module], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the logits of the ensemble, or of the one head that there is."""
        logits: list[Tensor] = []
        for stage, head in zip(self.stages, self.heads):  # noqa: B905  TorchScript has no strict
            x = stage(x)
            logits.append(head(x))
        return ensemble_logits(logits) if len(logits) > 1 else logits[0]


class ScriptableExit(nn.Module):
    """An exit with its classifier; see `Scriptable`."""

    def __init__(self, exit_head: Any) -> None:
        super().__init__()
        self.exit_head = exit_head

    def forward(self, x: Tensor) -> Tensor:
        """The stage's map to logits."""
        x = self.exit_head.fc(self.exit_head.features(self.exit_head(x)))
        return x


class ScriptableHead(nn.Module):
    """The final head; see `Scriptable`."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        """The last map to logits."""
        x = self.trunk.forward_head(x)
        return x


class Embedding(nn.Module):
    """The patches and positions of a transformer; see `Scriptable`."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        """Patches to tokens."""
        x = self.trunk._pos_embed(x)
        return x


class StagedMultiExit(MultiExit):
    """A timm network with exits: the part of its class that is not timm's; see `multi_exit_class`.

    `output` decides what `forward` returns, and so what is built:

    - 'ensemble': all is built. `forward` gives the log of the mean softmax of the four exits, computed in float32, in
      the images' type. `forward_features` and `forward_head` are timm's: the last map, and the final classifier's
      logits alone.
    - 'final' (or 4): timm's network, without exits.
    - 1, 2 or 3: the stages up to that exit, and the exit. `forward_features` gives the map that the exit pools,
      `forward_head` does the rest. `num_features`, `head_hidden_size` and `feature_info` are those of the exit.

    Without classifiers (`num_classes=0`) `forward` gives F_C, [B, head_hidden_size].
    """

    if TYPE_CHECKING:
        structure: Structure
        backbone: str
        plain_class: type[nn.Module]

    def add_exits(self, structure: Structure, pool_type: str, drop_rate: float) -> None:
        """Adds the exits that `output` needs, and removes what it does not need.

        Args:
            structure: of the network.
            pool_type: global pooling of the exits.
            drop_rate: of the dropout in front of all classifiers.
        """
        self.structure, self.pool_type, self.exit_drop_rate = structure, pool_type, drop_rate
        if drop_rate:
            self._take_over_dropout()
        self.removed: tuple[str, ...] = ()
        for number in self.exit_numbers():
            self.add_module(f"exit{number}", self._new_exit(number))
        if self.output in ("1", "2", "3"):
            self._truncate(int(self.output))

    def _take_over_dropout(self) -> None:
        """Disables the dropout in timm's head, which `dropped` does: F_C is as it is before the dropout."""
        self.drop_rate = 0.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout) and self.part_of(name) == "head":
                module.p = 0.0

    def _new_exit(self, number: int) -> MapExit | TokenExit:
        structure, parameter = self.structure, next(self.parameters())
        dd = {"device": parameter.device, "dtype": parameter.dtype}
        pool, features, fc = self._new_pool(), self.head_hidden_size, self._new_classifier(self.head_hidden_size)
        chs, strides = structure.chs[number - 1 :], structure.strides[number - 1 :]
        if isinstance(pool, PoolTokens):
            return TokenExit(chs[0], pool, features, fc, **dd)
        widths, channels_last = exit_widths(chs, structure.width), structure.layout == "NHWC"
        return MapExit(widths, strides, pool, features, fc, channels_last=channels_last, **dd)

    def _new_pool(self) -> PoolTokens | SelectAdaptivePool2d:
        if self.structure.layout == "NLC":
            return PoolTokens(self.pool_type, int(getattr(self, "num_prefix_tokens", 0)))
        return SelectAdaptivePool2d(pool_type=self.pool_type, flatten=False)

    def _new_classifier(self, features: int) -> nn.Module:
        parameter = next(self.parameters())
        if not self.num_classes:
            return nn.Identity()
        classifier = nn.Linear(features, self.num_classes, device=parameter.device, dtype=parameter.dtype)
        trunc_normal_(classifier.weight, std=0.02)
        nn.init.zeros_(classifier.bias)
        return classifier

    def _truncate(self, depth: int) -> None:
        """Removes all that runs after exit `depth`."""
        needed = {name for stage in self.structure.stages[:depth] for name in stage} | {f"exit{depth}"}
        needed |= {module for (_, module), method in METHODS.items() if method in needed}
        self._remove_except(self, "", needed)
        exit_head = self._exit(depth)
        self.feature_info = self.feature_info[: self.structure.features[depth - 1] + 1]
        self.output_fmt = "NCHW" if isinstance(exit_head, MapExit) else self.structure.layout
        if isinstance(exit_head, MapExit):
            self.num_features = exit_head.width

    def _remove_except(self, parent: nn.Module, prefix: str, needed: set[str]) -> None:
        for child_name, child in list(parent.named_children()):
            name = f"{prefix}{child_name}"
            if name in needed:
                continue
            if any(other.startswith(f"{name}.") for other in needed):
                self._remove_except(child, f"{name}.", needed)
            else:
                self.removed += (f"{name}.",) if any(True for _ in child.parameters()) else ()
                if type(parent) is nn.Sequential:  # TorchScript compiles a transformer's loop over its blocks
                    del parent._modules[child_name]
                else:
                    parent._modules[child_name] = nn.Identity()

    def _exit(self, number: int) -> Any:
        return self.get_submodule(f"exit{number}")

    def part_of(self, module: str) -> str:
        """See `MultiExit`."""
        top = module.partition(".")[0]
        if top in ("exit1", "exit2", "exit3"):
            return top
        for number, names in enumerate(self.structure.stages, start=1):
            if any(module == name or module.startswith(f"{name}.") for name in names):
                return f"stage{number}"
        return "head"

    def left_out(self) -> tuple[str, ...]:
        """See `MultiExit`."""
        exits = tuple(f"exit{number}." for number in (1, 2, 3) if not hasattr(self, f"exit{number}"))
        names = tuple(f"{name}." for name in classifier_names(self))
        return (*self.removed, *exits, *(() if self.num_classes else names))

    def stage(self, number: int, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        recompute = self.training and getattr(self, "grad_checkpointing", False)
        for name in self.structure.stages[number - 1]:
            run = link_of(self, name)
            blocks = recompute and isinstance(run, nn.Module) and any(True for _ in run.children())
            x = checkpoint(run, x) if blocks else run(x)
        return x

    def exit_map(self, number: int, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        maps: Tensor = self._exit(number)(x)
        return maps

    def pooled_exit(self, number: int, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        features: Tensor = self._exit(number).features(x)
        return features

    def last_features(self, x: Tensor) -> Tensor:
        """See `MultiExit`."""
        features: Tensor = super().forward_head(x, pre_logits=True)
        return features

    def dropped(self, features: Tensor) -> Tensor:
        """See `MultiExit`."""
        if self.exit_drop_rate:
            features = F.dropout(features, p=self.exit_drop_rate, training=self.training)
        return features

    def get_classifier(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The classifier behind `forward_head`: timm's, or a truncated network's `exit{i}.fc`."""
        truncated = self.output in ("1", "2", "3")
        classifier: nn.Module = (
            self._exit(int(self.output)).fc if truncated else super().get_classifier(*args, **kwargs)
        )
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """Replaces the classifiers of all exits by new ones.

        Args:
            num_classes: of the new classifiers; 0 for none.
            global_pool: the new pooling, '' for none; by default it stays.
            kwargs: of timm's method.
        """
        self.thresholds = None  # they were those of the old classifiers
        if self.output in ("1", "2", "3"):
            self.num_classes = num_classes
        else:
            super().reset_classifier(num_classes, global_pool, **kwargs)
        self.pool_type = self.pool_type if global_pool is None else global_pool
        for number in self.exit_numbers():
            exit_head = self._exit(number)
            exit_head.set_pool(self._new_pool(), self.head_hidden_size)
            exit_head.fc = self._new_classifier(self.head_hidden_size)
            exit_head.train(self.training)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The last map, as timm gives it; of a truncated network the map that its exit pools."""
        x = super().forward_features(x, *args, **kwargs)
        return self.exit_map(int(self.output), x) if self.output in ("1", "2", "3") else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the last map and classifies it, by timm's head or a truncated network's exit.

        Args:
            x: what `forward_features` gave.
            pre_logits: stop before the classifier.

        Returns:
            [B, num_classes], or [B, head_hidden_size] before the classifier.
        """
        if self.output in ("1", "2", "3"):
            x = self.pooled_exit(int(self.output), x)
            x = x if pre_logits else self.get_classifier()(self.dropped(x))
        elif self.exit_drop_rate and not pre_logits:
            x = self.get_classifier()(self.dropped(self.last_features(x)))
        else:
            x = super().forward_head(x, pre_logits=pre_logits)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """What `output` asks for (see the class): images [B, in_chans, H, W] to [B, num_classes]."""
        if self.ensemble and self.num_classes > 0:
            return ensemble_logits(self.forward_exits(x).logits).to(x.dtype)
        return self.forward_head(self.forward_features(x))

    def exits_and_map(self, x: Tensor) -> tuple[Exits, Tensor]:
        """See `MultiExit`."""
        self.check_all_exits()
        features = []
        # Each exit right after its stage, so that without gradients no map outlives its use.
        for number in (1, 2, 3):
            x = self.stage(number, x)
            features.append(self.pooled_exit(number, self.exit_map(number, x)))
        x = self.stage(4, x)
        features.append(self.last_features(x))
        logits = [self.exit_classifier(number)(self.dropped(features[number - 1])) for number in (1, 2, 3, 4)]
        return Exits(logits, features), x

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, **kwargs: Any) -> Any:
        """As in timm; the final map is what `forward_features` gives.

        Args:
            x: images, [B, in_chans, H, W].
            indices: which maps: the last n for a number, all for None. A truncated network has those up to its exit.
            kwargs: see timm.
        """
        if self.output not in ("1", "2", "3"):
            return super().forward_intermediates(x, indices, **kwargs)
        taken, last = feature_take_indices(len(self.feature_info), indices)
        result = super().forward_intermediates(x, taken, **kwargs)
        if kwargs.get("intermediates_only") or (kwargs.get("stop_early") and last + 1 < len(self.feature_info)):
            return result
        final, maps = result
        return self.exit_map(int(self.output), final), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in timm: removes what comes after the last map asked for; then, or with `prune_head`, also the exits.

        Args:
            indices: which maps, see `forward_intermediates`.
            prune_norm: see timm.
            prune_head: remove the exits and classifiers even if all stages stay.

        Returns:
            The indices as numbers from 0.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if not prune_head and last + 1 == len(self.feature_info):
            return taken
        for number in self.exit_numbers():
            delattr(self, f"exit{number}")
        truncated, self.output, self.ensemble = self.output in ("1", "2", "3"), "final", False
        if not truncated:
            super().prune_intermediate_layers(taken, prune_norm, prune_head)
        return taken

    def plain(self) -> nn.Module:
        """A network of timm's class that shares the trunk's weights."""
        trunk = self.plain_class.__new__(self.plain_class)
        trunk.__dict__ = dict(self.__dict__)
        trunk._modules = {name: child for name, child in self._modules.items() if not name.startswith("exit")}
        return trunk

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles in the network's place."""
        trunk = self.plain()
        if self.output == "final" or (self.ensemble and not self.num_classes):
            return trunk
        numbers = (1, 2, 3, 4) if self.ensemble else (int(self.output),)
        stages = [
            nn.Sequential(*(Embedding(trunk) if name == "_pos_embed" else self.get_submodule(name) for name in names))
            for names in self.structure.stages[: numbers[-1]]
        ]
        if not self.ensemble:
            stages = [nn.Sequential(*stages)]
        heads = [ScriptableHead(trunk) if number == 4 else ScriptableExit(self._exit(number)) for number in numbers]
        return Scriptable(stages, heads)

    def __reduce__(self) -> Any:
        """The class is made when it is needed, so it is pickled as timm's."""
        return _empty, (self.plain_class,), self.__dict__


@cache
def multi_exit_class(plain: Any) -> type[StagedMultiExit]:
    """The class of timm's networks of class `plain` with exits."""
    name = f"MultiExit{plain.__name__}"
    return type(name, (StagedMultiExit, plain), {"__doc__": StagedMultiExit.__doc__, "plain_class": plain})


def _empty(plain: Any) -> StagedMultiExit:
    cls = multi_exit_class(plain)
    return cls.__new__(cls)


def multi_exit(
    backbone: str,
    *,
    output: str | int = "ensemble",
    exits: str = "plain",
    cifar_stem: bool = False,
    thresholds: Sequence[float] | None = None,
    storage_size: int | None = None,
    bits: int | None = None,
    **kwargs: Any,
) -> StagedMultiExit:
    """A timm network with exits and new weights.

    Args:
        backbone: its timm name.
        output: see `StagedMultiExit`.
        exits: 'plain'; the exits with attention are those of `SSSDResNet`.
        cifar_stem: the first convolutions and poolings keep a map as large as they get it, until maps are four times
            larger than timm's, for images of about 32 px. Weights keep their shapes. A transformer's patches get
            smaller instead.
        thresholds: see `MultiExit`.
        storage_size: see `MultiExit`.
        bits: see `MultiExit`.
        kwargs: of timm's network (num_classes, in_chans, global_pool, drop_rate, img_size, device, dtype, ...).

    Raises:
        UserError: if timm has no such network, it cannot have exits, or an argument has a wrong value.
    """
    if exits != "plain":
        raise UserError(f"'{backbone}' has no exits={exits!r}: choose 'plain', or one of this package's ResNets")
    structure, arguments = structure_of_backbone(backbone, cifar_stem)
    network: Any = model_entrypoint(backbone)(pretrained=False, **{**arguments, **kwargs})
    with refusals(backbone, cifar_stem=cifar_stem):
        check_arguments(network, structure)
    if backbone not in TESTED and torch.get_default_device().type != "meta":
        compare_stages(backbone, cifar_stem)  # after that, a folder of small weights cannot ask for a large network
    if cifar_stem:
        widen_stem(network, structure)
    start_residuals_at_zero(network)
    pools = [module.pool_type for module in network.modules() if isinstance(module, SelectAdaptivePool2d)]
    default_pool = pools[-1] if pools else getattr(network, "global_pool", "avg")
    network.plain_class = type(network)
    network.__class__ = multi_exit_class(network.plain_class)
    network.backbone, network.cifar_stem = backbone, cifar_stem
    network.set_output(output, thresholds, storage_size, bits)
    network.add_exits(structure, kwargs.get("global_pool", default_pool), float(kwargs.get("drop_rate") or 0))
    return network  # type: ignore[no-any-return]


@contextmanager
def refusals(backbone: str, *, cifar_stem: bool) -> Iterator[None]:
    """Makes errors say that a network cannot have exits, or the stem for small images."""
    what = "a stem for small images" if cifar_stem else "exits"
    try:
        yield
    except UserError as error:
        raise UserError(f"'{backbone}' cannot have {what}: {error}") from error
    except Exception as error:  # every architecture fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"'{backbone}' cannot have {what}: it does not run stage by stage ({reason})") from error


@cache
def structure_of_backbone(backbone: str, cifar_stem: bool) -> tuple[Structure, dict[str, Any]]:
    """The stages of a timm network, and the arguments that it is built with, found without memory for its weights.

    Args:
        backbone: its timm name.
        cifar_stem: see `multi_exit`.

    Raises:
        UserError: that says why it cannot have exits, or such a stem.
    """
    if not is_model(backbone) or backbone.startswith("sssd_"):
        raise UserError(f"timm has no network '{backbone}' of its own")
    create, arguments = model_entrypoint(backbone), dict[str, Any]()
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        with refusals(backbone, cifar_stem=False):
            network: Any = create(pretrained=False, num_classes=CLASSES).eval()
            structure = structure_of_stages(network)
            check_stages(network, structure)
        if cifar_stem:
            with refusals(backbone, cifar_stem=True):
                if structure.layout == "NLC":
                    patch = max(1, network.feature_info[-1]["reduction"] // SMALL)
                    arguments = {"patch_size": patch, "img_size": SMALL_SIDE}
                    network = create(pretrained=False, num_classes=CLASSES, **arguments).eval()
                widen_stem(network, structure)
                check_stages(network, structure)
    return structure, arguments


@cache
def compare_stages(backbone: str, cifar_stem: bool) -> None:
    """Compares the numbers that a network's stages give with those of its forward pass, once in a process.

    Raises:
        UserError: if they differ.
    """
    structure, arguments = structure_of_backbone(backbone, cifar_stem)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), refusals(backbone, cifar_stem=cifar_stem):
        network = model_entrypoint(backbone)(pretrained=False, num_classes=CLASSES, **arguments).eval()
        if cifar_stem:
            widen_stem(network, structure)
        check_stages(network, structure)


def start_residuals_at_zero(network: nn.Module) -> None:
    """Sets the last BatchNorm's weight of each residual branch to 0 in networks of timm's EfficientNet blocks.

    So each block starts as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1). timm does the same for its
    ResNets and RegNets, but not for these blocks, and MoCo on `efficientnet_lite0` collapsed without it.
    """
    for block in network.modules():
        if getattr(block, "has_skip", False):
            norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
            # With an activation behind it, such as ReLU, a weight of 0 would get no gradient.
            if norms and isinstance(getattr(norms[-1], "act", nn.Identity()), nn.Identity):
                nn.init.zeros_(norms[-1].weight)


def widen_stem(network: Any, structure: Structure) -> None:
    """Lets the first modules that make a map smaller leave it as it is, until maps are `SMALL` times larger.

    Strides become 1, of convolutions in all branches of such a module; poolings go. A transformer is built with smaller
    patches instead and stays as it is.

    Raises:
        UserError: if the network's modules do not divide by `SMALL`.
    """
    if structure.layout == "NLC":
        return
    left = SMALL
    for name, factor in structure.shrinking:
        if left == 1 or left % factor:
            break
        left //= factor
        unit = network.get_submodule(name)
        if isinstance(unit, nn.MaxPool2d | nn.AvgPool2d):
            parent, _, child = name.rpartition(".")
            network.get_submodule(parent)._modules[child] = nn.Identity()
            continue
        for module in unit.modules():
            if getattr(module, "stride", None) in (factor, (factor, factor)):
                module.stride = 1 if module.stride == factor else (1, 1)
                if type(module) is nn.Conv2d and module.kernel_size[0] % 2 == 0:
                    module.__class__ = Conv2dSame  # it pads: an even kernel would take a row and a column away
    if left > 1:
        raise UserError(f"its first layers do not make maps {SMALL} times smaller in steps that can be left out")
    for entry in network.feature_info:
        entry["reduction"] = max(1, entry["reduction"] // SMALL)


@torch.no_grad()
def check_stages(network: Any, structure: Structure) -> None:
    """Compares a plain network's stages, run one by one, with its own forward pass: shapes, and numbers if it has any.

    Raises:
        UserError: if they differ.
    """
    fixed = network.patch_embed.img_size[0] if structure.layout == "NLC" else None
    side = fixed or SIDE * network.feature_info[-1]["reduction"]
    images = torch.randn(2, structure.in_chans, side, side)
    x = images
    for name in (name for stage in structure.stages for name in stage):
        x = link_of(network, name)(x)
    last = network.forward_features(images)
    by_head = network.get_classifier()(network.forward_head(x, pre_logits=True))
    same = x.shape == last.shape and by_head.shape == network.forward_head(last).shape
    if same and not x.is_meta:
        same = bool((x == last).all() and (by_head == network.forward_head(last)).all())
    if not same or (structure.layout != "NLC" and side_of(tuple(x.shape)) not in (0, SIDE)):
        raise UserError("its stages, run one after the other, do not give what its forward pass gives")
