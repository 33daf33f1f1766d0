"""The processes of `accelerate launch --cpu`, without its seconds: what it sets and its command line are enough."""

import json
import os
import subprocess
import sys

import pytest

from helpers.commands import ROOT
from sssd_zoo.distributed.launch import start_other_processes

LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1].split()]).returncode)"
TRAINING = """
import json, os, sys
from sssd_zoo.distributed.launch import end_other_processes, start_other_processes

others = start_other_processes()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
told = {**{name: os.environ[name] for name in names}, "others": len(others), "words": sys.argv[1:]}
open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w").write(json.dumps(told))
end_other_processes(others, None)
"""
OTHER_LAUNCHERS = {"RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
OF_ACCELERATE = {"MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize("asked", ["--num_processes 3", pytest.param("--num-processes=3", marks=pytest.mark.slow)])
@pytest.mark.long
def test_as_many_start_as_the_launcher_was_asked_for(asked, tmp_path):
    (tmp_path / "training.py").write_text(TRAINING)
    words = [sys.executable, "-c", LAUNCHER, f"{tmp_path / 'training.py'} {tmp_path} --epochs 3", *asked.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **OF_ACCELERATE}
    done = subprocess.run(words, env=environment, timeout=120, check=False)
    assert done.returncode == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert [one["RANK"] for one in told] == [one["LOCAL_RANK"] for one in told] == ["0", "1", "2"]
    assert [one["others"] for one in told] == [2, 0, 0], "those of the first process alone"
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for one in told} == {("3", "3")}
    (port,) = {one["MASTER_PORT"] for one in told}
    assert port != OF_ACCELERATE["MASTER_PORT"], "one that is free"
    assert {tuple(one["words"]) for one in told} == {(str(tmp_path), "--epochs", "3")}


@pytest.fixture
def environment(monkeypatch):
    """As in a process that no launcher started."""
    for name in OTHER_LAUNCHERS | OF_ACCELERATE.keys() | {"TORCHELASTIC_RUN_ID"}:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("given", [{}, {"MASTER_PORT": "1"}, {"ACCELERATE_USE_CPU": "true"}], ids=str)
def test_none_start_without_the_launcher(given, environment):
    for name, value in given.items():
        environment.setenv(name, value)
    before = dict(os.environ)
    assert start_other_processes() == []
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", sorted(OTHER_LAUNCHERS))
def test_none_start_where_another_launcher_has_set_the_ranks(name, environment):
    for each, value in {**OF_ACCELERATE, name: "1"}.items():
        environment.setenv(each, value)
    before = dict(os.environ)
    assert start_other_processes() == []
    assert dict(os.environ) == before
