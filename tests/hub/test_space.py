"""The page to try a network on: it says what the network says, in a real browser too; what would be published."""

import base64
import io
import json
import re
import shutil
import socket
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image

from helpers.browser import SpacePage, chromium
from helpers.commands import ROOT, command
from helpers.pages import served
from sssd_zoo.cli import run
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.augment import normalise, resize, to_float
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError
from sssd_zoo.files.run_folder import mark
from sssd_zoo.hub.page import Analysis, Demo
from sssd_zoo.hub.space import NEAREST, assemble, push
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models import ensemble_logits

SHIPPED = "sssd_resnet18_cifar.cifar10"
TINY = [
    *("--model", "sssd_resnet18", "--image_size", "32", "--pretrain.epochs", "1", "--pretrain.batch_size", "48"),
    *("--pretrain.splits", "2", "--pretrain.queue_size", "32", "--cluster.k", "4", "--distill.epochs", "1"),
    *("--distill.batch_size", "48", "--probe.probe_weight_decay", "0.01", "--device", "cpu", "--precision", "fp32"),
    *("--baseline", "false"),
]


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error line of `sssd space` with these words, which end with status 2."""
    with pytest.raises(SystemExit) as stop:
        run("space", list(map(str, words)))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def fitted(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on labelled images."""
    out = tmp_path_factory.mktemp("runs") / "labelled"
    run("fit", ["--data", str(folder_of_images), "--out", str(out), *TINY])
    return out


@pytest.fixture(scope="module")
def page(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run's Space."""
    folder = tmp_path_factory.mktemp("page")
    assemble(str(fitted), folder)
    return folder


@pytest.fixture(scope="module")
def demo(page: Path) -> Demo:
    return Demo(page)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the Space of the weights that ship."""
    folder = tmp_path_factory.mktemp("shipped")
    assemble(SHIPPED, folder)
    return folder


def test_the_folder_is_a_whole_space(page, fitted):
    files = {str(path.relative_to(page)) for path in page.rglob("*") if path.is_file()}
    assert {"app.py", "requirements.txt", "README.md", "page.json", "clusters/nearest.parquet"} <= files
    for name in ("model.safetensors", "config.json"):
        assert (page / "model" / name).read_bytes() == (fitted / "model" / name).read_bytes()
        assert (page / "clusters" / name).read_bytes() == (fitted / "pretrain" / name).read_bytes()
    # Nothing that is a pickle, a log or a checkpoint.
    kinds = {".py", ".txt", ".md", ".json", ".parquet", ".png", ".safetensors"}
    assert {Path(name).suffix for name in files} == kinds
    card = SpaceCard.load(page / "README.md").data
    assert (card.sdk, card.app_file, card.title) == ("gradio", "app.py", "sssd_resnet18 on " + "images0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(project["requires-python"].join(("python", ""))).specifier.contains(card.python_version)
    space = project["optional-dependencies"]["space"]
    [gradio] = [requirement for requirement in space if Requirement(requirement).name == card.sdk]
    assert Requirement(gradio).specifier.contains(card.sdk_version)
    # What the Space installs is asked for as the package asks for it.
    assert set((page / "requirements.txt").read_text().split()) <= {*space, *project["dependencies"]}


@pytest.mark.long
def test_the_page_runs_on_what_the_space_installs(page):
    needed = (page / "requirements.txt").read_text()
    others = ["accelerate", "datasets", "faiss", "jsonargparse", "matplotlib", "psutil", "sklearn", "torchmetrics"]
    assert not any(name in needed for name in others)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others}))  # an import of these fails
sys.path.insert(0, {str(page)!r})
import sssd_zoo
from pathlib import Path
from sssd_zoo.hub.page import Demo, build
demo = Demo(Path({str(page)!r}))
build(demo)
print(sssd_zoo.__file__, demo.analyse(Path(demo.examples[0]).read_bytes()).cluster)
"""
    result = command("-P", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2] == str(page / "sssd_zoo/__init__.py")


def test_it_says_what_the_network_says(demo, fitted, folder_of_images):
    network = timm.create_model(f"local-dir:{fitted / 'model'}", pretrained=True).eval()
    data = load_images(DataConfig(data=str(folder_of_images)), progress=False)
    files = sorted(folder_of_images.rglob("*.png"))
    assert data.class_names == demo.names
    config = network.pretrained_cfg
    for position in (0, 20, 40):
        [image] = data.gather(torch.tensor([position])).split(1)
        pixels = normalise(resize(to_float(image), 32), config["mean"], config["std"])
        found = demo.analyse(files[position].read_bytes())
        with torch.no_grad():
            logits = network.forward_exits(pixels).logits
            for answer, top in zip([*logits, ensemble_logits(logits)], found.top, strict=True):
                probabilities = answer[0].softmax(0)
                assert [label for label, _ in top] == probabilities.argsort(descending=True).tolist()
                assert [p for _, p in top] == pytest.approx(probabilities.sort(descending=True)[0].tolist(), abs=1e-5)
            for thresholds in [[share] * 3 for share in np.linspace(0, 1, 21)] + [[1, 0.99, 1], [0.99, 1, 0.99]]:
                early = network.forward_early(pixels, thresholds)
                assert found.exit_taken(thresholds) == early.exit.item()
                label, probability = found.early_answer(thresholds)
                assert label == early.logits.argmax()
                assert probability == pytest.approx(early.logits.softmax(1).max().item(), abs=1e-5)
        assert len(found.seconds) == 5
        assert min(found.seconds) > 0


def test_training_images_fall_into_their_own_clusters(demo, fitted, folder_of_images):
    pseudo = PseudoLabels.load(fitted / "labels")
    files = sorted(folder_of_images.rglob("*.png"))
    with torch.no_grad():
        assert [demo.clusters.nearest(files[row].read_bytes()) for row in pseudo.rows] == pseudo.labels.tolist()


def test_thumbnails_are_the_images_nearest_to_the_centres(page, fitted, folder_of_images):
    pseudo = PseudoLabels.load(fitted / "labels")
    pixels = load_images(DataConfig(data=str(folder_of_images)), progress=False).gather(torch.arange(48)).float()
    nearest = pq.read_table(page / "clusters/nearest.parquet").to_pydict()
    for cluster, size in enumerate(np.bincount(pseudo.labels)):
        members = np.flatnonzero(pseudo.labels == cluster)
        expected = members[np.argsort(pseudo.distances[members], kind="stable")][:NEAREST]
        shown = [image for image, own in zip(nearest["image"], nearest["cluster"], strict=True) if own == cluster]
        assert len(shown) == min(size, NEAREST)
        for row, image in zip(expected, shown, strict=True):
            thumbnail = torch.from_numpy(np.array(Image.open(io.BytesIO(image)))).permute(2, 0, 1).float()
            distances = (pixels - thumbnail).abs().mean((1, 2, 3))  # the thumbnail is compressed
            assert int(distances.argmin()) == row


def test_examples_are_of_every_class(page, demo, folder_of_images):
    assert len(demo.examples) == 10
    originals = [np.array(Image.open(path)) for path in sorted(folder_of_images.rglob("*.png"))]
    found = [
        [np.array_equal(Image.open(path), original) for original in originals].index(True) for path in demo.examples
    ]
    assert {position // 16 for position in found} == {0, 1, 2}


@pytest.mark.long
def test_a_network_without_labels_answers_with_clusters(folder_of_images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(folder_of_images.rglob("*.png"))):
        shutil.copy(path, flat / f"{number:02}.png")
    run("fit", ["--data", str(flat), "--out", str(tmp_path / "run"), *TINY])
    notes = assemble(str(tmp_path / "run"), tmp_path / "page")
    demo = Demo(tmp_path / "page")
    assert re.fullmatch(r"sssd_resnet18 on flat: \d clusters at 32 px", notes[0])
    assert "not names but" in demo.introduction()
    found = demo.analyse(Path(demo.examples[0]).read_bytes())
    cards = demo.answers(found, [0.5] * 3).split('<div class="card')[1:]
    assert len(cards) == 5
    for card, top in zip(cards, found.top, strict=True):  # each answer with the images of its cluster
        assert f'data-label="cluster {top[0][0]}"' in card
        assert demo.clusters is not None
        assert card.count("<img") == min(6, len(demo.clusters.thumbnails[top[0][0]]))
        assert demo.clusters.strip(top[0][0], 6) in card


def test_the_shipped_network(shipped):
    demo = Demo(shipped)
    assert demo.title == SHIPPED
    assert demo.clusters is None
    assert len(demo.examples) == 10
    found = demo.analyse(Path(demo.examples[9]).read_bytes())
    assert demo.neighbours(found) == ""
    network: Any = timm.create_model(SHIPPED, pretrained=True).eval()
    pixels = torch.from_numpy(np.array(Image.open(demo.examples[9]))).permute(2, 0, 1)[None]
    config = network.pretrained_cfg
    with torch.no_grad():
        answer = network(normalise(to_float(pixels), config["mean"], config["std"]))[0].softmax(0)
    assert found.top[4][0] == (int(answer.argmax()), pytest.approx(float(answer.max()), abs=1e-5))


def test_verdicts_and_names(demo, monkeypatch):
    monkeypatch.setattr(demo, "names", ["<b>", "green", "red"])
    shares = [[0.3, 0.4, 0.3], [0.6, 0.4, 0], [0, 0.1, 0.9], [0.2, 0.5, 0.3], [0.275, 0.35, 0.375]]
    tops = [[max(enumerate(own), key=lambda pair: pair[1])] for own in shares]
    found = Analysis(shares[:4], tops, [1, 2, 3, 4, 5], 0)
    assert [found.exit_taken([threshold] * 3) for threshold in (0.3, 0.4, 0.6, 0.9)] == [1, 2, 3, 4]
    early = demo.verdict(found, [0.5] * 3)
    assert 'data-exit="2"' in early
    assert "<b>&lt;b&gt;</b>, 60% sure, in 0.50 of the time to exit 4" in early
    assert found.exit_taken([0.4, 0.6, 0.8]) == 3
    # At the end answer the exits that were asked: all, some, or the last alone.
    for thresholds, words in (
        ([0.95] * 3, "as no exit before passes 95%: the ensemble of all exits answers <b>red</b>, 38% sure."),
        ([0.4, 0.6, 1], "passes its threshold (40%, 60% and 100%): the ensemble of exits 1, 2 and 4 answers"),
        ([0.4, 0.6, 1], "answers <b>green</b>, 43% sure."),
        ([1] * 3, "as no exit before passes 100%: it alone answers <b>green</b>, 50% sure."),
    ):
        assert words in demo.verdict(found, thresholds)

    def states(thresholds):
        return re.findall(r'class="card (\w*)" data-answer="(\w+)"', demo.answers(found, thresholds))

    assert states([0.5] * 3) == [("", "1"), ("taken", "2"), ("skipped", "3"), ("skipped", "4"), ("", "ensemble")]
    assert states([0.95] * 3) == [("", "1"), ("", "2"), ("", "3"), ("", "4"), ("taken", "ensemble")]
    assert states([1] * 3) == [("", "1"), ("", "2"), ("", "3"), ("taken", "4"), ("", "ensemble")]


def test_photographs_of_any_kind_and_files_that_are_none(demo):
    for mode, size, kind in (("RGBA", (300, 200), "PNG"), ("L", (40, 90), "JPEG"), ("CMYK", (64, 64), "JPEG")):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, kind)
        assert demo.analyse(buffer.getvalue()).top[0][0][1] > 0
    with pytest.raises(CorruptImageError, match="not an image"):
        demo.analyse(b"<svg/>")


def pictures(page: Path) -> list[bytes]:
    """The pixels of a page's examples."""
    return [Image.open(path).tobytes() for path in sorted((page / "examples").iterdir())]


def no_image(*_: Any) -> None:
    raise UserError("no image of images (test) can be decoded")


@pytest.mark.long
def test_without_the_images_of_the_run(fitted, folder_of_images, tmp_path, monkeypatch):
    assemble(str(fitted), tmp_path / "asked", run_images=False)
    moved = tmp_path / "moved"
    shutil.copytree(fitted, moved, ignore=shutil.ignore_patterns("checkpoints", "distill", "probe"))
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(folder_of_images), str(tmp_path / "gone")))
    notes = assemble(str(moved), tmp_path / "lost")
    assert "without the run's images and clusters: no file or folder" in notes[1]
    changed = tmp_path / "changed"
    shutil.copytree(folder_of_images, changed)
    next(changed.rglob("*.png")).unlink()
    (moved / "config.yaml").write_text(config.replace(str(folder_of_images), str(changed)))
    assert "these pseudo labels belong to other data" in assemble(str(moved), tmp_path / "other")[1]
    (moved / "config.yaml").write_text(config)
    (moved / "pretrain/model.safetensors").unlink()
    assert "holds no network: model.safetensors missing" in assemble(str(moved), tmp_path / "bare")[1]
    # The clusters can be shown, and an image of the split that the examples are taken from cannot.
    shutil.copy(fitted / "pretrain/model.safetensors", moved / "pretrain")
    monkeypatch.setattr("sssd_zoo.hub.space.run_examples", no_image)
    assert "without the run's images and clusters: no image" in assemble(str(moved), tmp_path / "undecodable")[1]
    monkeypatch.undo()
    # The network that the run distilled is not the page's to show, but the images are.
    (moved / "config.yaml").write_text(config.replace("features: null", "features: resnet18"))
    shutil.rmtree(moved / "pretrain")
    assert assemble(str(moved), tmp_path / "features")[1].startswith("without clusters: ")
    assert Demo(tmp_path / "features").clusters is None
    assert pictures(tmp_path / "features") != pictures(tmp_path / "asked")
    bundled = pictures(tmp_path / "asked")
    assert len(bundled) == 10
    for folder in ("asked", "lost", "other", "bare", "undecodable"):
        assert Demo(tmp_path / folder).clusters is None
        assert pictures(tmp_path / folder) == bundled, "only the bundled images are shown"


def test_a_fine_tuned_network(fitted, tmp_path):
    shutil.copytree(fitted / "model", tmp_path / "tuned" / "model")
    mark(tmp_path / "tuned", "finetune")
    said = assemble(str(tmp_path / "tuned"), tmp_path / "page")
    assert said == ["sssd_resnet18: 3 classes at 32 px"]
    assert Demo(tmp_path / "page").clusters is None
    assert list((tmp_path / "page" / "examples").iterdir()), "bundled images, as it has none of its own"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no folder 'nowhere'"),
        (["{tmp_path}"], "holds no network"),
        (["{fitted}/pretrain"], "not a network with four exits and classifiers"),
        ([SHIPPED, "--push", "name"], "the owner is missing"),
        ([SHIPPED, "--push", "org/na me"], "not a repository name"),
        ([SHIPPED, "--push", "org/name"], "run `hf auth login`, or set HF_TOKEN"),
        ([SHIPPED, "--dry_run"], "--dry_run is of what --push publishes"),
        ([SHIPPED, "--private"], "--private is of what --push publishes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(words, message, fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert message in one_line(capsys, *(word.format(fitted=fitted, tmp_path=tmp_path) for word in words))


def test_without_gradio_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in one_line(capsys, SHIPPED)


def test_a_taken_port_is_one_line(capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in one_line(capsys, SHIPPED, "--port", taken.getsockname()[1])


def test_what_would_be_published_is_listed(page, fitted, capsys):
    words = [str(fitted), "--push", "org/name", "--dry-run"]
    run("space", words)
    out = capsys.readouterr().out
    assert "clusters/" not in out, "images of the run are not published unasked"
    assert "the run's images stay here; --run_images true publishes thumbnails" in out
    run("space", [*words, "--run-images", "true"])
    out = capsys.readouterr().out
    listed = re.findall(r"^ +([\d,]+)  (.+)$", out, re.MULTILINE)
    expected = {str(path.relative_to(page)): path.stat().st_size for path in page.rglob("*") if path.is_file()}
    assert {name: int(size.replace(",", "")) for size, name in listed} == expected
    assert out.endswith("dry run: nothing was uploaded\n")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a Space of small files asks for; what was asked is kept in `server.asked`."""

    server: Any

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        action = self.path.partition("?")[0].removeprefix("/api/spaces/org/name")
        self.server.asked.append((self.command, action, self.headers.get("Authorization"), body))
        answers: dict[str, Any] = {
            "/api/repos/create": {"url": f"http://{self.headers['Host']}/spaces/org/name"},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/tree/main": [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.files],
            "/commit/main": {
                "commitUrl": f"http://{self.headers['Host']}/spaces/org/name/commit/1",
                "commitOid": "1" * 40,
            },
        }
        if action in ("", "/revision/main"):
            answers[action] = {"id": "org/name", "private": self.server.private, "sha": "0" * 40, "siblings": []}
        if action == "/preupload/main":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answers[action] = {"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]}
        found = action in answers and self.headers.get("Authorization") == "Bearer hf_good"
        content = json.dumps(answers[action] if found else {"error": "no"}).encode()
        self.send_response(200 if found else 401)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.private, server.files = [], False, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_push_makes_a_gradio_space_of_the_folder(hub, tmp_path, capsys):
    for name in ("app.py", "README.md", "model/config.json", "sssd_zoo/hub/page.py", "examples/cat [1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}'s content")
    hub.private = True
    hub.files = ["app.py", "clusters/nearest.parquet", "notes.txt"]  # of an earlier push, and of its owner
    push(tmp_path, "org/name", private=True, dry_run=False)
    asked = {action: json.loads(body) for _, action, _, body in hub.asked if action == "/api/repos/create"}
    made = asked["/api/repos/create"]
    assert (made["organization"], made["name"], made["type"], made["sdk"]) == ("org", "name", "space", "gradio")
    assert made.get("private") or made.get("visibility") == "private"
    [commit] = [body for _, action, _, body in hub.asked if action == "/commit/main"]
    items = [json.loads(line) for line in commit.splitlines()]
    sent = {
        item["value"]["path"]: base64.b64decode(item["value"]["content"]) for item in items if item["key"] == "file"
    }
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sent == {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files}
    gone = [item["value"]["path"] for item in items if item["key"] == "deletedFile"]
    assert gone == ["clusters/nearest.parquet"]
    assert "published: " in capsys.readouterr().out


def test_a_public_space_and_a_wrong_token_are_refused(hub, tmp_path, monkeypatch):
    (tmp_path / "app.py").write_text("")
    with pytest.raises(UserError, match="org/name is public"):
        push(tmp_path, "org/name", private=True, dry_run=False)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(UserError, match=r"org/name: .*401") as refused:
        push(tmp_path, "org/name", private=False, dry_run=False)
    assert "hf_bad" not in str(refused.value)
    assert not [action for _, action, _, _ in hub.asked if action == "/commit/main"]


def test_a_hub_that_is_down_is_one_line_without_the_token(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        line = one_line(capsys, SHIPPED, "--push", "org/name")
    assert "org/name: the Hub cannot be reached" in line
    assert "hf_secret" not in line
    assert not list(tmp_path.glob("sssd-space-*"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser")) as window:
        yield window


@pytest.fixture(scope="module")
def address(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `sssd space` shows the page of the run with thresholds; then it is ended, and leaves no folder behind."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("server")
    calibrated = folder / "calibrated"
    shutil.copytree(fitted, calibrated, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((calibrated / "model/config.json").read_text())
    config["model_args"]["thresholds"] = [1.0, 1.0, 0.0]
    (calibrated / "model/config.json").write_text(json.dumps(config))
    (folder / "scratch").mkdir()
    with served(calibrated, folder / "scratch") as where:
        yield where
    assert not list((folder / "scratch").glob("sssd-space-*"))


@pytest.fixture
def visited(browser: Any, address: str) -> SpacePage:
    return SpacePage(browser, address)


@pytest.mark.slow
class TestInABrowser:
    @pytest.fixture
    def expected(self, demo) -> list[Analysis]:
        """What `Demo` says of each example."""
        return [demo.analyse(Path(path).read_bytes()) for path in demo.examples]

    @staticmethod
    def names(demo: Demo, analysis: Analysis) -> list[str]:
        return [demo.names[top[0][0]] for top in analysis.top]

    def test_it_says_what_demo_says_of_an_example(self, visited, demo, expected):
        assert visited.labels() == self.names(demo, expected[0])
        assert len(visited.all("#examples .gallery-item")) == len(demo.examples)
        visited.choose_example(-1)
        visited.wait(lambda: visited.labels() == self.names(demo, expected[-1]))
        cards = visited.all("#answers .card")
        assert [card.find_element("tag name", "b").text for card in cards[:4]] == [f"Exit {n}" for n in range(1, 5)]
        for card, top in zip(cards, expected[-1].top, strict=True):
            shown = [value.text for value in card.find_elements("css selector", ".value")]
            assert shown == [f"{probability:.0%}" for _, probability in top]
            assert re.search(r"\d+\.\d ms", card.text)
        assert visited.all(f'#neighbours .strip[data-cluster="{expected[-1].cluster}"] img')

    def test_the_network_s_own_thresholds_hold_until_they_are_put_off(self, visited, demo, expected):
        names = self.names(demo, expected[0])
        assert names[2] in visited.verdict(3)
        (slider,) = visited.all("#threshold input[type=range]")
        assert not slider.is_enabled()
        assert "100%, 100% and 0% for exits 1 to 3" in visited.text("#own")
        visited.all("#own input")[0].click()
        visited.wait(slider.is_enabled)

        # No threshold lets every image leave at once, a full one lets none leave.
        slider.send_keys("\ue011")  # Home
        assert names[0] in visited.verdict(1)
        assert len(visited.all("#answers .card.skipped")) == 3
        slider.send_keys("\ue010")  # End
        assert "no exit before passes 100%" in visited.verdict(4)
        assert not visited.all("#answers .card.skipped")

    def test_nothing_is_wider_than_the_screen_nor_comes_from_elsewhere(self, visited, address):
        visited.choose_example(-1)
        assert visited.width_on(1280, mobile=False) <= 1280
        assert visited.width_on(390, mobile=True) <= 390
        assert visited.hosts() == {address}
        assert not visited.errors()

    def test_a_damaged_image_gets_a_sentence_in_the_place_of_answers(self, visited, demo, tmp_path):
        (tmp_path / "broken.png").write_bytes(Path(demo.examples[0]).read_bytes()[:200])
        visited.upload(tmp_path / "broken.png")
        visited.wait(lambda: "cannot be read as an image" in visited.text("#answers"))
        assert visited.labels() == []
