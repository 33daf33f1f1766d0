"""The models against timm's own expectations, and the exits against slow versions."""

import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import group_parameters, save_for_hf
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from timm.optim import param_groups_layer_decay
from torch import nn

from helpers.networks import NAMES, SHORT, create
from sssd_zoo.errors import UserError
from sssd_zoo.models import Exits, ensemble_logits, multiply_adds, stage_costs
from sssd_zoo.models.saving import network_config, save_network

CIFAR_NAMES = [name for name in NAMES if name.endswith("_cifar")]
OUTPUTS = ["ensemble", "final", 1, 2, 3]
CLASSIFIERS = ["fc", "exit1.fc", "exit2.fc", "exit3.fc"]


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network():
    """One full network for the tests that do not change it."""
    return create()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    """The full network as timm saves it."""
    path = tmp_path_factory.mktemp("saved")
    save_for_hf(network, str(path), safe_serialization=True)
    return path


# What timm asks of every model


def test_names():
    sizes = ("18", "34", "50", "101", "18_cifar", "50_cifar")
    assert sorted(NAMES) == sorted(f"sssd_resnet{size}" for size in sizes)


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name):
    model = timm.create_model(name, num_classes=7).train()
    size = 8 if name in CIFAR_NAMES else 32
    outputs = model(torch.randn(2, 3, size, size))
    outputs.mean().backward()
    assert outputs.shape == (2, 7)
    assert outputs.isfinite().all()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("output", OUTPUTS)
def test_backward_of_each_output(images, output):
    model = create(output=output)
    model(images).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = timm.create_model(name, device="meta").eval()
    cfg = model.default_cfg
    inputs = torch.randn(1, *cfg["input_size"], device="meta")
    assert tuple(model.forward_features(inputs).shape[-2:]) == cfg["pool_size"]
    assert model(inputs).shape == (1, cfg["num_classes"])
    assert model.num_features == (2048 if model.layer1[0].expansion == 4 else 512)
    keys = model.state_dict().keys()
    assert list(cfg["classifier"]) == CLASSIFIERS
    assert all(f"{module}.weight" in keys for module in [*cfg["classifier"], cfg["first_conv"]])

    model.reset_classifier(0)
    assert model(inputs).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(inputs).shape == (1, model.num_features, *cfg["pool_size"])
    bare = timm.create_model(name, num_classes=0, global_pool="", device="meta").eval()
    assert bare(inputs).shape == (1, model.num_features, *cfg["pool_size"])


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_cifar_cfg(name):
    cfg = timm.create_model(name, device="meta").default_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["crop_pct"]) == ((3, 32, 32), 10, 1.0)
    assert cfg["mean"] == (0.4914, 0.4822, 0.4465)
    assert cfg["std"] == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize("output", OUTPUTS)
def test_reset_classifier(images, output):
    model = create(output=output)
    before = model.get_classifier()
    assert model.get_submodule(model.get_classifier(name_only=True)) is before
    assert isinstance(before, nn.Linear)
    model.reset_classifier(3)
    assert model.get_classifier() is not before
    assert model(images).shape == (2, 3)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == (4 if output == "ensemble" else 1)
    assert {linear.out_features for linear in linears} == {3}
    assert not any(linear.training for linear in linears)
    model.reset_classifier(3, "catavgmax")
    assert model(images).shape == (2, 3)
    model.reset_classifier(0, "avg")
    assert model(images).shape == model.forward_head(model.forward_features(images)).shape == (2, 512)


def test_no_classes(images):
    model = create(num_classes=0)
    exits = model.forward_exits(images)
    assert torch.equal(model(images), exits.features[3])
    assert all(torch.equal(logits, features) for logits, features in zip(exits.logits, exits.features, strict=True))
    unpooled = create(num_classes=0, global_pool="")
    assert unpooled(images).shape == (2, 512, 1, 1)


def test_one_channel():
    model = create(in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert create("sssd_resnet18_cifar", in_chans=1).conv1.weight.shape == (64, 1, 3, 3)


@pytest.mark.parametrize("output", OUTPUTS)
def test_forward_head(images, output):
    model = create(output=output)
    final_map = model.forward_features(images)
    pooled = model.forward_head(final_map, pre_logits=True)
    assert final_map.shape == (2, 512, 1, 1)
    assert torch.equal(pooled, final_map.mean((2, 3)))
    logits = model.forward_head(final_map)
    assert torch.equal(logits, model.get_classifier()(pooled))
    if output == "ensemble":
        assert torch.equal(logits, model.forward_exits(images).logits[3])
    else:
        assert torch.equal(logits, model(images))


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = timm.create_model(name, features_only=True, device="meta").eval()
    reductions = [1, 1, 2, 4, 8] if name in CIFAR_NAMES else [2, 4, 8, 16, 32]
    assert model.feature_info.reduction() == reductions
    maps = model(torch.randn(1, 3, 64, 64, device="meta"))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == reductions
    assert not any("exit" in key or "fc" in key for key in model.state_dict())


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_feature_classes(images, network, feature_cls):
    wanted = network.forward_intermediates(images, intermediates_only=True)
    overlay = {"state_dict": network.state_dict(), "num_classes": 7}
    model = timm.create_model(
        "sssd_resnet18", features_only=True, feature_cls=feature_cls, out_indices=(1, 3), pretrained=True,
        pretrained_cfg_overlay=overlay,
    ).eval()  # fmt: skip
    maps = model(images)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert all(torch.equal(got, wanted[i]) for got, i in zip(maps, (1, 3), strict=True))


def test_features_of_truncated_network(images):
    model = timm.create_model("sssd_resnet18", features_only=True, output=2).eval()
    assert model.feature_info.reduction() == [2, 4, 8]
    assert [m.shape[2] for m in model(images)] == [16, 8, 4]


@pytest.mark.parametrize("output", OUTPUTS)
def test_forward_intermediates(images, output):
    model = create(output=output)
    count = 5 if output in ("ensemble", "final") else output + 1
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2, 1][:count]
    assert torch.equal(model.forward_intermediates(images, 1, intermediates_only=True)[0], maps[-1])
    last, (first,) = model.forward_intermediates(images, [1], stop_early=True)
    assert torch.equal(first, maps[1])
    # With stop_early the map is that of the last stage run, unless it ran to the end anyway.
    assert torch.equal(last, final if count == 2 else maps[1])


@pytest.mark.parametrize("output", ["ensemble", 3])
def test_prune_intermediate_layers(images, output):
    model = create(output=output)
    wanted = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    got = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert {key.split(".")[0] for key in model.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}
    assert model.num_features == 128
    assert model(images).shape == (2, 128, 4, 4)


@pytest.mark.parametrize("output", ["ensemble", 3])
def test_prune_nothing(images, output):
    model = create(output=output)
    wanted = model(images)
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(images), wanted)
    model.prune_intermediate_layers(1)
    assert model(images).shape[1:] == ((512, 1, 1) if output == "ensemble" else (256, 2, 2))


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("output", ["ensemble", 2])
def test_group_matcher(output, coarse):
    model = create(output=output)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    stages = 4 if output == "ensemble" else 2
    assert len(groups) == 1 + (stages if coarse else 2 * stages) + 1
    assert all(name.startswith(("conv1", "bn1")) for name in groups[0])
    assert all(name.startswith(("exit", "fc")) for name in groups[len(groups) - 1])


def test_layer_decay():
    model = create()
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert scales[id(model.conv1.weight)] == 0.5**9
    assert scales[id(model.layer4[1].conv2.weight)] == 0.5
    assert scales[id(model.fc.weight)] == scales[id(model.exit1.blocks[0].conv1.weight)] == 1


@pytest.mark.parametrize("output", ["ensemble", 2])
def test_grad_checkpointing(images, output):
    plain = create(output=output).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    outputs = [model(images) for model in (plain, saving)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    saving.set_grad_checkpointing(False)
    assert not saving.grad_checkpointing


def test_drop_rates(images, network):
    model = create(drop_rate=0.5, drop_path_rate=0.5)
    assert torch.equal(model(images), network(images))
    assert [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"][-1] == 0.5
    model.train()
    torch.manual_seed(0)
    dropped = model.forward_exits(images)
    assert not torch.equal(dropped.logits[0], model.forward_exits(images).logits[0])
    # Features are given before the dropout.
    assert not torch.allclose(model.fc(dropped.features[3]), dropped.logits[3], atol=1e-3)


def test_overlay():
    model = timm.create_model("sssd_resnet18", pretrained_cfg_overlay={"num_classes": 3, "mean": (0.1, 0.2, 0.3)})
    assert model.fc.out_features == model.exit1.fc.out_features == 3
    assert model.default_cfg["mean"] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("size", [33, 47])
@pytest.mark.parametrize("name", ["sssd_resnet18", "sssd_resnet50_cifar"])
def test_odd_sizes(name, size):
    model = timm.create_model(name, device="meta").eval()
    x = torch.randn(1, 3, size, size - 4, device="meta")
    final_map = model.forward_features(x)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for exit_head, stage_map in zip((model.exit1, model.exit2, model.exit3), maps[1:], strict=False):
        assert exit_head(stage_map).shape == final_map.shape


def test_output_stride():
    model = create(output_stride=8)
    x = torch.randn(1, 3, 64, 64)
    assert model.exit1(model.forward_intermediates(x, [1], intermediates_only=True)[0]).shape == (1, 512, 8, 8)
    assert model(x).shape == (1, 7)


# Exits


def test_forward_exits(images, network):
    exits = network.forward_exits(images)
    assert isinstance(exits, Exits)
    assert [tuple(logits.shape) for logits in exits.logits] == [(2, 7)] * 4
    assert [tuple(features.shape) for features in exits.features] == [(2, 512)] * 4
    assert all((features >= 0).all() for features in exits.features)
    heads = [network.exit1.fc, network.exit2.fc, network.exit3.fc, network.fc]
    for fc, logits, features in zip(heads, exits.logits, exits.features, strict=True):
        assert torch.equal(fc(features), logits)
    maps = network.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(network.exit2(maps[2]).mean((2, 3)), exits.features[1])


def test_forward_is_log_of_mean_softmax(images, network):
    exits = network.forward_exits(images)
    mean = torch.zeros(2, 7, dtype=torch.float64)
    for logits in exits.logits:
        for i, row in enumerate(logits.double()):
            for c, value in enumerate(row):
                mean[i, c] += value.exp() / sum(v.exp() for v in row) / 4
    torch.testing.assert_close(network(images).double(), mean.log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(network(images).softmax(1).double(), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ensemble_logits_hold_at_extremes(dtype):
    logits = [torch.tensor([[6e4, 0.0, -6e4]], dtype=dtype, requires_grad=True) for _ in range(4)]
    out = ensemble_logits(logits)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.log_softmax(logits[0].float(), 1))
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in logits)
    tiny = ensemble_logits([torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -300.0]])])
    assert tiny[0, 1].item() == pytest.approx(-200 - math.log(2), abs=1e-3)


def test_autocast(images, network):
    with torch.autocast("cpu", torch.bfloat16):
        out = network(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, network(images), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("output", ["final", 4, "4", 1, "2", 3])
def test_truncated_networks(images, network, output):
    model = create(output=output)
    model.load_state_dict({key: network.state_dict()[key] for key in model.state_dict()})
    number = 4 if output == "final" else int(output)
    assert torch.equal(model(images), network.forward_exits(images).logits[number - 1])
    parts = {key.split(".")[0] for key in model.state_dict()} - {"conv1", "bn1"}
    last = {"fc"} if number == 4 else {f"exit{number}"}
    assert parts == {f"layer{i}" for i in range(1, number + 1)} | last
    with pytest.raises(UserError, match="ensemble"):
        model.forward_exits(images)


def test_bad_arguments(images, network):
    for output in (0, 5, "best", True):
        with pytest.raises(UserError, match="there is no output="):
            timm.create_model("sssd_resnet18", output=output, device="meta")
    with pytest.raises(UserError, match="stem_type"):
        timm.create_model("sssd_resnet18_cifar", stem_type="deep", device="meta")
    for wrong in ((0.5, 0.5), (0.5, 0.5, 1.5), (0.5, math.nan, 0.5)):
        with pytest.raises(UserError, match="three thresholds"):
            network.forward_early(images, wrong)
    with pytest.raises(UserError, match="three thresholds"):
        timm.create_model("sssd_resnet18", thresholds=[0.5], device="meta")
    for wrong in (0.5, "abc", [None] * 3):
        with pytest.raises(UserError, match="a list of three thresholds in 0"):
            network.forward_early(images, wrong)
    with pytest.raises(UserError, match="needs classifiers"):
        timm.create_model("sssd_resnet18", num_classes=0, device="meta").eval().forward_early(images, (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="no thresholds of its own"):
        network.forward_early(images)
    with pytest.raises(UserError, match="eval mode"):
        copy.deepcopy(network).train().forward_early(images, (0.5, 0.5, 0.5))


def early_by_hand(model, images, thresholds):
    logits, taken = [], []
    for image in images:
        exits = model.forward_exits(image[None]).logits
        asked = []
        for number, (answer, threshold) in enumerate(zip(exits, [*thresholds, None], strict=True), start=1):
            if threshold == 1:
                continue
            asked.append(answer.softmax(1))
            if number == 4:
                logits.append(torch.stack(asked).mean(0).log()[0])
            elif asked[-1].max() > threshold:
                logits.append(answer[0])
            else:
                continue
            taken.append(number)
            break
    return torch.stack(logits), torch.tensor(taken)


@torch.no_grad()
def test_forward_early_equals_a_loop_over_images(network):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    exits = network.forward_exits(images)
    # Between two images' confidences, so that rounding decides nothing, and amid them, so that all exits occur.
    confidences = [logits.softmax(1).amax(1).sort().values for logits in exits.logits]
    thresholds = [((c[i] + c[i + 1]) / 2).item() for c, i in zip(confidences, (11, 10, 9), strict=False)]
    wanted, wanted_exit = early_by_hand(network, images, thresholds)
    got = network.forward_early(images, thresholds)
    assert set(wanted_exit.tolist()) == {1, 2, 3, 4}
    assert torch.equal(got.exit, wanted_exit)
    assert got.exit.dtype == torch.int64
    torch.testing.assert_close(got.logits, wanted)


@torch.no_grad()
def test_forward_early_drops_images(network):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    seen = {}
    stages = {name: getattr(network, name) for name in ("layer1", "layer2", "layer3", "layer4")}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, len(args[0])))
        for name, module in stages.items()
    ]
    c = network.forward_exits(images).logits[0].softmax(1).amax(1).sort().values
    try:
        seen.clear()
        got = network.forward_early(images, (((c[11] + c[12]) / 2).item(), 1.0, 0.0))
        assert seen == {"layer1": 16, "layer2": 12, "layer3": 12}
        assert got.exit.bincount().tolist() == [0, 4, 0, 12]
        seen.clear()
        assert network.forward_early(images, (0.0, 0.0, 0.0)).exit.tolist() == [1] * 16
        assert seen == {"layer1": 16}
        last = network.forward_early(images, (1.0, 1.0, 1.0))
        assert last.exit.tolist() == [4] * 16
        final = network.forward_exits(images).logits[3]
        torch.testing.assert_close(last.logits.softmax(1), final.softmax(1))
        assert network.forward_early(images[:0], (0.5, 0.5, 0.5)).logits.shape == (0, 7)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_forward_early_at_random_thresholds(name, memory_format):
    model = create(name).to(memory_format=memory_format)
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(3)).contiguous(memory_format=memory_format)
    confidences = torch.stack([logits.softmax(1).amax(1) for logits in model.forward_exits(images).logits[:3]])
    middles = (confidences.sort(1).values[:, 1:] + confidences.sort(1).values[:, :-1]) / 2
    random = torch.Generator().manual_seed(4)
    for turn in range(6):
        places = torch.randint(middles.shape[1], (3, 1), generator=random)
        thresholds = middles.gather(1, places)[:, 0].tolist()
        if turn % 2:  # an exit that is not asked has no say at the end
            thresholds[turn // 2] = 1.0
        wanted, wanted_exit = early_by_hand(model, images, thresholds)
        got = model.forward_early(images, thresholds)
        assert torch.equal(got.exit, wanted_exit)
        torch.testing.assert_close(got.logits, wanted, atol=1e-4, rtol=1e-4)  # other batches, other rounding
        for image, answer, number in zip(images, wanted, wanted_exit, strict=True):
            one = model.forward_early(image[None], thresholds)
            assert one.exit.tolist() == [number]
            torch.testing.assert_close(one.logits[0], answer, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_exits_at_threshold_1_are_not_run(network, images):
    model = copy.deepcopy(network)
    model.exit1, model.exit3 = None, None
    got = model.forward_early(images, (1.0, 0.0, 1.0))
    assert got.exit.tolist() == [2, 2]
    torch.testing.assert_close(got.logits, network.forward_exits(images).logits[1])


def test_stored_thresholds(network, images, tmp_path):
    model = copy.deepcopy(network)
    model.thresholds = [0.0, 1.0, 1.0]
    save_network(tmp_path, model, "sssd_resnet18")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.thresholds == [0.0, 1.0, 1.0]
    with torch.no_grad():
        assert loaded.forward_early(images).exit.tolist() == [1, 1]
        assert loaded.forward_early(images, (1, 1, 1)).exit.tolist() == [4, 4]
    # Other classifiers, or none: not their thresholds.
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).thresholds is None
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, output=2).thresholds is None
    loaded.reset_classifier(7)
    assert loaded.thresholds is None
    assert "thresholds" not in network_config(loaded, "sssd_resnet18")["model_args"]


# Weights


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_plain_timm_weights_into_the_trunk_and_back(images, name):
    torch.manual_seed(3)
    plain = timm.create_model(name, num_classes=7).eval()
    model = create(f"sssd_{name}")
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert {key.split(".")[0] for key in result.missing_keys} == {"exit1", "exit2", "exit3"}
    assert torch.equal(model.forward_exits(images).logits[3], plain(images))
    trunk = {key: value for key, value in model.state_dict().items() if not key.startswith("exit")}
    back = timm.create_model(name, num_classes=7).eval()
    back.load_state_dict(trunk)
    assert all(torch.equal(back.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert list(trunk) == list(plain.state_dict())


def test_plain_timm_weights_by_overlay(images, tmp_path):
    plain = timm.create_model("resnet18", num_classes=7).eval()
    save_file(plain.state_dict(), tmp_path / "resnet18.safetensors")
    kwargs = {
        "pretrained": True,
        "num_classes": 7,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "resnet18.safetensors"), "num_classes": 7},
    }
    assert torch.equal(timm.create_model("sssd_resnet18", output="final", **kwargs).eval()(images), plain(images))
    with pytest.raises(UserError, match="missing"):  # its exits would stay random
        timm.create_model("sssd_resnet18", **kwargs)


def test_local_dir_round_trip(images, network, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "sssd_resnet18"
    assert config["pretrained_cfg"]["classifier"] == CLASSIFIERS
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(images), network(images))
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in saved.items())


@pytest.mark.parametrize("output", [1, 2, 3, "final"])
def test_truncated_networks_from_the_full_folder(images, network, folder, output, tmp_path):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, output=output).eval()
    wanted = network.forward_exits(images).logits[3 if output == "final" else output - 1]
    assert torch.equal(model(images), wanted)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), wanted)
    with pytest.raises(UserError, match="missing"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, output="ensemble")


def test_features_only_from_the_full_folder(images, network, folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    wanted = network.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(images), wanted, strict=True))


def test_folder_with_other_channels_and_classes(network, folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1, num_classes=3).eval()
    torch.testing.assert_close(model.conv1.weight, network.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(model.exit3.blocks[0].conv1.weight, network.exit3.blocks[0].conv1.weight)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    bare = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert torch.equal(bare.layer4[1].bn2.running_var, network.layer4[1].bn2.running_var)


def test_pretext_trunk_gets_new_classifiers_only(network, tmp_path):
    trunk = create(output="final", num_classes=0)
    save_for_hf(trunk, str(tmp_path), safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    assert torch.equal(model.layer4[1].conv2.weight, trunk.layer4[1].conv2.weight)
    assert model.fc.out_features == 5
    with pytest.raises(UserError, match="missing"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5, output="ensemble")


@pytest.mark.parametrize("num_classes", [7, 3])  # timm loads loosely when the number of classes changes
@pytest.mark.parametrize("change", ["prefix", "one missing", "one unknown", "other architecture"])
def test_wrong_weights_fail(network, folder, tmp_path, change, num_classes):
    weights = dict(network.state_dict())
    if change == "prefix":
        weights = {f"encoder_q.{key}": value for key, value in weights.items()}
    elif change == "one missing":
        del weights["layer2.0.conv1.weight"]
    elif change == "one unknown":
        weights["exit4.fc.weight"] = torch.zeros(1)
    else:
        weights = timm.create_model("sssd_resnet34", num_classes=7).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(Path(folder / "config.json").read_text())
    with pytest.raises(UserError, match="do not fit"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=num_classes)


def test_networks_without_weights_say_so():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("sssd_resnet34", pretrained=True)


# Graphs. Their makers' time goes with the number of nodes, so the blocks are few.


@pytest.mark.parametrize("output", ["ensemble", 2])
def test_fx(images, output):
    model = create(output=output, **SHORT)
    train_nodes, eval_nodes = get_graph_node_names(model)
    assert len(train_nodes) == len(eval_nodes)
    extractor = create_feature_extractor(model, {"layer1": "map", eval_nodes[-1]: "out"})
    out = extractor(images)
    assert torch.equal(out["out"], model(images))
    assert out["map"].shape == (2, 64, 8, 8)


def test_backward_through_fx(images):
    model = create(**SHORT).train()
    nodes = get_graph_node_names(model)[0]
    extractor = create_feature_extractor(model, [nodes[-1]])
    extractor(images)[nodes[-1]].mean().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())
    assert len(list(extractor.parameters())) == len(list(model.parameters()))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("output", ["ensemble", "final", 2])
def test_torchscript(images, output):
    model = create(output=output, **SHORT)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(images), model(images))
        assert torch.equal(torch.jit.trace(model, images)(images), model(images))


def test_export(images):
    network = create(**SHORT)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    more = torch.cat([images, images + 1])
    torch.testing.assert_close(program.module()(more), network(more))


def test_onnx(images, tmp_path):
    network = create(**SHORT)
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(network, (images,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file)
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), network(images).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("output", ["ensemble", 2])
def test_compile_in_one_graph(images, output):
    model = create(output=output, **SHORT)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.slow
def test_compile(images, network):
    torch.testing.assert_close(torch.compile(network)(images), network(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_transformers(images, network, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["num_classes"]  # transformers gives it a second time
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(model(images).logits, network(images))


# Cost


@pytest.mark.parametrize("name", NAMES)
def test_exits_cost_at_most_8_percent(name):
    """At 32 px with 10 classes (1,000-class layers alone would outweigh a 7x7-stem trunk there), at 224 px as it is."""
    model = timm.create_model(name, device="meta")
    for size, num_classes in ((32, 10), (224, model.num_classes)):
        model.reset_classifier(num_classes)
        cost = multiply_adds(model, (3, size, size))
        assert cost["1"] < cost["2"] < cost["3"] < cost["4"] < cost["ensemble"] <= 1.08 * cost["4"]


def test_multiply_adds():
    model = create("sssd_resnet18", num_classes=1000)
    cost = multiply_adds(model, (3, 224, 224))
    # By hand: stem, then stages whose convolutions cost the same at every scale, but for the first of stages 2 to 4.
    stem = 112 * 112 * 64 * 3 * 49
    stage = 4 * 56 * 56 * 64 * 64 * 9
    later = stage * 7 // 8 + 28 * 28 * 64 * 128
    sides = ((64, 28), (128, 14), (256, 7))
    exit1 = sum(side * side * (chs * 9 * chs // 2 + chs // 2 * 2 * chs) for chs, side in sides)
    assert cost["4"] == stem + stage + 3 * later + 512_000 == 1_814_073_344
    assert cost["1"] == stem + stage + exit1 + 512_000
    stages, heads = stage_costs(model, (3, 224, 224))
    assert stages == (stem + stage, later, later, later)
    assert heads[0] == exit1 + 512_000
    assert sum(stages) + sum(heads) == cost["ensemble"]
    for output in (1, 2, 3, "final"):
        number = "4" if output == "final" else str(output)
        truncated = timm.create_model("sssd_resnet18", num_classes=1000, output=output, device="meta")
        assert multiply_adds(truncated, (3, 224, 224)) == {number: cost[number]}
    assert model.conv1.weight.device.type == "cpu"
    assert multiply_adds(timm.create_model("sssd_resnet18_cifar", device="meta"), (3, 32, 32))["4"] // 1_000_000 == 555
