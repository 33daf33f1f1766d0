"""`sssd predict`: answers of the network, whichever exit gives them, and images of all kinds."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import one_line, sssd
from helpers.networks import poisoned, save_tiny
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.inputs import prepared
from sssd_zoo.data.loading import load_images
from sssd_zoo.models.saving import save_network

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder_of_images):
    """A run folder: a network with thresholds at which images leave at several exits, in its `model`."""
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=3, layers=(1, 1, 1, 1)).eval()
    data = load_images(DataConfig(data=str(folder_of_images)), progress=False)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    images = prepared(data.gather(torch.arange(len(data))), model)
    with torch.no_grad():
        exits = model.forward_exits(images).logits[:3]
    confidences = [logits.softmax(1).amax(1).sort().values for logits in exits]
    model.thresholds = [(own[23:25].sum() / 2).item() for own in confidences]
    path = tmp_path_factory.mktemp("run")
    save_network(path / "model", model, "sssd_resnet18", input_size=32, label_names=CLASSES)
    return path


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def predict(run, *words):
    return sssd("predict", run, *words, "--device", "cpu", "--precision", "fp32")


def test_early_exit_and_fixed_exits(run, folder_of_images, capsys):
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    data = load_images(DataConfig(data=str(folder_of_images)), progress=False)
    images = prepared(data.gather(torch.arange(len(data))), model)
    capsys.readouterr()
    with torch.no_grad():
        early, exits = model.forward_early(images), model.forward_exits(images)
        ensemble = model(images)
    assert predict(run, folder_of_images, "--format", "jsonl", "--batch_size", "20") == 0
    found = lines(capsys)
    assert [line["exit"] for line in found] == early.exit.tolist()
    assert len(set(early.exit.tolist())) > 1
    assert [line["class"] for line in found] == [CLASSES[i] for i in early.logits.argmax(1)]
    confidences = early.logits.softmax(1).amax(1)
    assert [line["confidence"] for line in found] == pytest.approx(confidences.tolist(), abs=1e-5)
    assert [line["image"] for line in found] == sorted(line["image"] for line in found)

    for output, logits, name in (
        ("2", exits.logits[1], 2),
        ("final", exits.logits[3], 4),
        ("ensemble", ensemble, "ensemble"),
    ):
        assert predict(run, folder_of_images, "--format", "jsonl", "--output", output) == 0
        found = lines(capsys)
        assert {line["exit"] for line in found} == {name}
        assert [line["confidence"] for line in found] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)

    assert predict(run, folder_of_images, "--format", "jsonl", "--thresholds", "[1, 0, 0]") == 0
    assert {line["exit"] for line in lines(capsys)} == {2}


def test_kinds_of_images_and_the_table(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)
    grey = Image.fromarray(pixels)
    for mode in ("L", "RGB", "RGBA", "CMYK", "P"):
        grey.convert("RGB").convert(mode).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    (tmp_path / "notes.txt").write_text("no image")
    assert predict(run, *sorted(tmp_path.glob("*.png")), tmp_path / "CMYK.tif") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["class", "confidence", "exit", "image"]
    assert len(out) == 6
    rows = {line.split()[-1].rsplit("/", 1)[-1]: line.split()[:-1] for line in out[1:]}
    assert rows["L.png"] == rows["RGB.png"] == rows["RGBA.png"]
    assert all(row[0] in CLASSES and 0 < float(row[1]) <= 1 and row[2] in "1234" for row in rows.values())
    assert predict(run, tmp_path) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_corrupt_images(run, folder_of_images, tmp_path, capsys):
    good = folder_of_images / "red" / "00.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    assert predict(run, tmp_path, good, "--format", "jsonl") == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["image"] for line in captured.out.splitlines()] == [str(good)]
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "2 images" in error
    assert "cut.png" in error
    assert "text.jpg" in error
    assert predict(run, tmp_path, good, "--format", "jsonl", "--max_corrupt", "2") == 0
    assert len(lines(capsys)) == 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network without thresholds."""
    return save_tiny(tmp_path_factory.mktemp("plain") / "network", classes=3)


@pytest.fixture(scope="module")
def exit_two(tmp_path_factory):
    """A network with one exit."""
    network = timm.create_model("sssd_resnet18_cifar", num_classes=3, output="2")
    folder = tmp_path_factory.mktemp("exit") / "network"
    save_network(folder, network, "sssd_resnet18_cifar", input_size=32)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}"], "images"),
        (["{run}", "{tmp_path}/none.png"], "none.png"),
        (["{run}", "{tmp_path}"], "is empty: give a folder with images"),
        (["{tmp_path}/no_model", "{image}"], "no folder"),
        (["{plain}", "{image}", "--output", "early-exit"], "no thresholds"),
        (["{run}", "{image}", "--output", "2", "--thresholds", "[1, 1, 1]"], "--thresholds"),
        (["{exit_two}", "{image}", "--thresholds", "[1, 1, 1]"], "has one exit, so there is no early exit"),
        (["{run}", "{image}", "--thresholds", "[1, 1]"], "thresholds is [1.0, 1.0]; it must have 3 items"),
        (["resnet10t", "{image}"], "resnet10t"),
        (["{run}", "", "{image}"], "images[0] is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(words, message, run, plain, exit_two, folder_of_images, tmp_path, capsys):
    places = {
        "run": run,
        "plain": plain,
        "exit_two": exit_two,
        "tmp_path": tmp_path,
        "image": folder_of_images / "red" / "00.png",
    }
    assert sssd("predict", *(word.format(**places) for word in words), "--device", "cpu") == 2
    assert message in one_line(capsys)


def test_a_mean_of_fewer_channels_is_one_line(plain, folder_of_images, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5]
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    assert predict(tmp_path / "net", folder_of_images) == 2
    assert "has mean [0.5], and the network 3 input channels" in one_line(capsys)


def test_a_network_without_thresholds_answers_by_its_ensemble(plain, folder_of_images, capsys):
    assert predict(plain, folder_of_images / "red" / "00.png") == 0
    assert "ensemble" in capsys.readouterr().out


def test_shipped_network(folder_of_images, capsys):
    image = folder_of_images / "red" / "00.png"
    assert predict("sssd_resnet18_cifar.cifar10", image, "--format", "jsonl", "--output", "1") == 0
    (line,) = lines(capsys)
    assert line["exit"] == 1
    assert line["class"] in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def test_wordnet_ids_are_shown_as_words(folder_of_images, capsys):
    image = folder_of_images / "red" / "00.png"
    assert predict("sssd_resnet18.dist_tiny_imagenet_32", image, "--format", "jsonl", "--output", "1") == 0
    (line,) = lines(capsys)
    assert re.fullmatch(r"n\d{8}", line["class"])
    assert predict("sssd_resnet18.dist_tiny_imagenet_32", image, "--output", "1") == 0
    assert f"\n{line['description'].split(',')[0]} " in capsys.readouterr().out


def test_help_reads_well(capsys):
    assert sssd("predict", "--help") == 0
    out = capsys.readouterr().out
    assert "MODEL IMAGES [IMAGES ...]" in " ".join(out.split())
    assert "image files, or folders of them" in " ".join(out.split())


def test_a_network_that_gives_nan_answers_nothing(plain, folder_of_images, tmp_path, capsys):
    damaged = poisoned(plain, tmp_path / "network")
    assert predict(damaged, folder_of_images / "red" / "00.png") == 2
    line = one_line(capsys)
    assert line.endswith("red/00.png: give --precision fp32, or check its weights")
    assert "gives NaN or infinity for" in line
