"""The documentation: its examples and snippets run, its commands parse, its links lead somewhere, its site builds."""

import ast
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from helpers.commands import ROOT, command
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.hub import save_network

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    *GUIDES,
    *(ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"),
    *sorted((ROOT / "hub_cards").rglob("*.md")),
    *sorted((ROOT / "train").rglob("*.md")),
]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("sssd_zoo/*/__init__.py"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and mkdocs both name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def nav_pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in nav_pages(part)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.parent == ROOT / "docs" / "api" and target.stem in PACKAGES:
            continue  # made by docs/site_files.py
        assert target.is_file(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_and_package_is_in_the_navigation():
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(listed) == len(set(listed))
    wanted = {*map(name_of, GUIDES), "CONTRIBUTING.md", "CHANGELOG.md"} | {f"docs/api/{name}.md" for name in PACKAGES}
    assert wanted <= set(listed)


def shell_lines() -> list[tuple[str, str]]:
    """The commands of this package in the shell blocks of the guides, with the page that each is from."""
    lines = []
    for page in [*GUIDES, ROOT / "hub_cards/reports/README.md"]:
        for block in blocks(page, "sh"):
            block = (
                block.replace("\\\n", "").replace("$R", "train/recipes/compare-cifar10-mini.yaml").replace("$S", "0")
            )
            lines += [(name_of(page), line.strip()) for line in block.splitlines()]
    return lines


def test_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for page, line in shell_lines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["sssd"]:
            seen.add(words[1])
            try:
                read_arguments(words[1], words[2:], f"sssd {words[1]}")
            except SystemExit:
                pytest.fail(f"{page}: {line}")
        elif words[:1] in (["accelerate"], ["python"]):
            assert any(word.endswith(".py") and (ROOT / word).is_file() for word in words), f"{page}: {line}"
    assert len(seen) >= 12  # not a pattern that has stopped to match


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/early_exit.md",
        "docs/networks.md",
        "docs/api/index.md",
        "docs/backbones.md",
    ],
)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arch = "sssd_resnet18_cifar"
    for folder in ("RUN/model", "CALIBRATED"):
        save_network(folder, timm.create_model(arch, pretrained=True, thresholds=[0.6, 0.6, 1.0]), arch)
    names: dict[str, Any] = {"images": torch.randn(2, 3, 32, 32)}
    code = blocks(ROOT / page, "python")
    assert code
    for block in code:
        exec(compile(block, page, "exec"), names)
    assert isinstance(names["model"], torch.nn.Module)


@pytest.mark.parametrize("name", ["add_method", "add_network"])
def test_examples_are_short_and_on_their_pages(name):
    assert len((ROOT / f"docs/examples/{name}.py").read_text(encoding="utf-8").splitlines()) < 60
    assert f'--8<-- "{name}.py"' in (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_example_of_a_method_trains_and_resumes(tmp_path):
    names = runpy.run_path(str(ROOT / "docs/examples/add_method.py"))
    measured = names["main"](str(tmp_path / "run"))
    assert -1 < measured["loss"] < 0  # embeddings of two views agree more than by chance
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert min(yaml.safe_load(line)["std"] for line in lines) > 0.01  # not collapsed
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert names["main"](str(tmp_path / "run"))["loss"] == measured["loss"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    network = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert network.num_classes == 0


# In a process of its own: a registered network stays in timm's list.
USE = """
import runpy, timm, torch
runpy.run_path("docs/examples/add_network.py", run_name="__main__")
from sssd_zoo.hub import save_network
model = timm.create_model("sssd_resnet10", num_classes=3).eval()
images = torch.randn(2, 3, 64, 64)
assert model.forward_early(images, [0, 1, 1]).exit.tolist() == [1, 1]
save_network(OUT, model, "sssd_resnet10")
small = timm.create_model("local-dir:" + OUT, pretrained=True, output=2).eval()
assert torch.equal(small(images), model.forward_exits(images).logits[1])
maps = timm.create_model("sssd_resnet10", features_only=True)(images)
assert [each.shape[1] for each in maps] == [64, 64, 128, 256, 512]
"""


@pytest.mark.long
def test_the_example_of_a_network_is_timm_s(tmp_path):
    done = command("-c", USE.replace("OUT", repr(str(tmp_path / "network"))))
    assert done.returncode == 0, done.stderr
    *costs, shape = done.stdout.splitlines()
    macs = {line.split(":")[0].strip(): float(line.split(":")[1].split()[0]) for line in costs}
    assert list(macs) == ["1", "2", "3", "4", "ensemble"]
    assert sorted(macs.values()) == list(macs.values())
    assert shape == "torch.Size([2, 10])"


# Trained by name, too, in the process that knows it; its folder says which network it holds.
USE_FAMILY = """
import runpy, timm, torch
runpy.run_path("docs/examples/add_family.py", run_name="__main__")
from sssd_zoo.models.networks import choose_model, load_network
from sssd_zoo.models.saving import save_network
name = choose_model("own_net", 32, exits=True)
model = timm.create_model(name, num_classes=3).eval()
images = torch.randn(2, 3, 32, 32)
save_network(OUT, model, name)
assert torch.equal(load_network(OUT, output=2).eval()(images), model.forward_exits(images).logits[1])
plain = timm.create_model("own_net", num_classes=3)
plain.load_state_dict(model.plain().state_dict())
usual = timm.create_model("sssd_backbone", backbone="own_net", num_classes=3).eval()
usual.load_state_dict(model.state_dict())
images = torch.randn(2, 3, 64, 64)
assert torch.equal(usual.forward_exits(images).logits[3], plain.eval()(images))
print(name)
"""


@pytest.mark.long
def test_the_example_of_a_family_has_exits(tmp_path):
    code = (ROOT / "docs/examples/add_family.py").read_text(encoding="utf-8")
    assert len([line for line in code.splitlines() if line]) < 40
    assert '--8<-- "add_family.py"' in (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    done = command("-c", USE_FAMILY.replace("OUT", repr(str(tmp_path / "network"))))
    assert done.returncode == 0, done.stderr
    costs, name = done.stdout.splitlines()
    macs = ast.literal_eval(costs)
    assert macs["1"] < macs["2"] < macs["3"] < macs["4"] < macs["ensemble"] <= 1.08 * macs["4"]
    assert name == "sssd_own_net_cifar"


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    done = command("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path), environment={"NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?:', html), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:', html), page
    reference = (tmp_path / "docs/api/tasks/index.html").read_text(encoding="utf-8")
    assert 'id="sssd_zoo.tasks.sssd.self_distillation_loss"' in reference
