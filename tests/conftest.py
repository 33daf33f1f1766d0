"""Data and commands that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the workers, set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from sssd_zoo.data.walk import warn_once

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def every_warning_again() -> None:
    """A test's folder may bear the name of an earlier one's, which was removed: what was said of that is said again."""
    warn_once.cache_clear()


@pytest.fixture(scope="session")
def folder_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 16 px in three class folders, told apart by their colour."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for image in range(16):
            pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels).save(root / name / f"{image:02}.png")
    return root


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
