"""Fixtures of the tests of the functions."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keeps the data sets that are written out of the user's cache; gives the folder that they are written into."""
    folder = tmp_path_factory.getbasetemp() / "hf_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "sssd_zoo"
