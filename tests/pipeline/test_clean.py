"""`sssd clean` frees the space of complete stages, and touches nothing else."""

import json
import os
from pathlib import Path

import pytest

from helpers.commands import one_line, sssd
from helpers.disk import contents
from helpers.networks import save_tiny
from sssd_zoo.files import RUN_MARK
from sssd_zoo.files.lock import LOCK
from sssd_zoo.files.run_folder import mark
from sssd_zoo.pipeline.stages import Stage, Stages

MB = 1_000_000


def train(folder: Path) -> dict:
    for name in ("checkpoints/step-00000010/model.bin", "view_cache/features.npy", "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * MB)
    return {}


def interrupted(folder: Path) -> dict:
    train(folder)
    raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path):
    """A run with a complete stage, one that was interrupted, and files of the user's."""
    out = tmp_path / "run"
    mark(out, "fit")
    stages = Stages(out, {}, keep_checkpoints=True)
    stages.run(Stage(name="pretrain", action=train, settings={}))
    with pytest.raises(KeyboardInterrupt):
        stages.run(Stage(name="distill", action=interrupted, settings={}))
    (out / "pretrain" / "checkpoints" / "notes.txt").write_text("mine")
    (out / "photos" / "checkpoints" / "step-00000010").mkdir(parents=True)
    (out / "photos" / "checkpoints" / "step-00000010" / "me.jpg").write_text("mine")
    return out


def test_checkpoints_and_caches_of_complete_stages_go_and_nothing_else(run, capsys):
    before = contents(run)
    assert sssd("clean", run, "--dry_run") == 0
    assert "2.0 MB would be freed" in capsys.readouterr().out
    assert contents(run) == before
    assert sssd("clean", run) == 0
    said = capsys.readouterr().out
    assert f"{run / 'pretrain'}: 2 checkpoints or caches, 2.0 MB" in said
    assert "2.0 MB freed" in said
    gone = {str(name) for name in before if name not in contents(run)}
    assert gone == {
        *("pretrain/checkpoints/step-00000010", "pretrain/checkpoints/step-00000010/model.bin"),
        *("pretrain/view_cache", "pretrain/view_cache/features.npy"),
    }
    assert sssd("clean", run) == 0
    assert "0.0 MB freed" in capsys.readouterr().out


def test_of_a_comparison(tmp_path, capsys):
    mark(tmp_path / "compare", "compare")
    Stages(tmp_path / "compare" / "seed-0", {}, keep_checkpoints=True).run(
        Stage(name="sssd", action=train, settings={})
    )
    assert sssd("clean", tmp_path / "compare") == 0
    assert "2.0 MB freed" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "last"), [("training", "config.json"), ("detector", "detector.json")])
def test_of_a_single_training(kind, last, tmp_path, capsys):
    single = tmp_path / "single"
    mark(single, kind)
    train(single)
    assert sssd("clean", single) == 0
    assert "0.0 MB freed" in capsys.readouterr().out, f"without {last} it is not complete"
    (single / last).write_text("{}")
    assert sssd("clean", single) == 0
    assert "2.0 MB freed" in capsys.readouterr().out
    assert (single / "model.safetensors").exists()


def test_a_link_is_not_followed(run, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    (run / "pretrain").rename(elsewhere)
    (run / "pretrain").symlink_to(elsewhere)
    assert sssd("clean", run) == 0
    assert "0.0 MB freed" in capsys.readouterr().out
    assert (elsewhere / "checkpoints" / "step-00000010" / "model.bin").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "photos" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert sssd("clean", tmp_path / "photos") == 2
    assert "is not a run of this package" in one_line(capsys)
    assert sssd("clean", tmp_path / "nothing") == 2
    assert "is not a run" in one_line(capsys)
    assert sssd("clean", save_tiny(tmp_path / "network", 3)) == 2
    assert "is not a run" in one_line(capsys)


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_run_that_is_being_written_is_refused(more, run, capsys):
    import platform

    import psutil

    parent = psutil.Process(os.getppid())
    held = {"pid": parent.pid, "host": platform.node(), "started": parent.create_time(), "command": "sssd fit"}
    (run / LOCK).write_text(json.dumps(held))
    assert sssd("clean", run, *more) == 2
    assert "is in use by `sssd fit`" in one_line(capsys)
    assert (run / "pretrain" / "checkpoints" / "step-00000010").exists()
    assert (run / RUN_MARK).exists()
