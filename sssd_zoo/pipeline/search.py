"""`sssd search`: the images of a file of embeddings that are nearest to others, by cosine similarity."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sssd_zoo.configs import SearchArgs
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import Corrupt, decode, quiet_pillow
from sssd_zoo.data.inputs import pixels_of
from sssd_zoo.data.loading import CorruptTally
from sssd_zoo.data.opening import encoded
from sssd_zoo.data.pixels import PixelFormat
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.embeddings import FOUND, EmbeddingFile, FloatArray, Meta, is_found
from sssd_zoo.evaluation.features import run_network
from sssd_zoo.files import atomic_write_text, csv_text
from sssd_zoo.files.run_folder import check_replaceable
from sssd_zoo.labels.kmeans import IntArray, import_faiss, normalise
from sssd_zoo.pipeline.embed import load_exits
from sssd_zoo.pipeline.predict import find_images


class Found(NamedTuple):
    """One of the images nearest to a query.

    Attributes:
        query: the file that was searched for.
        rank: from 1, the nearest.
        similarity: cosine, -1 to 1.
        row: row number of the image in its data set.
        path: its file, or None.
    """

    query: str
    rank: int
    similarity: float
    row: int
    path: str | None


def search(args: SearchArgs) -> None:
    """`sssd search`."""
    tune_cpu()
    if args.out is not None:
        check_replaceable(Path(args.out), args.overwrite, "what `sssd search` found", is_found)
    index = EmbeddingFile(args.index)
    exit_name = chosen_exit(index, args.exit)
    network = load_same(args.model, index, exit_name)
    pixels = pixels_of_index(index.meta, network)
    files = find_images(args.images, arrays=pixels is not None)
    good, queries, corrupt = embed_queries(args, network, files, index.meta["storage_size"], pixels)
    if good:
        similarities, places = nearest(queries, index.chunks(exit_name), args.k)
        found = list(described(good, similarities, places, index))
        show(found, args.format, of_files_with_several(index))
        if args.out is not None:
            atomic_write_text(args.out, as_csv(found), follow_link=True)
    if corrupt:
        CorruptTally("those given", args.max_corrupt).add(corrupt, len(files))


def chosen_exit(index: EmbeddingFile, asked: str | None) -> str:
    """The exit whose embeddings are compared.

    Raises:
        UserError: if the file has none of that exit.
    """
    exits = index.meta["exits"]
    exit_name = asked if asked is not None else exits[-1]
    exit_name = exits[-1] if exit_name == "final" and exits[-1] == "4" else exit_name
    if exit_name not in exits:
        raise UserError(
            f"{index.path} has embeddings of exit {', '.join(exits)}, not of exit {exit_name}: give --exit "
            f"{exits[-1]}, or embed the images again with --exits {exit_name}"
        )
    return exit_name


def load_same(name: str, index: EmbeddingFile, exit_name: str) -> Any:
    """The network that made a file of embeddings.

    Raises:
        UserError: if it is another.
    """
    meta = index.meta
    network, digest, _ = load_exits(name, exit_name, meta["image_size"])
    if digest != meta["digest"]:
        raise UserError(
            f"{index.path} was made by another network ({meta['model']}, weights {meta['digest']}) than {name} "
            f"(weights {digest}): give that one, or embed the images again by `sssd embed {name}`"
        )
    return network


def pixels_of_index(meta: Meta, network: Any) -> PixelFormat | None:
    """The channels and bits that the images of a file of embeddings were read with; None for RGB of 8 bits."""
    if "bits" not in meta:
        return pixels_of(network)
    pixels = PixelFormat(meta["channels"], meta["bits"])
    return None if pixels == (3, 8) else pixels


def embed_queries(
    args: SearchArgs, network: Any, files: list[Path], storage_size: int, pixels: PixelFormat | None
) -> tuple[list[Path], FloatArray, list[Corrupt]]:
    """The files that are images, their embeddings, float32 [Q, D] of unit length, and the others with the reasons."""
    good: list[Path] = []
    corrupt: list[Corrupt] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(files), args.batch_size):
            images = []
            with quiet_pillow():
                for file in files[start : start + args.batch_size]:
                    try:
                        image = encoded(0, {"bytes": None, "path": str(file)})
                        images.append(torch.from_numpy(decode(image, storage_size, args.max_pixels, pixels).copy()))
                        good.append(file)
                    except CorruptImageError as error:
                        corrupt.append((str(file), str(error)))
            if images:
                yield torch.arange(len(images)), torch.stack(images)

    values = [read[-1].numpy() for _, read in run_network(network, batches(), args)]
    return good, normalise(np.concatenate(values)) if values else np.empty((0, 0), np.float32), corrupt


def nearest(queries: FloatArray, chunks: Iterable[FloatArray], k: int) -> tuple[FloatArray, IntArray]:
    """The rows nearest to each query by cosine similarity; of equal ones the first come first.

    Args:
        queries: float32 [Q, D] of unit length.
        chunks: the rows, float32 [n, D] each, in order; they are normalised in place.
        k: number of rows, at most as many as there are.

    Returns:
        The similarities, float32 [Q, k], the greatest first, and the rows' numbers, int64 [Q, k].
    """
    faiss = import_faiss()
    best, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    start = 0
    for rows in chunks:
        found = faiss.knn(queries, normalise(rows), min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        best, places = np.hstack([best, found[0]]), np.hstack([places, found[1] + start])
        order = np.lexsort((places, -best))[:, :k]
        best, places = np.take_along_axis(best, order, 1), np.take_along_axis(places, order, 1)
        start += len(rows)
    return best, places


def described(files: list[Path], similarities: FloatArray, places: IntArray, index: EmbeddingFile) -> Iterator[Found]:
    """What was found for each file, nearest first."""
    rows, paths = index.images()
    folder = index.meta["folder"]
    for file, values, numbers in zip(files, similarities.clip(-1, 1).tolist(), places.tolist(), strict=True):
        for rank, (similarity, place) in enumerate(zip(values, numbers, strict=True), start=1):
            path = paths[place]
            path = path if path is None or folder is None else str(Path(folder, path))
            yield Found(str(file), rank, similarity, int(rows[place]), path)


def of_files_with_several(index: EmbeddingFile) -> set[int]:
    """The rows of the images whose files hold others, too, as TIFF and DICOM files of several pages do."""
    rows, paths = index.images()
    images_of = Counter(path for path in paths if path is not None)
    return {int(row) for row, path in zip(rows, paths, strict=True) if path is not None and images_of[path] > 1}


def show(found: list[Found], form: str, several: set[int]) -> None:
    """Prints what was found, as 'jsonl' or as a 'table', which names also the rows of `several`."""
    for one in found:
        if form == "jsonl":
            print(json.dumps({**one._asdict(), "similarity": round(one.similarity, 6)}))
            continue
        if one.rank == 1:
            print(plain(one.query, longest=4096))
            print("  similarity  image")
        where = f"row {one.row}" if one.path is None else plain(one.path, longest=4096)
        where += f", row {one.row}" if one.row in several else ""
        print(f"  {one.similarity:10.4f}  {where}", flush=True)


def as_csv(found: list[Found]) -> str:
    """What was found as CSV."""
    return csv_text(FOUND, ([*one[:2], f"{one.similarity:.6f}", one.row, one.path or ""] for one in found))
