"""Progress: a bar in a terminal, plain lines with times elsewhere."""

import os
import re
import sys
import termios

from tqdm.std import tqdm

from helpers.training import run
from sssd_zoo.distributed.progress import ProgressLines, duration, progress_bar

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(capsys) -> list[str]:
    err = capsys.readouterr().err
    assert "\r" not in err
    assert all(re.match(TIME, line) for line in err.splitlines())
    return [re.sub(TIME, "", line) for line in err.splitlines()]


def test_lines_come_at_intervals(capsys):
    clock = Clock()
    with ProgressLines(1000, "features", "img", clock=clock) as bar:
        for clock.now in range(1, 101):
            bar.update(10)
    assert lines(capsys) == [
        "features: 100/1,000 img (10 %), 10 img/s, 2 min left",
        "features: 400/1,000 img (40 %), 10 img/s, 60 s left",
        "features: 700/1,000 img (70 %), 10 img/s, 30 s left",
        "features: 1,000/1,000 img (100 %), 10 img/s, took 2 min",
    ]


def test_a_training_says_epoch_step_and_loss(capsys):
    clock = Clock()
    bar = ProgressLines(16 * 800, "MoCo v2", "img", initial=16 * 100, step_size=16, clock=clock)
    bar.set_postfix(epoch="3/20", loss="6.123", refresh=False)
    clock.now = 5
    bar.refresh()  # too soon
    clock.now = 20
    bar.update(16 * 20)
    bar.write("computing with 2 threads on 2 CPUs")
    assert lines(capsys) == [
        "MoCo v2: epoch 3/20, step 120/800 (15 %), 16 img/s, loss 6.123, 11 min left",
        "MoCo v2: computing with 2 threads on 2 CPUs",
    ]
    clock.now = 31
    bar.refresh()
    bar.close()
    bar.close()
    assert [line.rsplit(", ", 1)[1] for line in lines(capsys)] == ["18 min left", "took 31 s"]


def test_an_unknown_total_and_one_that_is_not_to_stay(capsys):
    clock = Clock()
    with ProgressLines(None, "fingerprint", "img", leave=False, clock=clock) as bar:
        clock.now = 10
        bar.update(5)
    assert lines(capsys) == ["fingerprint: 5 img, 0.5 img/s"]


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 89, 90, 5000, 7500)] == [
        "1 s",
        "89 s",
        "2 min",
        "83 min",
        "2 h 05 min",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar(10, "features", "img") as bar:
            bar.update(10)
    assert isinstance(bar, tqdm)
    assert b"\rfeatures: 100%" in os.read(master, 10_000)
    os.close(master)


def test_a_file_gets_lines_of_a_training(tmp_path, capsys):
    run(tmp_path)
    said = lines(capsys)
    # How many threads compute is said once in a process, which an earlier test may have been.
    assert all(line.startswith("train: computing with ") for line in said[:-1])
    assert re.fullmatch(r"train: epoch 3/3, step 12/12 \(100 %\), [\d.,]+ img/s, loss \d\.\d{3}, took \d s", said[-1])
