"""The functions do what the commands do: the same weights, numbers and errors, in a program that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import sssd_zoo
from helpers.commands import ROOT, TINY, sssd
from helpers.networks import save_tiny
from sssd_zoo.api.results import by_exit
from sssd_zoo.errors import UserError
from sssd_zoo.files.lock import LOCK

HERE = {"device": "cpu", "workers": 0}
TRAINING = {"epochs": 1, "batch_size": 16, "model": "sssd_resnet18", "image_size": 32}
MOCO = {**TRAINING, "splits": 2, "queue_size": 32, **HERE}


def words(settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network of three classes with new weights."""
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("network") / "model", 3)


@pytest.fixture
def rows(folder_of_images):
    """The folder's images as a data set of `datasets`, held as pictures."""
    files = sorted(folder_of_images.rglob("*.png"))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["blue", "green", "red"]))
    labels = [features["label"].str2int(file.parent.name) for file in files]
    pictures = [Image.open(file).convert("RGB") for file in files]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features)


@pytest.mark.long
def test_training_gives_the_weights_of_the_command_and_leaves_the_program_as_it_was(folder_of_images, tmp_path):
    torch.manual_seed(7)
    state, threads, precision = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    run = sssd_zoo.pretrain(folder_of_images, tmp_path / "ours", **MOCO)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)
    assert not list(tmp_path.rglob(LOCK))
    assert sssd("pretrain", "--data", folder_of_images, "--out", tmp_path / "theirs", *words(MOCO)) == 0
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
    assert run.path == tmp_path / "ours"
    assert os.fspath(run) == str(run.path)
    assert run.loss == run.log[-1]["loss"] > 0
    assert run.load().num_classes == 0
    with pytest.raises(UserError, match="already holds a training run"):
        sssd_zoo.pretrain(folder_of_images, tmp_path / "ours", **MOCO)


@pytest.mark.slow
def test_what_one_function_returned_is_the_next_one_s_network_or_labels(folder_of_images, tmp_path):
    run = sssd_zoo.pretrain(folder_of_images, tmp_path / "run", **MOCO)
    assert sssd_zoo.pretrain(folder_of_images, tmp_path / "run", overwrite=True, **MOCO).loss == run.loss
    labels = sssd_zoo.pseudo_label(run, folder_of_images, tmp_path / "labels", k=4, **HERE)
    assert sum(labels.sizes) == 48
    assert set(labels.quality) == {"nmi", "ari", "purity"}
    trained = sssd_zoo.distill(folder_of_images, labels, tmp_path / "distil", **TRAINING, **HERE)
    assert trained.load(output=2).num_classes == len(labels.sizes)
    with pytest.raises(UserError, match="belong to other data"):
        sssd_zoo.distill([*[Image.new("RGB", (16, 16))] * 20], labels, tmp_path / "other", **TRAINING, **HERE)
    assert not (tmp_path / "other").exists()


def test_predict_answers_as_the_command_does(network, folder_of_images, tmp_path, capsys):
    assert sssd("predict", network, folder_of_images, "--format", "jsonl", "--device", "cpu") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = sssd_zoo.predict(network, folder_of_images, device="cpu")
    assert capsys.readouterr().out == ""
    assert [(one.image, one.label, one.exit) for one in found] == [
        (line["image"], line["class"], line["exit"]) for line in told
    ]
    assert [round(one.confidence, 6) for one in found] == [line["confidence"] for line in told]
    single = folder_of_images / "blue" / "00.png"
    several = sssd_zoo.predict(network, [folder_of_images / "red", str(single)], device="cpu")
    assert several[-1].image == str(single)
    assert len(several) == 17


def test_predict_numbers_images_that_are_objects(network, folder_of_images, rows):
    files = sssd_zoo.predict(network, folder_of_images, device="cpu", batch_size=48)
    expected = [(number, one.label, one.confidence) for number, one in enumerate(files)]
    found = sssd_zoo.predict(network, rows, device="cpu", batch_size=48)
    assert [(one.image, one.label, one.confidence) for one in found] == expected
    picture = Image.open(folder_of_images / "blue" / "00.png")
    for image in (picture, np.asarray(picture), torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)):
        (one,) = sssd_zoo.predict(network, image, device="cpu")
        assert (one.image, one.label) == expected[0][:2]
    twice = [folder_of_images / "red" / "00.png"] * 2
    assert [one.image for one in sssd_zoo.predict(network, [Image.open(file) for file in twice], device="cpu")] == [
        0,
        1,
    ]
    with pytest.raises(UserError, match="there is no file or folder"):
        sssd_zoo.predict(network, "nowhere.png")


def test_predict_takes_floats_as_a_resize_gives_them(network):
    levels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    between = (levels / 255 + 0.4 / 255).clamp(0, 1)  # no multiples of 1/255, nearest to the same levels
    (known,), (found,) = (sssd_zoo.predict(network, image, device="cpu") for image in (levels, between))
    assert found == known


def test_predict_names_the_item_that_cannot_be_read(network):
    levels = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=r"\(item 1: its colours have 16 bits.*convert it") as error:
        sssd_zoo.predict(network, [levels, levels.astype(np.uint16)], device="cpu")
    assert "sssd-predict" not in str(error.value)


def test_embed_of_a_folder_and_of_objects_is_the_same(network, folder_of_images, rows, tmp_path):
    files = sssd_zoo.embed(network, folder_of_images, tmp_path / "files.parquet", exits="all", **HERE)
    assert (files.count, files.dimension, files.exits, files.left_out) == (48, 512, ["1", "2", "3", "4"], [])
    assert files.images()[1][0] == "blue/00.png"
    objects = sssd_zoo.embed(str(network), rows, tmp_path / "objects.npy", **HERE)
    assert objects.array().shape == (48, 512)
    assert np.array_equal(objects.array(), files.array("4"))
    assert np.array_equal(objects.array(4), files.array("4"))
    assert objects.images()[1] == [None] * 48
    before = (tmp_path / "objects.npy").stat().st_mtime_ns
    assert sssd_zoo.embed(network, rows, tmp_path / "objects.npy", **HERE) == objects
    assert (tmp_path / "objects.npy").stat().st_mtime_ns == before, "it is the same, and not made again"
    with pytest.raises(UserError, match=r"already exists, of other settings or data \(exits differ\)"):
        sssd_zoo.embed(network, rows, tmp_path / "objects.npy", exits="1", **HERE)


def test_a_list_of_image_files_is_a_data_set_and_one_of_folders_several(network, folder_of_images, tmp_path):
    files = sorted(folder_of_images.rglob("*.png"))[:20]
    ours = sssd_zoo.embed(network, files, tmp_path / "files.npy", **HERE).array()
    pictures = [Image.open(file) for file in files]
    theirs = sssd_zoo.embed(network, pictures, tmp_path / "pictures.npy", **HERE).array()
    assert np.array_equal(ours, theirs)
    folders = [folder_of_images / "blue", str(folder_of_images / "green")]
    assert len(sssd_zoo.embed(network, folders, tmp_path / "folders.npy", **HERE).array()) == 32


@pytest.mark.long
def test_measures_are_those_of_the_commands(network, folder_of_images, rows, tmp_path, capsys):
    found = sssd_zoo.knn(network, rows, neighbours=5, **HERE)
    assert list(found.exits) == ["1", "2", "3", "4"]
    assert f"{found.exits['4']:.2f}" in capsys.readouterr().out
    assert sssd_zoo.knn(network, folder_of_images, neighbours=5, **HERE).exits == found.exits
    with pytest.raises(TypeError, match="nothing was written"):
        os.fspath(found)
    quick = {"probe_epochs": 2, "probe_weight_decay": 0.01, **HERE}
    probed = sssd_zoo.linear(network, rows, out=tmp_path / "probe", **quick)
    assert sssd("linear", network, "--data", folder_of_images, "--out", tmp_path / "theirs", *words(quick)) == 0
    metrics = json.loads((tmp_path / "theirs" / "metrics.json").read_text())
    assert probed.exits == by_exit(metrics["exits"], metrics["ensemble"])
    assert probed.data.startswith("Dataset-")
    calibrating = {"answers_changed": 99.0, "unlabelled": True, "runs": 1, **HERE}
    calibrated = sssd_zoo.early_exit(probed, rows, tmp_path / "early", split="train", **calibrating)
    assert calibrated.load().thresholds == calibrated.thresholds
    assert calibrated.answers["ensemble"]["agreement"] == 100
    assert calibrated.report.is_file()


def test_export_names_what_it_wrote(network, tmp_path):
    exported = sssd_zoo.export(network, tmp_path / "plain", format="timm")
    assert [file.name for file in exported.files] == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="already holds"):
        sssd_zoo.export(network, tmp_path / "plain", format="timm")
    for name in ("README.md", "notes.txt"):
        (tmp_path / "plain" / name).write_text("mine")
    again = sssd_zoo.export(network, tmp_path / "plain", format="timm", overwrite=True)
    assert again.files == exported.files
    assert [(tmp_path / "plain" / name).read_text() for name in ("README.md", "notes.txt")] == ["mine"] * 2


@pytest.mark.slow
def test_onnx_and_its_int8_form(network, rows, tmp_path):
    pytest.importorskip("onnxruntime")
    exported = sssd_zoo.export(
        network, tmp_path / "x.onnx", int8=True, data=rows, unlabelled=True, calibration_images=8
    )
    assert [file.name for file in exported.files] == ["x.onnx", "x.int8.onnx"]
    assert all(file.is_file() for file in exported.files)


@pytest.mark.slow
def test_finetune_returns_its_rows_and_the_network_to_deploy(network, rows, tmp_path):
    settings = {"per_class": [4], "epochs": 1, "batch_size": 8, "seeds": [0], "image_size": 32, **HERE}
    tuned = sssd_zoo.finetune(network.parent / "model", rows, tmp_path / "out", deploy=False, **settings)
    assert tuned.model is None
    (row,) = tuned.rows
    assert {**row, "accuracy": 0} == {"model": str(network), "amount": 4, "labels": 12, "seed": 0, "accuracy": 0}
    assert tuned.report.is_file()


PIPELINE = {
    "model": "sssd_resnet18",
    "image_size": 32,
    "epochs": 1,
    "pretrain": {"batch_size": 16, "splits": 2, "queue_size": 32},
    "cluster": {"k": 4},
    "distill.batch_size": 16,
    "probe": {"probe_weight_decay": 0.01},
    "device": "cpu",
}


@pytest.mark.slow
def test_fit_gives_the_run_of_the_command_and_resumes_it(folder_of_images, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = sssd_zoo.fit(folder_of_images, "ours", **PIPELINE)
    assert sssd("fit", "--data", folder_of_images, "--out", "theirs", *TINY) == 0
    for name in ("pretrain", "distill", "model"):
        ours, theirs = ((Path(where) / name / "model.safetensors").read_bytes() for where in ("ours", "theirs"))
        assert ours == theirs
    assert run.path == Path("ours")
    assert run.clusters == len(run.results["sizes"]) <= 4
    assert run.accuracy == by_exit(run.results["accuracy"][0]["exits"], run.results["accuracy"][0]["ensemble"])
    assert run.verdict == run.results.get("verdict")
    assert run.report.is_file()
    assert run.page.is_file()
    assert run.load(output=1).num_classes == 3
    stamp = (run.path / "distill" / "model.safetensors").stat().st_mtime_ns
    assert sssd_zoo.fit(folder_of_images, "ours", **PIPELINE).accuracy == run.accuracy
    assert (run.path / "distill" / "model.safetensors").stat().st_mtime_ns == stamp  # it was done
    with pytest.raises(UserError, match="made with other settings"):
        sssd_zoo.fit(folder_of_images, "ours", **{**PIPELINE, "epochs": 2})

    # Of a data set in memory: the same again, in this process, and by the command from what the run's config.yaml says.
    fitted = sssd_zoo.fit(rows, "objects", **PIPELINE)
    assert fitted.accuracy == run.accuracy
    stamp = (fitted.path / "distill" / "model.safetensors").stat().st_mtime_ns
    assert sssd_zoo.fit(rows, "objects", **PIPELINE).results["fingerprint"] == fitted.results["fingerprint"]
    assert (fitted.path / "distill" / "model.safetensors").stat().st_mtime_ns == stamp
    assert sssd("report", "objects", "--device", "cpu") == 0


INTERRUPTED = """
import os, signal, sssd_zoo
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a script
try:
    sssd_zoo.pretrain(DATA, OUT, **SETTINGS)
except KeyboardInterrupt:
    assert not os.path.exists(os.path.join(OUT, ".sssd-zoo.lock"))
    print("stopped", flush=True)
    run = sssd_zoo.pretrain(DATA, OUT, resume=True, **SETTINGS)
    print(run.log[-1]["step"])
"""


@pytest.mark.slow
def test_an_interrupted_call_is_resumed_in_the_same_process(folder_of_images, tmp_path):
    out = tmp_path / "run"
    settings = {**MOCO, "epochs": 12}  # without workers: Python ignores an interrupt that comes while it forks
    code = INTERRUPTED
    for name, value in (("DATA", str(folder_of_images)), ("OUT", str(out)), ("SETTINGS", settings)):
        code = code.replace(name, repr(value))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        limit = time.monotonic() + 300
        while not list(out.glob("checkpoints/step-*")) and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "stopped" in told
    assert told.split()[-1] == "36"
    whole = sssd_zoo.pretrain(folder_of_images, tmp_path / "whole", **settings)
    assert (whole.path / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
