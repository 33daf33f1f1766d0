"""`python eval/benchmark.py backbones`."""

import json

import pytest

from helpers.commands import command
from helpers.markdown import tables

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_every_answer_is_timed_in_both_runtimes(tmp_path):
    names = ["sssd_mobilenetv3_small_100_cifar", "sssd_resnet18_cifar"]
    words = ["--names", *names, "--size", "32", "--rounds", "1", "--out", str(tmp_path / "costs.json")]
    done = command("eval/benchmark.py", "backbones", *words, timeout=600)
    assert done.returncode == 0, done.stderr
    costs, times = (rows[1:] for rows in tables(done.stdout))
    assert [row[0] for row in costs] == names
    assert [row[1] for row in times] == ["torch", "onnxruntime"] * 2
    found = json.loads((tmp_path / "costs.json").read_text())["networks"]["sssd_resnet18_cifar"]
    assert round(found["macs"]["4"] / 1e6) == 555
    for by_batch in found["milliseconds"].values():
        assert list(by_batch) == ["1", "128"]
        assert all(value > 0 for by_answer in by_batch.values() for value in by_answer.values())
