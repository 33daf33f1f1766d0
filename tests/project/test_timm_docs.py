"""The code of docs/timm.md, run as it stands there: a section at a time, and what it left behind looked at."""

import math
import re

import pytest
import torch

from helpers.commands import ROOT

SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for title, text in re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/timm.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
}


def run_section(title: str) -> dict:
    names: dict = {"__name__": title}
    for code in SECTIONS[title]:
        exec(compile(code, f"docs/timm.md, {title}", "exec"), names)
    return names


def test_every_section_has_code_and_a_test():
    assert all(SECTIONS.values())
    assert set(SECTIONS) == {
        "Fine-tuning as timm's train.py does",
        "A linear head alone",
        "A neck on the stages' maps",
        "Without this package",
        "transformers",
    }


def test_fine_tuning():
    found = run_section("Fine-tuning as timm's train.py does")
    assert found["losses"][-1] < found["losses"][0]
    assert all(map(math.isfinite, found["losses"]))
    assert found["logits"].shape == (16, 5)
    # The layer decay reaches every layer: the stem's rate is the lowest, the classifiers' the highest.
    rates = {}
    for group in found["optimizer"].param_groups:
        for value in group["params"]:
            rates[id(value)] = group["lr_scale"]
    model = found["model"]
    heads = [model.fc, model.exit1.fc, model.exit2.fc, model.exit3.fc]
    assert {rates[id(head.weight)] for head in heads} == {1.0}
    assert rates[id(model.conv1.weight)] == min(rates.values()) < rates[id(model.layer4[0].conv1.weight)] < 1
    assert len(rates) == len(list(model.parameters()))
    ema, own = found["ema"].module.state_dict(), model.state_dict()
    assert not torch.equal(ema["layer1.0.conv1.weight"], own["layer1.0.conv1.weight"])


def test_linear_head():
    found = run_section("A linear head alone")
    for name, value in found["model"].state_dict().items():
        assert torch.equal(value, found["before"][name]) != name.startswith("fc."), name


def test_neck():
    found = run_section("A neck on the stages' maps")
    assert found["answer"].shape == (2, 3, 48, 64)
    assert all(value.grad is not None for value in found["model"].parameters())


def test_without_this_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_section("Without this package")
    assert type(found["plain"]).__module__ == "timm.models.resnet"
    assert found["same"]


@pytest.mark.slow
def test_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    found = run_section("transformers")
    assert len(found["answers"]) == 3
    assert all(answer["label"] in found["model"].pretrained_cfg["label_names"] for answer in found["answers"])
