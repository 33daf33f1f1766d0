"""k-means on features that stay on disk: what `kmeans` computes, in bounded memory.

Every pass reads the file once, a chunk at a time. faiss assigns a chunk's rows, and their sums are carried on in the
order of the rows, so the passes are those of Lloyd's algorithm on all rows, not on a subsample, and on the same machine
give faiss's own result bit for bit (seen in faiss 1.15, for features of 32 numbers and more). Only where clusters run
empty again and again may another cluster be split than faiss would.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sssd_zoo.configs import ClusterConfig
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.labels.feature_file import FeatureFile
from sssd_zoo.labels.kmeans import Clustering, FloatArray, check_kmeans, first_seed, import_faiss, refuse_non_finite

BLOCK = 4_096  # rows that faiss multiplies at a time; it computes far fewer in another way, which rounds otherwise
CHUNK = 8 * BLOCK  # rows in memory at a time
SPLIT = np.float32(1 / 1024)  # how far the halves of a split cluster are set apart; as faiss's


def kmeans_from_file(
    path: str | Path,
    k: int,
    *,
    seed: int,
    iterations: int = ClusterConfig.iterations,
    redos: int = ClusterConfig.redos,
    progress: bool = False,
) -> Clustering:
    """Clusters the rows of a .npy file without ever holding all of them.

    Beside the interpreter and its libraries it holds a chunk of rows, four copies of the K x D centroids (those in
    use, faiss's index of them, their sums and the best so far), 12 bytes for each row (label and distance) and faiss's
    block of some 20 MB. For 1.28 million x 2048 and K = 16,000 that is 0.27 + 0.52 + 0.02 + 0.02 GB.

    Args:
        path: .npy of float32 [N, D], L2-normalised by its writer where cosine is meant.
        k: see `kmeans`, as all that follow.
        seed: of the first centroids.
        iterations: passes over the file.
        redos: runs from different first centroids.
        progress: show a progress bar.

    Raises:
        UserError: as `kmeans`, and if the file cannot be read.
    """
    features = FeatureFile(path)
    n = features.shape[0]
    check_kmeans(n, k, iterations, redos)
    _check_finite(features)
    faiss = import_faiss()
    best: FloatArray | None = features.rows(np.arange(n)) if k == n else None  # each row its own, as in faiss
    best_inertia = np.float32(np.inf)
    with progress_bar(redos * iterations, "k-means", "pass", disable=not progress) as bar:
        for redo in range(redos if best is None else 0):
            order = np.empty(n, dtype=np.int32)
            faiss.rand_perm(faiss.swig_ptr(order), n, first_seed(seed, redo) + 1)
            centroids = features.rows(order[:k])
            del order
            inertia = np.float32(np.inf)
            for done in range(iterations):
                previous = inertia
                centroids, inertia = _pass(faiss, features, centroids)
                bar.update()
                if inertia == previous:  # converged; `kmeans` ends so too
                    bar.update(iterations - 1 - done)
                    break
            if best is None or inertia < best_inertia:
                best, best_inertia = centroids, inertia

    assert best is not None
    labels, distances = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
    index = _index(faiss, best)
    for place, chunk in features.chunks(CHUNK, BLOCK):
        found = index.search(chunk, 1)
        distances[place], labels[place] = found[0][:, 0], found[1][:, 0]
    return Clustering.without_holes(labels, best, distances, k)


def _check_finite(features: FeatureFile) -> None:
    for place, chunk in features.chunks(CHUNK, BLOCK):
        refuse_non_finite(chunk, place.start)


def _index(faiss: Any, centroids: FloatArray) -> Any:
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index


def _pass(faiss: Any, features: FeatureFile, centroids: FloatArray) -> tuple[FloatArray, np.float32]:
    """One pass of Lloyd's algorithm: the new centroids, and the inertia by the old ones."""
    k = len(centroids)
    index = _index(faiss, centroids)
    sums, counts = torch.zeros(centroids.shape), np.zeros(k, dtype=np.int64)
    inertia = np.float32(0)
    for _, chunk in features.chunks(CHUNK, BLOCK):
        distances, labels = (found[:, 0] for found in index.search(chunk, 1))
        sums.index_add_(0, torch.from_numpy(labels), torch.from_numpy(chunk))
        counts += np.bincount(labels, minlength=k)
        # One after the other in float32, as faiss adds them: whether it has converged is judged by this number.
        inertia = np.cumsum(np.concatenate([[inertia], distances], dtype=np.float32))[-1]
    means = sums.numpy()
    full = counts > 0
    means[full] *= (np.float32(1) / counts[full].astype(np.float32))[:, None]
    _split_into_empty(faiss, means, counts.astype(np.float32), features.shape[0])
    return means, inertia


def _split_into_empty(faiss: Any, centroids: FloatArray, counts: FloatArray, n: int) -> None:
    """Gives each empty cluster half of another, in place, by faiss's rule.

    That cluster is drawn by its size, and the two halves move a little apart, each dimension the other way.
    """
    k = len(centroids)
    random = faiss.RandomGenerator(1234)
    signs = np.where(np.arange(centroids.shape[1]) % 2 == 0, SPLIT, -SPLIT).astype(np.float32)
    for empty in np.flatnonzero(counts == 0):
        donor = 0
        while random.rand_float() >= np.float32((float(counts[donor]) - 1) / np.float32(n - k)):
            donor = (donor + 1) % k
        centroids[empty] = centroids[donor] * (1 + signs)
        centroids[donor] *= 1 - signs
        counts[empty] = counts[donor] / 2
        counts[donor] -= counts[empty]
