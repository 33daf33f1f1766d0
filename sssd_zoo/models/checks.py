"""A config.json is compared with its weights before it is trusted.

A network can come from anybody. timm passes all of `model_args` on and believes `pretrained_cfg` where weights lie, so
a config.json could make it read other files, fetch from other addresses, or take all memory for a network that its
weights do not hold. Here a network is built without memory first, on torch's meta device, and its sizes are compared
with the header of the weights.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open

from sssd_zoo.errors import UserError

LARGEST_CONFIG = 10_000_000  # bytes: ImageNet-22k's names are a tenth of it
LARGEST_SIDE = 2048  # pixels of the images that a network is for
SLACK = 10_000_000  # numbers that a network may have beyond twice those of its weights: a new head, resized positions
SMALL = 64  # what any argument that counts something may be
# These are not about the network, but about where its weights are, or are put.
REFUSED_ARGUMENTS = re.compile(
    r"pretrained.*|checkpoint_path|cache_dir|model_name|device|dtype|scriptable|features_only"
)
REFUSED_SOURCES = ("url", "state_dict", "hf_hub_filename", "custom_load")
# Arguments by these names are sizes of weights; all others count things that are built one by one.
SIZES = re.compile(r"chan|dim|class|width|size|feature|filter|embed|hidden|length")


def read_config(path: Path) -> dict[str, Any]:
    """Reads a network's config.json, no matter whose.

    Raises:
        UserError: if it is missing, too large, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
        content = json.loads(data) if len(data) <= LARGEST_CONFIG else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path} as JSON: {error}; run the command that made this network again, or fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no config.json of a network: it is no JSON object of at most {LARGEST_CONFIG:,} bytes"
        )
    return content


def check_network(config: dict[str, Any], weights: Path, where: str, *, features_only: bool = False) -> None:
    """Refuses a network's configuration that asks for more than its weights.

    Args:
        config: of config.json: `architecture`, `model_args`, `num_classes`, `pretrained_cfg`.
        weights: its safetensors file, whose header is read.
        where: what to call it in errors.
        features_only: the weights are of timm's `features_only`, without a classifier.

    Raises:
        UserError: that says what is wrong.
    """
    try:
        check_fields(config)
        with safe_open(weights, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        full = {name: shape for name, shape in shapes.items() if math.prod(shape)}
        check_weight_count(config, full, features_only=features_only)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot load the network '{where}': {weights.name} is damaged: {error}") from error
    except ValueError as error:
        raise UserError(f"cannot load the network '{where}': its config.json {str(error)[:300]}") from error


def check_fields(config: dict[str, Any]) -> None:
    """Refuses fields that have the wrong type, or do not describe the network.

    Raises:
        ValueError: that names the field.
    """
    described, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(described, dict) or not isinstance(arguments, dict):
        raise ValueError("has pretrained_cfg or model_args that are no JSON objects")
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"names an architecture that timm does not have: {architecture!r}")
    for name in REFUSED_SOURCES:
        if described.get(name):
            raise ValueError(f"names other weights ({name}): remove that, and put the weights beside it")
    for name in filter(REFUSED_ARGUMENTS.fullmatch, arguments):
        raise ValueError(f"has a model argument that is not about the network: {name}")
    classes = _classes(config)
    if classes is not None and (not isinstance(classes, int) or classes < 0):
        raise ValueError(f"has num_classes {classes!r}, which must be a whole number, at least 0")
    names = config.get("label_names", described.get("label_names"))
    if isinstance(names, list) and {*map(type, names)} - {str}:
        raise ValueError("has label_names that are not text")
    if isinstance(names, list) and classes and len(names) != classes:
        raise ValueError(f"has {len(names)} label_names for num_classes {classes}")
    for name in ("input_size", "test_input_size", "min_input_size"):
        size = described.get(name, [1, 1, 1])
        sides = isinstance(size, list) and len(size) == 3 and all(isinstance(side, int) for side in size)
        if size is not None and not (sides and all(1 <= side <= LARGEST_SIDE for side in size)):
            raise ValueError(f"has {name} {size!r}, which must be three numbers in 1..{LARGEST_SIDE}")
    for name in ("mean", "std"):
        values = described.get(name, [])
        if not isinstance(values, list) or not all(isinstance(each, int | float) for each in values):
            raise ValueError(f"has {name} {values!r}, which must be a list of numbers")
        if not all(math.isfinite(each) for each in values):
            raise ValueError(f"has {name} {values!r}, which must be finite")
        inputs = arguments.get("in_chans", 3)
        if values and inputs != 1 and len(values) != inputs:  # one channel may have those of the RGB network it came of
            raise ValueError(f"has {name} {values!r}, and the network {inputs} input channels")
        if name == "std" and not all(each > 0 for each in values):
            raise ValueError(f"has std {values!r}, which must be above 0")


def _classes(config: dict[str, Any]) -> Any:
    return config.get("num_classes", config.get("pretrained_cfg", config).get("num_classes"))


def check_weight_count(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], *, features_only: bool = False
) -> None:
    """Refuses a network that is larger than the weights with these shapes.

    Raises:
        ValueError: that says by what.
    """
    arguments = {**(config.get("model_args") or {})}
    arguments |= {"features_only": True} if features_only else {"num_classes": _classes(config)}
    largest = max(itertools.chain([LARGEST_SIDE], *shapes.values()))
    for name, number in _numbers("", arguments):
        limit = largest if SIZES.search(name) else max(len(shapes), SMALL)
        if number > limit:
            raise ValueError(f"has {name} {number:,}, and the weights hold no more than {limit:,}")
    total = sum(map(math.prod, shapes.values()))
    sizes = built_sizes(config["architecture"], arguments)
    asked = sum(sizes.values())
    if asked > 2 * total + SLACK:
        name = max(sizes, key=lambda name: sizes[name] - math.prod(shapes.get(name, (0,))))
        raise ValueError(f"asks for {asked:,} weights, {name} for the most, and there are {total:,}")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers in an argument, by its name; of a list that counts things, their sum."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(str(key), inner)
    elif isinstance(value, list):
        numbers = [number for inner in value for _, number in _numbers(name, inner)]
        yield from ((name, number) for number in (numbers if SIZES.search(name) else [sum(numbers)]))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, abs(value)


def built_sizes(architecture: str, arguments: dict[str, Any]) -> dict[str, int]:
    """How many numbers each tensor of a network has, built without memory for them; {} if it cannot be built so.

    Raises:
        ValueError: if its arguments are none of the architecture.
    """
    try:
        with torch.device("meta"):
            network = timm.create_model(architecture, pretrained=False, **arguments)
    except NotImplementedError:  # some networks compute with their weights when they are built
        return {}
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise ValueError(f"does not fit the architecture: {error}") from error
    return {name: tensor.numel() for name, tensor in network.state_dict().items()}
