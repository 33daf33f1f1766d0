"""Networks as folders that timm and transformers load: config.json and model.safetensors."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf  # its public `save_for_hf` writes the weights too
from torch import nn

from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_write_bytes, disk_errors, read_json, sha256_of, write_json
from sssd_zoo.models.backbones import RESIZED, stored_as


def save_network(
    folder: str | Path,
    model: nn.Module,
    arch: str,
    *,
    input_size: int | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Writes model.safetensors and config.json into a folder that may hold other things; then timm loads it.

    config.json also holds the weights' sha256, which `load_network` checks and timm ignores.

    Args:
        folder: created if it does not exist. An older network in it is replaced.
        model: made by `timm.create_model`, which recorded its arguments; not wrapped or compiled.
        arch: its timm name.
        input_size: side of the images that it was trained on, in pixels; by default that of its `pretrained_cfg`, whose
            mean and std are written too.
        label_names: of the classes, in order, if they have names.

    Raises:
        UserError: if the disk is full or not writable.
    """
    folder = Path(folder)
    config = network_config(model, arch, input_size=input_size, label_names=label_names)
    # config.json is what makes the folder a network: it goes first and comes last, so that it never describes others.
    with disk_errors(folder):
        (folder / "config.json").unlink(missing_ok=True)
    weights = folder / "model.safetensors"
    atomic_write_bytes(weights, network_weights(model))
    write_json(folder / "config.json", {**config, "sha256": sha256_of(folder, [weights])})


def network_weights(
    model: nn.Module, dtype: torch.dtype = torch.float32, *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A network's state as safetensors, floating-point tensors in `dtype`, and `metadata` in the file's own.

    Raises:
        UserError: if a number is too large for `dtype`.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if stored.dtype != tensor.dtype and (stored.isinf() & tensor.isfinite()).any():
            largest = tensor[tensor.isfinite()].abs().max().item()
            raise UserError(
                f"{name} has numbers up to {largest:.3g}, too large for {str(dtype).removeprefix('torch.')}: keep the "
                "weights in float32, as in the run's own model/, or train again with a lower learning rate"
            )
        tensors[name] = stored.detach().cpu().contiguous()
    weights = save(tensors, metadata={"format": "pt"})
    return weights if metadata is None else with_metadata(weights, metadata)


def with_metadata(weights: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with further metadata. `save` writes several in random order, so that equal files differ."""
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    header["__metadata__"] |= metadata
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors that follow are aligned
    return len(text).to_bytes(8, "little") + text + weights[8 + size :]


def network_config(
    model: nn.Module, arch: str, *, input_size: int | None = None, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What config.json says: timm's architecture, arguments and preprocessing; see `save_network`."""
    extra: dict[str, Any] = {"pretrained_cfg": {"architecture": arch}}
    if label_names is not None:
        extra["label_names"] = list(label_names)
        extra["label_descriptions"] = class_descriptions(label_names)
    # Training and probes see whole images, resized by `data.augment.resize`: so is timm's transform to prepare them.
    data_config: dict[str, Any] = {**RESIZED}
    if input_size is not None:
        data_config["img_size"] = input_size
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.json"
        save_config_for_hf(model, str(path), model_config=extra, data_config=data_config)
        config: dict[str, Any] = read_json(path)
    # timm reads it from the top; transformers, which does too, stumbles over a second one.
    config["model_args"].pop("num_classes", None)
    # Names that are known in this process only.
    config["architecture"], arguments = stored_as(config["architecture"])
    config["pretrained_cfg"]["architecture"] = config["architecture"]
    config["model_args"] |= arguments
    # The current thresholds: since the network was created they may have been calibrated, or dropped.
    config["model_args"].pop("thresholds", None)
    if getattr(model, "thresholds", None) is not None:
        config["model_args"]["thresholds"] = model.thresholds
    for name in ("storage_size", "bits"):
        if getattr(model, name, None) is not None:
            config["model_args"][name] = getattr(model, name)
    # These describe the weights of the network's default configuration, not the ones saved.
    of_others = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
    for name in (*of_others, "test_input_size", "test_pool_size"):
        config["pretrained_cfg"].pop(name, None)
    if label_names is None:
        config.pop("label_names", None)
        config["pretrained_cfg"].pop("label_names", None)
    return config


def class_descriptions(label_names: Sequence[str]) -> dict[str, str]:
    """Descriptions of classes that are named by WordNet ids, as ImageNet's are; {} for any others."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in label_names):
        return {}
    known = ImageNetInfo("imagenet-22k")
    try:
        return {name: known.label_name_to_description(name) for name in label_names}
    except KeyError:  # ids of no synset
        return {}
