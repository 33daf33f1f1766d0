"""Saved networks: how timm prepares images for them, and weights in half precision."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load
from timm.data import create_transform, resolve_model_data_config

from helpers.networks import create
from sssd_zoo.data.inputs import prepare
from sssd_zoo.data.opening import Encoded
from sssd_zoo.errors import UserError
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import network_config, network_weights, save_network

WHOLE = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}


@pytest.mark.parametrize(
    "name",
    ["sssd_resnet18", "sssd_regnety_004", "sssd_mobilenetv4_conv_small_cifar", "sssd_vit_tiny_patch16_224", "resnet50"],
)
def test_timm_prepares_images_as_they_were_measured(name):
    model = timm.create_model(name, num_classes=2)
    config = network_config(model, name)["pretrained_cfg"]
    assert config.items() >= WHOLE.items()
    assert not config.keys() & {"test_input_size", "test_crop_pct"}
    if name.startswith("sssd_") and "resnet" not in name:
        assert resolve_model_data_config(model).items() >= WHOLE.items()


def test_the_input_of_timm_s_transform_is_that_of_the_package(tmp_path):
    save_network(
        tmp_path, create("sssd_regnety_004", num_classes=2, storage_size=96), "sssd_regnety_004", input_size=96
    )
    network = load_network(str(tmp_path)).eval()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((400, 400), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    transform = create_transform(**resolve_model_data_config(network))
    torch.testing.assert_close(transform(image)[None], prepare(Encoded("image", file.getvalue(), None), network))


def test_numbers_that_half_precision_cannot_hold_are_refused():
    model = create(layers=(1, 1, 1, 1))
    model.layer2[0].bn1.running_var.fill_(1e5)
    with pytest.raises(UserError, match=r"^layer2\.0\.bn1\.running_var has numbers up to 1e\+05.*float16"):
        network_weights(model, torch.float16)
    assert load(network_weights(model))["layer2.0.bn1.running_var"].max() == 1e5
    marked = {network_weights(model, metadata={"package": "sssd-zoo", "kind": "card", "a": "b"}) for _ in range(20)}
    assert len(marked) == 1, "the same network is the same file"
    assert load(marked.pop()).keys() == load(network_weights(model)).keys()
    assert load(network_weights(model, torch.bfloat16))["layer2.0.bn1.running_var"].isfinite().all()
    model.layer2[0].bn1.running_var.fill_(torch.inf)  # what is infinite already is not this function's doing
    assert load(network_weights(model, torch.float16))["layer2.0.bn1.running_var"].isinf().all()
