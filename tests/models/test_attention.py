"""Exits with attention: the mask by hand, and what timm asks of every network, as of the plain exits."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models._features_fx import create_feature_extractor, get_graph_node_names

from helpers.commands import one_line, sssd
from helpers.networks import NAMES, SHORT, create
from sssd_zoo.errors import UserError
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.exits import Attention

OUTPUTS = ["ensemble", 1, 2, 3]


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [(8, 8), (7, 5), (1, 1)])
def test_the_mask_by_hand(side):
    torch.manual_seed(0)
    attention = Attention(4, norm_layer=torch.nn.BatchNorm2d, act_layer=torch.nn.ReLU).eval()
    for norm in (attention.bn1, attention.bn2):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, *side)
    padded = F.pad(x, (1, 1, 1, 1)).double()
    height, width = -(-side[0] // 2), -(-side[1] // 2)
    seen = torch.zeros(2, 4, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            window = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            seen[:, :, row, column] = (window * attention.conv_dw.weight[:, 0].double()).sum((2, 3))

    def normalised(values, norm):
        shape = (1, -1, 1, 1)
        centred = values - norm.running_mean.double().view(shape)
        return centred / (norm.running_var.double().view(shape) + norm.eps).sqrt()

    mixed = torch.einsum(
        "oc,bchw->bohw", attention.conv_pw.weight[:, :, 0, 0].double(), normalised(seen, attention.bn1).relu()
    )
    mask = F.interpolate(normalised(mixed, attention.bn2), size=side, mode="bilinear", align_corners=False)
    torch.testing.assert_close(attention(x).double(), x / (1 + (-mask).exp()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name):
    model = timm.create_model(name, num_classes=3, exits="attention").train()
    out = model(torch.randn(2, 3, *([16, 16] if name.endswith("_cifar") else [32, 32])))
    out.mean().backward()
    assert out.isfinite().all()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert sum("attention" in name for name, _ in model.named_parameters()) == 3 * 6


@pytest.mark.parametrize("output", OUTPUTS)
def test_torchscript_and_fx(images, output):
    model = create(output=output, exits="attention", **SHORT)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(images), model(images))
        nodes = get_graph_node_names(model)[1]
        assert torch.equal(create_feature_extractor(model, {nodes[-1]: "out"})(images)["out"], model(images))


def test_export_with_any_batch(images):
    model = create(exits="attention", **SHORT)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=16)},))
    more = torch.cat([images, images + 1])
    torch.testing.assert_close(program.module()(more), model(more))


def test_grad_checkpointing(images):
    plain = create(exits="attention", **SHORT).train()
    saving = create(exits="attention", **SHORT).train()
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images).square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_folders_truncation_and_early_exits(images, tmp_path):
    model = create(exits="attention", **SHORT)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    exits = model.forward_exits(images)
    loaded = {
        output: timm.create_model(
            f"local-dir:{tmp_path}", pretrained=True, output=output, exits="attention", **SHORT
        ).eval()
        for output in (2, "final")
    }
    torch.testing.assert_close(loaded[2](images), exits.logits[1])
    torch.testing.assert_close(loaded["final"](images), exits.logits[3])
    assert torch.equal(model.forward_early(images, [0.0] * 3).logits, exits.logits[0])
    with pytest.raises(UserError, match="do not fit"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, exits="plain", **SHORT)
    with pytest.raises(UserError, match="no exits='squeeze'"):
        timm.create_model("sssd_resnet18", exits="squeeze")


def test_the_trunk_is_still_timms_own():
    keys = create(exits="attention").state_dict().keys()
    trunk = {key for key in keys if not key.startswith(("exit", "fc."))}
    assert trunk == timm.create_model("resnet18", num_classes=0).state_dict().keys()


def test_cost():
    costs = {
        exits: multiply_adds(timm.create_model("sssd_resnet18_cifar", exits=exits, device="meta"), (3, 32, 32))
        for exits in ("plain", "attention")
    }
    added = [(9 + chs) * chs * side * side // 4 for chs, side in ((64, 32), (128, 16), (256, 8))]
    assert [costs["attention"][key] - costs["plain"][key] for key in "123"] == added
    assert costs["attention"]["4"] == costs["plain"]["4"]
    assert costs["attention"]["ensemble"] - costs["attention"]["4"] < 0.08 * costs["attention"]["4"]


@pytest.mark.long
def test_distill_takes_them_and_their_folder_remembers(folder_of_images, tmp_path, capsys):
    words = ["--data", folder_of_images, "--labels", "random", "--k", "4", "--model", "sssd_resnet18"]
    words += ["--image_size", "32", "--epochs", "1", "--batch_size", "16", "--exits", "attention"]
    out = tmp_path / "run"
    assert sssd("distill", *words, "--out", out) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert isinstance(model.exit1.blocks[0], Attention)
    assert (
        sssd(
            "linear",
            "--data",
            folder_of_images,
            "--model",
            out,
            "--probe_weight_decay",
            "0.01",
            "--out",
            tmp_path / "p",
        )
        == 0
    )
    assert isinstance(timm.create_model(f"local-dir:{tmp_path / 'p'}", pretrained=True).exit3.blocks[0], Attention)
    capsys.readouterr()
    assert sssd("distill", *words, "--method", "clusterfit", "--out", tmp_path / "other") == 2
    assert "remove --exits attention" in one_line(capsys)
    assert sssd("distill", *words[:-2], "--exits", "plain", "--out", out, "--resume") == 2
    assert "exits" in one_line(capsys)
