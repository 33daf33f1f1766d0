"""Exported networks give torch's answers in onnxruntime, and the loop in docs/deploy.md those of `forward_early`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import ROOT, one_line, sssd
from sssd_zoo.data.inputs import prepare
from sssd_zoo.data.opening import Encoded
from sssd_zoo.files import int8_beside
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.export import AllExits, Stage, onnx_bytes, quantise, run_onnx, session

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CLASSES = ["blue", "green", "red"]
OUTPUTS = ["1", "2", "3", "final", "ensemble"]


def create(name="sssd_resnet18", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 3, **kwargs})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def random_images(batch, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def check_all_exits(name, size, **kwargs):
    """All exits at once, and the ensemble, for batches of 1, 2 and 5."""
    model = create(name, **kwargs)
    names = ["images", "logits1", "logits2", "logits3", "logits4"]
    every = session(onnx_bytes(AllExits(model).eval(), random_images(2, size), names, {}))
    for batch in (1, 2, 5):
        images = random_images(batch, size)
        wanted = model.forward_exits(images).logits
        for got, own in zip(run_onnx(every, images.numpy()), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), own, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def check_output(name, size, output, **kwargs):
    model = create(name, output=output, **kwargs)
    graph = session(onnx_bytes(model, random_images(2, size), ["images", "logits"], {}))
    for batch in (1, 3):
        images = random_images(batch, size)
        (got,) = run_onnx(graph, images.numpy())
        torch.testing.assert_close(torch.from_numpy(got), model(images), atol=1e-4, rtol=1e-4)


def test_all_exits():
    check_all_exits("sssd_resnet18_cifar", 32)


def test_one_exit():
    check_output("sssd_resnet50_cifar", 16, 2, layers=(1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("sssd_*"))
def test_all_exits_of_every_model(name):
    check_all_exits(name, 32 if name.endswith("_cifar") else 224)


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", timm.list_models("sssd_*"))
def test_every_output_of_every_model(name, output):
    check_output(name, 32 if name.endswith("_cifar") else 224, output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved network with thresholds that images of the tests pass and do not pass."""
    path = tmp_path_factory.mktemp("network")
    model = create(layers=(1, 1, 1, 1))
    with torch.no_grad():
        exits = model.forward_exits(random_images(8)).logits[:3]
    sorted_confidences = [logits.softmax(1).amax(1).sort().values for logits in exits]
    model.thresholds = [(own[3:5].sum() / 2).item() for own in sorted_confidences]  # rounding decides nothing
    model.storage_size = 40
    save_network(path, model, "sssd_resnet18", input_size=32, label_names=CLASSES)
    return path


def test_export_onnx_and_int8(folder, folder_of_images, tmp_path, capsys):
    out = tmp_path / "exit2.onnx"
    words = ["export", folder, "--output", "2", "--out", out, "--int8", "--data", folder_of_images]
    assert sssd(*words, "--calibration_images", "16") == 0
    said = capsys.readouterr().out
    stated = re.search(r"logits +fp32 +([\d.]+) +int8 +([\d.]+)", said)
    graph, small = session(out), session(tmp_path / "exit2.int8.onnx")
    for own in (graph, small):
        facts = {key: json.loads(value) for key, value in own.get_modelmeta().custom_metadata_map.items()}
        assert facts["class_names"] == CLASSES
        assert facts["input_size"] == [3, 32, 32]
        assert (facts["architecture"], facts["output"]) == ("sssd_resnet18", "2")
        assert len(facts["mean"]) == len(facts["std"]) == 3
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, output=2).eval()
    images = random_images(3)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(run_onnx(graph, images.numpy())[0]), model(images), atol=1e-4, rtol=1e-4
        )
    assert (tmp_path / "exit2.int8.onnx").stat().st_size < 0.5 * out.stat().st_size
    # No test split: the fifth of the 48 images that `sssd fit` holds out from its probes is measured.
    assert "10 images, a part of split train that is not calibrated on" in said
    assert all(
        float(value) * 10 / 100 == pytest.approx(round(float(value) * 10 / 100), abs=0.01) for value in stated.groups()
    )


def test_the_int8_form_has_the_whole_name_of_its_graph():
    names = {"net.onnx": "net.int8.onnx", "net.exit1": "net.exit1.int8.onnx", "net": "net.int8.onnx"}
    assert {name: int8_beside(Path("out", name)).name for name in names} == names


def test_an_int8_form_of_an_earlier_export_is_told(folder, tmp_path, capsys):
    words = ["export", folder, "--out", tmp_path / "x.onnx"]
    assert sssd(*words, "--output", "1") == 0
    earlier = shutil.copy(tmp_path / "x.onnx", tmp_path / "x.int8.onnx")
    capsys.readouterr()
    assert sssd(*words, "--output", "2", "--overwrite") == 0
    assert f"{earlier} is of an earlier export" in capsys.readouterr().out
    assert earlier.is_file()


@pytest.mark.long
def test_int8_takes_the_options_that_its_mistakes_advise(folder, folder_of_images, tmp_path, capsys):
    data = shutil.copytree(folder_of_images, tmp_path / "data")
    next(data.rglob("*.png")).write_bytes(b"no image")
    words = ["export", folder, "--output", "2", "--out", tmp_path / "x.onnx", "--int8", "--data", f"[{data}]"]
    words += ["--calibration_images", "8"]
    assert sssd(*words) == 2
    assert "max_corrupt" in one_line(capsys)
    assert not (tmp_path / "x.int8.onnx").exists()
    assert sssd(*words, "--max_corrupt", "1") == 0
    assert "calibrated on 8 images" in capsys.readouterr().out


def test_int8_is_near_fp32():
    model = create(layers=(1, 1, 1, 1), output=1)
    images = random_images(32)
    graph = onnx_bytes(model, images, ["images", "logits"], {"a": 1})
    small = session(quantise(graph, iter(images.numpy()[None])))
    with torch.no_grad():
        wanted = model(images).numpy()
    (got,) = run_onnx(small, images.numpy())
    assert not np.array_equal(got, wanted)
    assert np.abs(got - wanted).mean() < 0.1 * wanted.std()
    assert small.get_modelmeta().custom_metadata_map["a"] == "1"


def docs_code(start: str) -> str:
    """The Python block of docs/deploy.md that starts so."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    (code,) = re.findall(rf"```python\n({start}.*?)```", text, flags=re.DOTALL)
    return code


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_preprocessing_of_the_docs_is_that_of_predict(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sssd("export", folder, "--output", "2", "--out", "exit2.onnx") == 0
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((900, 600), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    photo.save(name, exif=turned)
    names = {}
    exec(docs_code("# pip install onnxruntime pillow").replace("photo.jpg", name), names)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wanted = prepare(Encoded(name, tmp_path.joinpath(name).read_bytes(), None), model)
    np.testing.assert_allclose(names["prepare"](name), wanted.numpy(), atol=1e-4)
    with torch.no_grad():
        answer = timm.create_model(f"local-dir:{folder}", pretrained=True, output=2).eval()(wanted)
    assert names["logits"].argmax() == answer.argmax()


@pytest.mark.long
def test_reference_loop_of_the_docs(folder, tmp_path):
    assert sssd("export", folder, "--output", "early-exit", "--out", tmp_path / "stages") == 0
    names = {}
    exec(docs_code("import json").replace('Path("STAGES")', f"Path({str(tmp_path / 'stages')!r})"), names)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = random_images(8)
    with torch.no_grad():
        wanted = model.forward_early(images)
    answers, exits = names["early_exit"](images.numpy())
    assert exits.tolist() == wanted.exit.tolist()
    assert len(set(exits.tolist())) > 1
    np.testing.assert_allclose(answers, wanted.logits.softmax(1), atol=1e-4, rtol=1e-4)
    answers, exits = names["early_exit"](images[:1].numpy())
    assert exits.tolist() == wanted.exit[:1].tolist()
    for thresholds in ([0.99, 1, 0.99], [1, 1, 1]):  # an exit that is not asked has no say at the end
        names["manifest"]["thresholds"] = thresholds
        with torch.no_grad():
            wanted = model.forward_early(images, thresholds)
        assert wanted.exit.tolist() == [4] * 8
        answers, exits = names["early_exit"](images.numpy())
        assert exits.tolist() == [4] * 8
        np.testing.assert_allclose(answers, wanted.logits.softmax(1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_stages_chain():
    model = create(layers=(1, 1, 1, 1))
    images = random_images(2)
    x, answers = images, []
    for number in range(1, 4):
        x, logits = Stage(model, number)(x)
        answers.append(logits)
    answers.append(Stage(model, 4)(x))
    assert all(torch.equal(a, b) for a, b in zip(answers, model.forward_exits(images).logits, strict=True))


def test_torch_export_and_safetensors(folder, tmp_path):
    out = tmp_path / "all.pt2"
    assert sssd("export", folder, "--output", "all", "--format", "torch-export", "--out", out) == 0
    files = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=files)
    facts = json.loads(files["metadata.json"])
    assert (facts["class_names"], facts["storage_size"]) == (CLASSES, 40)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = random_images(5)
    with torch.no_grad():
        for got, wanted in zip(program.module()(images), model.forward_exits(images).logits, strict=True):
            torch.testing.assert_close(got, wanted)

    assert sssd("export", folder, "--output", "1", "--format", "safetensors", "--out", tmp_path / "exit1") == 0
    assert {name.split(".")[0] for name in load_file(tmp_path / "exit1" / "model.safetensors")} == {
        "conv1", "bn1", "layer1", "exit1",
    }  # fmt: skip
    small = timm.create_model(f"local-dir:{tmp_path / 'exit1'}", pretrained=True).eval()
    assert torch.equal(small(images), model.forward_exits(images).logits[0])
    assert small.thresholds is None

    words = ["export", folder, "--format", "safetensors", "--thresholds", "[0.5, 0.6, 0.7]"]
    assert sssd(*words, "--out", tmp_path / "whole") == 0
    whole = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True)
    assert whole.thresholds == [0.5, 0.6, 0.7]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network without thresholds."""
    folder = tmp_path_factory.mktemp("plain") / "network"
    save_network(folder, create(layers=(1, 1, 1, 1)), "sssd_resnet18", input_size=32)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}", "--output", "5"], "output"),
        (["{tmp_path}/none"], "no folder"),
        (["{plain}", "--output", "early-exit", "--out", "{tmp_path}/stages"], "no thresholds"),
        (["{plain}", "--thresholds", "[0.5, 0.6, 0.7]"], "--thresholds are stored by --output early-exit"),
        (["{plain}", "--thresholds", "[0.5]", "--format", "safetensors"], "must have 3 items"),
        (
            ["{plain}", "--thresholds", "[0.5, 0.6, 0.7]", "--format", "safetensors", "--output", "2"],
            "need all exits, and output 2 has one",
        ),
        (["{folder}", "--int8"], "--data"),
        (["{folder}", "--output", "early-exit", "--format", "torch-export"], "stages"),
        (["{folder}", "--out", "{folder}", "--overwrite"], "must be a file"),
        (["resnet10t"], "resnet10t"),
        (["{folder}", "--data", "photos"], "--data is what --int8 calibrates on"),
        (["{folder}", "--out", "{tmp_path}/x/"], "x/ is a folder, and --format onnx writes a file: give"),
        (["{folder}", "--format", "safetensors", "--out", "{tmp_path}/x.onnx"], "x.onnx is the name of a file"),
        (["{folder}", "--out", "{tmp_path}/x.pt"], "onnx does not write .pt files: give --out"),
        (["{folder}", "--format", "torch-export", "--out", "{tmp_path}/x.onnx"], "does not write .onnx files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(words, message, folder, plain, tmp_path, capsys):
    out = tmp_path / "x.onnx"
    words = [word.format(folder=folder, plain=plain, tmp_path=tmp_path) for word in words]
    assert sssd("export", *words, *([] if "--out" in words else ["--out", out])) == 2
    assert message in one_line(capsys)
    assert not out.exists()


def test_a_file_of_the_user_s_stays(folder, tmp_path, capsys):
    out = tmp_path / "x.onnx"
    out.write_text("mine")
    assert sssd("export", folder, "--out", out) == 2
    assert "--overwrite" in one_line(capsys)
    assert out.read_text() == "mine"


def test_images_to_calibrate_on_are_not_measured_on(folder, folder_of_images, tmp_path, capsys):
    words = ["export", folder, "--output", "2", "--out", tmp_path / "x.onnx", "--int8", "--data", folder_of_images]
    assert sssd(*words, "--unlabelled", "--split", "train[:20]", "--test_split", "train[10:30]") == 2
    assert "10 images of the split train[10:30]" in one_line(capsys)
