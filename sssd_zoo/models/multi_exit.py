"""What all multi-exit networks have in common, whatever their trunk.

`sssd export --format transformers` puts this file into folders that load without this package, as it does with those
that it imports.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sssd_zoo.errors import UserError
from sssd_zoo.models.exits import EarlyExits, Exits, confidence, ensemble_logits, exits_asked

if TYPE_CHECKING:
    Module = nn.Module
else:  # a mixin: the timm class beside it is the module
    Module = object


class MultiExit(Module):
    """A mixin for a timm network with four exits: heads after three of its stages, and its own head.

    A subclass says how its stages and exits run: `stage`, `exit_map`, `pooled_exit`, `exit_classifier` and
    `last_features`. The exits lie in its modules `exit1` to `exit3`.

    Attributes:
        output: 'ensemble', 'final', or the exit '1', '2' or '3' that the network ends at.
        ensemble: whether it has all exits.
        thresholds: of the exits 1 to 3, or None; `forward_early` takes them by default.
        storage_size: side in pixels of the square that images were stored as before they were resized, or None.
        bits: 8 or 16 where images were read as they are stored, or None.
        cifar_stem: whether its first layers are made for small images.
    """

    if TYPE_CHECKING:  # at run time TorchScript would compile them
        output: str
        ensemble: bool
        thresholds: list[float] | None
        storage_size: int | None
        bits: int | None
        cifar_stem: bool
        num_classes: int
        num_features: int
        head_hidden_size: int
        pretrained_cfg: dict[str, Any]
        feature_info: list[dict[str, Any]]

        # Methods of timm's class.
        get_classifier: Any
        forward_features: Any
        forward_head: Any
        reset_classifier: Any
        forward_intermediates: Any
        prune_intermediate_layers: Any

    def check_all_exits(self) -> None:
        """Refuses `forward_exits` of a network that has not all exits."""
        if not self.ensemble:
            raise UserError("forward_exits needs all exits: create the model with output='ensemble'")

    def set_output(
        self, output: str | int, thresholds: Sequence[float] | None, storage_size: int | None, bits: int | None
    ) -> None:
        """Checks and keeps what `create_model` was given; see the class.

        Raises:
            UserError: for an `output` that does not exist, wrong `thresholds`, or other `bits`.
        """
        self.output = "final" if str(output) == "4" else str(output)
        if self.output not in ("ensemble", "final", "1", "2", "3"):
            raise UserError(f"there is no output={output!r}: choose 'ensemble', 'final' or an exit from 1 to 4")
        self.ensemble = self.output == "ensemble"
        self.thresholds = check_thresholds(thresholds) if self.ensemble and thresholds is not None else None
        self.storage_size = storage_size
        if bits not in (None, 8, 16):
            raise UserError(f"there are no images of bits={bits!r} per channel: choose 8 or 16, or None")
        self.bits = bits

    def exit_numbers(self) -> tuple[int, ...]:
        """The exits before the last that `output` needs."""
        return {"ensemble": (1, 2, 3), "final": (), "1": (1,), "2": (2,), "3": (3,)}[self.output]

    def stage(self, number: int, x: Tensor) -> Tensor:
        """The map of stage 1 to 4 from that of the stage before; stage 1 takes images, stage 4 gives the last map."""
        raise NotImplementedError

    def exit_map(self, number: int, x: Tensor) -> Tensor:
        """The map that exit 1 to 3 pools, from its stage's."""
        raise NotImplementedError

    def pooled_exit(self, number: int, x: Tensor) -> Tensor:
        """The features F_i of exit 1 to 3, [B, D], from the map that it pools."""
        raise NotImplementedError

    def exit_classifier(self, number: int) -> nn.Module:
        """The classifier of exit 1 to 4: [B, D] to [B, num_classes]."""
        classifier: nn.Module = self.get_classifier() if number == 4 else self.get_submodule(f"exit{number}.fc")
        return classifier

    def last_features(self, x: Tensor) -> Tensor:
        """F_C, [B, D]: what the final classifier takes, from the last map."""
        raise NotImplementedError

    def dropped(self, features: Tensor) -> Tensor:
        """Features as an exit's classifier takes them, after the dropout in front of it."""
        raise NotImplementedError

    def part_of(self, module: str) -> str:
        """The part of the network that a module belongs to: 'stage1' to 'stage4', 'exit1' to 'exit3', or 'head'."""
        raise NotImplementedError

    def left_out(self) -> tuple[str, ...]:
        """Prefixes of the weights that the whole network has and this one lacks, because of `output` or no classes."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but the weights of stages and exits that `output` leaves out are ignored.

        So a full network's checkpoint fits `output=2` as well, by `create_model(..., checkpoint_path=FILE)` too.

        Args:
            state_dict: weights by name.
            strict: refuse all other weights that the network does not have, and missing ones.
            assign: see torch.
        """
        return super().load_state_dict(without_left_out(state_dict, self), strict, assign)

    def forward_exits(self, x: Tensor) -> Exits:
        """The logits and pooled features of all four exits, from one pass.

        Args:
            x: images, [B, in_chans, H, W].

        Raises:
            UserError: if the network was not built with `output='ensemble'`.
        """
        return self.exits_and_map(x)[0]

    def exits_and_map(self, x: Tensor) -> tuple[Exits, Tensor]:
        """`forward_exits`, and the output of the last stage in the network's own layout."""
        raise NotImplementedError

    def forward_early(self, x: Tensor, thresholds: Sequence[float] | None = None) -> EarlyExits:
        """Runs stage by stage; an image leaves the batch as soon as an exit is confident enough.

        An image leaves at the first exit whose largest softmax probability exceeds that exit's threshold, so with 0 all
        images leave and with 1 none does; the head of an exit with threshold 1 is not run. Images that reach the last
        exit get the ensemble of all the heads that ran, whose logits exist anyway, much as in the code of Zhang et al.,
        "SCAN" (NeurIPS 2019); with three thresholds of 1 these are the final classifier's logits.

        Args:
            x: images, [B, in_chans, H, W].
            thresholds: of the exits 1 to 3, in 0..1; by default those stored with the network.

        Raises:
            UserError: if the network was not built with `output='ensemble'`, has no classifiers or is in training mode
                (BatchNorm would see the hard images only), for thresholds that are not three numbers in 0..1, or if
                none are given and the network has none.
        """
        if not self.ensemble or self.training:
            raise UserError("forward_early needs a network created with output='ensemble', in eval mode")
        if not self.num_classes:
            raise UserError("forward_early needs classifiers, and the network was created with num_classes=0")
        if thresholds is None and self.thresholds is None:
            raise UserError(
                "the network has no thresholds of its own: give three, or calibrate it by `sssd early-exit`"
            )
        thresholds = self.thresholds if thresholds is None else check_thresholds(thresholds)
        assert thresholds is not None
        taken = torch.full((len(x),), 4, device=x.device)
        asked = exits_asked(thresholds)
        remaining = torch.arange(len(x), device=x.device)  # which images are still in the batch
        head_logits: list[Tensor] = []  # of those, from the heads that ran
        left: list[tuple[Tensor, Tensor]] = []  # indices of images, and their logits
        for number, threshold in enumerate(thresholds, start=1):
            x = self.stage(number, x)
            if number not in asked:
                continue
            logits = self.exit_classifier(number)(self.pooled_exit(number, self.exit_map(number, x))).float()
            head_logits.append(logits)
            leaves = confidence(logits) > threshold
            count = int(leaves.sum())  # the only wait for the device in a stage
            if not count:
                continue  # no copy of the map where it does not get smaller
            if count == len(remaining):
                left.append((remaining, logits))
                taken[remaining] = number
                break
            gone, stay = leaves.sort(descending=True, stable=True).indices.tensor_split([count])
            left.append((remaining[gone], logits[gone]))
            taken[remaining[gone]] = number
            remaining, x = remaining[stay], x.index_select(0, stay)
            head_logits = [each.index_select(0, stay) for each in head_logits]
        else:
            head_logits.append(self.exit_classifier(4)(self.last_features(self.stage(4, x))))
            left.append((remaining, ensemble_logits(head_logits)))
        if len(left) == 1:  # all left together: always so for a single image
            return EarlyExits(left[0][1], taken)
        order = torch.cat([images for images, _ in left]).argsort()
        return EarlyExits(torch.cat([logits for _, logits in left])[order], taken)


class Stage(nn.Module):
    """A stage of a network with all exits as a module of its own.

    Args:
        network: it.
        number: 1 to 4; the stem belongs to the first.
    """

    def __init__(self, network: MultiExit, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, x: Tensor) -> Tensor:
        """Images, or the map of the stage before, to this stage's map."""
        return self.network.stage(self.number, x)


class Head(nn.Module):
    """What turns a stage's map into logits, as a module of its own; see `Stage`."""

    def __init__(self, network: MultiExit, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, x: Tensor) -> Tensor:
        """The stage's map to [B, num_classes]."""
        if self.number == 4:
            features = self.network.last_features(x)
        else:
            features = self.network.pooled_exit(self.number, self.network.exit_map(self.number, x))
        logits: Tensor = self.network.exit_classifier(self.number)(features)
        return logits


def stages_and_heads(model: MultiExit) -> list[tuple[nn.Module, nn.Module]]:
    """The four stages of a network with all exits, each with what turns its map into logits."""
    return [(Stage(model, number), Head(model, number)) for number in (1, 2, 3, 4)]


def classifiers(model: Any) -> list[Any]:
    """The classifiers of a network with all exits, in order; the one classifier of any other timm network."""
    if getattr(model, "output", None) == "ensemble":
        return [model.exit_classifier(number) for number in (1, 2, 3, 4)]
    return [model.get_classifier()]


def classifier_names(model: Any) -> tuple[str, ...]:
    """The names of the classifiers of any timm network."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names or ())


def feature_width(model: Any) -> int:
    """Length of the features of any timm network, which it gives where it has no classifier."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def check_thresholds(thresholds: Sequence[float]) -> list[float]:
    """Three thresholds as numbers.

    Raises:
        UserError: for another number of them, one outside of 0..1, and what is no list of numbers.
    """
    try:
        values = [float(threshold) for threshold in thresholds]
    except (TypeError, ValueError):
        raise UserError(
            f"early exit needs a list of three thresholds in 0..1, for the exits 1 to 3; got {thresholds!r}"
        ) from None
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise UserError(f"early exit needs three thresholds in 0..1, for the exits 1 to 3; got {values}")
    return values


def without_left_out(state_dict: Mapping[str, Tensor], model: MultiExit) -> dict[str, Tensor]:
    """Weights without those of the stages, exits and classifiers that `model` was built without."""
    left_out = model.left_out()
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(left_out)}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MultiExit) -> dict[str, Tensor]:
    """Keeps of a full network's weights those that `model` has.

    timm does not load strictly when the number of classes differs: a checkpoint with other names would silently load
    nothing. So every name is checked here.

    Raises:
        UserError: for weights that belong neither to the model nor to an exit or stage that its `output` leaves out,
            and for missing weights of the model.
    """
    ours = model.state_dict().keys()
    kept = without_left_out(state_dict, model)
    new_classifiers = model.pretrained_cfg.get("num_classes") != model.num_classes  # timm leaves them at random
    if new_classifiers:
        model.thresholds = None  # they were those of the old classifiers
    names = tuple(f"{name}." for name in classifier_names(model))
    missing = [key for key in ours if key not in kept and not (new_classifiers and key.startswith(names))]
    unexpected = [key for key in kept if key not in ours]
    if missing or unexpected:
        raise UserError(
            f"the weights do not fit output={model.output!r} of this model: {len(missing)} of {len(ours)} are missing "
            f"({', '.join(missing[:3])}...), {len(unexpected)} are unknown ({', '.join(unexpected[:3])}...)"
        )
    return kept
