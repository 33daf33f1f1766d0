"""How commands end whatever happens to them: signals, closed pipes, odd consoles, errors that nobody foresaw."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.commands import ROOT, TINY, one_line, sssd
from sssd_zoo.cli.guard import guarded
from sssd_zoo.errors import UserError

UNBUFFERED = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
BUFFERED = {name: value for name, value in UNBUFFERED.items() if name != "PYTHONUNBUFFERED"}
# What a command is, without the seconds that importing torch takes: the guard around some lines.
GUARD = """
import os, signal, sys, time, types
sys.modules["sssd_zoo"] = types.ModuleType("sssd_zoo")
sys.modules["sssd_zoo"].__path__ = ["sssd_zoo"]
from sssd_zoo.cli.guard import guarded
with guarded():
"""


def guard(*lines: str, environment: dict[str, str] = BUFFERED, **kwargs) -> subprocess.Popen:
    script = GUARD + "".join(f"    {line}\n" for line in lines)
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True, **kwargs)


def start(*words: str, **kwargs) -> subprocess.Popen:
    """The `sssd` command in a session of its own, as a shell starts it, with the default answer to Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-m", "sssd_zoo.cli", *map(str, words)],
        cwd=ROOT,
        env=BUFFERED,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **kwargs,
    )


def quiet(text: str) -> bool:
    return "Traceback" not in text and "ignored" not in text


def test_closed_outputs_are_no_error():
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(GUARD + '    print(1)')} >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT, env=BUFFERED, check=False).returncode == 0


@pytest.mark.parametrize("environment", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
def test_a_reader_that_left_is_no_error(environment):
    process = guard(
        "for n in range(100000): print(n)", environment=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_what_was_printed_last_has_no_reader_either():
    process = guard(
        "sys.stdin.read()", "print('late')", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_other_broken_pipes_are_not_hidden():
    process = guard("r, w = os.pipe()", "os.close(r)", "os.write(w, b'x')", stderr=subprocess.PIPE)
    _, err = process.communicate()
    assert "unexpected BrokenPipeError" in err
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_onto_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        process = guard("print('x')", stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate()
    assert err == "error: cannot write the output: No space left on device\n"
    assert process.returncode == 2


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_command_and_its_workers(number, word, tmp_path):
    """A terminal's Ctrl-C goes to all processes: workers that would each print a traceback are left to their parent."""
    process = guard(
        "from torch.utils.data import DataLoader",
        "def slow(n): time.sleep(0.1); return n",
        "loader = DataLoader(range(1000), num_workers=2, collate_fn=slow, multiprocessing_context='fork')",
        "try:",
        "    for n in loader: print('ready', flush=True)",
        f"finally: open({str(tmp_path / 'ended')!r}, 'w').close()",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdout.readline()
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert quiet(err), err
    assert [line.split(";")[0] for line in err.splitlines() if line] == [word]
    assert process.returncode == 128 + number
    assert (tmp_path / "ended").exists(), "what is to be tidied up was"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_an_interrupt_that_a_library_swallows_still_ends_the_command(tmp_path):
    process = guard(
        "import sssd_zoo.cli.guard as own",
        "own.GRACE = 1",
        "try: signal.raise_signal(signal.SIGINT); time.sleep(1)",
        "except BaseException: pass",
        "time.sleep(60)",
        stderr=subprocess.PIPE,
    )
    _, err = process.communicate(timeout=30)
    assert err.strip().startswith("stopped;")
    assert process.returncode == 130


def test_errors_that_libraries_make_of_an_interrupt():
    process = guard(
        "try: signal.raise_signal(signal.SIGINT); time.sleep(1)",
        "except KeyboardInterrupt: raise RuntimeError('computation interrupted')",
        stderr=subprocess.PIPE,
    )
    _, err = process.communicate(timeout=30)
    assert err.strip().startswith("stopped;")
    assert process.returncode == 130


def test_an_interrupt_within_code_that_is_a_string(tmp_path):
    """As `dataclass` and others run it while modules are imported; only a program run by -m ended by the signal."""
    (tmp_path / "interrupted.py").write_text(f"{GUARD}    exec('signal.raise_signal(signal.SIGINT)')\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "interrupted"],
        cwd=ROOT,
        env={**BUFFERED, "PYTHONPATH": str(tmp_path)},
        text=True,
        stderr=subprocess.PIPE,
    )
    _, err = process.communicate(timeout=30)
    assert err.strip().startswith("stopped;")
    assert process.returncode == 130


@pytest.mark.parametrize("after", [1.2, *(pytest.param(after, marks=pytest.mark.slow) for after in (0.4, 2, 3))])
def test_ctrl_c_while_it_starts(after, folder_of_images, tmp_path):
    words = ["--data", folder_of_images, "--out", tmp_path / "run", *TINY, "--pretrain.epochs", "1000"]
    process = start("fit", *words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert quiet(err), err
    assert err.strip().splitlines()[-1].startswith("stopped")
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["pretrain", "labels", "distill"])
def test_a_signal_at_any_stage_of_a_run(stage, number, folder_of_images, tmp_path):
    words = ["--data", folder_of_images, "--out", tmp_path / "run", *TINY, "--in_memory", "false", "--workers", "2"]
    process = start("fit", *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = ""
    while not re.match(rf"\[{stage}\].* -> ", seen):
        seen = process.stdout.readline()
        assert seen, "it ended before"
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert quiet(out), out
    assert "run the same command again to resume" in out
    assert process.returncode == 128 + number
    assert not list(tmp_path.rglob(".*.sssd-tmp-*"))


def test_names_that_the_console_cannot_show(monkeypatch):
    for encoding in ("ascii", "cp1252", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
        with guarded():
            print("Zähne 猫 \udcff")
        assert sys.stdout.errors == "strict"
        assert b"\\udcff" in raw.getvalue()
        monkeypatch.undo()


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_command_with_such_names(encoding, tmp_path):
    environment = {**BUFFERED, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    words = [sys.executable, "-m", "sssd_zoo.cli", "predict", "sssd_resnet18", os.fsencode(tmp_path / "猫") + b"\xff"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    assert b"error: there is no file or folder" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_error_that_nobody_foresaw_leaves_a_line_and_a_file(monkeypatch, capsys, tmp_path):
    def broken(args, given):
        raise KeyError("all is\nlost")

    monkeypatch.setattr("sssd_zoo.pipeline.fit.fit", broken)
    assert sssd("fit", "--data", "x", "--out", tmp_path) == 1
    line = one_line(capsys)
    assert line.startswith("error: unexpected KeyError: 'all is")
    written = Path(line.split()[-1])
    assert not written.is_relative_to(tmp_path), "that folder is the user's"
    assert "in broken" in written.read_text()
    written.unlink()

    (tmp_path / ".sssd-zoo.json").write_text("{}")
    assert sssd("fit", "--data", "x", "--out", tmp_path) == 1
    assert one_line(capsys).endswith(f"its traceback is in {tmp_path / 'traceback.txt'}")
    assert "in broken" in (tmp_path / "traceback.txt").read_text()

    monkeypatch.setenv("SSSD_DEBUG", "1")
    assert sssd("fit", "--data", "x", "--out", tmp_path) == 1
    assert "in broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("Unable to allocate 3.00 TiB for an array"), "Unable to allocate 3.00 TiB for an array"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0"), "CUDA out of memory. Tried"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "CUDA error: CUBLAS"),
    ],
)
def test_a_full_memory_is_one_line(error, reason, capsys):
    with pytest.raises(SystemExit) as stop, guarded():
        raise error
    assert stop.value.code == 2
    line = one_line(capsys)
    assert line.startswith(f"error: not enough memory ({reason}")
    assert "a smaller --batch_size" in line


def test_signal_handlers_and_streams_are_as_before():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook, sys.stdout.errors
    with pytest.raises(SystemExit), guarded():
        raise UserError("no")
    after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook, sys.stdout.errors
    assert after == before
    assert "write" not in vars(sys.stdout)


def test_how_a_command_ends_is_known_before_torch_is_imported():
    """Else Ctrl-C in the seconds that the import takes would end in a traceback."""
    code = "import sys; import sssd_zoo.cli, sssd_zoo.cli.guard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
