"""`sssd models` against what timm knows."""

import timm

import sssd_zoo  # noqa: F401  registers the models with timm
from helpers.commands import one_line, sssd
from helpers.networks import BACKBONES, NAMES


def test_all_networks_and_weights_are_listed(capsys):
    assert sssd("models") == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    names = sorted({*NAMES, *BACKBONES} - {"sssd_backbone"}, key=timm.list_models("sssd_*").index)
    tags = [tag for name in names for tag in timm.list_pretrained(f"{name}.*")]
    assert first_words == ["model", *names, "pretrained=True", *tags]


def test_a_pattern_chooses_some(capsys):
    assert sssd("models", "--pattern", "sssd_resnet50*") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sssd_")]
    names = ["sssd_resnet50", "sssd_resnet50_cifar", "sssd_resnet50d", "sssd_resnet50d_cifar"]
    assert [line.split()[0] for line in lines] == names
    assert len({line.index(" M ") for line in lines}) == 1  # the columns stand below each other
    assert sssd("models", "--pattern", "resnet*") == 2
    assert "no network of this package matches 'resnet*'" in one_line(capsys)
