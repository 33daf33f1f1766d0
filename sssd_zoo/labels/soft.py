"""Soft pseudo labels: an image belongs to several clusters, the more the nearer it is to their centroids.

A flag of this package's own, not of the paper, whose pseudo labels are hard (section 3.1).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.errors import UserError
from sssd_zoo.labels.fixed import fingerprint
from sssd_zoo.labels.kmeans import FloatArray, IntArray, import_faiss
from sssd_zoo.labels.pseudo_labels import PseudoLabels

Near = tuple[IntArray, FloatArray]  # numbers of the nearest centroids, and the squared distances to them


def nearest_centroids(chunks: Iterable[FloatArray], centroids: FloatArray, count: int) -> Near:
    """The centroids nearest to each row of features, the nearest first.

    Args:
        chunks: float32 [n, D] each, the rows in order.
        centroids: float32 [K, D].
        count: M, how many of them; all K where there are fewer.

    Returns:
        Their numbers, int64 [N, M], and the squared distances, float32 [N, M].
    """
    index = import_faiss().IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    searches = [index.search(np.ascontiguousarray(chunk), min(count, len(centroids))) for chunk in chunks]
    distances, numbers = (np.concatenate(parts) for parts in zip(*searches, strict=True))
    return numbers, np.maximum(distances, 0)


class SoftLabels:
    """Memberships of images in clusters, made dense batch by batch: labels[positions] is float32 [B, K], rows sum to 1.

    The membership of image x in cluster k is proportional to exp(-d_k^2 / (T s)), where d_k is x's distance to the
    centroid, and s the mean over all images of the squared distance to their own, so that T has no unit. Of each image
    only the nearest centroids are known; its membership in the others is 0.

    Args:
        pseudo: pseudo labels with the nearest centroids.
        rows: int64 [N], the images' row numbers in the data set, in the order of their positions.
        temperature: T, over 0; toward 0 the labels become hard.

    Raises:
        UserError: if the labels keep no distances but those to the own centroid, or T is not over 0.
    """

    def __init__(self, pseudo: PseudoLabels, rows: IntArray, temperature: float) -> None:
        if temperature <= 0:
            raise UserError(f"the temperature of soft labels is {temperature}; it must be over 0")
        if pseudo.near is None or pseudo.near_distances is None:
            raise UserError(
                "these pseudo labels are hard only: run `sssd pseudo-label` with --nearest 8, say, for soft ones"
            )
        places = pseudo.places_of(rows)
        distances = torch.from_numpy(pseudo.near_distances[places])
        scale = max(float(pseudo.distances.mean(dtype=np.float64)), 1e-12)
        self.memberships = torch.softmax(-distances / (temperature * scale), dim=1)
        self.near = torch.from_numpy(pseudo.near[places])
        self.num_classes = len(pseudo.centroids)
        self.identity = (  # of the same centroids
            f"{fingerprint(pseudo.labels[places])}, soft {temperature} over {pseudo.near.shape[1]}"
        )

    def __getitem__(self, positions: Tensor) -> Tensor:
        dense = torch.zeros(len(positions), self.num_classes)
        return dense.scatter_(1, self.near[positions], self.memberships[positions])

    def attach(self, network: nn.Module, out: Path, spec: InputSpec, steps_per_epoch: int) -> None:
        """Nothing: they do not come of the network."""

    def for_epoch(self, epoch: int, step: int = 0) -> "SoftLabels":
        """The labels themselves."""
        return self
