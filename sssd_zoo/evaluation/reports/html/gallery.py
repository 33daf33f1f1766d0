"""The images of the page: which are shown, their thumbnails, and what is worth a look among them.

A page of 10,000 images is to stay under 15 MB. So of more images a sample is shown, spread over each cluster from its
centre to its edge, and thumbnails lie in sheets of WebP whose size and quality follow from how many there are.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sssd_zoo.configs import ForwardConfig
from sssd_zoo.data.augment import resize, to_float
from sssd_zoo.data.image_files import identical, image_names
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.pixels import shown
from sssd_zoo.distributed.hardware import compute_device
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.features import run_network
from sssd_zoo.evaluation.similar import CONSTANT, DARK, Pixels, brightness, copies, nearest

SHEET_BYTES = 8_000_000  # of all sheets, which base64 makes a third larger
SIDES = (112, 96, 80, 64, 56, 48, 40, 32, 24)  # of thumbnails in pixels
PIXELS = 24_000_000  # of all thumbnails, above which they are made smaller
QUALITIES = (82, 70, 55, 40)  # of WebP
COLUMNS = 10  # of a sheet, and as many rows
NEIGHBOURS = 8  # that are shown of an image
EXAMPLES = 12  # images whose neighbours are shown without being asked for
OUTLIERS = 36  # at most, and a twentieth of the images, but not fewer than 6
GROUPS = 60  # of copies that are shown
MEMBERS = 8  # of one group
HASHED = 200_000  # images up to which files are compared, as the data's fingerprint does

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Clusters:
    """The pseudo labels that the page shows.

    Attributes:
        rows: int64 [N], row number of each image in the data.
        labels: int64 [N] in 0..K-1.
        distances: float32 [N], squared distance to the centroid.
        names: of the K clusters.
        digest: tells these labels from others.
        nameable: whether the network answers these clusters, so that `sssd rename` can name them.
    """

    rows: Ints
    labels: Ints
    distances: NDArray[np.float32]
    names: Sequence[str]
    digest: str
    nameable: bool


def spread(labels: Ints, distances: NDArray[np.float32], limit: int) -> Ints:
    """At most `limit` images, as many of each cluster as possible, evenly from its nearest to its farthest.

    Args:
        labels: int64 [N] in 0..K-1.
        distances: float32 [N] to the centroid.
        limit: number of images. Below K, only the largest clusters have one.

    Returns:
        Positions, cluster by cluster and from the centre to the edge.
    """
    order = np.lexsort((distances, labels))
    sizes = np.bincount(labels)
    low, high = 0, int(sizes.max())
    while low < high:  # the largest number of images per cluster that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= limit else (low, middle - 1)
    quota = np.minimum(sizes, low)
    if low == 0:
        quota[np.argsort(-sizes, kind="stable")[:limit]] = 1
    starts = np.cumsum(sizes) - sizes
    chosen = [
        start + np.linspace(0, size - 1, count).round().astype(np.int64)
        for start, size, count in zip(starts, sizes, quota, strict=True)
    ]
    positions: Ints = order[np.concatenate(chosen)]
    return positions


def look(network: Any, data: ImageData, positions: Ints, forward: ForwardConfig) -> tuple[Pixels, Tensor]:
    """Thumbnails of images, uint8 [N, S, S, 3], and their features, float32 [N, D]: exit 4's, from one pass.

    Args:
        network: of this package, or any timm network.
        data: the images.
        positions: int64 [N] in `data`, each once.
        forward: how to run the network.
    """
    side = next((side for side in SIDES if len(positions) * side**2 <= PIXELS), SIDES[-1])
    side = min(side, data.size)
    place = {position: number for number, position in enumerate(positions.tolist())}
    thumbnails = np.zeros((len(positions), side, side, 3), np.uint8)
    features: Tensor | None = None
    statistics = data.statistics

    def shrunk() -> Iterator[tuple[Tensor, Tensor]]:
        for index, stored in data.batches(torch.from_numpy(positions).split(forward.batch_size)):
            visible = stored if statistics is None else shown(stored, statistics.mean, statistics.std)
            small = (resize(to_float(visible), side) * 255).round().clamp(0, 255).byte()
            thumbnails[[place[number] for number in index.tolist()]] = small.permute(0, 2, 3, 1).cpu().numpy()
            yield index, stored

    data.move(compute_device(forward.device))
    for index, pooled in run_network(network, shrunk(), forward, total=len(positions)):
        if features is None:
            features = torch.zeros(len(positions), pooled.shape[-1])
        features[[place[number] for number in index.tolist()]] = pooled[-1]
    assert features is not None  # there is at least one image
    return thumbnails, features


def sheets(thumbnails: Pixels, budget: int = SHEET_BYTES) -> list[str]:
    """Thumbnails, uint8 [N, S, S, 3], in sheets of COLUMNS x COLUMNS: WebP files in base64.

    The best of `QUALITIES` whose sheets take at most `budget` bytes is used; noise that no quality makes small enough
    is halved in size.
    """
    for quality in QUALITIES:
        files = list(_encoded(thumbnails, quality))
        if sum(map(len, files)) <= budget or len(thumbnails) == 1:
            return [base64.b64encode(file).decode() for file in files]
    small = resize(torch.from_numpy(thumbnails).permute(0, 3, 1, 2).float(), max(1, thumbnails.shape[1] // 2))
    return sheets(small.round().byte().permute(0, 2, 3, 1).numpy(), budget)


def _encoded(thumbnails: Pixels, quality: int) -> Iterator[bytes]:
    side, per_sheet = thumbnails.shape[1], COLUMNS**2
    for start in range(0, len(thumbnails), per_sheet):
        part = thumbnails[start : start + per_sheet]
        rows = -(-len(part) // COLUMNS)
        sheet = np.zeros((rows * COLUMNS, side, side, 3), np.uint8)
        sheet[: len(part)] = part
        sheet = sheet.reshape(rows, COLUMNS, side, side, 3).transpose(0, 2, 1, 3, 4)
        file = io.BytesIO()
        Image.fromarray(sheet.reshape(rows * side, COLUMNS * side, 3)).save(file, "WEBP", quality=quality)
        yield file.getvalue()


def gallery(network: Any, data: ImageData, clusters: Clusters, forward: ForwardConfig, limit: int) -> dict[str, Any]:
    """All that the page's script shows, as JSON has it; images are counted in the order in which they are shown.

    Args:
        network: whose features say what is similar.
        data: the images, those of `clusters` among them.
        clusters: the pseudo labels.
        forward: how to run the network.
        limit: number of images to show, beyond which they are a sample; outliers and copies come to it.
    """
    same = identical(data.encoded, clusters.rows) if len(clusters.rows) <= HASHED else []
    farthest = np.argsort(-clusters.distances, kind="stable")[: min(OUTLIERS, max(6, len(clusters.distances) // 20))]
    extra = [place for group in same[:GROUPS] for place in group[:MEMBERS]]
    chosen = np.unique(np.concatenate([spread(clusters.labels, clusters.distances, limit), farthest, extra]))
    chosen = chosen.astype(np.int64)
    chosen = chosen[np.lexsort((clusters.distances[chosen], clusters.labels[chosen]))]
    number = {place: shown for shown, place in enumerate(chosen.tolist())}
    positions = np.searchsorted(data.rows, clusters.rows[chosen])
    thumbnails, features = look(network, data, positions, forward)
    neighbours, cosines = nearest(features, NEIGHBOURS)
    means, spans = brightness(thumbnails)
    truth = None if data.labels is None else data.labels[np.searchsorted(data.rows, clusters.rows)]
    shown_same = [[number[place] for place in group if place in number] for group in same]
    return {
        "key": clusters.digest,
        "nameable": clusters.nameable,
        "side": thumbnails.shape[1],
        "columns": COLUMNS,
        "sheets": sheets(thumbnails),
        "images": {
            "name": [plain(name, 300) for name in image_names(data.encoded, clusters.rows[chosen])],
            "row": clusters.rows[chosen].tolist(),
            "cluster": clusters.labels[chosen].tolist(),
            "distance": _rounded(clusters.distances[chosen]),
            "truth": None if truth is None else truth[chosen].tolist(),
            "near": neighbours.tolist(),
            "cosine": [_rounded(row) for row in cosines.numpy()],
        },
        "clusters": cluster_facts(clusters, truth, data.class_names or []),
        "classes": [plain(name) for name in data.class_names or []],
        "median": round(float(np.median(clusters.distances)), 4),
        "copies": copies(thumbnails, neighbours[:, :4], [group for group in shown_same if len(group) > 1])[:GROUPS],
        "identical": sorted({shown for group in shown_same if len(group) > 1 for shown in group}),
        "identical_groups": len(same),
        "outliers": [number[place] for place in farthest.tolist()],
        "dark": np.flatnonzero((means < DARK) & (spans >= CONSTANT)).tolist(),
        "constant": np.flatnonzero(spans < CONSTANT).tolist(),
        "examples": np.linspace(0, len(chosen) - 1, min(EXAMPLES, len(chosen))).round().astype(int).tolist(),
        "total": len(clusters.rows),
    }


def cluster_facts(clusters: Clusters, truth: Ints | None, classes: Sequence[str]) -> dict[str, Any]:
    """Of each cluster its size, name and mean distance; with labels its commonest class and that one's fraction."""
    count = len(clusters.names)
    sizes = np.bincount(clusters.labels, minlength=count)
    means = np.bincount(clusters.labels, clusters.distances, minlength=count) / np.maximum(sizes, 1)
    facts: dict[str, Any] = {
        "size": sizes.tolist(),
        "name": [plain(name) for name in clusters.names],
        "distance": _rounded(means),
    }
    if truth is not None:
        counts = np.zeros((count, len(classes)), np.int64)
        np.add.at(counts, (clusters.labels, truth), 1)
        facts["class"] = counts.argmax(1).tolist()
        facts["purity"] = _rounded(counts.max(1) / np.maximum(sizes, 1))
    return facts


def _rounded(values: Iterable[Any]) -> list[float]:
    return [round(float(value), 3) for value in values]
