"""The `sssd` command in this process or in one of its own, and settings with which it takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sssd_zoo.cli import main

ROOT = Path(__file__).parents[2]
TINY = [
    *("--model", "sssd_resnet18", "--image_size", "32", "--pretrain.epochs", "1", "--pretrain.batch_size", "16"),
    *("--pretrain.splits", "2", "--pretrain.queue_size", "32", "--cluster.k", "4", "--distill.epochs", "1"),
    *("--distill.batch_size", "16", "--probe.probe_weight_decay", "0.01", "--device", "cpu"),
]
TINY_COMPARE = [
    *("--model", "sssd_resnet18", "--image_size", "32", "--pretrain.epochs", "1", "--pretrain.batch_size", "16"),
    *("--pretrain.splits", "2", "--pretrain.queue_size", "32", "--cluster.k", "4", "--distill.epochs", "1"),
    *("--distill.batch_size", "16", "--seed_method.epochs", "1", "--seed_method.batch_size", "16"),
    *("--contrastive.epochs", "1", "--contrastive.batch_size", "16", "--contrastive.queue_size", "32"),
    *("--seed_method.queue_size", "32", "--probe.probe_weight_decay", "0.01", "--device", "cpu"),
]
TINY_DETECTION = [
    *("--short_side", "64", "--fpn_channels", "16", "--regions", "16", "--workers", "0", "--device", "cpu"),
    *("--batch_size", "2", "--epochs", "2", "--optimizer", "adamw", "--lr", "0.001", "--anchor_scale", "4"),
    *("--precision", "fp32"),
]


def command(
    *words: str, timeout: float = 240, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these words in a process of its own; on one thread, so that results are the same anywhere."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def sssd(*words: str) -> int:
    """Runs the command in this process (a new one takes seconds) and gives its exit status."""
    arguments, sys.argv = sys.argv, ["sssd", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = arguments
    return 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error line: the only thing on stderr but progress bars and warnings, and no traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
