"""`sssd fit --method`: the paper's method, anchored or contrastive self distillation."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.commands import TINY, one_line, sssd
from sssd_zoo.api.settings import settings_of
from sssd_zoo.configs import AnchoredConfig, ContrastiveConfig, FitArgs, StudentConfig
from sssd_zoo.errors import UserError
from sssd_zoo.pipeline.fit import with_method


def weight(method, anchor=None, features=None):
    """The anchor's weight of a run with these arguments."""
    distill = StudentConfig(anchor=anchor)
    return with_method(FitArgs(data="d", out="o", method=method, features=features, distill=distill)).distill.anchor


@pytest.mark.parametrize(
    ("method", "anchor", "features", "expected"),
    [
        (None, None, None, 0),
        (None, None, "resnet18", 4),
        (None, 2.5, None, 2.5),
        ("sssd", None, None, 0),
        ("sssd", None, "resnet18", 0),
        ("sssd", 0, "resnet18", 0),
        ("anchored", None, None, 1),
        ("anchored", None, "resnet18", 4),
        ("anchored", 3, None, 3),
        ("contrastive", None, "resnet18", 0),
    ],
)
def test_weight_of_the_anchor(method, anchor, features, expected):
    assert weight(method, anchor, features) == expected


@pytest.mark.parametrize(("method", "anchor"), [("sssd", 1), ("anchored", 0), ("contrastive", 2)])
def test_contradictions(method, anchor):
    with pytest.raises(UserError, match=f"--method {method} and --distill.anchor {anchor} contradict"):
        weight(method, anchor)


@pytest.mark.parametrize(
    ("settings", "warm"),
    [
        ({}, True),
        ({"method": "sssd"}, False),
        ({"init": "resnet18"}, False),
        ({"features": "resnet18"}, False),
        ({"features": "run", "warm_start": True}, True),
        ({"warm_start": False}, False),
        ({"pretrain_model": "resnet50"}, False),
    ],
)
def test_the_contrastive_method_starts_from_its_pretext_unless_something_else_is_given(settings, warm):
    args = with_method(FitArgs(**{"data": "d", "out": "o", "method": "contrastive", **settings}))
    assert args.warm_start is warm


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "sssd"),
        ({"features": "resnet18"}, "anchored"),
        ({"distill": StudentConfig(anchor=2.0)}, "anchored"),
        ({"features": "resnet18", "distill": StudentConfig(anchor=0.0)}, "sssd"),
        ({"method": "contrastive"}, "contrastive"),
    ],
)
def test_the_method_is_saved_by_its_name(settings, method):
    assert with_method(FitArgs(**{"data": "d", "out": "o", **settings})).method == method


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, "contrastive"),
        ({"pretrain.init": "resnet18", "soft": 0.1, "warm_start": True}, "contrastive"),
        ({"method": "sssd"}, "sssd"),
        ({"method": None}, "sssd"),  # config.yaml of a version that did not save what it became
        ({"distill.anchor": 0.0}, "sssd"),
        ({"distill.anchor": 2.0}, "anchored"),
        ({"features": "resnet18"}, "anchored"),
        ({"distill.mix": "mixup"}, "sssd"),
        ({"distill.mix": "none", "distill.anchor": None}, "contrastive"),
        ({"init": "resnet18"}, "sssd"),
        ({"pretrain_model": "resnet50"}, "sssd"),
    ],
)
def test_the_method_that_won_is_used_unless_what_is_given_decides(given, method, tmp_path):
    args, names = settings_of("fit", {"data": "d", "out": str(tmp_path / "run"), **given})
    assert with_method(args, frozenset(names)).method == method


@pytest.mark.long
def test_a_run_keeps_its_method(folder_of_images, tmp_path, capsys):
    run, new = tmp_path / "run", ("--unlabelled", "--workers", "0")
    words = ["fit", "--data", folder_of_images, "--out", run, *TINY, *new]
    assert sssd(*words, "--method", "sssd") == 0
    saved = yaml.safe_load((run / "config.yaml").read_text())
    # None is what versions saved that did not know the default's name.
    for method in ("sssd", None):
        (run / "config.yaml").write_text(yaml.safe_dump({**saved, "method": method}))
        capsys.readouterr()
        assert sssd(*words) == 0
        assert "[distill] done before" in capsys.readouterr().out
        assert yaml.safe_load((run / "config.yaml").read_text())["method"] == "sssd"
    assert sssd(*words, "--method", "contrastive") == 2
    assert "(method: 'sssd' there, 'contrastive' now; " in one_line(capsys)
    assert with_method(FitArgs(data="d", out=str(run), overwrite=True), frozenset()).method == "contrastive"


def test_a_method_takes_its_own_of_the_settings():
    args = FitArgs(data="d", out="o", distill=StudentConfig(epochs=3, contrast=2.0, dense=True))
    assert args.student == AnchoredConfig(epochs=3, dense=True)
    args.method = "contrastive"
    assert args.student == ContrastiveConfig.of(args.distill)
    assert (args.student.epochs, args.student.contrast) == (3, 2.0)


@pytest.mark.long
def test_fit_by_the_contrastive_method(folder_of_images, tmp_path, capsys):
    run, new = tmp_path / "run", ("--unlabelled", "--workers", "0")
    words = ["fit", "--data", folder_of_images, "--out", run, *TINY, *new]
    assert sssd(*words, "--distill.lr", "1e-12", "--more_epochs", "1") == 0
    said = capsys.readouterr().out
    assert "  --method contrastive\n" in said
    assert "  --distill.optimizer adamw\n" in said
    assert "  --distill.queue_size 16\n" in said
    pretrained, trained, further = (
        load_file(run / name / "model.safetensors") for name in ("pretrain", "distill", "more-1")
    )
    for name in ("layer1.0.conv1.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(trained[name], pretrained[name])
        torch.testing.assert_close(further[name], pretrained[name])
    assert {"contrast", "contrast_top1"} <= json.loads(
        (run / "distill" / "metrics.jsonl").read_text().split("\n")[0]
    ).keys()
    used = yaml.safe_load((run / "config.yaml").read_text())
    assert (used["method"], used["warm_start"], used["distill"]["optimizer"]) == ("contrastive", True, "adamw")
    note = "**Method**: contrastive self distillation (weight 3), from that network's weights"
    assert all(note in (run / name).read_text() for name in ("report.md", "model/README.md"))

    assert sssd("fit", "--config", run / "config.yaml") == 0, "what was chosen is not chosen again"
    assert "[more-1] done before" in capsys.readouterr().out
    assert sssd(*words, "--distill.lr", "1e-12", "--more_epochs", "1", "--distill.contrast", "2") == 2
    assert "distill.contrast: 3.0 there, 2.0 now" in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--distill.mix", "mixup", "--method", "contrastive"), "no other view of mixed images: remove mix mixup"),
        (("--distill.queue_size", "999"), "distill: queue_size 999 is larger than the data set of 48 images"),
        (("--distill.splits", "3"), "distill: splits 3 must divide"),
        (("--distill.dense", "true"), "--distill.dense is of the anchor's network"),
        (("--distill.clusters", "false"), "--distill.clusters false leaves nothing to learn without --distill.anchor"),
        (("--method", "sssd", "--distill.contrast", "2"), "--distill.contrast 2 is of --method contrastive: give that"),
    ],
)
def test_contrastive_settings_that_cannot_work_are_told_at_once(words, said, folder_of_images, tmp_path, capsys):
    fit = ["fit", "--data", folder_of_images, "--out", tmp_path / "run", *TINY]
    assert sssd(*fit, *words) == 2
    assert one_line(capsys).count(said) == 1
    assert not (tmp_path / "run").exists()
