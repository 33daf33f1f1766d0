"""The report's tables and figures, on made-up results: complete, without labels, and at the edges."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from helpers.markdown import by_name, facts, sections, table, tables
from sssd_zoo.evaluation.reports.figures import accuracy_cost, cluster_sheet, cluster_sizes, loss_curves
from sssd_zoo.evaluation.reports.html.page import write_page
from sssd_zoo.evaluation.reports.markdown import AccuracyRow, Results, write_report

ROWS: list[AccuracyRow] = [
    {"name": "SSSD", "exits": [48.8, 48.7, 48.6, 46.5], "ensemble": 51.3},
    {"name": "random labels", "exits": [35.2, 38.7, 39.3, 37.4], "ensemble": 44.4},
]
MACS = {"1": 100_000_000, "2": 200_000_000, "3": 300_000_000, "4": 400_000_000, "ensemble": 420_000_000}
RESULTS: Results = {
    "model": "sssd_resnet18",
    "image_size": 64,
    "data": "cifar10-sample",
    "split": "train",
    "images": 10_000,
    "corrupt": 2,
    "fingerprint": "0123456789abcdef" * 4,
    "test": "its split test",
    "test_images": 2_000,
    "classes": 10,
    "seed": 7,
    "machine": "2 cores",
    "k_asked": 200,
    "sizes": [60, 30, 10],
    "quality": {"nmi": 0.31, "ari": 0.12, "purity": 0.4},
    "accuracy": ROWS,
    "clustered": {"linear probe": 51.3, "weighted kNN (k = 200)": 47.15},
    "macs": MACS,
    "times": [{"step": "MoCo v2", "seconds": 403.2}, {"step": "k-means", "seconds": 3.21, "note": "K = 200"}],
    "figures": {"figures/accuracy.png": "Accuracy", "clusters.png": "Clusters", "figures/curves.png": "Curves"},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test draws, kept to look into."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *words: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *words, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d[\d,.]*\b", text)


def lines(count: int, **parts: float) -> list[dict[str, float]]:
    epochs = np.linspace(0, 5, count + 1)[1:]
    return [
        {"step": i, "epoch": epoch, "loss": 8 / (1 + epoch), **parts, "lr": 0.1, "images_per_second": 500}
        for i, epoch in enumerate(epochs)
    ]


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    write_report(tmp_path / "run" / "report.md", RESULTS)
    text = (tmp_path / "run" / "report.md").read_text()
    run = facts(text)
    assert run["Data"].startswith("cifar10-sample, split train, ")
    assert numbers(run["Data"]) == ["10,000", "2"], "images, and corrupt ones that were left out"
    assert run["Measured on"].startswith("its split test")
    assert numbers(run["Measured on"]) == ["2,000", "10"], "images, classes"
    assert run["Network"].startswith("sssd_resnet18 ")
    assert numbers(run["Network"]) == ["64"]
    assert numbers(run["Pseudo labels"]) == ["3", "200", "0.310", "0.120", "0.400"]
    assert (run["Seed"], run["Machine"]) == ("7", "2 cores")
    clustered = run["Features that were clustered"]
    assert "linear probe 51.30" in clustered
    assert "weighted kNN (k = 200) 47.15" in clustered
    assert RESULTS["fingerprint"].startswith(run["Data fingerprint"])

    parts = sections(text)
    assert list(parts)[1:] == ["Accuracy", "Pseudo labels", "Training"]
    for part, figure in zip(list(parts)[1:], ("figures/accuracy", "clusters", "figures/curves"), strict=True):
        assert re.findall(r"^!\[.*\]\((.*)\.png\)$", parts[part], re.MULTILINE) == [figure]
    (head, *accuracy), (_, *costs) = tables(parts["Accuracy"])
    assert head[1:] == ["exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    assert by_name(accuracy) == {
        "SSSD": ["48.80", "48.70", "48.60", "46.50", "51.30"],
        "random labels": ["35.20", "38.70", "39.30", "37.40", "44.40"],
        "SSSD over random labels": ["+13.60", "+10.00", "+9.30", "+9.10", "+6.90"],
    }
    assert by_name(costs) == {
        "exit 1": ["100.0 M", "25%"],
        "exit 2": ["200.0 M", "50%"],
        "exit 3": ["300.0 M", "75%"],
        "exit 4": ["400.0 M", "100%"],
        "ensemble": ["420.0 M", "105%"],
    }
    clusters = table(parts["Pseudo labels"])
    assert [value for _, value in clusters] == ["200", "3", "10, 30, 60", "0.310", "0.120", "0.400"]
    assert by_name(table(parts["Training"])) == {
        "MoCo v2": ["6 min 43 s", ""],
        "k-means": ["3.2 s", "K = 200"],
        "all": ["6 min 46 s", ""],
    }


def test_report_without_labels(tmp_path: Path) -> None:
    unlabelled: Results = {
        "data": "pictures",
        "images": 90,
        "k_asked": 3,
        "sizes": [50, 40],
        "quality": None,
        "macs": MACS,
        "times": [{"step": "k-means", "seconds": 7300}],
    }
    write_report(tmp_path / "report.md", unlabelled)
    text = (tmp_path / "report.md").read_text()
    assert "true labels" in sections(text)["Accuracy"], "which are missing"
    assert by_name(table(sections(text)["Training"]))["k-means"] == ["2 h 01 min", ""]
    for word in ("SSSD over", "kNN", "NMI", "mutual", "Measured on", "Seed", "None"):
        assert word not in text


def test_report_of_nothing_is_still_a_report(tmp_path: Path) -> None:
    write_report(tmp_path / "report.md", {})
    assert "Accuracy" in sections((tmp_path / "report.md").read_text())


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path: Path) -> None:
    write_report(tmp_path / "report.md", {"times": [{"step": "a|b", "seconds": 1.0}]})
    assert table((tmp_path / "report.md").read_text())[0] == ["a|b", "1.0 s", ""]


def test_no_command_ends_its_block(tmp_path: Path) -> None:
    odd = ["a\n```\n\n[click](javascript:x) <img src=x>\n```.png", "`id`", "a\u202eb", "a\x1b[2K", "a\rb"]
    verdict: Any = {"level": "weak", "sentence": "Few.", "next": [*(f"sssd predict '{name}'" for name in odd)]}
    write_report(tmp_path / "none.md", {"verdict": verdict})
    assert "Next:" not in (tmp_path / "none.md").read_text()
    verdict["next"].append(f"sssd embed '50% off #1' {'x' * 300}")
    write_report(tmp_path / "one.md", {"verdict": verdict})
    text = (tmp_path / "one.md").read_text()
    assert re.findall(r"^```sh\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE) == verdict["next"][-1:]
    assert "click" not in text


def test_a_page_of_little(tmp_path: Path) -> None:
    shown: dict[str, Any] = {"nameable": False, "total": 0, "images": {"row": []}, "classes": []}
    write_page(tmp_path / "bare.html", "RUN", {"data": "pictures"}, {}, shown)
    assert '<p class="sub">0 images</p>' in (tmp_path / "bare.html").read_text()
    write_page(tmp_path / "sized.html", "RUN", {"data": "pictures", "model": "m", "image_size": 8}, {}, shown)
    assert '<p class="sub">0 images, m at 8 px</p>' in (tmp_path / "sized.html").read_text()


def test_loss_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    parts = {"ce_teacher": 4.0, "kl": 0.1, "feature": 300.0, "label_top1": 0.25}
    stages = {"MoCo v2": lines(500), "distil": lines(40, **parts), "skipped": [], "short": lines(1, kl=0.0)}
    loss_curves(stages, tmp_path / "curves.png")
    panels = np.array(drawn[0].axes).reshape(4, 3)  # loss, feature, top-1, lr; the stage without lines has no column
    assert [panel.get_title(loc="left") for panel in panels[0]] == ["MoCo v2", "distil", "short"]
    assert [panel.get_yscale() for panel in panels[0]] == ["linear", "log", "linear"]
    for row in (1, 2):
        assert [panel.get_visible() for panel in panels[row]] == [False, True, False]
    names = [text.get_text() for text in panels[0, 1].get_legend().get_texts()]
    assert names == ["loss", "ce teacher", "kl"]
    assert panels[1, 1].get_lines()[0].get_ydata().tolist() == [300.0] * 40
    assert "unweighted" in panels[1, 1].get_ylabel()
    assert panels[2, 1].get_lines()[0].get_ydata().tolist() == [25.0] * 40
    loss_curves({"MoCo v2": lines(500)}, tmp_path / "pretrain.png")
    assert len(drawn[1].axes) == 3, "no row for a term that no stage has"
    raw, smooth = panels[0, 0].get_lines()
    assert len(smooth.get_ydata()) == len(raw.get_ydata()) == 500
    np.testing.assert_allclose(smooth.get_ydata()[100], np.mean(raw.get_ydata()[95:105]), rtol=1e-6)
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


@pytest.mark.parametrize("sizes", [[4, 4, 4], [1], list(range(1, 500))])
def test_cluster_sizes(tmp_path: Path, drawn: list[Figure], sizes: list[int]) -> None:
    cluster_sizes(sizes, tmp_path / "sizes.png")
    bars, histogram = drawn[0].axes
    assert f"{sum(sizes):,} images in {len(sizes)} clusters" in bars.get_title(loc="left")
    assert sum(patch.get_height() for patch in histogram.patches) == len(sizes)
    assert (tmp_path / "sizes.png").exists()


def test_accuracy_cost(tmp_path: Path, drawn: list[Figure]) -> None:
    accuracy_cost(ROWS, MACS, tmp_path / "accuracy.png")
    (axes,) = drawn[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert {"48.8", "51.3", "35.2", "44.4", "exit 1", "exit 4", "ensemble"} <= set(texts)
    assert axes.get_lines()[0].get_xdata().tolist() == [100, 200, 300, 400]
    assert "million" in axes.get_xlabel()
    accuracy_cost(ROWS[:1], {name: 30 * cost for name, cost in MACS.items()}, tmp_path / "one.png")
    assert "billion" in drawn[1].axes[0].get_xlabel()
    many = [{**ROWS[0], "name": f"network {number}"} for number in range(10)]
    accuracy_cost(many, MACS, tmp_path / "many.png")
    assert {f"network {number}" for number in range(10)} <= set(drawn[2].axes[0].get_legend_handles_labels()[1])


def test_cluster_sheet(tmp_path: Path, drawn: list[Figure]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 3, 32, 32), dtype=np.uint8)
    cluster_sheet(images, ["cluster 1", "cluster 2", "cluster 3"], tmp_path / "sheet.png")
    (axes,) = drawn[0].axes
    sheet = np.asarray(axes.get_images()[0].get_array())
    assert sheet.shape == (3 * 34 - 2, 4 * 34 - 2, 3)
    np.testing.assert_array_equal(sheet[34:66, 68:100], images[1, 2].transpose(1, 2, 0))
    assert (sheet[32:34] == 255).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cluster 1", "cluster 2", "cluster 3"]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    cluster_sizes([3, 2], tmp_path / "sizes.png")
    assert dict(mpl.rcParams) == before
