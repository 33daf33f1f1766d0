"""Networks in folders that load where this package is not installed: by timm alone, or by transformers.

timm            the final exit as timm's own network: `timm.create_model("local-dir:FOLDER", pretrained=True)`
transformers    the whole network, with the code that builds it: `from_pretrained(FOLDER, trust_remote_code=True)`

Both are compared with the network they came from before they are written.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models._input import get_model_args
from torch import nn

from sssd_zoo.data.inputs import input_channels
from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.files.run_folder import TRANSFORMERS_CODE
from sssd_zoo.models import MultiExit, SSSDResNet
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.building import build, structure_of
from sssd_zoo.models.saving import save_network

# Arguments that timm's networks do not have.
OURS = ("output", "exits", "cifar_stem", "thresholds", "storage_size", "bits", "backbone")

CODE = Path(__file__).parents[1] / "models"


def plain_network(model: MultiExit) -> tuple[nn.Module, str]:
    """A network's final exit as a network of timm's own, and its timm name.

    Args:
        model: created with `output='final'`.

    Raises:
        UserError: if timm has no such network.
    """
    arch = architecture_of(model)
    other_formats = "give --format transformers, onnx or torch-export, which need no sssd-zoo either"
    if model.cifar_stem:
        stem = "a 3x3 stride-1 convolution without max-pool" if isinstance(model, SSSDResNet) else "for small images"
        raise UserError(
            f"no network of timm has the stem of {arch}, {stem}, so it has no plain timm form: {other_formats}"
        )
    name = str(getattr(model, "backbone", arch.removeprefix("sssd_")))
    if name == arch or not timm.is_model(name):
        raise UserError(f"timm has no network '{name}' that {arch} is a form of: {other_formats}")
    arguments = {key: value for key, value in get_model_args(model).items() if key not in (*OURS, "num_classes")}
    overlay = {key: value for key, value in model.pretrained_cfg.items() if key not in ("architecture", "tag", "file")}
    overlay |= {"classifier": getattr(timm.get_pretrained_cfg(name), "classifier", "fc")}
    overlay |= {"source": None, "hf_hub_id": None, "url": ""}
    plain = timm.create_model(name, num_classes=model.num_classes, pretrained_cfg_overlay=overlay, **arguments).eval()
    plain.load_state_dict(model.state_dict())
    _check_answers(model, plain, arch)
    return plain, name


def save_for_transformers(folder: Path, model: MultiExit, arch: str, label_names: Sequence[str] | None) -> None:
    """Writes a whole network with the code that builds it.

    Args:
        folder: see `save_network`.
        model: with all exits.
        arch: see `save_network`.
        label_names: see `save_network`.

    Raises:
        UserError: if the code builds another network, as it may for one that is not of this package.
    """
    save_network(folder, model, arch, label_names=label_names)
    config = read_json(folder / "config.json")
    structure = structure_of(model)
    rebuilt = build(structure, model.num_classes, config["model_args"]).eval()
    rebuilt.load_state_dict(model.state_dict())
    _check_answers(model, rebuilt, arch)
    code = {"AutoModelForImageClassification": "modeling_sssd.SSSDForImageClassification"}
    write_json(folder / "config.json", {**config, "structure": structure, "auto_map": code})
    for name in TRANSFORMERS_CODE:
        atomic_write_text(folder / name, standalone((CODE / name).read_text(encoding="utf-8")))


def standalone(source: str) -> str:
    """A module's source with its imports of this package changed to those of files beside it."""
    source = source.replace("from sssd_zoo.errors import UserError\n", "UserError = ValueError  # a name of sssd-zoo\n")
    return re.sub(r"^from sssd_zoo\.models\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)


@torch.no_grad()
def _check_answers(model: MultiExit, other: nn.Module, arch: str) -> None:
    """Refuses a form of a network that answers otherwise."""
    _, height, width = model.pretrained_cfg["input_size"]
    images = torch.randn(2, input_channels(model), height, width, generator=torch.Generator().manual_seed(0))
    # Not bit-equal: where a weight lies in memory can decide how a convolution is computed.
    if not torch.allclose(model.eval()(images), other(images), rtol=1e-4, atol=1e-5):
        raise UserError(f"{arch} is built otherwise than its name says: give --format onnx or torch-export")
