"""Exports that load where this package is not: in a process that cannot import it, by timm, transformers and torch."""

import json

import pytest
import timm
import torch

from helpers.commands import command, one_line, sssd
from helpers.networks import create
from sssd_zoo.files.run_folder import TRANSFORMERS_CODE
from sssd_zoo.hub.portable import standalone
from sssd_zoo.models.saving import save_network

CLASSES = ["blue", "green", "red"]
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sssd_zoo":
            raise ModuleNotFoundError("No module named 'sssd_zoo'")

sys.meta_path.insert(0, Blocked())
import timm, torch
folder = sys.argv[1]

def same(a, b):  # where a weight lies in memory can decide how a convolution is computed
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)

images = torch.load(folder + "/images.pt")
"""


def without_package(code, folder):
    """What code prints that runs without this package, beside `images`."""
    done = command("-c", BLOCKED + code, str(folder), environment={"HF_HOME": str(folder / "hf")})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run's network with three classes and thresholds, images, and what it answers to them."""
    work = tmp_path_factory.mktemp("portable")
    model = create(num_classes=3, layers=(1, 1, 1, 1), in_chans=1)
    model.thresholds = [0.4, 0.4, 0.4]
    save_network(work / "run" / "model", model, "sssd_resnet18", input_size=32, label_names=CLASSES)
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, work / "images.pt")
    with torch.no_grad():
        exits, early = model.forward_exits(images).logits, model.forward_early(images).exit
        torch.save([*exits, model(images), early], work / "wanted.pt")
    return work


@pytest.mark.long
def test_timm(work):
    out = work / "plain"
    assert sssd("export", work / "run", "--format", "timm", "--out", out) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["label_names"]) == ("resnet18", CLASSES)
    assert not config["model_args"].keys() & {"output", "thresholds", "storage_size"}
    lines = without_package(
        """
model = timm.create_model("local-dir:" + folder + "/plain", pretrained=True).eval()
wanted = torch.load(folder + "/wanted.pt")[3]
print(type(model).__module__, same(model(images), wanted), model.pretrained_cfg["label_names"])
maps = timm.create_model("local-dir:" + folder + "/plain", pretrained=True, features_only=True)(images)
print(len(maps))
""",
        work,
    )
    assert lines == [f"timm.models.resnet True {CLASSES}", "5"]


@pytest.mark.slow
def test_transformers(work):
    pytest.importorskip("transformers")
    out = work / "whole"
    assert sssd("export", work / "run", "--format", "transformers", "--out", out) == 0
    lines = without_package(
        """
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(folder + "/whole", trust_remote_code=True).eval()
*exits, ensemble, early = torch.load(folder + "/wanted.pt")
output = model(images, labels=torch.zeros(3, dtype=torch.long))
print(same(output.logits, ensemble), all(map(same, output.exit_logits, exits)), output.loss > 0)
print(torch.equal(model.timm_model.forward_early(images).exit, early), model.config.id2label)
model.save_pretrained(folder + "/again")
again = AutoModelForImageClassification.from_pretrained(folder + "/again", trust_remote_code=True).eval()
print(same(again(images).logits, ensemble))
try:
    AutoModelForImageClassification.from_pretrained(folder + "/whole")
except ImportError as error:
    print("its code does not run unasked")
""",
        work,
    )
    names = dict(enumerate(CLASSES))
    assert lines == ["True True tensor(True)", f"True {names}", "True", "its code does not run unasked"]
    # With this package, the folder is an ordinary network.
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.load(work / "images.pt")), torch.load(work / "wanted.pt")[4])


@pytest.mark.slow
def test_image_processor_and_cifar_stem(tmp_path):
    """The bundled network, from a photo to a class name, as docs/deploy.md shows it."""
    pytest.importorskip("transformers")
    assert sssd("export", "sssd_resnet18_cifar", "--format", "transformers", "--out", tmp_path / "whole") == 0
    torch.save(0, tmp_path / "images.pt")
    lines = without_package(
        """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(folder + "/whole", trust_remote_code=True).eval()
inputs = AutoImageProcessor.from_pretrained(folder + "/whole")(Image.new("RGB", (64, 48), "skyblue"))
print(tuple(inputs["pixel_values"].shape), model.config.id2label[model(**inputs).logits.argmax(1).item()])
""",
        tmp_path,
    )
    assert lines[0].startswith("(1, 3, 32, 32) ")


@pytest.mark.slow
def test_onnx_and_torch_export(work):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert sssd("export", work / "run", "--output", "2", "--out", work / "exit2.onnx") == 0
    words = ["--output", "all", "--format", "torch-export", "--out", work / "all.pt2"]
    assert sssd("export", work / "run", *words) == 0
    lines = without_package(
        """
import onnxruntime
wanted = torch.load(folder + "/wanted.pt")
session = onnxruntime.InferenceSession(folder + "/exit2.onnx")
(answer,) = session.run(None, {"images": images.numpy()})
print(same(torch.from_numpy(answer), wanted[1]))
exits = torch.export.load(folder + "/all.pt2").module()(images)
print(all(map(same, exits, wanted)))
""",
        work,
    )
    assert lines == ["True", "True"]


def test_code_imports_nothing_of_the_package():
    from sssd_zoo.hub.portable import CODE

    for name in TRANSFORMERS_CODE:
        source = standalone((CODE / name).read_text(encoding="utf-8"))
        assert "import sssd_zoo" not in source
        assert "from sssd_zoo" not in source
        compile(source, name, "exec")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--format", "timm", "--output", "2"], "no output 2"),
        (["{run}", "--format", "transformers", "--output", "4"], "--format timm"),
        (["sssd_resnet18_cifar", "--format", "timm"], "3x3 stride-1"),
        (["{run}", "--format", "timm", "--int8", "--data", "x"], "--int8"),
        (["resnet10t", "--format", "timm"], "resnet10t"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(words, message, work, tmp_path, capsys):
    words = [word.format(run=work / "run") for word in words]
    assert sssd("export", *words, "--out", tmp_path / "out") == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_foreign_files_stay(work, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exits.py").write_text("mine")
    for form in ("timm", "transformers"):
        assert sssd("export", work / "run", "--format", form, "--out", tmp_path / "out", "--overwrite", "true") == 2
        assert "out" in one_line(capsys)
    assert (tmp_path / "out" / "exits.py").read_text() == "mine"


@pytest.mark.slow
def test_int8_without_labels(work, folder_of_images, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = create(num_classes=4, layers=(1, 1, 1, 1))
    save_network(tmp_path / "network", model, "sssd_resnet18", input_size=32)
    words = ["export", tmp_path / "network", "--output", "1", "--out", tmp_path / "x.onnx", "--int8"]
    words += ["--data", folder_of_images, "--calibration_images", "8"]
    assert sssd(*words) == 2  # the folder has three classes, the network four
    assert "--unlabelled" in one_line(capsys)
    assert not (tmp_path / "x.int8.onnx").exists()
    assert sssd(*words, "--unlabelled", "true") == 0
    said = capsys.readouterr().out
    assert "calibrated on 8 images" in said
    assert "24 images, the other half of split train (no labels)" in said
    assert 50 <= float(said.split("logits ")[1].split()[0]) <= 100
