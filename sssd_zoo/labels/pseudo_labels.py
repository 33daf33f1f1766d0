"""Pseudo labels as files, their quality, and random labels to compare with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from safetensors import SafetensorError

from sssd_zoo.configs import ClusterConfig, DataConfig
from sssd_zoo.data import columns, sources
from sssd_zoo.data.images import EncodedImages, fingerprint
from sssd_zoo.data.loading import ImageData, open_encoded
from sssd_zoo.data.several import open_data
from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_write_bytes, damage, read_json, recorded_sha256, sha256_of, write_json
from sssd_zoo.files.run_folder import LABEL_ARRAYS, LABELS, atomic_dir
from sssd_zoo.labels.kmeans import Clustering, FloatArray, IntArray


def random_labels(n: int, k: int, seed: int) -> IntArray:
    """The baseline: `n` labels drawn uniformly from `k` classes, int64 [n]; a class that nobody drew is left out.

    Raises:
        UserError: if k is less than 2 or more than n.
    """
    if not 2 <= k <= n:
        raise UserError(f"random labels need 2 <= K <= the number of images, but K = {k} and there are {n} images")
    drawn = np.random.default_rng(seed).integers(k, size=n)
    return np.unique(drawn, return_inverse=True)[1].astype(np.int64, copy=False)


def match_labels(labels: IntArray, reference: IntArray, k: int) -> IntArray:
    """Renumbers clusters so that as many rows as possible have the number that they have in `reference`.

    The optimal one-to-one assignment of the k x k counts of rows by both numbers (Hungarian method).

    Args:
        labels: int64 [N] in 0..k-1.
        reference: int64 [N] in 0..k-1.
        k: number of clusters; those without rows take the numbers that are left.

    Returns:
        Int64 [N] in 0..k-1.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.bincount(labels * k + reference, minlength=k * k).reshape(k, k)
    _, number = linear_sum_assignment(counts, maximize=True)
    matched: IntArray = number[labels]
    return matched


def quality(labels: IntArray, truth: IntArray) -> dict[str, float]:
    """Compares pseudo labels with true ones, both int64 [N].

    Returns:
        ``nmi``, normalised mutual information (0..1, arithmetic mean of the entropies); ``ari``, adjusted Rand index
        (at most 1, 0 by chance); ``purity``, the fraction of rows whose class is the most common of their
        cluster (0..1; always 1 where there are as many clusters as rows).
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(truth, labels, sparse=True)
    return {
        "nmi": float(normalized_mutual_info_score(truth, labels)),
        "ari": float(adjusted_rand_score(truth, labels)),
        "purity": float(counts.max(axis=0).sum() / len(labels)),
    }


class Meta(TypedDict):
    """What pseudo_labels.json always says, see `PseudoLabels`."""

    data: str
    split: str
    fingerprint: str
    model: str
    k_asked: int
    sizes: list[int]
    quality: dict[str, float] | None


class OtherData(UserError):
    """Pseudo labels belong to other images than those that were read."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """Pseudo labels and the data they belong to; on disk a folder.

    The folder holds labels.parquet (columns row, label, distance, path where the images are files, and for soft labels
    near and near_distance), centroids.safetensors (tensor ``centroids``) and pseudo_labels.json (`meta` and the sha256
    of the other two).

    Attributes:
        rows: int64 [N], each image's row number in the data set, corrupt ones left out.
        labels: int64 [N] in 0..K'-1, without holes.
        distances: float32 [N], squared distance to the centroid.
        centroids: float32 [K', D].
        meta: what made them: data, split, fingerprint, model, seed, iterations, redos, k_asked, k, inertia, sizes (rows
            per cluster), quality (nmi, ari, purity; None without true labels) and, with `near`, nearest (M).
        near: int64 [N, M], the centroids nearest to each image, the nearest first, where soft labels may be wanted.
        near_distances: float32 [N, M], the squared distances to them.
        paths: N, each image's file relative to the folder of the data, as `ImageData.paths` gives it; None where the
            images are no files, and for labels of versions that kept none.
    """

    rows: IntArray
    labels: IntArray
    distances: FloatArray
    centroids: FloatArray
    meta: dict[str, Any]
    near: IntArray | None = None
    near_distances: FloatArray | None = None
    paths: list[str | None] | None = None

    @classmethod
    def from_clustering(
        cls,
        clustering: Clustering,
        data: ImageData,
        config: ClusterConfig,
        *,
        model: str,
        seed: int,
        near: tuple[IntArray, FloatArray] | None = None,
    ) -> Self:
        """Joins a clustering with what it was made from.

        Args:
            clustering: the result of `kmeans` over the images, in their order.
            data: the images; true labels serve `quality` only.
            config: of k-means.
            model: name of the network whose features were clustered.
            seed: of k-means.
            near: the nearest centroids, int64 [N, M], and the squared distances to them, float32 [N, M], or None.
        """
        meta = {
            "data": data.name,
            "split": data.split,
            "fingerprint": data.fingerprint,
            "model": model,
            "seed": seed,
            "iterations": config.iterations,
            "redos": config.redos,
            "k_asked": clustering.k_asked,
            "k": clustering.k,
            "inertia": clustering.inertia,
            "quality": None if data.labels is None else quality(clustering.labels, data.labels),
            "sizes": np.bincount(clustering.labels).tolist(),
            **({} if near is None else {"nearest": near[0].shape[1]}),
        }
        paths = data.paths()
        return cls(
            rows=data.rows,
            labels=clustering.labels,
            distances=clustering.distances,
            centroids=clustering.centroids,
            meta=meta,
            near=None if near is None else near[0],
            near_distances=None if near is None else near[1],
            paths=paths if any(path is not None for path in paths) else None,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the folder, whole or not at all, over an older one.

        Raises:
            UserError: if it cannot be written.
        """
        columns: dict[str, Any] = {"row": self.rows, "label": self.labels, "distance": self.distances}
        if self.paths is not None:
            columns["path"] = pa.array(self.paths, pa.string())
        if self.near is not None and self.near_distances is not None:
            for name, values in (("near", self.near), ("near_distance", self.near_distances)):
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        table = pa.table(columns)
        parquet = pa.BufferOutputStream()
        pq.write_table(table, parquet)
        with atomic_dir(folder, "labels") as temporary:
            atomic_write_bytes(temporary / "labels.parquet", parquet.getvalue().to_pybytes())
            centroids = safetensors.numpy.save({"centroids": np.ascontiguousarray(self.centroids)})
            atomic_write_bytes(temporary / "centroids.safetensors", centroids)
            sums = sha256_of(temporary, [temporary / name for name in LABEL_ARRAYS])
            write_json(temporary / "pseudo_labels.json", {**self.meta, "sha256": sums})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a folder that `save` wrote.

        Raises:
            UserError: if a file is missing or unreadable, or the files do not fit one another.
        """
        folder = Path(folder)
        for name in LABELS:
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} is not a folder of pseudo labels: {name} is missing; `sssd pseudo-label` writes one"
                )
        meta = read_json(folder / "pseudo_labels.json", Meta)
        if wrong := damage(folder, recorded_sha256(meta, LABEL_ARRAYS)):
            raise UserError(f"the pseudo labels in {folder} are damaged: {wrong}; make them again")
        try:
            table = pq.read_table(folder / "labels.parquet")
            rows, labels, distances = (table[name].to_numpy() for name in ("row", "label", "distance"))
            near, near_distances = (
                table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
                if name in table.column_names
                else None
                for name in ("near", "near_distance")
            )
            paths = table["path"].to_pylist() if "path" in table.column_names else None
            centroids = safetensors.numpy.load_file(folder / "centroids.safetensors")["centroids"]
            clusters, sizes = np.unique(labels, return_counts=True)
            whole = np.array_equal(clusters, np.arange(len(centroids))) and "fingerprint" in meta
            whole = whole and meta.get("sizes", sizes.tolist()) == sizes.tolist()
            meta.pop("sha256", None)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError) as error:
            raise UserError(f"cannot read the pseudo labels in {folder}: {error}; make them again") from error
        if not whole:
            raise UserError(f"the files of the pseudo labels in {folder} do not fit one another; make them again")
        return cls(
            rows=rows,
            labels=labels,
            distances=distances,
            centroids=centroids,
            meta=meta,
            near=near,
            near_distances=near_distances,
            paths=paths,
        )

    def check(self, data_fingerprint: str, images: int) -> None:
        """Refuses other data than those the labels were made from.

        Args:
            data_fingerprint: of the data.
            images: number of those.

        Raises:
            OtherData: if the fingerprints differ.
        """
        if self.meta["fingerprint"] != data_fingerprint:
            clustered = f"{len(self.rows):,} images of {self.meta.get('data')} (split {self.meta.get('split')})"
            raise OtherData(
                f"these pseudo labels belong to other data: {clustered} were clustered, and what was read now, "
                f"{images:,}, is not the same; give the images that were clustered, or repeat the command that made "
                "the labels, with --overwrite"
            )

    def open_images(self, config: DataConfig) -> EncodedImages:
        """The images that the labels were made from, by the row numbers of their split.

        Args:
            config: where the images are, and how they are read; the split is that of the labels.

        Raises:
            UserError: if they cannot be read, or are others.
        """
        name = sources.short_name(config.data)
        splits, split = columns.take_split(open_data(config, progress=True), self.meta["split"], name)
        images = open_encoded(splits[split], config.image_column, name, config.max_pixels)
        self.check(fingerprint(images, progress=True), len(images))
        return images

    def labels_of(self, rows: IntArray) -> IntArray:
        """The labels of the images with these row numbers, int64 [len(rows)], in their order; see `places_of`."""
        return self.labels[self.places_of(rows)]

    def places_of(self, rows: IntArray) -> IntArray:
        """Where the images with these row numbers stand in `labels`, int64 [len(rows)], in their order.

        Raises:
            UserError: if a row has no label.
        """
        order = np.argsort(self.rows)
        place = np.searchsorted(self.rows, rows, sorter=order)
        places = order[np.minimum(place, len(order) - 1)]
        missing = self.rows[places] != rows
        if missing.any():
            row = int(rows[missing.argmax()])
            raise UserError(
                f"row {row} has no pseudo label ({int(missing.sum())} rows have none); make the labels again"
            )
        return places
