"""Two commands in one --out: the second is refused in one line; a dead process holds nothing."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.commands import ROOT, command, dead, one_line, sssd
from sssd_zoo.errors import UserError
from sssd_zoo.files import lock
from sssd_zoo.files.run_folder import mark

TINY = ["--model", "sssd_resnet18", "--image_size", "32", "--batch_size", "8", "--splits", "2", "--queue_size", "16"]
HOLDER = """
import sys, time, types
from pathlib import Path
package = sys.modules["sssd_zoo"] = types.ModuleType("sssd_zoo")
package.__path__ = ["sssd_zoo"]  # without what __init__ imports, which takes seconds
from sssd_zoo.files import lock
lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds tmp_path/run."""
    mark(tmp_path, "training")
    mark(tmp_path / "run", "training")
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def says(folder: Path, **changes: object) -> None:
    """A lock file as another process would have written it."""
    content = {"pid": dead(), "host": platform.node(), "started": time.time() - 99, "command": "sssd fit", **changes}
    folder.mkdir(exist_ok=True)
    (folder / lock.LOCK).write_text(json.dumps(content))


@pytest.mark.parametrize("out", ["run", "run/distill", "."])
def test_a_second_command_is_refused_and_a_killed_one_holds_nothing(out, holder, tmp_path, folder_of_images, capsys):
    words = ["pretrain", "--data", folder_of_images, "--out", tmp_path / out, *TINY, "--epochs", "1"]
    words += ["--batch_size", "4096"]
    before = (tmp_path / "run" / lock.LOCK).read_bytes()
    assert sssd(*words) == 2
    line = one_line(capsys)
    assert f"process {holder.pid} on {platform.node()}" in line
    assert f"{tmp_path / 'run'} is in use by" in line
    assert (tmp_path / "run" / lock.LOCK).read_bytes() == before
    assert not (tmp_path / "run" / "distill").exists()
    holder.send_signal(signal.SIGKILL)  # not waited for: a zombie holds nothing either
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert sssd(*words) == 2
    assert "batch_size 4096 is larger than the data set" in one_line(capsys)
    assert not (tmp_path / out / lock.LOCK).exists()


@pytest.mark.parametrize("old", ["dead", "recycled number", "killed while it wrote", "nonsense"])
def test_a_lock_that_nobody_holds_is_taken_over(old, tmp_path):
    if old == "dead":
        says(tmp_path)
    elif old == "recycled number":
        says(tmp_path, pid=os.getppid())
    else:
        (tmp_path / lock.LOCK).write_text("" if old == "killed while it wrote" else "[1]")
    lock.take(tmp_path)
    assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
    lock.take(tmp_path)  # its own
    lock.release(tmp_path)
    assert not (tmp_path / lock.LOCK).exists()


def test_who_holds_it_on_another_machine_is_said(tmp_path):
    says(tmp_path, host="node17", pid=42)
    with pytest.raises(UserError, match=r"`sssd fit`, process 42 on node17: .* if that process is gone, delete .*lock"):
        lock.take(tmp_path)
    lock.release(tmp_path)
    assert (tmp_path / lock.LOCK).exists(), "another's is not released"


def test_of_many_that_take_over_one_succeeds(tmp_path):
    says(tmp_path)
    script = HOLDER.replace("time.sleep(60)", "sys.stdin.read()")
    words = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(words, cwd=ROOT, text=True, **pipes) for _ in range(4)]
    while sum(process.poll() is not None for process in processes) < 3:
        time.sleep(0.05)
    results = [process.communicate() for process in processes]
    assert sum(out == "held\n" for out, _ in results) == 1
    assert sum("is in use by" in err for _, err in results) == 3


@pytest.mark.slow
def test_processes_of_one_run_share_the_lock_and_are_refused_together(folder_of_images, tmp_path):
    words = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "train/pretrain.py"]
    words += ["--data", str(folder_of_images), "--out", str(tmp_path / "run"), "--epochs", "1", *TINY]
    assert command(*words).returncode == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / lock.LOCK).exists()
    says(tmp_path / "run", pid=os.getpid(), started=psutil.Process().create_time())
    done = command(*words, "--overwrite", timeout=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.split("error: ")[0]
    assert f"process {os.getpid()} on" in done.stderr


def test_a_lock_file_of_something_else_holds_nothing(tmp_path):
    (tmp_path / lock.LOCK).write_text('{"pid": "many", "host": "here", "started": 1.0, "command": "x"}')
    lock.take(tmp_path)
    lock.release(tmp_path)
    assert not (tmp_path / lock.LOCK).exists()
