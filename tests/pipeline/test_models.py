"""`sssd models` against what timm knows."""

import timm

import sssd_zoo  # noqa: F401  registers the models with timm
from helpers.commands import one_line, sssd


def test_all_networks_and_weights_are_listed(capsys):
    assert sssd("models") == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    tags = [tag for name in timm.list_models("sssd_*") for tag in timm.list_pretrained(f"{name}.*")]
    assert first_words == ["model", *timm.list_models("sssd_*"), "pretrained=True", *tags]


def test_a_pattern_chooses_some(capsys):
    assert sssd("models", "--pattern", "sssd_resnet50*") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("sssd_")]
    assert names == ["sssd_resnet50", "sssd_resnet50_cifar"]
    assert sssd("models", "--pattern", "resnet*") == 2
    assert "no network of this package matches 'resnet*'" in one_line(capsys)
