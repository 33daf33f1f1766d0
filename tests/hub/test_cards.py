"""The bundled weights: each loads on a machine without a network and is as good as its card says."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch

import sssd_zoo
from helpers.commands import ROOT, command
from sssd_zoo.cli import run
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json
from sssd_zoo.hub.cards import sample_accuracy

CARDS = ROOT / "hub_cards"
NAMES = timm.list_pretrained("sssd_*")


def test_every_pretrained_network_has_a_card_and_the_other_way_round():
    assert NAMES
    assert sorted(path.parent.name for path in CARDS.glob("*/metrics.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_bundled_weights_are_as_good_as_their_card_says(name):
    weights = Path(sssd_zoo.__file__).parent / "weights" / f"{name}.safetensors"
    card = read_json(CARDS / name / "metrics.json")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["weights"]["sha256"]
    network = timm.create_model(name, pretrained=True).eval()
    assert next(network.parameters()).dtype == torch.float32
    config = read_json(CARDS / name / "config.json")
    for key in ("input_size", "num_classes", "mean", "std", "label_names"):
        ours, theirs = network.pretrained_cfg[key], config["pretrained_cfg"][key]
        assert ours == (tuple(theirs) if isinstance(theirs, list) else theirs), key
    measured = sample_accuracy(network)
    # They are the same numbers, unless an image of the 1,000 lies on the edge between two classes.
    assert measured == pytest.approx(card["weights"]["check"], abs=0.11)
    if "knn" not in measured:  # the card's own figures are of all test images: 1,000 of them lie within 2 points
        ours = card["accuracy"][0]
        stated = dict(zip(("1", "2", "3", "4", "ensemble"), [*ours["exits"], ours["ensemble"]], strict=True))
        assert measured == pytest.approx(stated, abs=2)


def test_the_one_liner_of_the_readme_works_offline():
    code = (
        "import sssd_zoo, timm; print(timm.create_model('sssd_resnet18_cifar', pretrained=True, output=2).num_classes)"
    )
    done = command("-c", code, environment={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.stdout.split() == ["10"], done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_sssd_models_lists_them_with_their_accuracies(name, capsys):
    run("models", ["--pattern", name.split(".")[0]])
    card = read_json(CARDS / name / "metrics.json")
    words = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name)).split()
    measured = [*card["accuracy"][0]["exits"], card["accuracy"][0]["ensemble"]]
    assert words[1:6] == [f"{value:.2f}" for value in measured]


def test_missing_weights_are_named(monkeypatch):
    overlay = {"file": "/no/such.safetensors"}
    with pytest.raises(UserError, match="are missing"):
        timm.create_model("sssd_resnet18_cifar", pretrained=True, pretrained_cfg_overlay=overlay)
