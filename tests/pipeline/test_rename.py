"""`sssd rename`: names of clusters from a CSV file, clusters merged by name, and files that are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.commands import TINY, one_line, sssd
from helpers.disk import contents
from helpers.networks import save_tiny
from helpers.runs import made_run
from sssd_zoo.files import RUN_MARK
from sssd_zoo.hub.page import Demo
from sssd_zoo.hub.space import assemble
from sssd_zoo.models.merged import Answers
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.rename import cluster_names, read_names

GOOD = "cluster,name\n0,cats\n1,cats\n2,dogs\n3,none of these\n"


@pytest.fixture(scope="module")
def run(folder_of_images, tmp_path_factory) -> Path:
    """A run without labels: its network answers four clusters."""
    return made_run(tmp_path_factory.mktemp("made") / "run", folder_of_images)


@pytest.fixture
def network(tmp_path) -> Path:
    return save_tiny(tmp_path / "network", classes=4)


def csv(folder: Path, content: str | bytes) -> Path:
    path = folder / "NAMES.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def answers(capsys, *words) -> list[dict]:
    capsys.readouterr()
    assert sssd("predict", *words, "--format", "jsonl", "--device", "cpu") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_names_of_one_answer_add_up():
    merged = Answers(["cats", "dogs", "cats", "birds"])
    logits = torch.randn(5, 3, 4)
    single = logits.softmax(-1)
    expected = torch.stack([single[..., 0] + single[..., 2], single[..., 1], single[..., 3]], -1)
    assert merged.names == ["cats", "dogs", "birds"]
    torch.testing.assert_close(merged.probabilities(logits), expected)
    plain = Answers(["a", "b", "c", "d"])
    assert torch.equal(plain.probabilities(logits), single)


def test_predict_answers_with_the_names_of_a_run(run, folder_of_images, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    images = folder_of_images / "red"
    before = answers(capsys, copy, images, "--output", "ensemble")
    assert sssd("rename", copy, csv(tmp_path, GOOD)) == 0
    assert "4 clusters, 3 answers" in capsys.readouterr().out
    after = answers(capsys, copy, images, "--output", "ensemble")
    assert {each["class"] for each in after} <= {"cats", "dogs", "none of these"}
    assert all(new["confidence"] >= old["confidence"] - 1e-6 for new, old in zip(after, before, strict=True))
    assert cluster_names(copy) == ["cats", "cats", "dogs", "none of these"]
    # A second file changes only what it lists.
    assert sssd("rename", copy / "model", csv(tmp_path, "cluster,name\n3,birds\n")) == 0
    assert cluster_names(copy) == ["cats", "cats", "dogs", "birds"]
    assert load_network(str(copy)).pretrained_cfg["label_names"] == ["cats", "cats", "dogs", "birds"]


@pytest.mark.slow
def test_fit_keeps_the_names(folder_of_images, tmp_path):
    out = tmp_path / "run"
    fit = ("fit", "--data", folder_of_images, "--unlabelled", "--out", out, *TINY)
    assert sssd(*fit) == 0
    assert "cluster 3" in (out / "report.html").read_text()
    assert sssd("rename", out, csv(tmp_path, GOOD)) == 0
    assert sssd(*fit) == 0
    assert load_network(str(out)).pretrained_cfg["label_names"] == ["cats", "cats", "dogs", "none of these"]
    assert '"none of these"' in (out / "report.html").read_text()


def test_names_of_other_clusters_are_not_used(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    assert sssd("rename", copy, csv(tmp_path, GOOD)) == 0
    naming = json.loads((copy / "cluster_names.json").read_text())
    (copy / "cluster_names.json").write_text(json.dumps({**naming, "labels": "of others"}))
    capsys.readouterr()
    assert cluster_names(copy) == [f"cluster {number}" for number in range(4)]
    assert "earlier labels" in capsys.readouterr().out


def test_the_page_and_transformers_take_merged_names(run, folder_of_images, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    assert sssd("rename", copy, csv(tmp_path, GOOD)) == 0
    assemble(str(copy), tmp_path / "space", run_images=False)
    demo = Demo(tmp_path / "space")
    found = demo.analyse((folder_of_images / "red" / "00.png").read_bytes())
    assert demo.names == ["cats", "dogs", "none of these"]
    assert all(sum(answer) == pytest.approx(1) and len(answer) == 3 for answer in found.probabilities)
    assert all(single <= top[0][1] + 1e-6 for single, top in zip(found.confidences, found.top, strict=False))
    image = torch.from_numpy(np.zeros((1, 3, 32, 32), np.float32))
    assert load_network(str(copy)).eval()(image).shape == (1, 4)
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(copy / "model")
    assert dict(config.id2label) == {0: "cats", 1: "cats", 2: "dogs", 3: "none of these"}


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace("\n", "\r\n").encode("utf-8-sig"),
        GOOD.replace(",", ";").encode(),
        GOOD.replace(",", "\t").encode("utf-16"),
        b'name,images,cluster\n"cats",4,0\ncats,9,cluster 1\n dogs ,2,2\n"none of these",1,3\n,,\n',
        GOOD.replace("cluster,name", "Cluster, Name ").encode(),
    ],
    ids=["a byte order mark and CRLF", "semicolons", "UTF-16", "other columns", "other case"],
)
def test_spreadsheets_files_are_read(content, tmp_path):
    assert read_names(csv(tmp_path, content), 4) == {0: "cats", 1: "cats", 2: "dogs", 3: "none of these"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cluster,name\n4,cats\n", "row 2 of .*: there is no cluster '4'; they are numbered 0 to 3"),
        ("cluster,name\n-1,cats\n", "no cluster '-1'"),
        ("cluster,name\n1.5,cats\n", "no cluster '1.5'"),
        ("cluster,name\n0,cats\n0,dogs\n", "row 3 of .* names cluster 0 once more"),
        ("cluster,title\n0,cats\n", "no column 'name'"),
        ("number,name\n0,cats\n", "no column 'cluster'"),
        ("cluster,name,name\n0,cats,dogs\n", "two columns 'name'"),
        ("cluster,name\n0,\n", "name of cluster 0 is empty"),
        ("cluster,name\n0,  \n", "name of cluster 0 is empty"),
        ("cluster,name\n0\n", "name of cluster 0 is empty"),
        ('cluster,name\n0,"two\nlines"\n', "invisible"),
        ("cluster,name\n0,\x1b[31mred\n", "invisible"),
        (f"cluster,name\n0,{'x' * 201}\n", "more than 200 characters"),
        ("cluster,name\n", "names no cluster"),
        ("", "no column 'cluster'"),
        (b"cluster,name\n0,caf\xe9\n", "not UTF-8"),
        (b"cluster,name\n0,a\x00b\n", "invisible|cannot read"),
        ('cluster,name\n0,"open\n', "cannot read .* as CSV"),
    ],
)
def test_a_wrong_file_is_one_line_and_changes_nothing(content, words, network, tmp_path, capsys):
    before = contents(network)
    path = csv(tmp_path, content)
    assert sssd("rename", network, path) == 2
    line = one_line(capsys)
    assert re.search(words, line), line
    assert contents(network) == before


def test_a_folder_is_known_by_any_name(run, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    save_tiny(copy / "distill", classes=4)
    (copy / "steps").mkdir()
    (copy / "steps" / "distill.json").write_text("{}")
    names = csv(tmp_path, GOOD)
    before = contents(copy)
    for step in (".", "./", "link"):
        monkeypatch.chdir(copy / "distill" if step != "link" else tmp_path)
        if step == "link":
            Path("link").symlink_to(copy / "distill")
        assert sssd("rename", step, names) == 2
        assert f"{step.rstrip('/')} is of a step of a run" in one_line(capsys)
    assert contents(copy) == before
    # The network of a run is renamed with the run.
    (tmp_path / "network of the run").symlink_to(copy / "model")
    for folder, given, name in (
        (copy / "model", ".", "owls"),
        (copy / "model", "./", "cows"),
        (copy, ".", "bees"),
        (tmp_path, "network of the run", "bats"),
    ):
        monkeypatch.chdir(folder)
        assert sssd("rename", given, csv(tmp_path, f"cluster,name\n1,{name}\n")) == 0
        assert cluster_names(copy)[1] == name
        assert load_network(str(copy)).pretrained_cfg["label_names"][1] == name


def test_networks_that_are_not_renamed(run, network, folder_of_images, tmp_path, capsys):
    names = csv(tmp_path, GOOD)
    (run / "steps").mkdir(exist_ok=True)
    (run / "steps" / "distill.json").write_text("{}")
    assert sssd("rename", network, names) == 0
    assert load_network(str(network)).pretrained_cfg["label_names"][1] == "cats"
    for model, words in (
        (tmp_path / "none", "there is no folder"),
        (run / "distill", "is of a step of a run"),
        (folder_of_images, "was not made by sssd-zoo"),
    ):
        assert sssd("rename", model, names) == 2
        assert words in one_line(capsys)
    assert sssd("rename", network, tmp_path / "none.csv") == 2
    assert "there is no file" in one_line(capsys)
    labelled = shutil.copytree(run, tmp_path / "labelled")
    results = json.loads((labelled / "metrics.json").read_text())
    accuracy = [{"name": "SSSD", "exits": [1.0] * 4, "ensemble": 1.0}]
    (labelled / "metrics.json").write_text(json.dumps({**results, "accuracy": accuracy}))
    # The network with the probes as its classifiers, a card of it, and one fine-tuned on classes.
    probe, card, tuned = labelled / "probe" / "network", tmp_path / "card", tmp_path / "tuned"
    for folder in (probe, card, tuned / "model"):
        save_tiny(folder, classes=4)
    (labelled / "steps").mkdir(exist_ok=True)
    (labelled / "steps" / "probe.json").write_text("{}")
    shutil.copyfile(labelled / "metrics.json", card / "metrics.json")
    for folder, kind in ((card, "card"), (tuned, "finetune")):
        (folder / RUN_MARK).write_text(json.dumps({"kind": kind}))
    before = contents(tmp_path)
    for model, words in (
        (labelled, "nothing to name"),
        (probe, "is of a step of a run"),
        (card, "predicts classes, as its card says, not clusters"),
        (tuned, "was trained by `sssd finetune` on classes"),
        (tuned / "model", "was trained by `sssd finetune` on classes"),
    ):
        assert sssd("rename", model, names) == 2
        assert words in one_line(capsys)
    assert contents(tmp_path) == before


def test_a_run_whose_results_are_damaged_is_not_renamed(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "metrics.json").write_text("")
    before = contents(copy)
    assert sssd("rename", copy, csv(tmp_path, GOOD)) == 2
    assert f"run the command that made {copy} again, which repairs it" in one_line(capsys)
    assert contents(copy) == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1")], ids=["missing", "cut"])
def test_clusters_of_damaged_labels_get_no_names(damage, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    damage(copy / "labels" / "labels.parquet")
    assert sssd("rename", copy, csv(tmp_path, GOOD)) == 2
    assert "labels is damaged (labels.parquet is" in one_line(capsys)
    assert not (copy / "cluster_names.json").exists()
