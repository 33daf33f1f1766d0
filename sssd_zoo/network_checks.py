"""What a config.json says is compared with its weights before it is believed.

A network can come from anybody. timm passes all of `model_args` on and believes `pretrained_cfg` where weights lie, so
a config.json could make it read other files, fetch from other addresses, or take all memory for a network that its
weights do not hold. Here a network is built without memory first, on torch's meta device, and its sizes are compared
with the header of the weights.
"""

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
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no config.json of a network: it is no JSON object of at most {LARGEST_CONFIG:,} bytes"
        )
    return content


def check_network(config: dict[str, Any], weights: Path, where: str) -> None:
    """Refuses a network's configuration that asks for more than its weights.

    Args:
        config: of config.json: `architecture`, `model_args`, `num_classes`, `pretrained_cfg`.
        weights: its safetensors file, whose header is read.
        where: what to call it in errors.

    Raises:
        UserError: that says what is wrong.
    """

    def refuse(reason: str) -> None:
        raise UserError(f"cannot load the network '{where}': {reason}")

    described = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    architecture: Any = config.get("architecture")
    if not isinstance(described, dict) or not isinstance(arguments, dict):
        refuse("pretrained_cfg and model_args of its config.json are to be JSON objects")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        refuse(f"timm has no architecture {architecture!r}")
    for name in REFUSED_SOURCES:
        if described.get(name):
            refuse(f"its config.json names other weights ({name}): drop that, and put the weights beside it")
    for name in arguments:
        if REFUSED_ARGUMENTS.fullmatch(name):
            refuse(f"its config.json has a model argument that is not about the network: {name}")
    classes = config.get("num_classes", described.get("num_classes"))
    if classes is not None and (not isinstance(classes, int) or classes < 0):
        refuse(f"its config.json has num_classes {classes!r}, which is to be a number from 0 on")
    _check_images(described, refuse)
    names = config.get("label_names", described.get("label_names"))
    if isinstance(names, list) and (
        len(names) != (classes or len(names)) or not all(isinstance(name, str) for name in names)
    ):
        refuse(f"its config.json has {len(names)} label_names, and num_classes {classes}")
    try:
        with safe_open(weights, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        refuse(f"{weights.name} is damaged: {error}")
    present = [shape for shape in shapes.values() if math.prod(shape)]
    largest = max((side for shape in present for side in shape), default=0)
    for name, number in _numbers("num_classes", classes) if classes else ():
        _check_number(name, number, largest, len(present), refuse)
    for name, number in _numbers("", arguments):
        _check_number(name, number, largest, len(present), refuse)
    total = sum(map(math.prod, present))
    sizes = built_sizes(architecture, {"num_classes": classes, **arguments}, where)
    asked = sum(sizes.values())
    if asked > 2 * total + SLACK:
        name = max(sizes, key=lambda name: sizes[name] - math.prod(shapes.get(name, (0,))))
        refuse(f"its config.json asks for {asked:,} weights ({name} has the most), and {weights.name} has {total:,}")


def _check_images(described: dict[str, Any], refuse: Any) -> None:
    """Refuses sizes and statistics of images that are none."""
    for name in ("input_size", "test_input_size", "min_input_size"):
        size = described.get(name)
        if size is None:
            continue
        sides = isinstance(size, list) and all(isinstance(side, int) for side in size)
        if not sides or len(size) != 3 or not all(1 <= side <= LARGEST_SIDE for side in size):
            refuse(f"its config.json has {name} {size!r}, which is to be three numbers in 1..{LARGEST_SIDE}")
    for name in ("mean", "std"):
        values = described.get(name)
        numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        if values is not None and (not numbers or not all(abs(value) < math.inf for value in values)):
            refuse(f"its config.json has {name} {values!r}, which is to be a list of numbers")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers in an argument, by its name; of a list that counts things, their sum."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(str(key), inner)
    elif isinstance(value, list):
        found = [number for inner in value for _, number in _numbers(name, inner)]
        yield from ((name, number) for number in (found if SIZES.search(name) else [sum(found)]))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, abs(value)


def _check_number(name: str, number: int, largest: int, tensors: int, refuse: Any) -> None:
    """Refuses sizes above the largest of the weights, and counts above the number of tensors."""
    limit = max(largest, LARGEST_SIDE) if SIZES.search(name) else max(tensors, SMALL)
    if number > limit:
        refuse(f"its config.json has {name} {number:,}, and its weights hold no more than {limit:,}")


def built_sizes(architecture: str, arguments: dict[str, Any], where: str) -> dict[str, int]:
    """How many numbers each tensor of a network has, built without memory for them; {} if it cannot be built so.

    Raises:
        UserError: if its arguments are none of the architecture.
    """
    try:
        with torch.device("meta"):
            network = timm.create_model(architecture, pretrained=False, **arguments)
    except NotImplementedError:  # some networks compute with their weights when they are built
        return {}
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise UserError(f"cannot load the network '{where}': {str(error)[:300]}") from error
    return {name: tensor.numel() for name, tensor in network.state_dict().items()}
