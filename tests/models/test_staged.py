"""Exits on timm's other networks: against timm itself, and the exits against each other.

What goes slowly is run by default on a few networks that differ in what matters: convolutions with and without the stem
for small images, tokens, and a network that is compared when it is built. The slow tests have all names.
"""

import copy
import json
import pickle
import resource

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models._efficientnet_blocks import ConvBnAct
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from timm.optim import param_groups_layer_decay
from torch import nn

from helpers.commands import command, one_line, sssd
from helpers.networks import BACKBONES, create
from sssd_zoo.errors import UserError
from sssd_zoo.models import early_logits, multiply_adds
from sssd_zoo.models.backbones import architecture_of, has_network, named_backbone
from sssd_zoo.models.checks import check_network, read_config
from sssd_zoo.models.networks import check_sizes, choose_model, load_network, load_trunk
from sssd_zoo.models.saving import save_network
from sssd_zoo.models.staged import (
    TESTED,
    StagedMultiExit,
    compare_stages,
    start_residuals_at_zero,
    structure_of_backbone,
)

FEW = ["sssd_mobilenetv4_conv_small", "sssd_convnextv2_atto_cifar", "sssd_vit_tiny_patch16_224_cifar", "sssd_backbone"]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in FEW[1:]]
FIRST = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]
OUTPUTS = ["final", 1, 2, 3]
every_family = pytest.mark.parametrize("name", FIRST)


def backbone_of(name: str) -> str:
    return "resnet10t" if name == "sssd_backbone" else name.removeprefix("sssd_").removesuffix("_cifar")


def plain_of(model: StagedMultiExit) -> nn.Module:
    """timm's own network for a model's images, with the same weights."""
    arguments = {} if model.structure.layout != "NLC" or not model.cifar_stem else {"patch_size": 4, "img_size": 32}
    plain = timm.create_model(model.backbone, num_classes=model.num_classes, **arguments).eval()
    trunk = {key: value for key, value in model.state_dict().items() if not key.startswith("exit")}
    assert list(trunk) == list(plain.state_dict())
    plain.load_state_dict(trunk)
    return plain


def images_for(model: StagedMultiExit, count: int = 2) -> torch.Tensor:
    """Images as small as stages allow to be told apart; a transformer's have one size."""
    side = model.pretrained_cfg["input_size"][-1] if model.structure.layout == "NLC" else 32 if model.cifar_stem else 64
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# Trunk and exits


@every_family
@torch.no_grad()
def test_the_last_exit_is_timm_s_network(name):
    """The weights go to timm's network and back; with timm's stem the answers are its own, bit for bit."""
    model = create(name)
    images, plain = images_for(model), plain_of(model)
    exits = model.forward_exits(images)
    if not model.cifar_stem or model.structure.layout == "NLC":
        assert torch.equal(exits.logits[3], plain(images))
        assert torch.equal(exits.features[3], plain.forward_head(plain.forward_features(images), pre_logits=True))
    assert torch.equal(exits.logits[3], model.forward_head(model.forward_features(images)))
    for value in plain.state_dict().values():
        value.mul_(0.5) if value.is_floating_point() else None
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {key.split(".")[0] for key in missing.missing_keys} == {"exit1", "exit2", "exit3"}
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.plain().state_dict().items())


@every_family
@torch.no_grad()
def test_stages_are_the_forward_pass_and_every_output_is_its_exit(name):
    model = create(name)
    x = images = images_for(model)
    exits = model.forward_exits(images)
    for number in (1, 2, 3, 4):
        x = model.stage(number, x)
    assert torch.equal(x, model.forward_features(images))
    assert {tuple(features.shape) for features in exits.features} == {(2, model.head_hidden_size)}
    for output in OUTPUTS:
        number = 4 if output == "final" else output
        small = create(name, output=output)
        small.load_state_dict(model.state_dict())
        assert torch.equal(small(images), exits.logits[number - 1])
        sizes = [sum(value.numel() for value in network.state_dict().values()) for network in (small, model)]
        assert sizes[0] < sizes[1]
        if number < 4:
            maps = small.forward_intermediates(images, intermediates_only=True)
            assert len(maps) == model.structure.features[number - 1] + 1 == len(small.feature_info)
            wanted = model.forward_intermediates(images, list(range(len(maps))), intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))


@every_family
@torch.no_grad()
def test_forward_early_is_that_of_all_logits(name):
    model = create(name)
    images = images_for(model, 8)
    logits = torch.stack(model.forward_exits(images).logits)
    confidences = logits.softmax(2).amax(2).sort(1).values
    thresholds = [((row[i] + row[i + 1]) / 2).item() for row, i in zip(confidences, (5, 4, 3), strict=False)]
    for each in (thresholds, [1.0, thresholds[1], 1.0], [1.0] * 3, [0.0] * 3):
        wanted, got = early_logits(logits, each), model.forward_early(images, each)
        assert torch.equal(got.exit, wanted.exit)
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-4, rtol=1e-4)  # other batches, other rounding


@pytest.mark.parametrize("backbone", TESTED)
def test_exits_cost_at_most_8_percent(backbone):
    model = timm.create_model(f"sssd_{backbone}", num_classes=1000, device="meta")
    cost = multiply_adds(model, (3, 224, 224))
    assert cost["1"] < cost["2"] < cost["3"] < cost["4"] < cost["ensemble"] <= 1.08 * cost["4"]
    small = timm.create_model(f"sssd_{backbone}", num_classes=1000, output=2, device="meta")
    assert multiply_adds(small, (3, 224, 224)) == {"2": cost["2"]}


@pytest.mark.parametrize("backbone", [name for name in TESTED if "mobilenet" in name or "efficientnet" in name])
def test_residual_blocks_start_as_the_identity_and_learn(backbone):
    model = timm.create_model(f"sssd_{backbone}", num_classes=3)
    blocks = [block for block in model.modules() if getattr(block, "has_skip", False)]
    assert len(blocks) >= 5
    last = [[module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1] for block in blocks]
    for block, norm in zip(blocks, last, strict=True):
        maps = torch.randn(2, norm.num_features, 4, 4)
        with torch.no_grad():
            assert torch.equal(block.eval()(maps), maps)
    model.train()(torch.randn(4, 3, 64, 64)).square().mean().backward()
    assert all(norm.weight.grad.abs().max() > 0 for norm in last)


def test_a_residual_branch_that_ends_in_relu_keeps_its_weights():
    block = ConvBnAct(4, 4, 3, skip=True)  # as in EfficientNetV2: a weight of 0 would never get a gradient
    start_residuals_at_zero(block)
    assert block.has_skip
    assert torch.equal(block.bn1.weight, torch.ones(4))


@pytest.mark.parametrize("backbone", TESTED)
def test_the_stem_for_small_images(backbone):
    """Weights are timm's, and a map is four times larger: 4x4 at 32 px, where timm's leave one pixel."""
    model = timm.create_model(f"sssd_{backbone}_cifar", device="meta").eval()
    usual = timm.create_model(f"sssd_{backbone}", num_classes=10, device="meta")
    shapes, others = ({key: value.shape for key, value in each.state_dict().items()} for each in (model, usual))
    differ = {key for key in shapes if shapes[key] != others[key]}
    assert shapes.keys() == others.keys()
    assert differ == ({"pos_embed", "patch_embed.proj.weight"} if "vit_tiny" in backbone else set())
    small, large = ([entry["reduction"] for entry in each.feature_info] for each in (model, usual))
    assert small == [max(1, reduction // 4) for reduction in large]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32, device="meta"), intermediates_only=True)
    assert [each.shape[-1] for each in maps] == [32 // reduction for reduction in small]
    assert maps[-1].shape[-1] == (8 if "vit_tiny" in backbone else 4)


# timm's surface


@every_family
@torch.no_grad()
def test_no_classes_one_channel_no_pooling_and_new_classifiers(name):
    model = create(name, num_classes=0)
    images = images_for(model)
    exits = model.forward_exits(images)
    assert torch.equal(model(images), exits.features[3])
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    assert {logits.shape[1] for logits in model.forward_exits(images).logits} == {5}
    model.reset_classifier(0)
    assert [torch.equal(a, b) for a, b in zip(model.forward_exits(images).features, exits.features, strict=True)]
    grey = create(name, in_chans=1)
    assert grey(images[:, :1]).shape == (2, 7)
    unpooled = create(name, num_classes=0, global_pool="")
    own = timm.create_model(backbone_of(name), num_classes=0, global_pool="").eval()
    assert unpooled(images).ndim == own(torch.zeros(1, *own.pretrained_cfg["input_size"])).ndim


@every_family
@torch.no_grad()
def test_dropout_is_in_front_of_all_classifiers_and_in_no_features(name):
    model = create(name, drop_rate=0.5)
    final = create(name, drop_rate=0.5, output="final")
    for network in (model, final):
        network.training = True  # of the network and its dropout alone: BatchNorm would move
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    images = images_for(model)
    first, second = model.forward_exits(images), model.forward_exits(images)
    assert [torch.equal(a, b) for a, b in zip(first.features, second.features, strict=True)] == [True] * 4
    assert [torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True)] == [False] * 4
    last = final.forward_features(images)
    assert torch.equal(final.forward_head(last, pre_logits=True), final.forward_head(last, pre_logits=True))
    assert not torch.equal(final.forward_head(last), final.forward_head(last))


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_exits_pool_tokens_as_the_network_does(pool):
    model = create("sssd_vit_tiny_patch16_224_cifar", global_pool="max")
    model.reset_classifier(7, pool)
    tokens = torch.randn(2, 65, 192)
    assert torch.equal(model.exit1.pool(tokens), model.pool(tokens, pool))


@every_family
def test_features_only(name):
    model = timm.create_model(name, features_only=True, device="meta").eval()
    with torch.device("meta"):
        own = [entry["num_chs"] for entry in timm.create_model(backbone_of(name)).feature_info]
    side = model.pretrained_cfg["input_size"][-1] if "vit" in name else 64
    images = torch.zeros(1, 3, side, side, device="meta")
    maps = model(images)
    assert model.feature_info.channels() == own
    assert [each.shape[1] for each in maps] == model.feature_info.channels()
    assert [side // each.shape[2] for each in maps] == model.feature_info.reduction()
    assert not any("exit" in key for key in model.state_dict())


@every_family
def test_layer_decay_takes_exits_for_heads(name):
    model = timm.create_model(name, num_classes=7)
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = sorted(parameter for names in groups.values() for parameter in names)
        assert grouped == sorted(parameter for parameter, _ in model.named_parameters())
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scales |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    exits = {scales[id(value)] for key, value in model.named_parameters() if key.startswith("exit")}
    assert exits == {scales[id(value)] for value in model.get_classifier().parameters()} == {1.0}
    first = model.pretrained_cfg["first_conv"]  # of parallel branches each
    stem = model.get_submodule(first if isinstance(first, str) else first[0])
    assert scales[id(stem.weight)] == min(scales.values()) < 0.1


@every_family
def test_grad_checkpointing(name):
    plain = create(name).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        torch.manual_seed(0)
        model(images_for(model)).square().mean().backward()
    for (key, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert a.grad is not None, key
        torch.testing.assert_close(a.grad, b.grad, msg=key)


@every_family
@torch.no_grad()
def test_copies(name):
    model = create(name)
    images = images_for(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(images), model(images))
        assert not {id(value) for value in other.parameters()} & {id(value) for value in model.parameters()}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("output", ["ensemble", 2])
@pytest.mark.parametrize("name", [FEW[0], *REST])
@torch.no_grad()
@pytest.mark.long
def test_graphs(name, output):
    model = create(name, output=output)
    images = images_for(model)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
    nodes = get_graph_node_names(model)[1]
    assert torch.equal(create_feature_extractor(model, {nodes[-1]: "out"})(images)["out"], model(images))
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    more = torch.cat([images, images + 1])
    torch.testing.assert_close(program.module()(more), model(more), atol=1e-5, rtol=1e-4)


# Weights and folders


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"in_chans": 1}, {"output": "final"}])
def test_numbers_are_the_same_whether_or_not_the_stages_are_known(kwargs):
    found = []
    for known in (False, True):
        if not known:
            structure_of_backbone.cache_clear()
            compare_stages.cache_clear()
        torch.manual_seed(3)
        model = timm.create_model("sssd_backbone", backbone="regnetx_002", cifar_stem=True, **kwargs)
        found.append(([*model.state_dict().values()], torch.rand(1).item()))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    torch.manual_seed(3)
    arguments = {"num_classes": 10, **{key: value for key, value in kwargs.items() if key != "output"}}
    own = timm.create_model("regnetx_002", **arguments)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize("name", [FEW[0], *REST])
def test_timm_s_weights_into_the_trunk(name):
    torch.manual_seed(5)
    weights = timm.create_model(backbone_of(name), num_classes=0)
    model = create(name)
    if "vit" in name:  # its patches have another size
        with pytest.raises(
            UserError,
            match=rf"which are of {backbone_of(name)}, do not fit the trunk of .*--model {backbone_of(name)}, or",
        ):
            load_trunk(model, weights)
        return
    load_trunk(model, weights)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.state_dict().items())


USE = """
import sys, sssd_zoo, timm, torch
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.networks import load_network
# To rounding: how a convolution adds up depends on threads and on where its weights lie in memory.
same = lambda a, b: bool((a - b).abs().max() <= 1e-5 * b.abs().max())
images = torch.load(FOLDER + "/images.pt")
wanted = torch.load(FOLDER + "/wanted.pt")
model = timm.create_model("local-dir:" + FOLDER, pretrained=True).eval()
print(same(model(images), wanted["ensemble"]), type(model).__name__, architecture_of(model))
print(same(load_network(FOLDER, output=2).eval()(images), wanted[2]), model.thresholds)
trunk = timm.create_model("local-dir:" + FOLDER, pretrained=True, features_only=True).eval()
print(same(trunk(images)[-1], wanted["map"]))
"""


@torch.no_grad()
@pytest.mark.long
def test_a_network_named_while_running_loads_in_another_process(tmp_path):
    name = choose_model("regnetx_002", 32, exits=True)
    assert name == "sssd_regnetx_002_cifar"
    model = create(name)
    model.thresholds = [0.5, 0.25, 1.0]
    images = images_for(model)
    save_network(tmp_path, model, name, input_size=32)
    exits = model.forward_exits(images).logits
    torch.save({"ensemble": model(images), 2: exits[1], "map": model.forward_features(images)}, tmp_path / "wanted.pt")
    torch.save(images, tmp_path / "images.pt")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "sssd_backbone"
    assert config["model_args"]["backbone"] == "regnetx_002"
    done = command("-c", USE.replace("FOLDER", repr(str(tmp_path))))
    assert done.stdout.splitlines() == [
        "True MultiExitRegNet sssd_regnetx_002_cifar", "True [0.5, 0.25, 1.0]", "True",
    ], done.stderr  # fmt: skip
    # Saved again by whoever loaded it, it is still a network that any process knows.
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert architecture_of(again) == name
    save_network(tmp_path / "again", again, architecture_of(again))
    assert json.loads((tmp_path / "again/config.json").read_text())["model_args"] == config["model_args"]


@pytest.mark.parametrize("name", ["sssd_mobilenetv3_small_100_cifar", "sssd_vit_tiny_patch16_224_cifar"])
@torch.no_grad()
def test_local_dir_round_trip(name, tmp_path):
    model = create(name)
    images = images_for(model)
    save_network(tmp_path, model, name)
    exits = model.forward_exits(images).logits
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))
    for output in OUTPUTS:
        small = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, output=output).eval()
        assert torch.equal(small(images), exits[3 if output == "final" else output - 1])


# Refusals


@pytest.mark.parametrize(
    ("backbone", "cifar_stem", "message"),
    [
        ("levit_128s", False, "'levit_128s' cannot have exits: it has 3 stages that timm knows of"),
        ("hrnet_w18_small", False, "'hrnet_w18_small' cannot have exits: "),
        ("xception41", False, "'xception41' cannot have exits: "),
        ("deit_tiny_distilled_patch16_224", False, "'deit_tiny_distilled_patch16_224' cannot have exits: "),
        ("swin_tiny_patch4_window7_224", True, "'swin_tiny_patch4_window7_224' cannot have a stem for small images: "),
        ("no_such_network", False, "timm has no network 'no_such_network'"),
        ("sssd_resnet18", False, "timm has no network 'sssd_resnet18' of its own"),
        ("hf-hub:someone/thing", False, "timm has no network 'hf-hub:someone/thing'"),
    ],
)
def test_what_cannot_have_exits_is_refused_in_one_line(backbone, cifar_stem, message):
    with pytest.raises(UserError) as caught:
        timm.create_model("sssd_backbone", backbone=backbone, cifar_stem=cifar_stem)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_size_that_a_network_does_not_take_is_refused():
    swin = choose_model("swin_tiny_patch4_window7_224", 224, exits=True)
    check_sizes(swin, [224])
    with pytest.raises(UserError, match=r"does not take images of 64 px: give --image_size 224, or another network$"):
        check_sizes(swin, [224, 64])
    check_sizes(choose_model("vit_tiny_patch16_224", 64, exits=True), [64, 96])


def test_wrong_arguments():
    with pytest.raises(UserError, match="no exits='attention'"):
        timm.create_model("sssd_mobilenetv3_small_100", exits="attention")
    with pytest.raises(UserError, match="change the depth or the widths"):
        timm.create_model("sssd_resnet50d", layers=(3, 4, 7, 3), device="meta")
    with pytest.raises(UserError, match="change the depth or the widths"):
        timm.create_model("sssd_vit_tiny_patch16_224", embed_dim=96, device="meta")
    with pytest.raises(UserError, match="names weights"):
        named_backbone("regnety_004.pycls_in1k", cifar_stem=True)


def test_names():
    assert has_network("sssd_regnetx_004_cifar")  # of a report, say
    assert timm.is_model("sssd_regnetx_004_cifar")
    assert not has_network("sssd_no_such_network")
    assert choose_model("sssd_regnetx_002", 32, exits=True) == "sssd_regnetx_002"
    assert choose_model("resnet18", 32, exits=True) == "sssd_resnet18_cifar"
    assert load_network("sssd_regnetx_002", pretrained=False, num_classes=2).num_classes == 2


def test_commands_refuse_in_one_line(folder_of_images, tmp_path, capsys):
    for model, reason in (("levit_128s", "3 stages"), ("regnety_004.pycls_in1k", "--pretrain.init")):
        words = ["fit", "--data", folder_of_images, "--out", tmp_path / "run", "--image_size", "224", "--model", model]
        assert sssd(*words) == 2
        assert reason in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [{}, {"depth": 4, "embed_dim": 16, "num_heads": 1}])
def test_a_folder_cannot_ask_for_more_memory_than_its_weights(arguments, tmp_path):
    arguments = {"backbone": "vit_giant_patch14_reg4_dinov2", "output": "final", **arguments}
    config = {"architecture": "sssd_backbone", "num_classes": 2, "model_args": arguments, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"head.weight": torch.zeros(2, 8)}, tmp_path / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"config\.json"):
        check_network(read_config(tmp_path / "config.json"), tmp_path / "model.safetensors", str(tmp_path))
    with pytest.raises(UserError, match="cannot load"):
        load_network(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; its weights are 4.5 GB
