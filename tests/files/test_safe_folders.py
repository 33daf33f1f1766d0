"""Nothing of the user's is replaced or removed: what the commands write into, and what of it they may take away."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from helpers.commands import ROOT, TINY, command, dead, one_line, sssd
from helpers.disk import contents
from sssd_zoo.cli.arguments import PATHS
from sssd_zoo.cli.commands import COMMANDS
from sssd_zoo.configs import commands as arguments
from sssd_zoo.errors import UserError
from sssd_zoo.files import RUN_MARK, atomic_write_text, expand_home, lock, sha256, write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import (
    CHECKPOINTS,
    KINDS,
    atomic_dir,
    check_replaceable,
    claim,
    drop,
    kind_of,
    mark,
    remove,
    tidy,
)
from sssd_zoo.hub.cards import WEIGHTS_MARK, check_weights_file
from sssd_zoo.hub.model_card import save_model_folder
from sssd_zoo.models.saving import network_weights, save_network
from sssd_zoo.pipeline.export import is_graph, is_program

SMALL = ["--model", "sssd_resnet18", "--image_size", "32", "--epochs", "1", "--batch_size", "16", "--device", "cpu"]
WORDS = {  # a command line of each command that has an --out, but for that
    "fit": ["--data", "DATA", *TINY],
    "compare": ["--data", "DATA"],
    "finetune": ["--data", "DATA", "--models", "[scratch]"],
    "pretrain": ["--data", "DATA"],
    "pseudo-label": ["--data", "DATA", "--model", "sssd_resnet18_cifar"],
    "distill": ["--data", "DATA", "--labels", "random"],
    "seed": ["--data", "DATA", "--teacher", "sssd_resnet18_cifar"],
    "linear": ["--data", "DATA", "--model", "sssd_resnet18_cifar"],
    "early-exit": ["sssd_resnet18_cifar", "--data", "DATA"],
    "export": ["sssd_resnet18_cifar", "--format", "safetensors"],
    "detect": ["--data", "[DATA]", "--model", "sssd_resnet18_cifar"],
    "detect-eval": ["--data", "[DATA]", "--model", "sssd_resnet18_cifar"],
    "card": ["--run", "DATA"],
    "clusters": ["DATA"],
    "pull": ["sssd_resnet18_cifar"],
}


def words_of(command: str, data: Path) -> list[str]:
    return [command, *(word.replace("DATA", str(data)) for word in WORDS[command])]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of the user's, in which every name that a run uses is taken."""
    folder = tmp_path / "mine"
    for name in ("labels", "pretrain", "model", "checkpoints", "figures"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text(f"my {name}")
    (folder / "thesis.txt").write_text("the only copy")
    return folder


def test_every_command_that_writes_a_folder_is_tried_here():
    writers = {name for name, made in COMMANDS.items() if "out" in get_type_hints(getattr(arguments, made.arguments))}
    assert writers - {"embed", "search"} == set(WORDS)  # those write files


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_the_users_is_refused(command, overwrite, mine, folder_of_images, capsys):
    before = contents(mine)
    words = words_of(command, folder_of_images)
    assert sssd(*words, "--out", mine, *(["--overwrite"] if overwrite else [])) == 2
    assert "holds checkpoints, figures, labels, ...; nothing in it" in one_line(capsys)
    assert contents(mine) == before


@pytest.mark.parametrize("command", [name for name, words in WORDS.items() if "--data" in words])
def test_data_in_out_are_refused_and_stay(command, folder_of_images, tmp_path, capsys):
    data = shutil.copytree(folder_of_images, tmp_path / "W" / "pretrain")
    mark(tmp_path / "W", "fit")  # a folder in which a run was begun, too
    before = contents(tmp_path)
    for out in (data, data.parent, tmp_path):
        assert sssd(*words_of(command, data), "--out", out, "--overwrite") == 2
        assert "lies in --out" in one_line(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", WORDS)
def test_a_folder_of_another_kind_is_refused(command, folder_of_images, tmp_path, capsys):
    kind = "labels" if command == "fit" else "fit"
    mark(tmp_path / "out", kind)
    (tmp_path / "out" / "report.md").write_text("days of work")
    before = contents(tmp_path)
    assert sssd(*words_of(command, folder_of_images), "--out", tmp_path / "out", "--overwrite") == 2
    assert KINDS[kind].words in one_line(capsys)
    assert contents(tmp_path) == before


def test_an_out_that_cannot_be_made_is_one_line(folder_of_images, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, words in ((tmp_path / "link", "nowhere, which does not exist"), ("/proc/run", "cannot be made there")):
        assert sssd("pretrain", "--data", folder_of_images, "--out", out) == 2
        assert words in one_line(capsys)


def test_a_command_that_fails_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for out in ("new/er/run", "empty"):
        assert sssd("pretrain", "--data", tmp_path / "none", "--out", tmp_path / out) == 2
        one_line(capsys)
    assert list(contents(tmp_path)) == ["empty"]


@pytest.mark.long
def test_overwrite_takes_what_the_command_wrote_and_leaves_the_rest(folder_of_images, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["distill", "--data", folder_of_images, "--out", out, "--labels", "random", "--k", "4", *SMALL]
    assert sssd(*words) == 0
    assert json.loads((out / RUN_MARK).read_text()) == {"package": "sssd-zoo", "kind": "training"}
    (out / "README.md").write_text("my notes")
    (out / "checkpoints" / "notes.txt").write_text("mine, too")
    (out / "photos").mkdir()
    (out / "photos" / "one.png").write_bytes(b"mine")
    first = (out / "model.safetensors").read_bytes()
    assert sssd(*words, "--seed", "1", "--overwrite") == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert (out / "README.md").read_text() == "my notes"
    assert (out / "checkpoints" / "notes.txt").read_text() == "mine, too"
    assert (out / "photos" / "one.png").read_bytes() == b"mine"
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert not {"overwrite", "resume"} & saved.keys(), "config.yaml is a recipe: using it again must not overwrite"
    assert not list(out.rglob("*.lock"))


def test_a_folder_that_is_replaced_keeps_what_others_put_into_it(tmp_path):
    folder = tmp_path / "net"
    model = timm.create_model("sssd_resnet18", num_classes=3, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
    save_model_folder(folder, model, arch="sssd_resnet18")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "nowhere")
    save_model_folder(folder, model, arch="sssd_resnet18", label_names=["a", "b", "c"])
    assert "label_names" in json.loads((folder / "config.json").read_text())
    assert (folder / "notes" / "mine.txt").read_text() == (folder / ".hidden").read_text() == "mine"
    assert (folder / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "read-only"), (errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied")],
)
def test_a_folder_that_nothing_can_be_written_into_is_one_line(number, words, tmp_path, monkeypatch):
    def fails(folder):
        raise OSError(number, "no", str(folder / lock.LOCK))

    monkeypatch.setattr(lock, "take", fails)
    with pytest.raises(UserError, match=f"cannot write .*{words}"):
        claim(tmp_path / "run", "training")


def test_of_the_checkpoints_only_those_of_this_package_are_removed(tmp_path):
    mark(tmp_path, "training")
    for name in ("step-00000100/checkpoint.json", "step-00000100-keep/notes.txt", "step-by-step notes.txt"):
        (tmp_path / "checkpoints" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoints" / name).write_text("")
    remove(tmp_path, CHECKPOINTS)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000100-keep", "step-by-step notes.txt"]


def test_a_library_call_replaces_no_folder_of_the_users(mine):
    before = contents(mine)
    with pytest.raises(UserError, match="not made by sssd-zoo"), atomic_dir(mine, "labels") as temporary:
        (temporary / "labels.parquet").write_bytes(b"")
    assert contents(mine) == before


def test_out_may_be_the_current_folder_or_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for out in (".", tmp_path / "link"):
        with atomic_dir(out, "labels") as temporary:
            (temporary / "labels.parquet").write_bytes(b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "labels.parquet").is_file()


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.long
def test_export_replaces_only_an_export(suffix, tmp_path, capsys):
    model = timm.create_model("sssd_resnet18", num_classes=3, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
    save_network(tmp_path / "net", model, "sssd_resnet18", input_size=32)
    out = tmp_path / f"photo.{suffix}"
    words = ["export", tmp_path / "net", "--out", out, "--overwrite"]
    words += ["--format", "onnx" if suffix == "onnx" else "torch-export"]
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    out.write_text("a photo")
    assert sssd(*words) == 2
    assert "so it is kept" in one_line(capsys)
    assert out.read_text() == "a photo"
    out.unlink()
    half = tmp_path / f".{out.name}.sssd-tmp-{dead()}"
    half.write_text("half an export")
    assert sssd(*words) == 0
    assert not half.exists()
    assert (is_graph if suffix == "onnx" else is_program)(out), "which may be replaced"
    kept = out.rename(tmp_path / "kept")
    out.symlink_to(kept)
    before = kept.stat().st_ino
    assert sssd(*words) == 0
    assert out.readlink() == kept, "a link stays one, and what it names is written"
    assert kept.stat().st_ino != before
    kept.rename(out)
    (tmp_path / "photo.int8.onnx").write_text("mine")
    if suffix == "onnx":
        assert sssd(*words, "--int8", "--data", "cifar10-sample") == 2
        assert "photo.int8.onnx" in one_line(capsys)


def test_the_weights_of_a_card_replace_no_other_file(tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    weights.write_text("mine")
    run = tmp_path / "run"
    save_model_folder(run / "model", timm.create_model("sssd_resnet18", num_classes=3), arch="sssd_resnet18")
    for name in ("metrics.json", "config.yaml"):
        (run / name).write_text("{}")
    words = ["card", "--run", run, "--out", tmp_path / "card", "--weights", weights]
    for more, reason in (([], "already exists"), (["--overwrite"], "is not")):
        assert sssd(*words, *more) == 2
        assert f"weights.safetensors {reason}" in one_line(capsys)
    assert weights.read_text() == "mine"
    assert not (tmp_path / "card").exists()


def test_an_output_that_is_a_link(tmp_path):
    real, link, broken = tmp_path / "kept" / "v1.csv", tmp_path / "latest.csv", tmp_path / "broken.csv"
    real.parent.mkdir()
    real.write_text("old")
    link.symlink_to(real)
    broken.symlink_to(tmp_path / "nowhere" / "x.csv")
    check_replaceable(link, True, "a listing", lambda path: path.read_text() == "old")
    atomic_write_text(link, "new", follow_link=True)
    assert link.readlink() == real
    assert real.read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == [real.name]
    for overwrite in (False, True):
        with pytest.raises(UserError, match=re.escape(f"broken.csv is a link to {tmp_path / 'nowhere' / 'x.csv'}")):
            check_replaceable(broken, overwrite, "a listing", lambda _: True)
    assert broken.is_symlink()
    # What this package links itself it replaces.
    atomic_write_text(link, "own")
    assert (link.is_symlink(), real.read_text()) == (False, "new")


def test_the_weights_of_a_card_replace_only_such_weights(tmp_path, capsys):
    foreign, card = tmp_path / "llm.safetensors", tmp_path / "card"
    save_file({"conv1.weight": torch.zeros(2)}, foreign, metadata={"format": "pt"})
    run = tmp_path / "run"
    save_model_folder(run / "model", timm.create_model("sssd_resnet18", num_classes=3), arch="sssd_resnet18")
    mark(run, "fit")
    before = contents(tmp_path)
    own, new = run / "model" / "model.safetensors", run / "new.safetensors"
    for path, reason in (
        (foreign, "is not weights of `sssd card`, so it is kept"),
        (own, f"lies in {run / 'model'}, which holds a network"),
        (new, f"lies in {run}, which holds a run of `sssd fit`"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            check_weights_file(path, card, overwrite=True)
    assert contents(tmp_path) == before
    network, weights = timm.create_model("sssd_resnet18", num_classes=3), tmp_path / "weights.safetensors"
    weights.write_bytes(network_weights(network, torch.float16, metadata=WEIGHTS_MARK))
    check_weights_file(weights, card, overwrite=True)
    # Those of an earlier version have no mark; the card that they belong to knows them.
    weights.write_bytes(network_weights(network, torch.float16))
    with pytest.raises(UserError, match="is not weights of"):
        check_weights_file(weights, card, overwrite=True)
    mark(card, "card")
    write_json(card / "metrics.json", {"weights": {"sha256": sha256(weights)}})
    check_weights_file(weights, card, overwrite=True)
    check_weights_file(card / "weights.safetensors", card, overwrite=False)


def test_an_export_replaces_no_archive_of_the_user_s(tmp_path):
    archive = tmp_path / "takeout.zip"
    for name, content in (
        ("Takeout/Photos/2019/metadata.json", '{"architecture": "", "output": ""}'),
        ("Takeout/extra/metadata.json", '{"title": "2019"}'),
        ("Takeout/extra/metadata.json", "["),
    ):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, content)
        assert not is_program(archive), name
    archive.write_bytes(archive.read_bytes()[:40])
    assert not is_program(archive)


@pytest.mark.parametrize("suffix", ["json", "textproto", "onnxtxt"])
def test_an_export_replaces_no_text_of_the_user_s(suffix, tmp_path):
    onnx = pytest.importorskip("onnx")
    out = tmp_path / f"x.{suffix}"
    out.write_text('{"mine": true}')
    assert not is_graph(out)
    graph = onnx.ModelProto()
    onnx.helper.set_model_props(graph, {"architecture": '"sssd_resnet18"', "output": '"4"'})
    out.write_bytes(graph.SerializeToString())
    assert is_graph(out), "an export is one by any name"


# Folders of version 0.1, which wrote no marks.


def common(**settings: Any) -> str:
    return yaml.safe_dump({"data": "photos", "out": "run", "workers": 2, "image_column": None, **settings})


def detection(**settings: Any) -> str:
    return yaml.safe_dump({"data": ["VOC2007"], "out": "run", "workers": 2, "voc": False, **settings})


NETWORK = json.dumps({"architecture": "sssd_resnet18"})
LABELS = json.dumps({"fingerprint": "0", "k_asked": 4})
OLD = [
    ("fit", {"config.yaml": common(pretrain={}), "steps/pretrain.json": "{}"}),
    ("compare", {"config.yaml": common(pretrain={}, methods=[])}),
    ("finetune", {"config.yaml": common(models=[], epochs=1)}),
    ("training", {"config.yaml": common(epochs=1), "metrics.jsonl": ""}),
    ("training", {"config.json": '{"architecture": "resnet18"}', "checkpoints/step-00000001/checkpoint.json": "{}"}),
    (None, {"checkpoints/step-00000001-keep/checkpoint.json": "{}", "checkpoints/step-mine/checkpoint.json": "{}"}),
    ("detector", {"config.yaml": detection(frozen_stages=0, epochs=1), "detector.json": "{}"}),
    ("detections", {"config.yaml": detection()}),
    ("probe", {"config.yaml": common(probe_epochs=1), "config.json": NETWORK}),
    ("labels", {"pseudo_labels.json": LABELS, "labels.parquet": ""}),
    ("pulled-labels", {"pseudo_labels.json": LABELS, "README.md": ""}),
    ("network", {"config.json": NETWORK, "model.safetensors": ""}),
    ("early-exit", {"config.json": NETWORK, "early_exit/report.json": "{}"}),
    ("card", {"config.json": NETWORK, "metrics.json": '{"weights": {"sha256": "0"}}'}),
    ("graphs", {"early_exit.json": '{"stages": [], "thresholds": []}', "stage1.onnx": ""}),
    (None, {"config.yaml": "data: photos\nout: run\n"}),
    (None, {"config.yaml": "data: photos\nout: run\nworkers: 2\nepochs: 3\nmine: 42\n", "metrics.json": "{}"}),
    (None, {"config.json": '{"architecture": "resnet18"}', "model.safetensors": ""}),
    (None, {"metrics.json": "[1]", "config.yaml": "- : {", "pseudo_labels.json": "\0"}),
]


@pytest.mark.parametrize(("kind", "files"), OLD)
def test_folders_from_before_marks_are_told_by_their_files(kind, files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kind_of(tmp_path) == kind
    if kind is not None and KINDS[kind].files:
        (tmp_path / "mine.txt").write_text("mine")
        drop(tmp_path, kind)
        assert list(contents(tmp_path)) == ["mine.txt"]


# Litter.


def test_litter_of_dead_processes_goes_and_what_one_had_put_aside_returns(tmp_path, folder_of_images, capsys):
    out, gone, alive = tmp_path / "run", dead(), os.getppid()
    names = ["labels", f".labels.sssd-tmp-{gone}", f".model.sssd-old-{gone}", f"sub/.x.json.sssd-tmp-{gone}"]
    for name in [*names, f".a.sssd-tmp-{alive}"]:
        (out / name).mkdir(parents=True)
        (out / name / "file").write_text(name)
    (out / ".labels.sssd-features.npy").write_text("")
    (out / "..labels.sssd-features.npy.partial").write_text("")
    mark(tmp_path / f".run.sssd-tmp-{gone}", "labels")
    (tmp_path / f".run.sssd-tmp-of-mine-{gone}").mkdir()
    (tmp_path / f".other.sssd-tmp-{gone}").mkdir()
    (tmp_path / f".run.sssd-old-{gone}").mkdir()
    (tmp_path / f".run.sssd-old-{gone}" / "photo").write_text("no mark: who knows whose")
    tidy(out)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"run/labels/file", "run/model/file", f"run/.a.sssd-tmp-{alive}/file", f".run.sssd-old-{gone}/photo"}
    assert (tmp_path / f".other.sssd-tmp-{gone}").exists()


def test_what_is_of_another_folder_or_of_the_user_is_no_litter(tmp_path):
    out, gone = tmp_path / "labels", dead()
    mark(out, "labels")
    others = [".labels.v2.sssd-features.npy", "..labels.v2.sssd-features.npy.partial", f".labels.v2.sssd-tmp-{gone}"]
    mine = ["labels/notes", f"labels/.notes.old-{gone}", f"labels/.draft.tmp-{gone}", "labels/.a.features.npy"]
    for name in [*others, *mine, "labels/.x.sssd-tmp-of-mine"]:
        (tmp_path / name).write_text(name)
    before = contents(tmp_path)
    tidy(out)
    assert contents(tmp_path) == before


def test_a_folder_that_was_lost_between_two_renames_returns(tmp_path, folder_of_images, capsys):
    aside = tmp_path / f".labels.sssd-old-{dead()}"
    mark(aside, "labels")
    (aside / "pseudo_labels.json").write_text(LABELS)
    words = ["pseudo-label", "--data", folder_of_images, "--model", "sssd_resnet18_cifar", "--out", tmp_path / "labels"]
    assert sssd(*words) == 2
    assert "already holds pseudo labels" in one_line(capsys)
    assert (tmp_path / "labels" / "pseudo_labels.json").read_text() == LABELS
    assert not aside.exists()


# `~`.


def text_arguments(own: Any) -> set[str]:
    found = set()
    for name, kind in get_type_hints(own).items():
        if is_dataclass(kind):
            found |= text_arguments(kind)
        elif {str, list[str]} & {kind, *get_args(kind)}:
            found.add(name)
    return found


def test_every_argument_that_may_be_a_path_is_known():
    texts = set().union(*(text_arguments(getattr(arguments, made.arguments)) for made in COMMANDS.values()))
    no_paths = {
        *("split", "test_split", "pretrain_split", "calibration_split", "image_column", "label_column", "revision"),
        *("objects_column", "classes", "name", "paper", "license", "remarks", "repo", "tag", "commit_message"),
        *("include", "push", "pattern", "pretrain_model", "optimizer", "epochs", "variants", "budget"),
    }
    assert texts - no_paths == set(PATHS)


def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("sssd_zoo.pipeline.fit.fit", lambda args, given: seen.append(args))
    monkeypatch.setattr("sssd_zoo.pipeline.compare.compare", seen.append)
    (home / "recipe.yaml").write_text("data: ~/photos\nout: ~/run\npretrain:\n  init: ~/old\n")
    assert sssd("fit", "--config=~/recipe.yaml", "--features=local-dir:~/net") == 0
    assert (seen[0].data, seen[0].out) == (f"{home}/photos", f"{home}/run")
    assert (seen[0].pretrain.init, seen[0].features) == (f"{home}/old", f"local-dir:{home}/net")
    assert sssd("compare", "--data=~", "--out=x", "--also", "[~/a, b]") == 0
    assert (seen[1].data, seen[1].also) == (str(home), [f"{home}/a", "b"])
    for words in (["--out=~nobody-here/run", "--data=x"], ["--out=x", "--data=~nobody-here/x"]):
        assert sssd("fit", *words) == 2
        assert "no user 'nobody-here'" in one_line(capsys)
    assert expand_home("a~b") == "a~b"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.slow
def test_other_labels_of_the_same_images_change_the_figures_alone(tmp_path, capsys, folder_of_images):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder_of_images.rglob("*.png"))
    (tmp_path / "data").mkdir()
    content = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "colour": [file.parent.name for file in files],
        "half": [f"half {number % 2}" for number in range(len(files))],
    }
    pq.write_table(pa.table(content), tmp_path / "data" / "train.parquet")
    words = ["fit", "--data", tmp_path / "data", *TINY, "--baseline", "false", "--label_column"]
    torch.manual_seed(0)
    assert sssd(*words, "colour", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert sssd(*words, "half", "--out", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 3
    assert "[probe] repeated, for other true labels" in printed
    assert sssd(*words, "half", "--out", tmp_path / "fresh") == 0
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "fresh"))
    for name in ("accuracy", "clustered", "quality", "classes", "sizes"):
        assert ours[name] == theirs[name], name
    labels = json.loads((tmp_path / "run" / "labels" / "pseudo_labels.json").read_text())
    assert labels["quality"] == theirs["quality"]


@pytest.mark.slow
def test_a_kill_while_a_step_is_made_anew_costs_nothing_and_resumes_to_equal_weights(folder_of_images, tmp_path):
    words = ["-m", "sssd_zoo.cli", "fit", "--data", str(folder_of_images), *TINY, "--baseline", "false"]
    words += ["--log_every", "1", "--checkpoint_every", "1", "--out"]
    other = ["--distill.epochs", "3"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert command(*words, str(whole), *other).returncode == 0
    assert command(*words, str(run)).returncode == 0
    old = (run / "distill" / "model.safetensors").read_bytes()
    refused = command(*words, str(run), *other)
    assert refused.returncode == 2
    assert "epochs: 1 there, 3 now" in refused.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    again = [sys.executable, *words, str(run), *other, "--overwrite"]
    with subprocess.Popen(again, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(read_metrics(run / ".distill.new" / "metrics.jsonl")) < 4:
            time.sleep(0.01)
        process.kill()
    assert (run / "distill" / "model.safetensors").read_bytes() == old
    assert command(*words, str(run)).returncode == 0, "the run is what it was"
    assert command(*again[1:]).returncode == 0
    for name in ("distill", "model"):
        ours, theirs = ((folder / name / "model.safetensors").read_bytes() for folder in (run, whole))
        assert ours == theirs
    assert not (run / ".distill.new").exists()
