"""Networks for grey images, and those of other channel counts, in the commands."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import TINY_DETECTION, one_line, sssd
from helpers.images import write_voc
from sssd_zoo.data.augment import LUMA, normalise
from sssd_zoo.data.images import decode
from sssd_zoo.data.inputs import input_spec, network_input, prepared
from sssd_zoo.data.opening import Encoded
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network

CLASSES = ["blue", "green", "red"]
CPU = ["--device", "cpu", "--precision", "fp32"]


def save(folder, channels, **kwargs):
    torch.manual_seed(0)
    small = {"layers": (1, 1, 1, 1), "num_classes": 3, **kwargs}
    network = timm.create_model("sssd_resnet18_cifar", in_chans=channels, **small).eval()
    save_network(folder, network, "sssd_resnet18_cifar", input_size=16, label_names=CLASSES)
    return network


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """The folder of a network of four exits for grey images of 16 px."""
    folder = tmp_path_factory.mktemp("grey")
    save(folder, 1, thresholds=(0.5, 0.5, 0.5))
    return folder


@pytest.fixture(scope="module")
def images(folder_of_images, tmp_path_factory):
    """The images of three classes, as a training and a test split."""
    root = tmp_path_factory.mktemp("splits")
    for split in ("train", "test"):
        shutil.copytree(folder_of_images, root / split)
    return root


def test_grey_is_luma_normalised_by_the_mean_of_the_statistics(grey):
    network = load_network(str(grey))
    size, mean, std = input_spec(network)
    assert (len(mean), len(std), size) == (1, 1, 16)
    stored = torch.rand(2, 3, 16, 16)
    luma = sum(weight * stored[:, i] for i, weight in enumerate(LUMA))
    expected = ((luma - mean[0]) / std[0]).unsqueeze(1)
    torch.testing.assert_close(normalise(stored, mean, std).contiguous(), expected)


def test_a_grey_network_made_of_an_rgb_one_has_one_mean():
    network = timm.create_model("sssd_resnet18_cifar", pretrained=True, in_chans=1)
    whole = timm.create_model("sssd_resnet18_cifar", pretrained=True)
    _, (mean,), (std,) = input_spec(network)
    assert mean == pytest.approx(sum(whole.pretrained_cfg["mean"]) / 3)
    assert std == pytest.approx(sum(whole.pretrained_cfg["std"]) / 3)


def test_images_are_prepared_for_a_grey_network_made_of_an_rgb_one():
    network = timm.create_model("sssd_resnet18_cifar", pretrained=True, in_chans=1).eval()
    stored = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    images = prepared(stored, network)
    torch.testing.assert_close(images, network_input(stored, input_spec(network)))
    assert images.shape == (2, 1, 32, 32)
    with torch.no_grad():
        assert network(images).shape == (2, 10)


def test_predict_answers_as_the_network_does(grey, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([pixels] * 3, -1)).save(tmp_path / "rgb.png")
    assert sssd("predict", grey, tmp_path, "--output", "ensemble", "--format", "jsonl", *CPU) == 0
    grey_answer, rgb_answer = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    network = load_network(str(grey)).eval()
    _, mean, std = input_spec(network)
    image = torch.from_numpy(pixels / 255).float()[None, None]
    with torch.no_grad():
        confidence, label = network((image - mean[0]) / std[0]).softmax(1).max(1)
    for answer in (grey_answer, rgb_answer):
        assert answer["class"] == CLASSES[int(label)]
        assert answer["confidence"] == pytest.approx(float(confidence), abs=1e-4)
    assert sssd("predict", grey, tmp_path, *CPU) == 0


def test_the_page_prepares_grey_images(grey, folder_of_images):
    from sssd_zoo.hub.page import network_input

    network = load_network(str(grey))
    data = (folder_of_images / "red/00.png").read_bytes()
    found = network_input(data, network)
    assert found.shape == (1, 1, 16, 16)
    stored = torch.from_numpy(decode(Encoded(0, data, None), 16).copy())[None].float() / 255
    _, mean, std = input_spec(network)
    torch.testing.assert_close(found, normalise(stored, mean, std))


class TestExport:
    @pytest.mark.slow
    def test_torch_export(self, grey, tmp_path):
        assert sssd("export", grey, "--format", "torch-export", "--out", tmp_path / "grey.pt2") == 0
        facts = {"metadata.json": ""}
        program = torch.export.load(tmp_path / "grey.pt2", extra_files=facts)
        network, images = load_network(str(grey)).eval(), torch.randn(5, 1, 16, 16)
        torch.testing.assert_close(program.module()(images), network(images), atol=1e-4, rtol=1e-4)
        facts = json.loads(facts["metadata.json"])
        assert facts["input_size"] == [1, 16, 16]
        assert len(facts["mean"]) == len(facts["std"]) == 1

    def test_safetensors(self, grey, tmp_path):
        assert sssd("export", grey, "--format", "safetensors", "--output", "2", "--out", tmp_path / "two") == 0
        network = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True).eval()
        images = torch.randn(2, 1, 16, 16)
        torch.testing.assert_close(network(images), load_network(str(grey), output=2).eval()(images))

    @pytest.mark.slow
    @pytest.mark.parametrize("output", ["1", "all"])
    def test_onnx_in_int8(self, grey, images, tmp_path, output, capsys):
        ort = pytest.importorskip("onnxruntime")
        words = ["--output", output, "--out", tmp_path / "grey.onnx", "--int8", "--data", images]
        assert sssd("export", grey, *words) == 0
        assert "accuracy in percent" in capsys.readouterr().out
        graph = ort.InferenceSession(str(tmp_path / "grey.onnx"), providers=["CPUExecutionProvider"])
        batch = torch.randn(3, 1, 16, 16)
        found = torch.from_numpy(graph.run(None, {"images": batch.numpy()})[0])
        expected = load_network(str(grey), output=1).eval()(batch)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)

    @pytest.mark.slow
    def test_the_stages_of_early_exit(self, grey, tmp_path):
        ort = pytest.importorskip("onnxruntime")
        assert sssd("export", grey, "--output", "early-exit", "--out", tmp_path / "stages") == 0
        stage = ort.InferenceSession(str(tmp_path / "stages/stage1.onnx"), providers=["CPUExecutionProvider"])
        batch = torch.randn(3, 1, 16, 16)
        logits = torch.from_numpy(stage.run(["logits"], {"images": batch.numpy()})[0])
        expected = load_network(str(grey), output=1).eval()(batch)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.long
def test_measuring_and_calibrating(grey, images, tmp_path, capsys):
    data = ["--data", images, "--workers", "1"]
    assert sssd("knn", "--model", grey, *data, "--neighbours", "5", *CPU) == 0
    assert (
        sssd("linear", "--model", grey, *data, "--out", tmp_path / "probed", "--probe_weight_decay", "0.01", *CPU) == 0
    )
    probed = load_network(str(tmp_path / "probed"))
    assert probed.conv1.in_channels == 1
    words = ["early-exit", tmp_path / "probed", *data, "--points_lost", "100", "--out", tmp_path / "early"]
    assert sssd(*words, "--runs", "1") == 0
    config = json.loads((tmp_path / "early/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 16, 16]
    assert len(config["model_args"]["thresholds"]) == 3
    words = ["pseudo-label", "--model", grey, *data, "--out", tmp_path / "labels", "--k", "3", *CPU]
    assert sssd(*words) == 0
    assert (tmp_path / "labels/labels.parquet").is_file()
    capsys.readouterr()


@pytest.mark.long
def test_the_check_of_a_card(grey):
    from sssd_zoo.hub.cards import sample_accuracy

    assert 0 <= sample_accuracy(load_network(str(grey)))["knn"] <= 100


@pytest.mark.slow
def test_fine_tuning_keeps_the_channel(grey, images, tmp_path, capsys):
    words = ["--data", images, "--workers", "1", "--fractions", "[0.5]", "--seeds", "[0]", "--epochs", "1"]
    words += ["--batch_size", "8", "--device", "cpu"]
    # A network for each row and the one to deploy, for which a network with exits is trained after `final`.
    for method, networks in (("final", 4), ("exits", 3)):
        out = tmp_path / method
        assert sssd("finetune", "--models", f"[{grey}, scratch]", "--method", method, "--out", out, *words) == 0
        weights = [load_file(file)["conv1.weight"] for file in out.rglob("model.safetensors")]
        assert [weight.shape[1] for weight in weights] == [1] * networks
    capsys.readouterr()


@pytest.mark.slow
def test_a_grey_teacher_teaches_an_rgb_student(grey, images, tmp_path, capsys):
    words = ["seed", "--teacher", grey, "--data", images, "--workers", "1", "--out", tmp_path / "student"]
    assert sssd(*words, "--epochs", "1", "--batch_size", "16", "--queue_size", "16", "--device", "cpu") == 0
    assert load_file(tmp_path / "student/model.safetensors")["conv1.weight"].shape[1] == 3
    capsys.readouterr()


@pytest.mark.long
def test_a_detector_on_a_grey_trunk(grey, tmp_path, capsys):
    from sssd_zoo.detection.detector import load_detector

    voc = write_voc(tmp_path / "VOC", {"trainval": range(4), "test": range(4, 6)})
    words = [
        "detect",
        "--data",
        f"[{voc}]",
        "--model",
        grey,
        "--out",
        tmp_path / "out",
        *TINY_DETECTION,
        "--epochs",
        "1",
    ]
    assert sssd(*words) == 0
    detector, _ = load_detector(tmp_path / "out")
    assert detector.backbone.body.conv1.in_channels == 1
    image = torch.rand(3, 48, 64)
    luma = sum(weight * image[i] for i, weight in enumerate(LUMA)).expand(3, -1, -1)
    with torch.no_grad():
        maps, grey_maps = (detector.backbone(detector.transform([each])[0].tensors)["0"] for each in (image, luma))
    torch.testing.assert_close(maps, grey_maps, atol=1e-4, rtol=1e-4)
    assert sssd("detect-eval", "--model", tmp_path / "out", "--data", f"[{voc}]", "--device", "cpu") == 0
    capsys.readouterr()


@pytest.mark.parametrize("step", ["distill", "pretrain"])
def test_an_rgb_network_does_not_start_from_a_grey_one(grey, images, tmp_path, step, capsys):
    own = {"distill": ["--labels", "true"], "pretrain": ["--queue_size", "16", "--splits", "1"]}[step]
    words = [step, "--init", grey, "--data", images, "--workers", "1", "--out", tmp_path / "out", *own]
    assert sssd(*words, "--epochs", "1", "--batch_size", "16", "--device", "cpu") == 2
    assert "conv1.weight is [64, 1, 3, 3] there, [64, 3, 3, 3] here" in one_line(capsys)
    assert not (tmp_path / "out/checkpoints").exists()


@pytest.fixture(scope="module", params=[2, 4])
def other(request, tmp_path_factory):
    """The channels of a network that is whole as such: it is images that it would lack, and its folder."""
    folder = tmp_path_factory.mktemp("other") / "network"
    network = save(folder, request.param)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, request.param, 16, 16)
    torch.testing.assert_close(again(x), network(x))
    return request.param, folder


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("detection") / "VOC", {"trainval": range(2)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict {model} {images}", "it has 3 channels, and --channels asks for {channels}"),
        ("linear --model {model} --data {images} --out {out}", "it has 3 channels, and --channels asks for {channels}"),
        ("knn --model {model} --data {images}", "it has 3 channels, and --channels asks for {channels}"),
        ("knn --model {model} --data {images} --channels 3", "takes images with {channels} channels, not 3"),
        ("early-exit {model} --data {images} --out {out}", "it has 3 channels, and --channels asks for {channels}"),
        ("finetune --models [{model}] --data {images} --out {out}", "it has 3 channels, and --channels asks for"),
        ("detect --model {model} --data [{voc}] --batch_size 2 --out {out}", "takes images with {channels} channels"),
        (
            "distill --init {model} --labels true --data {images} --batch_size 16 --out {out}",
            "conv1.weight is [64, {channels}, 3, 3] there, [64, 3, 3, 3] here",
        ),
        ("pseudo-label --model {model} --data {images} --out {out}", "it has 3 channels, and --channels asks for"),
    ],
    ids=lambda words: words.split(" --out")[0],
)
def test_images_of_other_channels_are_refused_in_one_line(words, message, other, images, voc, tmp_path, capsys):
    channels, model = other
    places = {"model": model, "images": images, "voc": voc, "out": tmp_path / "out"}
    assert sssd(*(word.format(**places) for word in words.split())) == 2
    assert message.format(channels=channels) in one_line(capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_more_channels_than_images_have(tmp_path, images, capsys):
    save(tmp_path / "wide", 17)
    assert sssd("knn", "--model", tmp_path / "wide", "--data", images) == 2
    assert "takes images with 17 channels, and images have at most 16" in one_line(capsys)
