"""What is measured or trained on images read by `--channels` or `--storage_size` is deployed with the same reading."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
from PIL import Image

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import sssd
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import load_images
from sssd_zoo.evaluation.protocol import evaluation_data
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network

CPU = ["--device", "cpu"]
ALONE = [*CPU, "--workers", "0"]  # processes that are forked from a test's own, which has many threads, may end
WIDE = ["--channels", "3"]  # reads 16 bits, where RGB of 8 bits would stretch each image from black to white


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Grey images of 16 bits as of a camera of 12: two classes, told apart by their brightness alone."""
    root, random = tmp_path_factory.mktemp("deep"), np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for image in range(20):
            pixels = random.integers(0, 1000, (16, 16)) + 3000 * number
            Image.fromarray(pixels.astype(np.uint16)).save(root / name / f"{image:02}.png")
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """One for RGB images that says nothing about their bits."""
    out = tmp_path_factory.mktemp("network")
    model = timm.create_model("sssd_resnet18_cifar", layers=(1, 1, 1, 1), num_classes=0, output="ensemble")
    save_network(out, model, "sssd_resnet18_cifar", input_size=16)
    return out


@pytest.fixture(scope="module")
def probed(network, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed") / "out"
    words = ["--probe_weight_decay", "0.001", "--storage_size", "24"]
    assert sssd("linear", "--model", network, "--data", images, "--out", out, *words, *WIDE, *ALONE) == 0
    return out


def right(folder, images, capsys):
    """The fraction of the images that `sssd predict` names by their class."""
    capsys.readouterr()
    assert sssd("predict", folder, images, "--format", "jsonl", *CPU) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return np.mean([answer["class"] in answer["image"] for answer in answers])


def test_linear_probes(probed, images, capsys):
    made = load_network(str(probed))
    assert (made.bits, made.storage_size) == (16, 24)
    assert right(probed, images, capsys) == 1


@pytest.mark.long
def test_fine_tuning(network, images, tmp_path, capsys):
    words = ["--method", "exits", "--fractions", "[1]", "--seeds", "[0]", "--epochs", "4", "--batch_size", "8"]
    words += ["--min_steps", "60", "--image_size", "16", "--models", f"[{network}]", "--lr", "0.05"]
    assert sssd("finetune", "--data", images, "--out", tmp_path / "out", *words, *WIDE, *ALONE) == 0
    assert load_network(str(tmp_path / "out" / "model")).bits == 16
    assert right(tmp_path / "out", images, capsys) == 1


def test_early_exit(probed, images, tmp_path):
    words = ["--split", "train", "--points_lost", "60", "--runs", "1", *ALONE]
    assert sssd("early-exit", probed, "--data", images, "--storage_size", "20", "--out", tmp_path / "out", *words) == 0
    made = load_network(str(tmp_path / "out"))
    assert (made.bits, made.storage_size) == (16, 20)


def test_search_reads_queries_as_the_index_was_read(network, images, tmp_path, capsys):
    index = tmp_path / "index.npy"
    assert sssd("embed", network, "--data", images, "--out", index, *WIDE, *ALONE) == 0
    capsys.readouterr()
    queries = [images / "dark" / "03.png", images / "light" / "05.png"]
    assert sssd("search", network, index, *queries, "--k", "1", "--format", "jsonl", *CPU) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["path"] for one in found] == [str(query) for query in queries], "each is nearest to itself"
    assert [one["similarity"] for one in found] == pytest.approx([1, 1], abs=1e-4)


def test_splits_are_read_with_the_same_bits(tmp_path):
    for split, dtype in (("train", np.uint16), ("test", np.uint8)):
        for name in ("dark", "light"):
            (tmp_path / split / name).mkdir(parents=True)
            for image in range(4):
                pixels = np.full((16, 16), image + 100 * (name == "light"), dtype)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{image}.png")
    config = DataConfig(data=str(tmp_path), channels=1, workers=0)
    data = load_images(config, default_size=16)
    evaluation = evaluation_data(data, config, test_split=None, holdout=0.5, seed=0)
    assert evaluation.test.split == "test"
    assert evaluation.test.pixels == data.pixels
    assert data.pixels.bits == 16
    # Alone, they would be read with 8.
    assert load_images(replace(config, split="test"), default_size=16).pixels.bits == 8
