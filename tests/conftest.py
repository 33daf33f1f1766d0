"""Data that several test files share."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the workers, set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from sssd_zoo.data.walk import warn_once

pytest.register_assert_rewrite("helpers")


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
