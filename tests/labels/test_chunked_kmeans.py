"""k-means from a file against the one in memory: bit for bit, and in bounded memory."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sssd_zoo.errors import UserError
from sssd_zoo.labels import chunked_kmeans
from sssd_zoo.labels.chunked_kmeans import kmeans_from_file
from sssd_zoo.labels.kmeans import kmeans, normalise


def saved(tmp_path, features):
    np.save(tmp_path / "features.npy", features)
    return tmp_path / "features.npy"


def unit_vectors(n, d, seed=0):
    return normalise(np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32))


# Few different rows: first centroids are equal, clusters get empty while it trains, and others are split.
COARSE = np.random.default_rng(1).integers(-3, 4, size=(9000, 3)).astype(np.float32)


@pytest.mark.parametrize("chunk", [4096, 32_768])
@pytest.mark.parametrize(
    ("features", "k", "options"),
    [
        (unit_vectors(9000, 48), 70, {"seed": 3, "iterations": 8}),
        (unit_vectors(12_000, 40), 40, {"seed": 0, "iterations": 5, "redos": 3}),
        (COARSE, 150, {"seed": 9, "iterations": 6}),
        (COARSE, 20, {"seed": 2**40, "iterations": 200}),
        (np.repeat(np.eye(4, dtype=np.float32), 25, axis=0), 10, {"seed": 0}),
        (unit_vectors(200, 64), 200, {"seed": 0, "redos": 2}),
        (np.repeat(unit_vectors(20, 64), 2, axis=0), 40, {"seed": 0}),
    ],
    ids=["unit", "redos", "splits", "converged", "holes", "each", "each-of-pairs"],
)
def test_it_is_the_k_means_in_memory_bit_for_bit(features, k, options, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_kmeans, "CHUNK", chunk)
    found, expected = kmeans_from_file(saved(tmp_path, features), k, **options), kmeans(features, k, **options)
    for name in ("labels", "centroids", "distances"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.inertia, found.k, found.k_asked) == (expected.inertia, expected.k, k)


def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_kmeans, "CHUNK", 4096)
    features = unit_vectors(5000, 4)
    path = saved(tmp_path, features)
    for k in (1, 5001):
        with pytest.raises(UserError, match=f"K = {k}"):
            kmeans_from_file(path, k, seed=0)
    features[4500, 2] = np.nan
    with pytest.raises(UserError, match="row 4500 "):
        kmeans_from_file(saved(tmp_path, features), 3, seed=0)


PEAK = """
import re, sys
from pathlib import Path
import sssd_zoo.labels.chunked_kmeans as chunked
chunked.CHUNK = 4096
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
chunked.kmeans_from_file(sys.argv[1], 20, seed=0, iterations=1)
before = peak()
chunked.kmeans_from_file(sys.argv[2], 20, seed=0, iterations=2)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    small, large = unit_vectors(5000, 256), np.tile(unit_vectors(5000, 256), (20, 1))  # 100 MB
    paths = [str(saved(tmp_path, features).rename(tmp_path / f"{len(features)}.npy")) for features in (small, large)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50, "labels, distances and the order of the rows take 1.6; the rest is the allocator's"
