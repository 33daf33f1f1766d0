"""The folders that timm loads: same numbers, no pickle, whole or absent, and a card of what was measured only."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import sssd_zoo  # noqa: F401  registers the models
from helpers.disk import files_up_to
from helpers.markdown import by_name, facts, table
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.reports.markdown import Results
from sssd_zoo.hub.model_card import save_model_folder
from sssd_zoo.models import activations
from sssd_zoo.models.saving import class_descriptions, save_network

ARCH = "sssd_resnet18_cifar"
NAMES = ["cat", "dog", "frog"]
MACS = {"1": 100_000_000, "2": 200_000_000, "3": 300_000_000, "4": 400_000_000, "ensemble": 420_000_000}
METRICS = {"1": 41.5, "2": 42.25, "3": 43.0, "4": 44.0, "ensemble": 46.125}
CONTEXT: Results = {
    "data": "org/set",
    "images": 10_000,
    "seed": 3,
    "k_asked": 9,
    "sizes": [5, 3, 2],
    "quality": {"nmi": 0.5},
    "accuracy": [
        {"name": "SSSD", "exits": [41.5, 42.25, 43.0, 44.0], "ensemble": 46.125},
        {"name": "random labels", "exits": [31.0, 32.0, 33.0, 34.0], "ensemble": 36.0},
    ],
    "macs": MACS,
}


def network(arch: str = ARCH, num_classes: int = 3, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=num_classes, **kwargs)
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))  # so that the BatchNorm statistics are not those of a new network
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def load(folder: Path, **kwargs: object) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@torch.no_grad()
def test_timm_loads_the_same_network(tmp_path: Path, model: nn.Module, images: Tensor) -> None:
    save_model_folder(tmp_path / "model", model, arch=ARCH, label_names=NAMES)
    loaded = load(tmp_path / "model")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(loaded(images), model(images))
    assert loaded.pretrained_cfg["label_names"] == NAMES
    exits = model.forward_exits(images)
    for number in (1, 2, 3):
        small = load(tmp_path / "model", output=number)
        torch.testing.assert_close(small(images), exits.logits[number - 1])
        assert len(small.state_dict()) < len(model.state_dict())
    torch.testing.assert_close(load(tmp_path / "model", output="final")(images), exits.logits[3])
    assert load(tmp_path / "model", num_classes=0)(images).shape == (2, 512)


@pytest.mark.slow
def test_another_process_loads_it_after_the_import(tmp_path: Path, model: nn.Module, images: Tensor) -> None:
    save_model_folder(tmp_path / "model", model, arch=ARCH)
    code = (
        "import sssd_zoo, timm, torch\n"
        f"model = timm.create_model({f'local-dir:{tmp_path}/model'!r}, pretrained=True).eval()\n"
        "images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))\n"
        "print(model(images).double().sum().item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(model(images).double().sum().item(), abs=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_transformers_loads_it(tmp_path: Path, model: nn.Module) -> None:
    transformers = pytest.importorskip("transformers")
    save_model_folder(tmp_path / "model", model, arch=ARCH, label_names=NAMES)
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "model"))
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    answers = {answer["label"]: answer["score"] for answer in classify(image, top_k=3)}
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(load(tmp_path / "model")))
    expected = model(transform(image).unsqueeze(0)).softmax(1)[0]
    assert answers == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-3)


@torch.no_grad()
def test_weights_are_safetensors_in_float32(tmp_path: Path, images: Tensor) -> None:
    model = network().to(torch.bfloat16).to(memory_format=torch.channels_last)
    save_model_folder(tmp_path / "model", model, arch=ARCH)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        ".sssd-zoo.json",
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype))
    torch.testing.assert_close(load(tmp_path / "model")(images), model.float()(images))


def test_config_says_how_images_are_prepared(tmp_path: Path) -> None:
    model = network("sssd_resnet18", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    save_network(tmp_path, model, "sssd_resnet18", input_size=64)
    loaded = load(tmp_path)
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 64, 64)
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert config["crop_pct"] == 1
    assert "tag" not in loaded.pretrained_cfg or loaded.pretrained_cfg["tag"] is None


@torch.no_grad()
def test_a_run_folder_keeps_its_other_files(tmp_path: Path, images: Tensor) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    trunk = network(num_classes=0, output="final")
    save_network(tmp_path, network(num_classes=7), ARCH)
    save_network(tmp_path, trunk, ARCH, input_size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "model.safetensors"]
    torch.testing.assert_close(load(tmp_path)(images), trunk(images))


@pytest.mark.parametrize(("room", "file"), [(100_000, "model.safetensors"), (1_000_000, "README.md")])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, room: int, file: str) -> None:
    """Of a card that is larger than the weights, either may be what the disk has no room for."""
    model, large = network(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1)), Results(notes=["a" * 2_000_000])
    save_model_folder(tmp_path / "old", model, arch=ARCH)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for name in ("old", "new"):
        refusal = pytest.raises(UserError, match=f"cannot write .*{file}.*larger than the file-size limit")
        with files_up_to(room), refusal:
            save_model_folder(tmp_path / name, model, arch=ARCH, card_context=large)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_card_holds_what_was_measured(tmp_path: Path, model: nn.Module) -> None:
    save_model_folder(tmp_path / "model", model, arch=ARCH, label_names=NAMES, metrics=METRICS, card_context=CONTEXT)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["linear-probe accuracy, exit 2 (%)"] == 42.25
    assert results["linear-probe accuracy, ensemble (%)"] == 46.12
    assert {result.dataset_name for result in card.data.eval_results} == {"org/set"}
    assert card.data.library_name == "timm"
    answers = by_name(table(card.text))
    assert list(answers) == ["exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    numbers = activations(model, (3, 32, 32))
    assert answers["exit 1"] == ["41.50", "31.00", "100.0 M", f"{numbers['1'] / 1e6:.2f} M"]
    assert answers["ensemble"] == ["46.12", "36.00", "420.0 M", f"{numbers['ensemble'] / 1e6:.2f} M"]
    assert re.findall(r"[A-Z]*[\d.]+|NMI", facts(card.text)["Pseudo labels"]) == ["3", "9", "NMI", "0.500"]
    assert card.text.index("import sssd_zoo") < card.text.index("timm.create_model")
    assert "\n\n\n" not in card.text


def test_card_leaves_out_what_was_not_measured(tmp_path: Path, model: nn.Module) -> None:
    save_model_folder(tmp_path / "bare", model, arch=ARCH)
    card = ModelCard.load(tmp_path / "bare" / "README.md")
    assert card.data.eval_results is None
    for word in ("ccuracy", "## Training", "%", "NMI", "Seed", "named in", "None"):
        assert word not in card.text
    assert "\n\n\n" not in card.text

    one = {"2": 42.0}
    save_model_folder(tmp_path / "one", model, arch=ARCH, metrics=one, card_context={"data": "x", "macs": MACS})
    text = (tmp_path / "one" / "README.md").read_text()
    answers = by_name(table(text))
    assert answers["exit 2"][:2] == ["42.00", "200.0 M"]
    assert answers["exit 3"][:2] == ["", "300.0 M"]


def test_card_names_a_local_folder_without_its_path(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "pictures").mkdir()
    context: Results = {"data": str(tmp_path / "pictures")}
    save_model_folder(tmp_path / "model", model, arch=ARCH, metrics=METRICS, card_context=context)
    text = (tmp_path / "model" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "`pictures`" in text
    assert context == {"data": str(tmp_path / "pictures")}


def test_wordnet_ids_get_words(tmp_path):
    model = timm.create_model(ARCH, num_classes=2)
    save_model_folder(tmp_path / "model", model, arch=ARCH, label_names=["n01443537", "n01641577"])
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["label_descriptions"]["n01443537"] == "goldfish, Carassius auratus"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert loaded.pretrained_cfg["label_descriptions"] == config["label_descriptions"]
    assert class_descriptions(["n01443537", "n99999999"]) == class_descriptions(["fish", "frog"]) == {}
