"""Folders that load without this package: images are prepared for them as for the network that they came from."""

import json

import pytest
import timm

from helpers.commands import sssd
from helpers.networks import create
from sssd_zoo.models.saving import save_network


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_images_are_resized_as_in_training(form, tmp_path):
    name = "sssd_mobilenetv4_conv_small"  # timm resizes for its own weights otherwise, to 256 px where it tests them
    assert timm.get_pretrained_cfg(name.removeprefix("sssd_")).test_input_size
    save_network(tmp_path / "net", create(name, num_classes=2), name, input_size=64)
    assert sssd("export", tmp_path / "net", "--format", form, "--out", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (1.0, "center", "bilinear")
    assert config["input_size"] == [3, 64, 64]
    assert "test_input_size" not in config
