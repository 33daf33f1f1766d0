"""Experiment trackers: refused where they are missing, written for real, and continued by a resumed training."""

import json
import sqlite3
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from helpers.commands import command, one_line, sssd
from helpers.training import Tensors, run
from sssd_zoo.cli.arguments import join_trackers
from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.configs.training import Tracker
from sssd_zoo.errors import UserError
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import KINDS, mark
from sssd_zoo.training.log import Log
from sssd_zoo.training.trackers import PACKAGES, Trackers, check_trackers, grid_of_views, place

MISSING = sorted({*get_args(Tracker)} - {str(name) for name in get_available_trackers()})


def test_they_are_those_of_accelerate():
    assert set(LOGGER_TYPE_TO_CLASS) <= set(get_args(Tracker))  # older versions have fewer


@pytest.mark.parametrize("name", MISSING)
def test_one_that_is_not_installed_is_refused(name):
    with pytest.raises(
        UserError, match=rf"^--trackers: {name} is not installed: pip install {PACKAGES.get(name, name)}$"
    ):
        check_trackers(["tensorboard", name, name])


@pytest.mark.skipif(len(MISSING) < 2, reason="trackers are installed")
def test_it_is_refused_before_anything_is_read(tmp_path, capsys):
    words = ("pretrain", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--trackers", *MISSING[:2])
    assert sssd(*words, "--device", "cpu") == 2
    assert f"{MISSING[0]}, {MISSING[1]} are not installed: pip install " in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_an_unknown_one_is_refused(tmp_path, capsys):
    words = ("pretrain", "--data", "d", "--out", str(tmp_path / "out"), "--trackers", "wndb")
    assert sssd(*words) == 2
    assert "wndb" in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--trackers", "wandb", "mlflow", "--out", "x"], ["--trackers", "[wandb,mlflow]", "--out", "x"]),
        (["--out", "x", "--trackers", "wandb"], ["--out", "x", "--trackers", "[wandb]"]),
        (["--trackers", "[wandb, mlflow]"], ["--trackers", "[wandb, mlflow]"]),
        (["--trackers=[wandb]", "a"], ["--trackers=[wandb]", "a"]),
        (["--trackers"], ["--trackers"]),
    ],
)
def test_they_are_given_as_words(words, joined):
    assert join_trackers(words) == joined


def test_a_step_of_a_command_is_called_after_both(tmp_path):
    mark(tmp_path / "run", "fit")
    for name in ("pretrain", ".pretrain.new"):
        (tmp_path / "run" / name).mkdir()
        assert place(tmp_path / "run" / name) == (tmp_path / "run", "run-pretrain")
    mark(tmp_path / "alone", "training")
    assert place(tmp_path / "alone") == (tmp_path / "alone", "alone")


def test_all_files_are_of_the_training(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, trackers=["tensorboard"], epochs=1)
    known = {path for pattern in KINDS["training"].files for path in tmp_path.glob(pattern)}
    there = {path for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts}
    assert there - known == set()
    assert {"trackers.json", "views.png"} <= {path.name for path in there}


def test_tensorboard_has_numbers_settings_and_views_and_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Tensors):
        def epoch(self, epoch, start=0):
            if epoch == 2:
                raise KeyboardInterrupt
            yield from super().epoch(epoch, start)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, trackers=["tensorboard"], loader=Stop(8))
    run(tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Images("views")] == [0]
    assert b"| optim.lr | 0.05 |" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_forgets_what_came_before_the_first_checkpoint_of_a_training_that_was_killed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Tensors):
        def epoch(self, epoch, start=0):
            for number, batch in enumerate(super().epoch(epoch, start)):
                if number == 3:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, trackers=["tensorboard"], loader=Stop(8))
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path, trackers=["tensorboard"])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "both parts wrote"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Images("views")] == [0]


def test_a_resumed_trackio_run_goes_on(tmp_path):
    pytest.importorskip("trackio")
    program = (
        "import pathlib, numpy as np; from sssd_zoo.training.trackers import Trackers\n"
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "for begin in (0, 2):\n"
        "    trackers = Trackers(['trackio'], out, begin, {'lr': 0.1})\n"
        "    for step in (begin + 1, begin + 2): trackers.log({'loss': 1 / step}, step)\n"
        "    if not begin: trackers.log_image('views', np.zeros((8, 8, 3), np.uint8), 0)\n"
        "    assert trackers.trackers; trackers.close()\n"
    )
    done = command("-c", program, environment={"PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _, _ in rows} == {tmp_path.name}
    losses = {step: json.loads(metrics)["loss"] for _, step, metrics in rows if "loss" in json.loads(metrics)}
    assert losses == {1: 1, 2: 0.5, 3: 1 / 3, 4: 0.25}
    assert list((tmp_path / "trackio").rglob("*.png"))


OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "dvclive", "swanlab", "clearml"])
def test_others_run_offline_where_they_are_installed(tmp_path, monkeypatch, name):
    for variable, value in OFFLINE.items():  # some are read by the import
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name)
    ids = []
    for step in (0, 2):
        trackers = Trackers([name], tmp_path, step, {"lr": 0.1, "sizes": [16, 32], "arch": "line"})
        trackers.log_image("views", np.zeros((8, 16, 3), np.uint8), step)
        trackers.log({"loss": 0.5, "epoch": 1}, step + 1)
        assert trackers.trackers, "it failed"
        trackers.close()
        ids.append((tmp_path / "trackers.json").read_text())
    assert ids[0] == ids[1]


def test_one_that_fails_is_left_out_and_the_training_goes_on(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    log = Log(tmp_path, RuntimeConfig(trackers=["tensorboard"]), 0, is_main=True, settings={})

    def fail(*_, **__):
        raise ConnectionError("the server\nis down")

    log.trackers.trackers[0].log = fail
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5})
    log.close()
    assert capsys.readouterr().err == "warning: tracker tensorboard failed and gets nothing more: the server is down\n"
    assert len(read_metrics(log.path)) == 2


def test_one_that_cannot_start_is_an_error_of_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match=r"^tracker tensorboard cannot start: "):
        Log(tmp_path, RuntimeConfig(trackers=["tensorboard"]), 0, is_main=True, settings={})


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_grid_shows_the_views_as_they_were(channels):
    images = torch.rand(10, channels, 4, 4)
    mean, std = [0.4] * channels, [0.2] * channels
    batch = {"views": [(images - 0.4) / 0.2, (images.flip(3) - 0.4) / 0.2], "shuffles": []}
    grid = grid_of_views(batch, mean, std)
    assert grid.shape == (8, 32, 3)
    shown = images[:, :3].expand(-1, 3, -1, -1)
    assert np.allclose(grid[:4, 4:8], 255 * shown[1].permute(1, 2, 0), atol=0.51)
    assert np.allclose(grid[4:, 28:], 255 * shown[7].flip(2).permute(1, 2, 0), atol=0.51)
    assert grid_of_views({"images": list(images)}, mean, std) is None
    assert grid_of_views({"target": images}, mean, std) is None


def test_views_do_not_change_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    plain = run(tmp_path / "plain", epochs=1).state_dict()
    tracked = run(tmp_path / "tracked", epochs=1, trackers=["tensorboard"]).state_dict()
    assert all(torch.equal(plain[name], tracked[name]) for name in plain)
    assert Image.open(tmp_path / "tracked" / "views.png").size == (64, 8)
