"""Names of strangers reach terminals, reports, cards, figures and the page as the characters that they are."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from helpers.commands import ROOT
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import Terminal, code, html, markdown, plain
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.markdown import table, write_report
from sssd_zoo.hub.model_card import model_card
from sssd_zoo.hub.publish import labels_card

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "\x9b31m\x90q\x9c",
    "cat\r\nerror: spoofed",
    "gpj.\u202etxt\u2066\u2069",
    "a\u2028b\ufeff\U000e0041",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[click](javascript:alert(1)) ![x](http://127.0.0.1/x.png) <http://127.0.0.1>",
    "`</code><b>x</b>`` ```",
    "a|b\\|c\\\\|d||",
    "*bold* _em_ ~~gone~~ # head",
    "$\\frac{1}{0}$ $$x$$ $5_$10",
    "---\nlicense: mit\n---\n",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt; &amp; &#60;",
    "\ud800 half",
    "x" * 5000,
    "",
]
PLAIN = ["cat", "sssd_resnet18", "Ente, grün", "日本語", "👩\u200d🔬", "cifar10-sample", "a b (c)", "owner/animals"]


@pytest.mark.parametrize("name", PLAIN)
def test_names_that_do_no_harm_stay_as_they_are(name):
    assert plain(name) == name
    assert markdown(name) == name
    assert code(name) == f"`{name}`"
    assert html(name) == name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_one_line_of_visible_characters(name):
    shown = plain(name)
    assert len(shown) <= 2000
    assert all(character.isprintable() or character in "\u200c\u200d" for character in shown)
    assert "\n" not in str(UserError(f"no class '{name}'"))
    assert not {"\x1b", "\x9b", "\u202e"} & set(str(UserError(name)))


def test_a_terminal_sees_control_characters_as_escapes():
    buffer = io.StringIO()
    terminal: Any = Terminal(buffer)
    for words in ("\rk-means: 10%", "\n\x1b[A", "two\nlines\tof text\n", "\x1b[2J\x9b\u202e\rerror: all well\n"):
        terminal.write(words)
    print("日本語 👩\u200d🔬", file=terminal)
    start = "\rk-means: 10%\n\x1b[Atwo\nlines\tof text\n"
    assert buffer.getvalue() == start + "\\x1b[2J\\x9b\\u202e\\rerror: all well\n日本語 👩\u200d🔬\n"


@pytest.mark.long
def test_what_a_command_says_passes_through_it(tmp_path):
    name = tmp_path / "\x1b[31mred\u202e.png"
    name.write_bytes(b"no image")
    code_ = "import sys, sssd_zoo.cli; sys.argv[0] = 'sssd'; sssd_zoo.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code_, "predict", "sssd_resnet18_cifar", str(name), "\x1b]0;title\x07"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"\x1b" not in done.stdout + done.stderr
    assert "\u202e".encode() not in done.stdout + done.stderr


def rendered(text: str) -> Any:
    """The tokens of Markdown with tables, flat."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    return [*tokens, *(child for token in tokens for child in token.children or [])]


def harmless(text: str) -> None:
    """Asserts that Markdown has no HTML, link or picture but those of our own."""
    tokens = rendered(text)
    assert not [token.content for token in tokens if token.type.startswith("html")]
    targets = [str(token.attrs.get("href") or token.attrs.get("src")) for token in tokens if token.attrs]
    assert not [target for target in targets if "javascript" in target or "127.0.0.1" in target]
    assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(text)
    assert "$$" not in re.sub(r"`[^`]*`|\\\$", "", text)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_of_a_name_is_text(name):
    for written in (markdown(name), code(name)):
        tokens = rendered(f"- **Data**: {written}, ours")
        kinds = {token.type for token in tokens if token.nesting >= 0}
        kinds -= {"bullet_list_open", "list_item_open", "paragraph_open", "inline", "strong_open"}
        assert kinds <= {"text", "code_inline", "text_special"}
        said = "".join(token.content for token in tokens if token.type in ("text", "code_inline", "text_special"))
        assert said == f"Data: {plain(name)}, ours" or not plain(name).strip()
        head = ["", "b", "c"]
        tokens = rendered("\n".join(table(head, [[written, "1", "2"], ["x", written, written]])))
        assert sum(token.type == "td_open" for token in tokens) == 6


@pytest.mark.parametrize("name", HOSTILE)
def test_reports_and_cards_of_hostile_names(name, tmp_path):
    results: Any = {
        **{"model": name, "image_size": 32, "data": name, "split": name, "images": 48, "test": name, "machine": name},
        **{"seed": name, "fingerprint": name, "clustered": {name: 1.0}, "classes": 3},
        "times": [{"step": name, "seconds": 61.0, "note": name}],
        "accuracy": [{"name": each, "exits": [1.0, 2.0, 3.0, 4.0], "ensemble": 5.0} for each in (name, f"{name}2")],
        "figures": {"figures/accuracy.png": name},
        "macs": {"1": 1, "2": 2, "3": 3, "4": 4, "ensemble": 5},
    }
    write_report(tmp_path / "report.md", results)
    harmless((tmp_path / "report.md").read_text(encoding="utf-8"))
    config = {"architecture": name, "num_classes": 3, "label_names": [name] * 3, "model_args": {}}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32]}
    measured = dict(zip(("1", "2", "3", "4", "ensemble"), (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    figures = {"figures/accuracy.png": name}
    network = timm.create_model("sssd_resnet18", device="meta")
    text = model_card(config, network, metrics=measured, context=results, figures=figures, license_name="mit")
    card = ModelCard(text)
    harmless(card.text)
    assert card.data.license == "mit"
    assert card.data.to_dict()["library_name"] == "timm"
    meta = {"data": f"owner/{name}", "split": name, "k": 3, "k_asked": 4, "sizes": [1, 2, 3], "seed": name}
    meta |= {"fingerprint": name, "nearest": None, "quality": None}
    labels = DatasetCard(labels_card(meta, "owner/name", "mit"))
    harmless(labels.text)
    assert yaml.safe_load(labels.data.to_yaml())["license"] == "mit"


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["$1_$5", "$5_$10", "$\\frac{1}{0}$", "_hidden", "\ud800\x1b[2J\n", "x" * 5000, ""])
def test_figures_show_names_as_they_are(name, tmp_path):
    lines = [{"epoch": number, "loss": 10.0**-number, "part": 1.0, "lr": 0.1} for number in (1, 2, 3)]
    figures.loss_curves({name: lines}, tmp_path / "curves.png")
    rows: Any = [{"name": name, "exits": [1.0, 2.0, 3.0, 4.0], "ensemble": 5.0}]
    macs = {"1": 1, "2": 2, "3": 3, "4": 4, "ensemble": 5}
    figures.accuracy_cost(rows, macs, tmp_path / "accuracy.png", plain={name: 2.0})
    figures.cluster_sheet(np.zeros((2, 3, 3, 8, 8), np.uint8), [name, f"{name} 2"], tmp_path / "clusters.png")
    figures.label_curves({name: {1.0: [50.0, 60.0]}}, {name: {1.0: 50.0}}, tmp_path / "labels.png", axis="labels (%)")
    boxes: Any = [{"boxes": np.array([[1, 1, 5, 5]]), "labels": np.array([1]), "difficult": np.array([0])}]
    figures.detections([np.zeros((3, 8, 8), np.uint8)], boxes, boxes, [name], tmp_path / "boxes.png")
    for path in sorted(Path(tmp_path).glob("*.png")):
        with Image.open(path) as picture:
            assert max(picture.size) < 3000
