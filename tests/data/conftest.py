"""Fixtures of the tests of data."""

from pathlib import Path

import datasets
import pytest

from helpers.images import picture, write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keeps what `datasets` converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_cache")
    # After each pass over a parquet stream `datasets` sleeps for 5 s, to be safe from a race at the interpreter's end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


@pytest.fixture
def classes(tmp_path) -> Path:
    """Three classes of 2, 3 and 4 images."""
    for number, name in enumerate(("cat", "dog", "eel")):
        for seed in range(2 + number):
            write(tmp_path / "classes" / name / f"{seed}.png", picture(10 * number + seed))
    return tmp_path / "classes"
