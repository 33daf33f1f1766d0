"""Everything from `sssd fit` on with networks that are no ResNets: a mobile one, a ViT, one named while running."""

import json
from pathlib import Path

import pytest
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import TINY, TINY_COMPARE, TINY_DETECTION, command, one_line, sssd
from helpers.images import write_voc
from sssd_zoo.data.inputs import prepared
from sssd_zoo.detection import load_detector
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network

MOBILE, VIT, NAMED = "mobilenetv3_small_100", "vit_tiny_patch16_224", "regnetx_002"
QUIET = ["--device", "cpu", "--workers", "0"]
OUTPUTS = ["1", "2", "3", "final", "ensemble", "early-exit"]


def with_network(words: list[str], name: str) -> list[str]:
    return [name if word == "sssd_resnet18" else word for word in words]


def fitted(data: Path, out: Path, name: str) -> Path:
    words = ["--probe.probe_epochs", "2", "--baseline", "false", "--workers", "0"]
    assert sssd("fit", "--data", data, "--out", out, *with_network(TINY, name), *words) == 0
    model = load_network(str(out / "model"))
    model.thresholds = [0.5, 0.5, 1.0]
    arch = json.loads((out / "metrics.json").read_text())["model"]
    save_network(out / "model", model, arch, input_size=32, label_names=model.pretrained_cfg["label_names"])
    return out


@pytest.fixture(scope="module")
def run(folder_of_images, tmp_path_factory):
    """A run of the mobile network, with thresholds."""
    return fitted(folder_of_images, tmp_path_factory.mktemp("mobile") / "run", MOBILE)


@pytest.fixture(scope="module", params=[VIT, NAMED])
def another(folder_of_images, tmp_path_factory, request):
    """A run of each other network."""
    return fitted(folder_of_images, tmp_path_factory.mktemp("another") / "run", request.param)


def predictions(run, data, capsys, *words):
    capsys.readouterr()
    assert sssd("predict", run, data, "--format", "jsonl", "--device", "cpu", "--precision", "fp32", *words) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check_predictions(run, data, capsys):
    """Every output's answers are those of the network in Python."""
    from helpers.data import load

    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    images = load(data)
    batch = prepared(images.gather(torch.arange(len(images))), model)
    with torch.no_grad():
        exits, early = model.forward_exits(batch).logits, model.forward_early(batch)
        logits = dict(zip(("1", "2", "3", "final"), exits, strict=True)) | {"ensemble": model(batch)}
    for output in OUTPUTS:
        found = predictions(run, data, capsys, "--output", output)
        wanted = early.logits if output == "early-exit" else logits[output]
        assert [line["confidence"] for line in found] == pytest.approx(wanted.softmax(1).amax(1).tolist(), abs=1e-4)
    assert [line["exit"] for line in found] == early.exit.tolist()


def check_stages_in_onnx(run, out):
    """The four graphs, one after the other, give the exits' logits."""
    from sssd_zoo.pipeline.export import run_onnx, session

    assert sssd("export", run, "--output", "early-exit", "--out", out) == 0
    record = json.loads((out / "early_exit.json").read_text())
    assert record["thresholds"] == [0.5, 0.5, 1.0]
    model = load_network(str(run)).eval()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.forward_exits(x).logits
    x = x.numpy()
    for number, logits in enumerate(wanted, start=1):
        *maps, found = run_onnx(session(out / f"stage{number}.onnx"), x)
        torch.testing.assert_close(torch.from_numpy(found), logits, atol=1e-4, rtol=1e-4)
        x = maps[0] if maps else x
    return record


def test_fit_and_predict(run, folder_of_images, capsys):
    report = (run / "report.md").read_text()
    assert "**Network**: `sssd_mobilenetv3_small_100_cifar` at 32 px" in report
    card = (run / "model/README.md").read_text()
    assert "four exits, one per stage of timm's `mobilenetv3_small_100`" in card
    assert "ResNet" not in card
    assert "- Features: 1024 numbers from every exit" in card
    encoder = load_network(str(run), num_classes=0).eval()
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 1024)
    check_predictions(run, folder_of_images, capsys)


@pytest.mark.slow
def test_stages_of_early_exit(run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    record = check_stages_in_onnx(run, tmp_path / "stages")
    assert record["architecture"] == "sssd_mobilenetv3_small_100_cifar"


@pytest.mark.slow
def test_other_networks(another, folder_of_images, tmp_path, capsys):
    name = json.loads((another / "metrics.json").read_text())["model"]
    assert f"**Network**: `{name}` at 32 px" in (another / "report.md").read_text()
    card = (another / "model/README.md").read_text()
    assert f"- Architecture: `{name}`" in card
    assert "sssd_backbone" not in card + (another / "report.md").read_text()
    check_predictions(another, folder_of_images, capsys)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert check_stages_in_onnx(another, tmp_path / "stages")["architecture"] == name
    words = ["--data", folder_of_images, "--out", tmp_path / "cal", "--answers_changed", "99", "--unlabelled", *QUIET]
    assert sssd("early-exit", another, "--runs", "1", *words) == 0
    assert json.loads((tmp_path / "cal/early_exit/report.json").read_text())["model"] == name
    assert f"Network**: `{name}`" in (tmp_path / "cal/early_exit/report.md").read_text()
    assert sssd("card", another, "--out", tmp_path / "card", "--calibrated", tmp_path / "cal") == 0
    assert sssd("finetune", "--data", folder_of_images, "--models", f"[{another}, scratch]", "--method", "exits",
                "--fractions", "[0.5]", "--seeds", "[0]", "--image_size", "32", "--epochs", "2", "--batch_size", "4",
                "--out", tmp_path / "tuned", "--device", "cpu", "--precision", "fp32") == 0  # fmt: skip
    assert load_network(str(tmp_path / "tuned")).num_classes == 3
    assert f"`{name}`" in (tmp_path / "tuned/report.md").read_text()


@pytest.mark.slow
def test_measures_and_features(run, folder_of_images, tmp_path, capsys):
    data = ["--data", folder_of_images, *QUIET]
    assert sssd("linear", run, *data, "--probe_epochs", "2", "--out", tmp_path / "linear") == 0
    assert load_network(str(tmp_path / "linear")).num_classes == 3
    assert sssd("knn", run, *data, "--neighbours", "5") == 0
    assert sssd("quality", run, *data) == 0
    changed = ["--answers_changed", "99"]
    assert sssd("early-exit", run, *data, *changed, "--runs", "1", "--unlabelled", "--out", tmp_path / "cal") == 0
    report = json.loads((tmp_path / "cal/early_exit/report.json").read_text())
    assert report["model"] == "sssd_mobilenetv3_small_100_cifar"
    assert load_network(str(tmp_path / "cal")).thresholds is not None
    assert sssd("embed", run, *data, "--exits", "all", "--out", tmp_path / "e.parquet") == 0
    assert "1024 numbers each" in capsys.readouterr().out
    words = [tmp_path / "e.parquet", folder_of_images / "red", "--exit", "2", "--device", "cpu"]
    assert sssd("search", run, *words) == 0


@pytest.mark.slow
def test_every_export(run, folder_of_images, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from sssd_zoo.pipeline.export import run_onnx, session

    model = load_network(str(run)).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exits, ensemble = model.forward_exits(images).logits, model(images)
    for output, wanted in (("ensemble", [ensemble]), ("all", exits), ("2", [exits[1]])):
        assert sssd("export", run, "--output", output, "--out", tmp_path / f"{output}.onnx") == 0
        found = run_onnx(session(tmp_path / f"{output}.onnx"), images.numpy())
        for got, own in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), own, atol=1e-4, rtol=1e-4)
        words = ["--output", output, "--format", "torch-export", "--out", tmp_path / f"{output}.pt2"]
        assert sssd("export", run, *words) == 0
        answer = torch.export.load(tmp_path / f"{output}.pt2").module()(images)
        for got, own in zip(answer if output == "all" else [answer], wanted, strict=True):
            torch.testing.assert_close(got, own, atol=1e-4, rtol=1e-4)
        assert sssd("export", run, "--output", output, "--format", "safetensors", "--out", tmp_path / output) == 0
    assert load_network(str(tmp_path / "2")).output == "2"
    words = ["--int8", "--data", folder_of_images, "--calibration_images", "8", "--out", tmp_path / "8.onnx"]
    assert sssd("export", run, *words) == 0
    assert (tmp_path / "8.int8.onnx").is_file()
    capsys.readouterr()
    assert sssd("export", run, "--format", "timm", "--out", tmp_path / "plain") == 2
    assert "the stem of sssd_mobilenetv3_small_100_cifar, for small images" in one_line(capsys)


PLAIN = """
import sys
sys.modules["sssd_zoo"] = None  # as if it were not installed
import timm, torch
model = timm.create_model("local-dir:" + FOLDER + "/plain", pretrained=True).eval()
images, wanted = torch.load(FOLDER + "/images.pt"), torch.load(FOLDER + "/wanted.pt")
print(type(model).__module__, torch.allclose(model(images), wanted[3], rtol=1e-4, atol=1e-5))
try:
    import transformers
except ImportError:
    raise SystemExit
whole = transformers.AutoModelForImageClassification.from_pretrained(FOLDER + "/whole", trust_remote_code=True).eval()
print(all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(whole(images).exit_logits, wanted)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"sssd_{MOBILE}", f"sssd_{NAMED}", f"sssd_{VIT}"])
def test_exports_without_this_package(name, tmp_path):
    from sssd_zoo.models.backbones import has_network

    assert has_network(name)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    save_network(tmp_path / "model", model, name, label_names=["a", "b", "c"])
    images = torch.randn(2, 3, 224, 224)
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(model.forward_exits(images).logits, tmp_path / "wanted.pt")
    for form, out in (("timm", "plain"), ("transformers", "whole")):
        assert sssd("export", tmp_path / "model", "--format", form, "--out", tmp_path / out) == 0
    home = {"HF_HOME": str(tmp_path / "hf")}
    done = command("-c", PLAIN.replace("FOLDER", repr(str(tmp_path))), environment=home)
    module, *rest = done.stdout.splitlines()
    assert module.startswith("timm.models."), done.stderr
    assert module.endswith(" True")
    assert rest in ([], ["True"])


@pytest.mark.slow
def test_card_publish_and_space(run, tmp_path, capsys):
    assert sssd("card", run, "--out", tmp_path / "card") == 0
    text = (tmp_path / "card/README.md").read_text()
    assert "# sssd_mobilenetv3_small_100_cifar on images" in text.replace("\\_", "_").split("## Use")[0]
    capsys.readouterr()
    assert sssd("publish", run, "--repo", "org/name", "--dry_run") == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert sssd("space", run, "--push", "org/name", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "sssd_zoo/models/staged.py" in said
    assert "sssd_zoo/models/stages.py" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", [MOBILE, VIT])
def test_compare(name, folder_of_images, tmp_path):
    words = [*with_network(TINY_COMPARE, name), "--seeds", "[0]", "--probe.probe_epochs", "2", "--workers", "0"]
    assert sssd("compare", "--data", folder_of_images, "--out", tmp_path, *words) == 0
    assert f"sssd_{name}_cifar" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["final", "exits"])
def test_finetune(method, run, folder_of_images, tmp_path):
    words = ["--fractions", "[0.5]", "--seeds", "[0]", "--image_size", "32", "--epochs", "2", "--batch_size", "4"]
    words += ["--out", tmp_path / "out", "--device", "cpu", "--precision", "fp32", "--method", method]
    assert sssd("finetune", "--data", folder_of_images, "--models", f"[{run}, scratch]", *words) == 0
    network = load_network(str(tmp_path / "out"))  # whatever the method of the curve, the one to use has all exits
    assert (network.num_classes, network.output) == (3, "ensemble")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc") / "data", {"trainval": range(4), "test": range(4, 6)})


@pytest.mark.slow
def test_detect(run, voc, tmp_path, capsys):
    words = ["--data", f"[{voc}]", *TINY_DETECTION, "--epochs", "1", "--out", tmp_path / "out"]
    assert sssd("detect", *words, "--model", run, "--frozen_stages", "2") == 0
    detector, classes = load_detector(tmp_path / "out")
    assert classes == ["disc", "square"]
    assert sssd("detect-eval", tmp_path / "out", "--data", f"[{voc}]", "--split", "test", *QUIET) == 0
    trunk = load_network(str(run), features_only=True).state_dict()
    ours = detector.backbone.body.state_dict()
    assert trunk.keys() == ours.keys()
    moved = {name.split(".")[1] for name, value in ours.items() if not torch.equal(value, trunk[name])}
    assert moved == {"blocks"}
    assert torch.equal(ours["model.conv_stem.weight"], trunk["model.conv_stem.weight"])


@pytest.mark.slow
def test_detect_with_a_network_named_while_running(voc, tmp_path):
    words = ["--data", f"[{voc}]", *TINY_DETECTION, "--epochs", "1", "--out", tmp_path / "out", "--pretrained", "false"]
    assert sssd("detect", *words, "--model", f"sssd_{NAMED}_cifar") == 0
    code = f"from sssd_zoo.detection import load_detector; print(load_detector({str(tmp_path / 'out')!r})[1])"
    done = command("-c", code)
    assert done.stdout == "['disc', 'square']\n", done.stderr


def test_detection_refuses_tokens_in_one_line(voc, tmp_path, capsys):
    words = ["--data", f"[{voc}]", *TINY_DETECTION, "--out", tmp_path / "out", "--pretrained", "false"]
    assert sssd("detect", *words, "--model", f"sssd_{VIT}") == 2
    assert "take a convolutional network" in one_line(capsys)
    assert not (tmp_path / "out").exists()
