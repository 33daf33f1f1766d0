"""M_ssl of other kinds, sizes and data, through `sssd fit` and `sssd compare` on tiny data."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from helpers.commands import TINY, TINY_COMPARE, one_line, sssd
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.pretext import weights_digest


@pytest.fixture(scope="module")
def other_images(tmp_path_factory) -> Path:
    """36 images of 24 px without labels: another D_pre."""
    root = tmp_path_factory.mktemp("other")
    random = np.random.default_rng(7)
    for number in range(36):
        Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / f"{number:02}.png")
    return root


def encoder(folder: Path, seed: int) -> Path:
    """A network of timm's own, with weights, as a folder that timm loads."""
    torch.manual_seed(seed)
    save_network(folder, timm.create_model("resnet10t", num_classes=0), "resnet10t", input_size=32)
    return folder


def ran(capsys) -> dict[str, str]:
    """What each step said of itself: 'before', 'again' or 'new'."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("["):
            name = line[1:].split("]")[0]
            found.setdefault(name, "before" if "done before" in line else "again" if "repeated" in line else "new")
    return found


@pytest.mark.long
def test_labels_of_any_timm_network_and_nothing_pretrained(folder_of_images, tmp_path, capsys):
    network, out = encoder(tmp_path / "encoder", 0), tmp_path / "run"
    words = ["fit", "--data", folder_of_images, "--out", out, *TINY, "--features", network]
    assert sssd(*words) == 0
    steps = ran(capsys)
    assert "pretrain" not in steps
    assert not (out / "pretrain").exists()
    assert "`encoder`, as it is" in (out / "report.md").read_text()
    found = json.loads((out / "metrics.json").read_text())["clustered"]
    assert found.keys() == {"linear probe", "weighted kNN (k = 38)"}

    alone = tmp_path / "labels"
    words_alone = ["--data", folder_of_images, "--model", network, "--k", "4", "--out", alone]
    assert sssd("pseudo-label", *words_alone) == 0
    ours, theirs = PseudoLabels.load(out / "labels"), PseudoLabels.load(alone)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    capsys.readouterr()

    assert sssd(*words) == 0
    assert set(ran(capsys).values()) == {"before"}
    encoder(network, 1)  # other weights at the same place
    assert sssd(*words) == 2
    assert "features" in one_line(capsys)
    assert sssd(*words, "--overwrite") == 0
    steps = ran(capsys)
    assert {name: steps[name] for name in ("labels", "distill", "baseline")} == {
        "labels": "again",
        "distill": "again",
        "baseline": "before",
    }
    assert sssd("card", "--run", out, "--out", tmp_path / "card", "--weights", tmp_path / "weights") == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "pseudo labels from the features of `encoder`" in card
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "card").glob("*.*"))


@pytest.mark.slow
def test_a_pretext_of_another_network_on_other_data(folder_of_images, other_images, tmp_path, capsys):
    words = ["fit", "--data", folder_of_images, "--out", tmp_path, *TINY, "--baseline", "false"]
    words += ["--pretrain_model", "sssd_resnet34", "--pretrain_data", other_images]
    assert sssd(*words) == 0
    capsys.readouterr()
    architectures = [
        json.loads((tmp_path / name / "config.json").read_text())["architecture"] for name in ("pretrain", "model")
    ]
    assert architectures == ["sssd_resnet34", "sssd_resnet18"]
    record = json.loads((tmp_path / "steps" / "pretrain.json").read_text())["inputs"]
    labels = json.loads((tmp_path / "steps" / "labels.json").read_text())["inputs"]
    assert (record["images"], labels["images"]) == (36, 48)
    assert labels["pretrain.arch"] == "sssd_resnet34"
    assert labels["pretrain.data"] == record["data"] != labels["data"]
    assert f"on `{other_images.name}`, 36 images" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["pretrain_data"] == other_images.name

    words = ["fit", "--overwrite", *words[1:]]
    assert sssd(*words, "--model", "sssd_resnet34") == 0  # another student: the pretext stays
    steps = ran(capsys)
    assert (steps["pretrain"], steps["distill"]) == ("before", "again")
    assert sssd(*words[:-1], folder_of_images) == 0
    steps = ran(capsys)
    assert {steps[name] for name in ("pretrain", "labels", "distill")} == {"again"}


@pytest.mark.slow
def test_compare_follows_and_its_tables_join_other_comparisons(folder_of_images, other_images, tmp_path, capsys):
    network = encoder(tmp_path / "encoder", 0)
    words = ["compare", "--data", folder_of_images, *TINY_COMPARE, "--seeds", "[0]"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert sssd(*words, "--out", first, "--features", network, "--methods", "[sssd, seed]") == 0
    assert not (first / "seed-0" / "pretrain").exists()
    digest = weights_digest(timm.create_model(f"local-dir:{network}", pretrained=True, num_classes=0))
    record = json.loads((first / "seed-0" / "steps" / "seed.json").read_text())
    assert record["inputs"]["features"] == digest, "SEED's teacher is the same network"
    assert record["inputs"]["arch"] == "sssd_resnet18"
    capsys.readouterr()

    words += ["--out", second, "--methods", "[sssd]", "--pretrain_data", other_images]
    assert sssd(*words, "--also", f"[{first}]") == 0
    report = (second / "report.md").read_text()
    assert "| r2 | " in report
    assert f"`{other_images.name}`, 36" in report
    assert "`encoder`, as it is" in report
    assert report.split("### Table 6")[1].count("| ours | `") == 2
    assert len((second / "results.csv").read_text().splitlines()) == 4
    assert sssd(*words, "--also", f"[{tmp_path}]") == 2
    assert "results.json" in one_line(capsys)
    (tmp_path / "results.json").write_text('[{"method": "sssd"}]')
    assert sssd(*words, "--also", f"[{tmp_path}]") == 2
    assert "run its comparison once more" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--features", "resnet_of_dreams"], "resnet_of_dreams"),
        (["--features", "hf-hub:nobody/nothing"], "hf-hub:nobody/nothing"),
        (["--features", "sssd_resnet34"], "No pretrained weights"),
        (["--features", "sssd_resnet18_cifar", "--pretrain_data", "x"], "remove --pretrain_data"),
        (["--pretrain_model", "resnet_of_dreams"], "resnet_of_dreams"),
        (["--pretrain_split", "train"], "--pretrain_data"),
        (["--pretrain_data", "/no/such/folder"], "/no/such/folder"),
        (["--pretrain_model", "sssd_resnet34", "--warm_start"], "do not fit"),
        (["--features", "sssd_resnet18_cifar", "--warm_start"], "do not fit"),
        (["--pretrain.init", "sssd_resnet18_cifar"], "do not fit"),
        (["--pretrain.init", "/no/such/run"], "/no/such/run"),
        (["--features", "sssd_resnet18", "--pretrain.init", "sssd_resnet18"], "remove --pretrain.init"),
        (["--soft", "0.1"], "--cluster.nearest"),
        (["--soft", "0", "--cluster.nearest", "8"], "soft is 0.0;"),
        (["--cluster.nearest", "0"], "cluster.nearest is 0;"),
        (["--cluster.redos", "0"], "cluster.redos is 0;"),
    ],
)
def test_mistakes_cost_one_line_and_no_training(change, words, folder_of_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sssd("fit", "--data", folder_of_images, "--out", tmp_path / "run", *TINY, *change) == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_too_few_other_images_for_the_queue(folder_of_images, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for number, file in enumerate(sorted(folder_of_images.rglob("*.png"))[:20]):
        (few / f"{number}.png").write_bytes(file.read_bytes())
    words = ["fit", "--data", folder_of_images, "--out", tmp_path / "run", *TINY, "--pretrain_data", few]
    assert sssd(*words) == 2
    assert "queue_size 32" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_recipes_can_be_layered(folder_of_images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sssd_zoo.pipeline.fit.fit", lambda args, given: seen.append(args))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": "x", "pretrain": {"epochs": 7, "lr": 0.5}}))
    (tmp_path / "row.yaml").write_text(yaml.safe_dump({"pretrain_model": "sssd_resnet50", "pretrain": {"epochs": 9}}))
    words = ["fit", "--config", tmp_path / "base.yaml", "--config", tmp_path / "row.yaml", "--out", "y"]
    assert sssd(*words) == 0
    assert (seen[0].data, seen[0].pretrain_model) == ("x", "sssd_resnet50")
    assert (seen[0].pretrain.epochs, seen[0].pretrain.lr) == (9, 0.5)


@pytest.mark.slow
def test_pretraining_goes_on_from_weights_that_are_there(folder_of_images, tmp_path, capsys):
    """The trunk of a run and that of weights with exits and heads; a rate of nothing leaves it as it was."""
    torch.manual_seed(3)
    start = timm.create_model("sssd_resnet18", num_classes=5)
    save_network(tmp_path / "start", start, "sssd_resnet18", input_size=32)
    words = ["pretrain", "--data", folder_of_images, "--model", "sssd_resnet18", "--image_size", "32", "--epochs", "1"]
    words += ["--batch_size", "16", "--splits", "2", "--queue_size", "32", "--device", "cpu", "--lr", "1e-9"]
    words += ["--weight_decay", "0"]
    assert sssd(*words, "--out", tmp_path / "run", "--init", tmp_path / "start") == 0
    trained = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).state_dict()
    weights = start.state_dict()
    for name in (name for name, _ in timm.create_model("sssd_resnet18", output="final").named_parameters()):
        if not name.startswith("fc."):
            torch.testing.assert_close(trained[name], weights[name], atol=1e-5, rtol=0)

    fit = ["fit", "--data", folder_of_images, "--out", tmp_path / "fit", *TINY, "--baseline", "false"]
    # The weights below are of no trained network: a student that started from them would have no features.
    fit += ["--pretrain.init", tmp_path / "start", "--method", "sssd"]
    capsys.readouterr()
    assert sssd(*fit) == 0
    assert "from the weights of `start`" in (tmp_path / "fit" / "report.md").read_text()
    capsys.readouterr()
    assert sssd(*fit) == 0
    assert set(ran(capsys).values()) == {"before"}
    with torch.no_grad():
        start.conv1.weight.add_(1)
    save_network(tmp_path / "start", start, "sssd_resnet18", input_size=32)
    assert sssd(*fit) == 2
    assert "init: " in capsys.readouterr().err
    assert sssd(*fit, "--overwrite") == 0
    assert ran(capsys)["pretrain"] == "again", "other weights at the same place"
    assert sssd("card", "--run", tmp_path / "fit", "--out", tmp_path / "card", "--weights", tmp_path / "weights") == 0
    assert "started from the weights of `start`" in (tmp_path / "card" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "card" / "recipe.yaml").read_text()
