"""How a timm network divides into four stages, found by watching it run.

A network can have exits where its forward pass is a chain of modules: each takes what the module before it gave, and
nothing happens between them. Then an image can stop after any of them. timm's `feature_info` names the ends of the
stages, with their channels and strides.

`sssd export --format transformers` puts this file into folders that load without this package, as it does with those
that it imports.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sssd_zoo.errors import UserError

EXITS = 3  # before a network's own head
SIDE = 7  # pixels of the last map while a network is watched: an image of 224 px at a stride of 32
BUDGET = 0.08  # of the trunk's MACs: what the exits may cost
CLASSES = 1000  # with which they may cost so much
WIDTHS = (1.0, 0.5, 0.25, 0.125)  # of an exit's layers, relative to the stages that they stand for
# Methods that run between two modules of networks that are chains but for that; each runs the module after it, too.
METHODS = {("patch_embed", "pos_drop"): "_pos_embed"}


class Structure(NamedTuple):
    """The stages of a network.

    Attributes:
        stages: for each of the four, the names of the modules that run, in order. The stem belongs to the first; the
            last goes up to the result of `forward_features`. Among the modules can be a method; see `METHODS`.
        features: the entries of `feature_info` that the exits 1 to 3 follow.
        chs: channels of the maps of the exits 1 to 3, and of the last entry of `feature_info`.
        strides: of the stages 2 to 4, relative to the stage before each.
        layout: of the maps that exits take: 'NCHW', 'NHWC', or 'NLC' for tokens.
        width: of an exit's layers, one of `WIDTHS`.
        shrinking: the modules that make the map smaller, in order, and by how much each divides its side.
        in_chans: of the images.
        feature_count: entries of `feature_info`.
        listed: names of the network's modules that can be links and lie in lists or sequences.
    """

    stages: tuple[tuple[str, ...], ...]
    features: tuple[int, ...]
    chs: tuple[int, ...]
    strides: tuple[int, ...]
    layout: str
    width: float
    shrinking: tuple[tuple[str, int], ...]
    in_chans: int
    feature_count: int
    listed: tuple[str, ...]


class Link(NamedTuple):
    """A module that ran, or a method in its place.

    Attributes:
        name: its name.
        shape: of what it gave.
    """

    name: str
    shape: tuple[int, ...]


def macs_of(layer: Any, output: Tensor) -> int:
    """MACs of a convolution or linear layer that gave `output`."""
    per_number = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
    return int(output.numel() * per_number)


def link_of(network: Any, name: str) -> Any:
    """A link of a network's chain by its name: a module or a method."""
    return getattr(network, name) if name in METHODS.values() else network.get_submodule(name)


def side_of(shape: tuple[int, ...]) -> int:
    """The side of a square map in any layout; 0 for tokens."""
    if len(shape) != 4:
        return 0
    return shape[2] if shape[2] == shape[3] else shape[1]


def modules_of_chain(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that can be links, by name: the network's own, and those within its lists and sequences."""
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward:
            yield from ((f"{name}.{inner}", link) for inner, link in modules_of_chain(module))
        else:
            yield name, module


def listed_modules(network: nn.Module) -> tuple[str, ...]:
    """The names of those that lie within lists and sequences."""
    return tuple(name for name, _ in modules_of_chain(network) if "." in name)


@torch.no_grad()
def watch(network: Any, images: Tensor) -> tuple[list[Link], int]:
    """Runs a network; gives its chain from the images to the last map, and the MACs of an image with the head's.

    Raises:
        UserError: if the forward pass is no chain.
    """
    events: list[tuple[str, Any, int]] = []  # what each module takes, then gives, and how often that was written to
    macs = 0

    def note(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        events.append((name, value, value._version if isinstance(value, Tensor) else -1))

    def count(layer: Any, _: Any, given: Tensor) -> None:
        nonlocal macs
        macs += macs_of(layer, given) // len(images)

    handles = []
    for name, link in modules_of_chain(network):
        handles.append(link.register_forward_pre_hook(lambda _, taken, name=name: note(name, taken)))
        handles.append(link.register_forward_hook(lambda _, __, given, name=name: note(name, given)))
    counted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles += [module.register_forward_hook(count) for module in counted]
    try:
        last = network.forward_features(images)
        chain = list(linked(images, last, events))
        network.forward_head(last)
    finally:
        for handle in handles:
            handle.remove()
    return chain, macs


def linked(images: Tensor, last: Any, events: list[tuple[str, Any, int]]) -> Iterator[Link]:
    """The links of a chain, from what its modules took and gave in turn; see `watch`.

    Raises:
        UserError: if it is none.
    """
    before, current, written = "the image", images, images._version
    for (name, taken, taken_written), (end, given, given_written) in zip(events[::2], events[1::2], strict=True):
        if name != end or not isinstance(given, Tensor):
            raise UserError(f"its module {name} does more than turn one map into another")
        method = METHODS.get((before, name))
        if method is None and (taken is not current or taken_written != written):
            raise UserError(f"it computes something between {before} and {name}")
        yield Link(method or name, tuple(given.shape))
        before, current, written = name, given, given_written
    if last is not current or last._version != written:
        raise UserError(f"it computes something after {before}")


def structure_of_stages(network: Any) -> Structure:
    """The four stages of a plain timm network.

    Args:
        network: with a classifier, in eval mode; on the meta device it is watched without computing.

    Raises:
        UserError: if it cannot have exits; the message says why.
    """
    entries = [dict(entry) for entry in getattr(network, "feature_info", None) or []]
    if len(entries) <= EXITS or not hasattr(network, "forward_head"):
        raise UserError(f"it has {len(entries)} stages that timm knows of, and four exits need at least 4")
    if not isinstance(network.get_classifier(), nn.Linear | nn.Conv2d):
        raise UserError("it has no single classifier")
    parameter = next(network.parameters())
    side, in_chans = SIDE * entries[-1]["reduction"], int(network.in_chans)
    if len({entry["reduction"] for entry in entries}) == 1:  # patches of a transformer, whose grid may be fixed
        side = network.pretrained_cfg["input_size"][-1]
    images = torch.zeros(2, in_chans, side, side, device=parameter.device, dtype=parameter.dtype)
    chain, macs = watch(network, images)
    ends = [_end_of(entry, chain) for entry in entries]
    features = _features_of_exits(entries, ends)
    cuts = [ends[feature] or 0 for feature in features]
    layouts = {
        _layout(chain[cut].shape, entries[feature]["num_chs"]) for cut, feature in zip(cuts, features, strict=True)
    }
    if len(layouts) != 1 or "" in layouts:
        raise UserError("the maps of its stages are not what timm's feature_info says")
    borders = [0, *(cut + 1 for cut in cuts), len(chain)]
    reductions = [*(entries[feature]["reduction"] for feature in features), entries[-1]["reduction"]]
    chs = (*(entries[feature]["num_chs"] for feature in features), entries[-1]["num_chs"])
    strides = tuple(after // before for before, after in pairwise(reductions))
    layout = layouts.pop()
    return Structure(
        stages=tuple(tuple(link.name for link in chain[start:end]) for start, end in pairwise(borders)),
        features=features,
        chs=chs,
        strides=strides,
        layout=layout,
        width=1.0 if layout == "NLC" else _width(network, chs, strides, side_of(chain[cuts[0]].shape), macs),
        shrinking=tuple(_shrinking(side, chain)),
        in_chans=in_chans,
        feature_count=len(entries),
        listed=listed_modules(network),
    )


def _end_of(entry: dict[str, Any], chain: list[Link]) -> int | None:
    """The index of the last link of a stage; None if the stage ends within a link."""
    module = entry["module"]
    found = [i for i, link in enumerate(chain) if link.name == module or link.name.startswith(f"{module}.")]
    return found[-1] if found else None


def _features_of_exits(entries: list[dict[str, Any]], ends: list[int | None]) -> tuple[int, ...]:
    """The entries of `feature_info` that the exits follow: the last three before the last, or at each quarter.

    Raises:
        UserError: if there are too few.
    """
    if len({entry["reduction"] for entry in entries}) == 1:  # blocks of a transformer, of one resolution
        quarters = tuple(len(entries) * quarter // 4 - 1 for quarter in (1, 2, 3))
        usable = [number for number in quarters if ends[number] is not None]
    else:
        usable = [number for number, end in enumerate(ends[:-1]) if end is not None][-EXITS:]
    if len(usable) < EXITS:
        raise UserError("its stages end within modules, not between them")
    return tuple(usable)


def _layout(shape: tuple[int, ...], chs: int) -> str:
    if len(shape) == 3:
        return "NLC" if shape[2] == chs else ""
    if len(shape) == 4 and shape[2] == shape[3] and shape[1] == chs:
        return "NCHW"
    return "NHWC" if len(shape) == 4 and shape[1] == shape[2] and shape[3] == chs else ""


def _shrinking(side: int, chain: list[Link]) -> Iterator[tuple[str, int]]:
    for link in chain:
        now = side_of(link.shape)
        if now and now < side:
            yield link.name, round(side / now)
        side = now or side


def _width(network: Any, chs: tuple[int, ...], strides: tuple[int, ...], side: int, trunk: int) -> float:
    """The greatest of `WIDTHS` with which the exits stay within `BUDGET`; the smallest if none does.

    So the exits of a network are the same whatever its number of classes.
    """
    classifier = network.get_classifier()
    trunk += CLASSES * network.head_hidden_size - sum(p.numel() for p in classifier.parameters() if p.ndim > 1)
    for width in WIDTHS:
        total = 0
        for number in range(EXITS):
            widths, at = exit_widths(chs[number:], width), side // _product(strides[:number])
            for stride, (before, after) in zip(strides[number:], pairwise(widths), strict=True):
                at = -(-at // stride)
                total += (9 + after) * before * at * at
            total += (widths[-1] + CLASSES) * network.head_hidden_size
        if total <= BUDGET * trunk:
            break
    return width


def _product(numbers: tuple[int, ...]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product


def check_arguments(network: Any, structure: Structure) -> None:
    """Refuses a network whose arguments give it other stages than those of its name, which its exits were made for.

    Args:
        network: plain, as built with the arguments.
        structure: of the network that the name alone gives.

    Raises:
        UserError: if a stage has more or fewer modules, or maps of another width.
    """
    widths = [entry["num_chs"] for entry in network.feature_info]
    same = listed_modules(network) == structure.listed and len(widths) == structure.feature_count
    if not same or tuple(widths[number] for number in (*structure.features, -1)) != structure.chs:
        raise UserError("its arguments change the depth or the widths of its stages, which its exits are made for")


def exit_widths(chs: tuple[int, ...], width: float) -> list[int]:
    """Channels of the maps in an exit, from the stage's own on: multiples of 8 where `width` makes them fewer."""
    return [chs[0], *(max(8, round(number * width / 8) * 8) if width < 1 else number for number in chs[1:])]
