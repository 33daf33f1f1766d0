"""What works as for timm's own resnet18: `feature_cfg`, `checkpoint_path`, `hf_hub:`, `local-dir:RUN`, its scripts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.commands import ROOT
from helpers.networks import SHORT, create
from sssd_zoo.files import read_json, write_json
from sssd_zoo.files.network_link import link_network
from sssd_zoo.files.run_folder import mark
from sssd_zoo.models import activations
from sssd_zoo.models.networks import find_network, hub_repository, load_network, with_current_prefix
from sssd_zoo.models.saving import save_network


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
@torch.no_grad()
def test_feature_cfg(feature_cls):
    images = torch.randn(1, 3, 64, 64)
    settings = {"out_indices": (1, 3), "feature_cls": feature_cls}
    found = []
    for name in ("sssd_resnet18", "resnet18"):
        own = dict(settings)
        torch.manual_seed(0)
        backbone = timm.create_model(name, features_only=True, feature_cfg=own, **SHORT).eval()
        maps = backbone(images)
        found.append([tuple(each.shape) for each in (maps.values() if isinstance(maps, dict) else maps)])
        if name.startswith("sssd"):
            assert own == settings  # the caller's stays as it is
    assert found[0] == found[1] == [(1, 64, 16, 16), (1, 256, 4, 4)]


def test_out_indices_over_feature_cfg():
    backbone = timm.create_model(
        "sssd_resnet18", features_only=True, output=2, feature_cfg={"out_indices": (0,)}, out_indices=(1, 2), **SHORT
    )
    assert backbone.feature_info.channels() == [64, 128]


@pytest.mark.parametrize("output", [1, 2, 3, "final", "ensemble"])
def test_a_full_checkpoint_fits_every_output(output, tmp_path):
    whole = create(**SHORT)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in whole.state_dict().items()}}, tmp_path / "a.pth"
    )
    for file in ("whole.safetensors", "a.pth"):
        model = timm.create_model(
            "sssd_resnet18", num_classes=7, output=output, checkpoint_path=str(tmp_path / file), **SHORT
        )
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_weights_are_still_refused():
    weights = create(**SHORT).state_dict()
    model = create(output=2, **SHORT)
    with pytest.raises(RuntimeError, match="exit4"):
        model.load_state_dict({**weights, "exit4.fc.weight": torch.zeros(1)})
    del weights["exit2.fc.bias"]
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict(weights)
    assert model.load_state_dict(weights, strict=False).missing_keys == ["exit2.fc.bias"]


def test_older_prefix():
    assert with_current_prefix("hf_hub:org/name@v1") == "hf-hub:org/name@v1"
    assert with_current_prefix("resnet18") == "resnet18"
    assert find_network("hf_hub:org/name") == "hf-hub:org/name"
    assert hub_repository(find_network("hf_hub:org/name@v1"), pretrained=True) == "org/name"


def test_local_dir_of_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    save_network(run / "model", create(**SHORT), "sssd_resnet18", input_size=32)
    link_network(run)
    link_network(run)
    for name in (f"local-dir:{run}", f"local-dir:{run / 'model'}"):
        assert timm.create_model(name, pretrained=True).num_classes == 7
    # Another network in its place is found at once.
    save_network(run / "model", create(num_classes=2, **SHORT), "sssd_resnet18", input_size=32)
    assert timm.create_model(f"local-dir:{run}", pretrained=True).num_classes == 2

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("mine")
    link_network(other)
    assert (other / "config.json").read_text() == "mine"
    assert not (other / "model.safetensors").is_file()


def test_a_run_copied_with_links_followed_has_no_stale_network(tmp_path, capsys):
    run, copy = tmp_path / "run", tmp_path / "copy"
    save_network(run / "model", create(**SHORT), "sssd_resnet18", input_size=32)
    mark(run, "fit")
    link_network(run)
    shutil.copytree(run, copy)
    assert not (copy / "config.json").is_symlink()
    # Its classes were named meanwhile: the copy of config.json differs, and is of this network all the same.
    config = read_json(copy / "model" / "config.json")
    write_json(copy / "model" / "config.json", {**config, "label_names": list("abcdefg")})
    assert load_network(str(copy)).pretrained_cfg["label_names"] == list("abcdefg")
    link_network(copy)
    for name in ("config.json", "model.safetensors"):
        assert (copy / name).readlink() == Path("model") / name
    assert capsys.readouterr().out == ""

    # Copies of a network that is no longer there, and a file of the user's, stay, and are not what the run answers by.
    shutil.copytree(run, tmp_path / "late")
    late = tmp_path / "late"
    old = (late / "model.safetensors").read_bytes()
    (late / "config.json").write_text("mine")
    save_network(late / "model", create(num_classes=2, **SHORT), "sssd_resnet18", input_size=32)
    link_network(late)
    said = capsys.readouterr().out
    for name in ("config.json", "model.safetensors"):
        assert f"{late / name} is not the network of this run, so it is kept" in said
    assert ((late / "config.json").read_text(), (late / "model.safetensors").read_bytes()) == ("mine", old)
    assert load_network(str(late)).num_classes == 2


def test_no_links_on_this_file_system(tmp_path, capsys, monkeypatch):
    def refuse(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link_network(tmp_path)
    assert f"local-dir:{tmp_path / 'model'}" in capsys.readouterr().out


def test_activations():
    """Timm's model card of resnet18 says 2.5 M at 224 px."""
    numbers = activations(create("sssd_resnet18", num_classes=1000), (3, 224, 224))
    stem, stages = 64 * 112**2, [4 * 64 * 56**2, 5 * 128 * 28**2, 5 * 256 * 14**2, 5 * 512 * 7**2]
    assert numbers["4"] == stem + sum(stages) + 1000 == 2_484_712
    assert numbers["1"] < numbers["2"] < numbers["3"] < numbers["ensemble"]


@pytest.mark.long
def test_device_modules():
    """Timm's train.py imports the modules named by --device-modules, then asks for the network by name."""
    code = (
        "import importlib, timm; from timm.models import create_model, resolve_model_input_args\n"
        "importlib.import_module('sssd_zoo')\n"
        "model = create_model(**resolve_model_input_args('sssd_resnet18_cifar', {'img_size': 32}, pretrained=True))\n"
        "print(type(model).__name__, timm.data.resolve_data_config({}, model=model)['input_size'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "SSSDResNet (3, 32, 32)", done.stderr
