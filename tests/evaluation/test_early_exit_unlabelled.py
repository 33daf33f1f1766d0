"""Early exit without labels: thresholds by agreement with the ensemble, and which temperatures stay."""

import json
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F

from helpers.commands import one_line, sssd
from helpers.networks import save_tiny
from sssd_zoo.configs import EarlyExitArgs
from sssd_zoo.evaluation.calibration import (
    SHARED,
    calibration_error,
    choose,
    early_answers,
    fit_temperatures,
    useful_temperatures,
)
from sssd_zoo.models import StageCosts, ensemble_logits

COSTS = StageCosts((100.0, 80.0, 70.0, 60.0), (9.0, 7.0, 5.0, 1.0))
BEFORE = [0.3, 1.0, 4.0, 2.0]


def logits_and_labels(seed, count=2000, classes=5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(4, count, classes, generator=generator)
    return noise + torch.tensor([0.8, 1.2, 1.6, 2.0]).view(-1, 1, 1) * F.one_hot(labels, classes), labels


def test_thresholds_change_no_more_answers_than_allowed():
    logits, _ = logits_and_labels(0)
    ensemble = ensemble_logits(list(logits)).argmax(1)
    taken_at = []
    for allowed in (0.5, 2.0, 20.0, 100.0):
        args = EarlyExitArgs(model="m", out="o", data="d", answers_changed=allowed)
        thresholds = choose(logits, ensemble, COSTS, args, by_agreement=True)
        assert len(set(thresholds)) == 1
        assert thresholds[0] in SHARED
        answers, taken = early_answers(logits, thresholds)
        changed = (answers != ensemble).double().mean().item()
        assert 100 * changed < allowed
        taken_at.append(taken.double().mean().item())
    assert taken_at[0] >= taken_at[1] > taken_at[2] > taken_at[3] == 1


def test_only_temperatures_that_help_stay():
    logits, labels = logits_and_labels(1)
    test, test_labels = logits_and_labels(2)
    fitted = fit_temperatures(logits * torch.tensor(BEFORE).view(-1, 1, 1), labels)
    scaled = test * torch.tensor(BEFORE).view(-1, 1, 1)
    kept = useful_temperatures(fitted, scaled, test_labels)
    after = scaled / torch.tensor(kept).view(-1, 1, 1)
    assert any(value != 1 for value in kept)
    assert all(value in (1, temperature) for value, temperature in zip(kept, fitted, strict=True))
    for own, old in [*zip(after, scaled, strict=True), (ensemble_logits(list(after)), ensemble_logits(list(scaled)))]:
        assert calibration_error(own, test_labels) <= calibration_error(old, test_labels)
    assert useful_temperatures([20.0] * 4, test, test_labels) == [1] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "mine" / "model"
    return save_tiny(path, 3, input_size=32, label_names=["blue", "green", "red"])


@pytest.fixture(scope="module")
def photos(folder_of_images, tmp_path_factory):
    """The images without folders of classes."""
    path = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(sorted(folder_of_images.rglob("*.png"))):
        shutil.copy(image, path / f"{number}.png")
    assert len(list(path.iterdir())) > 20
    return path


def test_a_folder_of_photos(folder, photos, tmp_path, capsys):
    """No --split, no labels: the run is named as a whole, and half of the images calibrate."""
    words = [folder.parent, "--data", photos, "--runs", "1", "--device", "cpu", "--answers_changed", "20"]
    assert sssd("early-exit", *words, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out/early_exit/report.json").read_text())
    assert report["budget"] == {"answers_changed": 20}
    assert report["temperatures"] == [1] * 4
    assert report["labelled"] is False
    assert report["model"] == "sssd_resnet18"
    assert report["source"] == "mine"
    assert report["answers"]["ensemble"]["agreement"] == 100
    assert "accuracy" not in report["answers"]["early exit"]
    assert report["answers"]["early exit"]["agreement"] >= 50
    for words in ("drawn at random", "20.0 percent of the ensemble's answers", "agreement (%)", "none, as they need"):
        assert words in said
    assert "ECE" not in said
    assert "accuracy" not in said
    before, after = (
        timm.create_model(f"local-dir:{path}", pretrained=True).state_dict() for path in (folder, tmp_path / "out")
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_labelled_images_by_agreement(folder, folder_of_images, tmp_path):
    words = [folder, "--data", folder_of_images, "--split", "train", "--runs", "1", "--device", "cpu"]
    assert sssd("early-exit", *words, "--answers_changed", "100", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out/early_exit/report.json").read_text())
    assert report["exits_taken"] == [1, 0, 0, 0]
    assert {"accuracy", "agreement"} <= report["answers"]["1"].keys()
    assert report["source"] == "mine/model"
    for name, error in report["calibration_error"].items():
        assert error["after"] <= error["before"], name
    text = (tmp_path / "out/early_exit/report.md").read_text()
    assert "sssd early-exit mine/model --data" in text
    assert "Answers changed" in text


def test_mistakes(folder, photos, folder_of_images, tmp_path, capsys):
    other = save_tiny(tmp_path / "four", classes=4)
    cases = [
        ([folder, "--data", photos, "--points_lost", "1"], "label"),
        ([folder, "--data", folder_of_images, "--unlabelled", "true", "--points_lost", "1"], "--answers_changed"),
        ([folder, "--data", folder_of_images], "--unlabelled"),
        ([other, "--data", folder_of_images, "--split", "train"], "--unlabelled"),
        ([folder, "--data", photos, "--answers_changed", "101"], "answers_changed"),
        ([folder, "--data", photos, "--answers_changed", "1", "--latency", "1"], "one budget"),
        ([folder, "--data", photos], "images do not show that early exit would change at most 0.5 percent"),
    ]
    for words, message in cases:
        assert sssd("early-exit", *words, "--out", tmp_path / "out", "--device", "cpu") == 2
        assert message in one_line(capsys)
        assert not (tmp_path / "out").exists()
