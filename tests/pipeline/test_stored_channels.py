"""Networks of images as they are stored: from training to prediction, all commands read them alike."""

import json

import numpy as np
import pytest
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import TINY, one_line, sssd
from sssd_zoo.data.augment import normalise
from sssd_zoo.data.inputs import input_spec
from sssd_zoo.files.run_folder import CORRUPT
from sssd_zoo.models.networks import load_network

CPU = ["--device", "cpu", "--precision", "fp32"]
SIDE, CHANNELS = 16, 4
TRAINED = ["--epochs", "1", "--batch_size", "16", "--image_size", str(SIDE), "--model", "sssd_resnet18_cifar", *CPU]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 24 images of four channels and 12 of 16 bits, told apart by the fourth channel."""
    root, random = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    for number, name in enumerate(("dry", "wet")):
        (root / name).mkdir()
        for image in range(24):
            pixels = random.integers(0, 2000, (SIDE, SIDE, CHANNELS)).astype(np.uint16)
            pixels[..., 3] += 2000 * number
            np.save(root / name / f"{image:02}.npy", pixels)
    return root


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A network that was distilled from the true labels, and turned and jittered on the way."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ["--labels", "true", "--augment.quarter_turns", "--augment.vertical_flip", "0.5", "--augment.jitter", "0.2"]
    assert sssd("distill", "--data", images, "--channels", "4", "--out", out, *words, *TRAINED) == 0
    return out


def test_config_json_says_how_images_are_read(trained, images):
    config = json.loads((trained / "config.json").read_text())
    values = np.stack([np.load(file) for file in sorted(images.rglob("*.npy"))]) / 65535
    described = config["pretrained_cfg"]
    assert described["input_size"] == [CHANNELS, SIDE, SIDE]
    np.testing.assert_allclose(described["mean"], values.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(described["std"], values.std((0, 1, 2)), rtol=1e-4)
    assert config["model_args"] == {"in_chans": 4, "storage_size": SIDE, "bits": 16} | {"global_pool": "avg"}
    network = timm.create_model(f"local-dir:{trained}", pretrained=True)
    assert network.bits == 16
    recipe = (trained / "config.yaml").read_text()
    assert "quarter_turns: true" in recipe


def test_predict_answers_as_the_network_does(trained, images, capsys):
    words = ["--output", "ensemble", "--format", "jsonl", *CPU]
    assert sssd("predict", trained, images, *words) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 48
    network = load_network(str(trained)).eval()
    _, mean, std = input_spec(network)
    for answer in answers[::12]:
        pixels = torch.from_numpy(np.load(answer["image"]).transpose(2, 0, 1)[None] / 65535).float()
        with torch.no_grad():
            confidence, label = network(normalise(pixels, mean, std)).softmax(1).max(1)
        assert answer["class"] == str(int(label))
        assert answer["confidence"] == pytest.approx(float(confidence), abs=1e-4)


def test_measuring_needs_no_channels_flag(trained, images, capsys):
    assert sssd("knn", "--model", trained, "--data", images, "--neighbours", "5", *CPU) == 0
    assert "accuracy of" in capsys.readouterr().out
    assert sssd("knn", "--model", trained, "--data", images, "--channels", "3", *CPU) == 2
    assert "takes images with 4 channels, not 3" in one_line(capsys)


@pytest.mark.slow
def test_an_export_tells_channels_and_bits(trained, tmp_path):
    assert sssd("export", trained, "--format", "torch-export", "--output", "2", "--out", tmp_path / "net.pt2") == 0
    facts = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=facts)
    described = json.loads(facts["metadata.json"])
    assert (described["input_size"], described["bits"]) == ([4, SIDE, SIDE], 16)
    batch = torch.randn(3, 4, SIDE, SIDE)
    expected = load_network(str(trained), output=2).eval()(batch)
    torch.testing.assert_close(program.module()(batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_network_of_16_bit_colours_is_not_one_of_8(images, tmp_path, capsys):
    from helpers.deep import png16

    for number in range(16):
        file = tmp_path / "colour" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png16(np.random.default_rng(number).integers(0, 900, (SIDE, SIDE, 3)).astype(np.uint16)))
    words = ["--queue_size", "16", "--splits", "1", "--epochs", "1", *TRAINED[2:]]
    assert sssd("pretrain", "--data", file.parent, "--channels", "3", "--out", tmp_path / "run", *words) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model_args"]["bits"] == 16
    assert max(config["pretrained_cfg"]["mean"]) < 0.01
    words = ["--model", tmp_path / "run", "--data", file.parent, "--out", tmp_path / "labels", "--k", "2", *CPU]
    assert sssd("pseudo-label", *words) == 0
    assert sssd("pretrain", "--data", file.parent, "--out", tmp_path / "dark", *TRAINED[2:]) == 2
    assert "16-bit colours use less than a tenth" in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrain {data} --channels 4 --augment.hue 0.1", "augment.hue is for RGB images, and these have 4 channels"),
        ("fit {data} --channels 4 --distill.augment.jitter 0.5 --distill.augment.hue 0.1", "augment.hue is for RGB"),
        ("fit {data} --augment.blur 0.1 --pretrain.augment.blur 0.2", "give one of them"),
        ("fit {data} --augment.brightness 0.1", "give augment.jitter above 0 too"),
        ("fit {data} --augment.flip 2", "augment.flip is 2"),
        ("pretrain {data} --augment.rotate 20", "did you mean"),
        ("pretrain {data} --bits 16", "give --channels too"),
        ("distill {data} --labels true --channels 3", "it has 4 channels, and --channels asks for 3"),
        (
            "seed {data} --channels 4 --teacher sssd_resnet18_cifar.cifar10",
            "takes images with 3 channels, and those of",
        ),
        (
            "fit {data} --channels 4 --features sssd_resnet18_cifar.cifar10",
            "takes images with 3 channels, and those of",
        ),
        ("pretrain {data} --channels 4 --init sssd_resnet18_cifar.cifar10", "conv1.weight is [64, 3, 3, 3] there"),
    ],
)
def test_mistakes_are_told_in_a_line(words, message, images, tmp_path, capsys):
    small = [] if "fit" in words else ["--queue_size", "16", "--splits", "1"] if "pretrain" in words else []
    small += ["--queue_size", "16"] if words.startswith("seed") else []
    batch = [] if "fit" in words else ["--batch_size", "16"]
    name, *others = words.replace("{data}", f"--data {images}").split()
    assert sssd(name, *others, "--out", tmp_path / "out", "--device", "cpu", *small, *batch) == 2
    assert message in one_line(capsys)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_estimate_and_the_verdict_know_the_channels(images, tmp_path, capsys):
    words = ["fit", "--data", images, "--unlabelled", "--channels", "4", "--out", tmp_path / "run", *TINY]
    words += [
        "--pretrain.epochs",
        "20",
        "--distill.epochs",
        "20",
        "--distill.anchor",
        "1",
        "--distill.cached_views",
        "2",
    ]
    assert sssd(*words, "--augment.quarter_turns") == 0
    said = capsys.readouterr().out
    assert "by a few measured steps of each training" in said
    assert "--init RUN --features RUN starts from a run on more images of 4 channels" in said
    proposed = json.loads((tmp_path / "run" / "metrics.json").read_text())["verdict"]["next"]
    assert proposed
    assert all(any(has in line for has in ("--channels 4", "--config", "sssd predict")) for line in proposed)
    assert not any("tiny_imagenet" in line or "efficientnet" in line for line in proposed), "those are for RGB images"
    assert sssd("quality", tmp_path / "run", "--data", images, "--format", "json") == 0
    proposed = json.loads(capsys.readouterr().out)["verdict"]["next"]
    assert all("--channels 4" in line for line in proposed if " fit " in line)


@pytest.mark.slow
def test_the_whole_pipeline(images, tmp_path, capsys):
    (images / "dry" / "broken.npy").write_bytes(b"\x93NUMPY, but no more")
    try:
        words = ["--data", images, "--channels", "4", "--max_corrupt", "1", "--augment.quarter_turns", *TINY]
        assert sssd("fit", "--out", tmp_path / "run", *words) == 0
    finally:
        (images / "dry" / "broken.npy").unlink()
    skipped = (tmp_path / "run" / CORRUPT).read_text().splitlines()
    assert len(skipped) == 2
    assert "broken.npy\t" in skipped[1]
    recipe = (tmp_path / "run/config.yaml").read_text()
    assert recipe.count("quarter_turns: true") == 2, "of both trainings"
    assert "augment: null" in recipe
    assert sssd("card", "--run", tmp_path / "run", "--out", tmp_path / "card") == 0
    early = ["early-exit", tmp_path / "run/model", "--data", images, "--split", "train", "--points_lost", "50"]
    assert sssd(*early, "--out", tmp_path / "early", "--runs", "1") == 0
    config = json.loads((tmp_path / "early/config.json").read_text())
    assert config["model_args"]["bits"] == 16
    words = ["--models", f"[{tmp_path / 'run/model'}, scratch]", "--fractions", "[0.5]", "--seeds", "[0]"]
    words += ["--epochs", "1", "--batch_size", "8", "--augment.rotation", "20", "--image_size", "32", "--device", "cpu"]
    assert sssd("finetune", "--data", images, "--out", tmp_path / "tuned", *words) == 0
    capsys.readouterr()
