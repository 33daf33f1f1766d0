"""`train/paper_row.py`: the epochs that fit a time, and a run on a few images."""

import json
import runpy

import pytest

from helpers.commands import ROOT, command
from sssd_zoo.files.json_lines import read_metrics

TINY = [
    *("--data", "cifar10-sample", "--split", "train[:96]", "--batch_size", "32", "--k", "8", "--steps", "2"),
    *("--minutes", "0.1", "--device", "cpu", "--no-compile", "--no-measure", "--workers", "1"),
]


@pytest.mark.parametrize(
    ("seconds", "rate", "epochs"),
    [(350, 50_000, 310), (22, 50_000, 19), (1, 50_000, 1), (-30, 50_000, 1)],  # nine tenths of the rate is sustained
)
def test_epochs_that_fit_a_time(seconds, rate, epochs):
    script = runpy.run_path(str(ROOT / "train" / "paper_row.py"))
    assert script["epochs_in"](seconds, rate, images=50_000) == epochs


@pytest.mark.long
def test_wrong_data_are_one_line_and_leave_nothing(tmp_path):
    done = command("train/paper_row.py", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *TINY[2:])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: no file or folder") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_both_forms_are_trained_on_one_pretext_and_a_second_call_resumes(tmp_path):
    words = ["train/paper_row.py", "--out", str(tmp_path), *TINY]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    schedule = json.loads((tmp_path / "schedule.json").read_text())
    assert [schedule[name] for name in ("pretrain", "anchored", "sssd", "images")] == [1, 1, 1, 96]
    logs = {form: read_metrics(tmp_path / form / "distill" / "metrics.jsonl") for form in ("anchored", "sssd")}
    assert ["anchor" in lines[-1] for lines in logs.values()] == [True, False]
    networks = [(tmp_path / form / "pretrain" / "model.safetensors").read_bytes() for form in logs]
    assert networks[0] == networks[1]

    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("[distill] done before") == 2
