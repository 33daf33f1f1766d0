"""k-means in memory, by faiss: the same clusters on every machine with the same seed."""

import logging
import os
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from sssd_zoo.configs import ClusterConfig
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError

logger = logging.getLogger("sssd_zoo")

FloatArray = npt.NDArray[np.float32]

IntArray = npt.NDArray[np.int64]

_CHUNK = 8192  # rows looked at in one go, so that a check never needs a copy of all features

_OPENBLAS_KERNELS = {"AVX512": "SkylakeX", "AVX2": "Haswell"}


def import_faiss() -> Any:
    """Imports faiss so that its matrix products use the CPU's vector units.

    The OpenBLAS inside the faiss-cpu wheel is of 2021. On a CPU it does not know (Intel's Ice Lake and AMD's Zen 5 are
    two) it falls back to SSE3 kernels, and k-means takes four times as long. OPENBLAS_CORETYPE names a kernel; OpenBLAS
    reads it once, when it is loaded, which is why faiss is not imported at the top of this file. The user's own value
    stands, and ours is taken back so that child processes do not inherit it. Where the program has imported faiss
    before, its kernel stays as it is.
    """
    kernel = _OPENBLAS_KERNELS.get(torch.backends.cpu.get_cpu_capability())
    if kernel is None or "OPENBLAS_CORETYPE" in os.environ:
        import faiss

        return faiss
    os.environ["OPENBLAS_CORETYPE"] = kernel
    try:
        import faiss
    finally:
        del os.environ["OPENBLAS_CORETYPE"]
    return faiss


def normalise(features: FloatArray) -> FloatArray:
    """Divides every row by its Euclidean norm, in place, and returns the same array; a row of zeros stays zero.

    Args:
        features: float32 [N, D].
    """
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    features /= np.maximum(norms, np.finfo(np.float32).tiny)
    return features


@dataclass(frozen=True)
class Clustering:
    """What `kmeans` found.

    Attributes:
        labels: int64 [N], each row's cluster in 0..K'-1; every cluster has at least one row.
        centroids: float32 [K', D].
        distances: float32 [N], the squared Euclidean distance of each row to its centroid.
        inertia: the sum of `distances`.
        k_asked: the K that was asked for; K' is less where clusters came out empty.
    """

    labels: IntArray
    centroids: FloatArray
    distances: FloatArray
    inertia: float
    k_asked: int

    @property
    def k(self) -> int:
        """K', the number of clusters that have rows."""
        return len(self.centroids)

    @classmethod
    def without_holes(cls, labels: IntArray, centroids: FloatArray, distances: FloatArray, k_asked: int) -> Self:
        """Drops the clusters that have no rows and renumbers the others.

        Args:
            labels: int64 [N] in 0..K-1.
            centroids: float32 [K, D].
            distances: float32 [N].
            k_asked: K.

        Raises:
            UserError: if all rows are in one cluster.
        """
        kept, labels = np.unique(labels, return_inverse=True)
        if len(kept) == 1:
            raise UserError(
                f"only 1 cluster of the {k_asked} asked for holds images: all {len(labels)} have the same features; "
                "give images that differ or, if these do, a network that has not collapsed (train it with a lower lr)"
            )
        if len(kept) <= k_asked // 2:
            logger.warning("warning: only %d clusters of the %d asked for hold images", len(kept), k_asked)
        inertia = float(distances.sum(dtype=np.float64))
        return cls(labels.astype(np.int64, copy=False), centroids[kept], distances, inertia, k_asked)


def check_clusters(k: int, images: int, setting: str = "--k") -> None:
    """Refuses a number of clusters that the images do not make.

    Args:
        k: the number of clusters.
        images: number of them.
        setting: what the user gives it by.

    Raises:
        UserError: unless it is from 2 to the number of images.
    """
    if not 2 <= k <= images:
        raise UserError(f"K = {k} clusters of {images} images; give a {setting} from 2 to the number of images")


def check_kmeans(n: int, k: int, iterations: int, redos: int) -> None:
    """Refuses numbers that k-means cannot work with.

    Args:
        n: number of rows.
        k: number of clusters.
        iterations: most passes over the rows.
        redos: runs, of which the best is kept.

    Raises:
        UserError: if there are fewer than 2 clusters or more than rows, or nothing would be run.
    """
    if k < 2:
        raise UserError(f"K = {k} clusters are no pseudo labels to learn: ask for at least 2")
    if k > n:
        raise UserError(f"k-means with K = {k} needs at least as many images, but there are {n}; ask for a smaller K")
    if iterations < 1 or redos < 1:
        raise UserError(f"k-means needs at least 1 iteration and 1 redo, not {iterations} and {redos}")


def refuse_non_finite(features: FloatArray, first_row: int) -> None:
    """Raises `UserError` naming the first row of `features` [n, D] with NaN or infinity, counted from `first_row`."""
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        row = first_row + int(bad.argmax())
        raise UserError(f"the features of row {row} hold NaN or infinity; check the network's weights")


def first_seed(seed: int, redo: int) -> int:
    """The seed of one run's first centroids; 15486557 is the step between the seeds of faiss's own redos."""
    return (seed + redo * 15486557) % (2**31 - 1)


def kmeans(
    features: FloatArray,
    k: int,
    *,
    seed: int,
    iterations: int = ClusterConfig.iterations,
    redos: int = ClusterConfig.redos,
    progress: bool = False,
) -> Clustering:
    """Clusters the rows of `features` by faiss's k-means, trained on all of them.

    The result is that of ``faiss.Kmeans(D, k, seed=seed, niter=iterations, nredo=redos)`` without its subsampling (by
    default faiss trains on at most 256 rows per cluster), in the same time. Repeated calls give bit-equal results with
    the same number of threads. Clusters that the final assignment leaves empty are dropped and the others renumbered.

    Args:
        features: float32 [N, D], finite; L2-normalised by the caller (`normalise`) where cosine is meant. Not copied if
            C-contiguous.
        k: the number of clusters, 2..N.
        seed: chooses the rows that are the first centroids.
        iterations: passes over the data, >= 1; fewer are made where the inertia stops changing.
        redos: runs from different first centroids, >= 1; the one of least inertia is kept.
        progress: show a progress bar.

    Raises:
        UserError: if k is less than 2 or more than N, or a feature is NaN or infinite.
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    n, d = features.shape
    check_kmeans(n, k, iterations, redos)
    for start in range(0, n, _CHUNK):
        refuse_non_finite(features[start : start + _CHUNK], start)

    faiss = import_faiss()
    all_rows = {"max_points_per_centroid": -(-n // k), "min_points_per_centroid": 1, "check_input_data_for_NaNs": False}
    best, best_inertia = None, np.inf
    with progress_bar(redos * iterations, "k-means", "pass", disable=not progress) as bar:
        for redo in range(redos):
            # One pass per call, so that the bar can move, gives the same bits as faiss's own loop at 1 ms more a pass.
            trainer = faiss.Kmeans(d, k, niter=1, seed=first_seed(seed, redo), **all_rows)
            inertia = np.inf
            for done in range(iterations):
                previous, inertia = inertia, trainer.train(features, init_centroids=trainer.centroids)
                bar.update()
                # Converged; faiss's own loop ends so too.
                if inertia == previous:
                    bar.update(iterations - 1 - done)
                    break
            if best is None or inertia < best_inertia:
                best, best_inertia = trainer, inertia

    assert best is not None
    distances, labels = best.assign(features)
    return Clustering.without_holes(labels, best.centroids, distances, k)
