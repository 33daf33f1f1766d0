"""Files of embeddings: written from parts, and read a part at a time, so that no number of images fills the memory.

    FILE.parquet   columns row, path (where the images are files) and embedding; what made it is in its metadata
    FILE.csv       the same columns, embedding_0, embedding_1, ...; what made it is in FILE.csv.json
    FILE.npy       [N, D], or [N, E, D] of E exits; FILE.npy.csv has row and path, FILE.npy.json what made it

Of several exits the columns are embedding_1, embedding_2 and so on, in CSV embedding_1_0, embedding_1_1, ...
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Required, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sssd_zoo.errors import UserError
from sssd_zoo.files import (
    check_content,
    damage,
    disk_errors,
    read_json,
    recorded_sha256,
    sha256_of,
    temporary_name,
    write_json,
)

FORMATS = (".parquet", ".csv", ".npy")
KEY = b"sssd_zoo"  # of the schema's metadata in parquet
KIND = "embeddings"
CHUNK = 16_384  # rows read at a time
FOUND = ("query", "rank", "similarity", "row", "path")  # the columns of what `sssd search` writes
DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}

FloatArray = NDArray[np.float32]


class LeftOut(TypedDict):
    """An image that could not be read: its path or row number, and the reason."""

    image: int | str
    reason: str


class Meta(TypedDict, total=False):
    """What made a file of embeddings.

    Attributes:
        package: 'sssd-zoo'.
        kind: 'embeddings'.
        model: what the user called the network.
        digest: of its weights, without classifiers; see `weights_digest`.
        exits: '1' to '4', or 'final' for a network without exits.
        dimension: D, numbers per image and exit.
        dtype: 'fp32' or 'fp16', of the file.
        normalised: whether every embedding was divided by its L2 norm.
        precision: of the forward pass.
        batch_size: of the forward pass.
        image_size: side of the network's images in pixels.
        storage_size: side that images were stored at before, in pixels; see `decode`.
        channels: that images were read with; 3 and 8 bits also where a network for grey images makes RGB grey.
        bits: of each channel, 8 or 16. Earlier versions wrote neither.
        max_pixels: images with more were left out.
        data: name of the data set.
        split: of it.
        folder: absolute path of the folder that `path` is relative to; None where the images are no files.
        paths: digest of the images' paths.
        fingerprint: of the data set, by content.
        count: N, images in the file.
        left_out: images that could not be read.
        sha256: of the other files beside the metadata.
    """

    package: Required[str]
    kind: Required[str]
    model: Required[str]
    digest: Required[str]
    exits: Required[list[str]]
    dimension: Required[int]
    dtype: Required[str]
    normalised: bool
    precision: str
    batch_size: int
    image_size: Required[int]
    storage_size: Required[int]
    channels: int
    bits: int
    max_pixels: int
    data: str
    split: str
    folder: Required[str | None]
    paths: str
    fingerprint: str
    count: Required[int]
    left_out: list[LeftOut]
    sha256: dict[str, str]


class Part(NamedTuple):
    """Some rows of a file.

    Attributes:
        rows: int64 [n], row numbers of the data set.
        paths: n, None for an image that is no file.
        values: float32 or float16 [n, E, D].
    """

    rows: NDArray[np.int64]
    paths: list[str | None]
    values: NDArray[Any]


def sidecars(path: Path) -> list[Path]:
    """The files beside a file of embeddings, that with the metadata first."""
    names = {".csv": [".json"], ".npy": [".json", ".csv"]}.get(path.suffix, [])
    return [path.with_name(path.name + name) for name in names]


def is_embeddings(path: Path) -> bool:
    """Whether this package wrote a file of embeddings."""
    with suppress(UserError):
        return read_meta(path)["kind"] == KIND
    return False


def is_found(path: Path) -> bool:
    """Whether a file is what `sssd search` writes."""
    with path.open("rb") as file:
        return file.readline(200).decode(errors="replace").rstrip("\r\n") == ",".join(FOUND)


def read_meta(path: Path) -> Meta:
    """What made a file of embeddings.

    Raises:
        UserError: if it is no such file.
    """
    if not path.exists():
        raise UserError(f"there is no file {path}: give one that `sssd embed` wrote")
    if path.suffix not in FORMATS or not path.is_file():
        raise UserError(f"{path} is not a file of `sssd embed`, which ends in {', '.join(FORMATS)}")
    content: Any
    if path.suffix == ".parquet":
        try:
            content = json.loads((pq.read_metadata(path).metadata or {}).get(KEY, b"null"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path}: {error}; make it again by `sssd embed`") from error
    else:
        record = sidecars(path)[0]
        content = read_json(record) if record.is_file() else None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path} was not written by `sssd embed`, so it does not say which network made it")
    check_content(path, content, Meta)
    meta: Meta = content  # type: ignore[assignment]  # checked
    return meta


def column_names(exits: list[str]) -> list[str]:
    """The column of each exit."""
    return ["embedding"] if len(exits) == 1 else [f"embedding_{number}" for number in exits]


class EmbeddingFile:
    """The rows of a file of embeddings, a part at a time.

    Args:
        path: of the file.

    Attributes:
        meta: what made it.

    Raises:
        UserError: if it is no file of embeddings, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.meta = read_meta(self.path)
        beside = recorded_sha256(self.meta, [path.name for path in sidecars(self.path)] + [self.path.name])
        if wrong := damage(self.path.parent, beside):
            raise UserError(f"the embeddings in {self.path} are damaged: {wrong}; make them again by `sssd embed`")

    def chunks(self, exit_name: str) -> Iterator[FloatArray]:
        """The embeddings of one exit, in order: float32 [n, D] each, a copy.

        Raises:
            UserError: if the file cannot be read, or has no such exit.
        """
        if exit_name not in self.meta["exits"]:
            exits = ", ".join(self.meta["exits"])
            raise UserError(f"{self.path} has no exit {exit_name!r}: give one of {exits}")
        place = self.meta["exits"].index(exit_name)
        column, width = column_names(self.meta["exits"])[place], self.meta["dimension"]
        try:
            for values in self._values(column, place, width):
                yield np.array(values, np.float32).reshape(-1, width)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"cannot read the embeddings in {self.path}: {error}; make them again") from error

    def _values(self, column: str, place: int, width: int) -> Iterator[NDArray[Any]]:
        if self.path.suffix == ".parquet":
            for batch in pq.ParquetFile(self.path).iter_batches(CHUNK, columns=[column]):
                yield batch[column].flatten().to_numpy(zero_copy_only=False)
        elif self.path.suffix == ".csv":
            names = [f"{column}_{number}" for number in range(width)]
            options = pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.float32()))
            for batch in pacsv.open_csv(self.path, convert_options=options, parse_options=CSV_FORM):
                yield np.stack([values.to_numpy() for values in batch.columns], 1)
        else:
            for start in range(0, self.meta["count"], CHUNK):
                values = np.load(self.path, mmap_mode="r")[start : start + CHUNK]
                yield values if values.ndim == 2 else values[:, place]

    def images(self) -> tuple[NDArray[np.int64], list[str | None]]:
        """The row numbers, int64 [N], and the paths of all images; None for those that are no files."""
        try:
            if self.path.suffix == ".parquet":
                table = pq.read_table(self.path, columns=["row", "path"])
            else:
                source = self.path if self.path.suffix == ".csv" else sidecars(self.path)[1]
                options = pacsv.ConvertOptions(
                    include_columns=["row", "path"],
                    column_types={"row": pa.int64(), "path": pa.string()},
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                )
                table = pacsv.read_csv(source, convert_options=options, parse_options=CSV_FORM)
            return table["row"].to_numpy(), table["path"].to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"cannot read the rows of {self.path}: {error}; make it again") from error


CSV_FORM = pacsv.ParseOptions(newlines_in_values=True)  # a file's name may have some


def write_embeddings(path: Path, parts: Iterable[Part], meta: Meta) -> None:
    """Writes a file of embeddings and what belongs beside it, in place of an older one.

    Each file is written under a temporary name, and all are renamed at the end, the metadata first: it holds the sha256
    of the others, so that a kill in between is noticed.

    Args:
        path: ends in one of `FORMATS`.
        parts: in order, N rows together.
        meta: what made them.

    Raises:
        UserError: if the disk is full or not writable; then nothing is left.
    """
    rows_file = sidecars(path)[1:]
    files = {file: temporary_name(file) for file in (path, *rows_file)}
    with disk_errors(path):
        try:
            if path.suffix == ".parquet":
                _write_parquet(parts, meta, files[path])
            elif path.suffix == ".csv":
                _write_csv(parts, meta, files[path])
            else:
                _write_npy(parts, meta, files[path], files[rows_file[0]])
            for temporary in files.values():
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
            for record in sidecars(path)[:1]:
                sums = sha256_of(path.parent, files.values())
                named = {file.name: sums[temporary.name] for file, temporary in files.items()}
                write_json(record, {**meta, "sha256": named})
            for file, temporary in files.items():
                temporary.replace(file)
        finally:
            for temporary in files.values():
                temporary.unlink(missing_ok=True)


def _write_parquet(parts: Iterable[Part], meta: Meta, path: Path) -> None:
    kind, width = pa.from_numpy_dtype(DTYPES[meta["dtype"]]), meta["dimension"]
    names = column_names(meta["exits"])
    fields = [("row", pa.int64()), ("path", pa.string()), *((name, pa.list_(kind, width)) for name in names)]
    schema = pa.schema(fields, metadata={KEY: json.dumps(meta).encode()})
    # Embeddings are all but random: dictionaries and statistics of them would cost time and save nothing.
    options = {"use_dictionary": ["path"], "write_statistics": ["row", "path"]}
    with path.open("wb") as stream, pq.ParquetWriter(stream, schema, **options) as file:
        for rows, paths, values in parts:
            lists = [pa.FixedSizeListArray.from_arrays(values[:, place].ravel(), width) for place in range(len(names))]
            file.write_table(pa.table([pa.array(rows), pa.array(paths, pa.string()), *lists], schema))


def _write_csv(parts: Iterable[Part], meta: Meta, path: Path) -> None:
    names = [f"{name}_{number}" for name in column_names(meta["exits"]) for number in range(meta["dimension"])]
    _csv_rows(path, names, parts, lambda part: part.values.reshape(len(part.values), -1).astype(np.float32))


def _write_npy(parts: Iterable[Part], meta: Meta, path: Path, rows_path: Path) -> None:
    exits = (len(meta["exits"]),) if len(meta["exits"]) > 1 else ()
    header = {
        "shape": (meta["count"], *exits, meta["dimension"]),
        "fortran_order": False,
        "descr": np.lib.format.dtype_to_descr(np.dtype(DTYPES[meta["dtype"]])),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        _csv_rows(rows_path, [], _written_to(file, parts), lambda part: np.empty((len(part.rows), 0), np.float32))


def _written_to(file: BinaryIO, parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        file.write(np.ascontiguousarray(part.values).tobytes())
        yield part


def _csv_rows(path: Path, names: list[str], parts: Iterable[Part], numbers: Callable[[Part], FloatArray]) -> None:
    """Writes the rows and paths of parts as CSV, and so many numbers behind them."""
    schema = pa.schema([("row", pa.int64()), ("path", pa.string()), *((name, pa.float32()) for name in names)])
    with path.open("wb") as stream, pacsv.CSVWriter(stream, schema) as file:
        for part in parts:
            columns = [pa.array(part.rows), pa.array(part.paths, pa.string()), *map(pa.array, numbers(part).T)]
            file.write_table(pa.table(columns, schema))
