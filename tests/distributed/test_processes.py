"""Several processes: whatever ends one of them ends all, at once, with its cause in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.commands import ROOT, command
from sssd_zoo.files.json_lines import read_metrics

LIMIT = 30  # seconds in which all processes must end
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
}
PRETRAIN = [
    *("train/pretrain.py", "--model", "sssd_resnet18", "--image_size", "32", "--queue_size", "32", "--splits", "2"),
    *("--epochs", "500", "--batch_size", "16", "--log_every", "1", "--checkpoint_epochs", "500", "--device", "cpu"),
    *("--precision", "fp32"),
]
FIT = [
    *("-m", "sssd_zoo.cli", "fit", "--model", "sssd_resnet18", "--image_size", "32", "--device", "cpu"),
    *("--precision", "fp32", "--log_every", "1", "--pretrain.epochs", "2", "--pretrain.batch_size", "16"),
    *("--pretrain.queue_size", "16", "--pretrain.splits", "2", "--cluster.k", "4", "--distill.epochs", "2"),
    *("--distill.batch_size", "16", "--baseline", "false"),
]


class Run:
    """A command in two processes, its output, and which of its processes is which."""

    def __init__(self, launcher: str, words: list[str], log: Path, shell: str = "") -> None:
        self.log = log
        command = [sys.executable, *LAUNCHERS[launcher], *words]
        if shell:
            command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        self.launcher = psutil.Process(self.process.pid)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def rank(self, number: int) -> psutil.Process:
        for process in self.launcher.children(recursive=True):
            if process.environ().get("RANK") == str(number) and "resource_tracker" not in " ".join(process.cmdline()):
                return process
        # The main process of `accelerate launch --cpu` gives itself its rank, after it was started.
        return self.launcher.children()[0]

    def wait_for(self, condition) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    def ends(self) -> str:
        """The output, once all processes have ended; fails if one is left after the limit."""
        end = time.monotonic() + LIMIT
        others = []
        while time.monotonic() < end and self.process.poll() is None:
            if self.launcher.is_running():
                others = self.launcher.children(recursive=True) or others
            time.sleep(0.1)
        _, left = psutil.wait_procs(others, timeout=max(0, end - time.monotonic()))
        for process in left:
            process.kill()
        assert self.process.poll() is not None, f"still running after {LIMIT} s: {self.text()}"
        assert not left, f"left over: {left}, {self.text()}"
        assert self.process.returncode != 0
        return self.text()

    def close(self) -> None:
        if self.process.poll() is None:
            for process in [*self.launcher.children(recursive=True), self.launcher]:
                process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    runs: list[Run] = []

    def begin(launcher: str, words: list[str], shell: str = "") -> Run:
        runs.append(Run(launcher, words, tmp_path / "log", shell))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def causes(text: str) -> list[str]:
    """The lines that tell the cause."""
    lines = text.replace("\r", "\n").split("\n")
    return [line for line in lines if "error: " in line and line.split("error: ")[0] in ("", "[process 1] ")]


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_an_error_of_the_main_process_alone_ends_all(launcher, start, folder_of_images, tmp_path):
    (tmp_path / "file").touch()
    words = [*PRETRAIN, "--data", str(folder_of_images), "--out", str(tmp_path / "file" / "run")]
    run = start(launcher, words)  # only the main process writes there
    run.wait_for(lambda: "error: " in run.text())
    (cause,) = causes(run.ends())
    assert "a parent of it is a file" in cause


@pytest.mark.parametrize(
    ("launcher", "number", "name"),
    [
        ("accelerate", 1, "SIGKILL"),
        *(
            pytest.param(launcher, number, name, marks=pytest.mark.slow)
            for launcher in LAUNCHERS
            for number in (0, 1)
            for name in ("SIGKILL", "SIGTERM", "SIGINT")
            if (launcher, number, name) != ("accelerate", 1, "SIGKILL")
        ),
    ],
)
@pytest.mark.long
def test_a_signal_to_one_process_ends_all(launcher, number, name, start, folder_of_images, tmp_path):
    out = tmp_path / "run"
    run = start(launcher, [*PRETRAIN, "--data", str(folder_of_images), "--out", str(out)])
    run.wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) > 2)
    run.rank(number).send_signal(getattr(signal, name))
    text = run.ends()
    if name != "SIGKILL":
        told = {"SIGINT": "stopped; ", "SIGTERM": "terminated; "}[name]
        # torchrun's own agent ends the others by SIGTERM, and each says so.
        assert text.count(told) == 1 or (launcher == "torchrun" and name == "SIGTERM" and told in text), text
    elif launcher == "accelerate":
        words = name if number else "was lost"
        assert [words in cause for cause in causes(text)] == [True], text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_checkpoint_that_one_process_cannot_write_ends_all(launcher, start, folder_of_images, tmp_path):
    words = [*PRETRAIN, "--checkpoint_every", "2", "--data", str(folder_of_images), "--out", str(tmp_path / "run")]
    run = start(launcher, words, shell="ulimit -f 20000")  # of 1 KiB: less than model.safetensors, the main one's
    run.wait_for(lambda: "error: " in run.text())
    found = causes(run.ends())
    assert found
    assert all("file-size limit" in cause for cause in found)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_killed_takes_all_with_it(launcher, start, folder_of_images, tmp_path):
    out = tmp_path / "run"
    run = start(launcher, [*PRETRAIN, "--data", str(folder_of_images), "--out", str(out)])
    run.wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) > 2)
    processes = run.launcher.children(recursive=True)
    run.launcher.kill()
    run.process.wait()
    _, left = psutil.wait_procs(processes, timeout=LIMIT)
    for process in left:
        process.kill()
    assert not left, run.text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "labels", "distill"])
def test_sssd_fit_ends_in_every_stage(stage, start, folder_of_images, tmp_path):
    out = tmp_path / "run"
    run = start("accelerate", [*FIT, "--data", str(folder_of_images), "--out", str(out)])
    run.wait_for(lambda: f"[{stage}]" in run.text())
    time.sleep(1)
    run.rank(1).kill()
    text = run.ends()
    assert ["process 1 was ended by SIGKILL" in cause for cause in causes(text)] == [True], text


OTHER_RUN = """
import torch.distributed as dist
from sssd_zoo.distributed import leave, on_main, rank
from sssd_zoo.training.checkpoints import OtherRun

dist.init_process_group("gloo")

def fail():
    raise OtherRun("of another run")

try:
    on_main(fail)
except OtherRun as error:
    print(f"rank {rank()}: {error}, told: {error.told}")
leave()
"""


@pytest.mark.long
def test_an_error_of_the_main_process_has_its_type_in_all(tmp_path):
    (tmp_path / "script.py").write_text(OTHER_RUN)
    done = command(*LAUNCHERS["torchrun"], str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0: of another run, told: False",
        "rank 1: of another run, told: True",
    ]
