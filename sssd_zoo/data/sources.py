"""Where images come from: the sample, the Hub, folders, lists of files, parquet, WebDataset and `save_to_disk` folders.

Each is opened as splits of Hugging Face `datasets`; `columns.py` then finds their columns.
"""

import logging
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from sssd_zoo.data.file_list import LIST, listed_files, paged
from sssd_zoo.data.formats import SHARDS
from sssd_zoo.data.layout import image_layout, split_of_parquet
from sssd_zoo.data.walk import FolderContent, refuse_pointers, walk, warn_once
from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError, causes
from sssd_zoo.errors.text import listed
from sssd_zoo.files import disk_errors, expand_home

logger = logging.getLogger("sssd_zoo")

SAMPLE_NAME = "cifar10-sample"
SAMPLE_FOLDER = Path(__file__).with_name("sample")
TAR_BLOCK = 512  # bytes
# Data with or without a configuration, and networks of timm and, by their prefix, of the Hub.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/\\]*)?|hf[-_]hub:.*")
HUB_TIMEOUT = 10.0  # seconds; without this check `datasets` retries an unreachable Hub for half a minute

# What to do where the cache of `datasets` cannot be written to.
OTHER_CACHE = "; HF_DATASETS_CACHE names another folder to write to"

Splits = Mapping[str, Any]  # split name -> Dataset or IterableDataset


def short_name(data: str | Sequence[str]) -> str:
    """The name of data or a network in files that are shared: a Hub id as it is, a path without its parent folders.

    A path need not exist (any more, or on this machine): what cannot be a Hub id is one.
    """
    if not isinstance(data, str):
        names = [PurePath(short_name(part)).name for part in data]
        return short_name(data[0]) if len(names) == 1 else listed(names, 3, " + ")
    name = data.removeprefix("local-dir:")
    try:
        path = Path(expand_home(name))
        if path.exists():
            return path.resolve().name
    except (OSError, UserError):  # longer than any path, or the home of nobody
        pass
    return data if HUB_NAME.fullmatch(data) and name == data else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_local(data: str) -> bool:
    """Whether data of this name lie on this disk, rather than on the Hub."""
    try:
        return data == SAMPLE_NAME or Path(expand_home(data)).exists()
    except OSError:  # longer than any path
        return False


def open_splits(
    data: str,
    *,
    revision: str | None = None,
    streaming: bool = False,
    unlabelled: bool = False,
    progress: bool = True,
    arrays: bool = False,
    all_pages: bool = False,
) -> Splits:
    """Opens the splits of a data set.

    Args:
        data: 'cifar10-sample'; a path of an image folder, a list of files, a parquet or WebDataset file, a folder of
            these or a `save_to_disk` folder; or a Hub id, with `:configuration` behind it where the data set has
            several.
        revision: commit or branch, for the Hub.
        streaming: read rows as they are asked for.
        unlabelled: treat no sub-folder of an image folder as a class.
        progress: show the bars of downloads.
        arrays: count files of NumPy arrays as images.
        all_pages: give a row to every page of a TIFF or DICOM file; only of folders and lists of files.

    Returns:
        Splits by name; `IterableDataset` of the Hub's and of parquet files when streaming, otherwise `Dataset`.

    Raises:
        UserError: if there is nothing of that name, or nothing to read in it.
    """
    if data == SAMPLE_NAME:
        files = {split: [str(SAMPLE_FOLDER / f"{split}.parquet")] for split in ("train", "test")}
        splits: Splits = _parquet(files, SAMPLE_FOLDER, streaming)
        return paged(splits, data) if all_pages else splits
    if not data:
        raise UserError("a name of the data is empty: give a folder, a file or a Hub id")
    path = Path(expand_home(data))
    if path.exists():
        splits = _open_path(path, streaming, unlabelled, arrays)
        return paged(splits, data) if all_pages else splits
    name, _, configuration = data.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix.lower() == ".parquet":
        raise UserError(f"no file or folder {data}: give an image folder, parquet, a Hub id or {SAMPLE_NAME}")
    if all_pages:
        raise UserError(f"--pages all is for folders and lists of files, not for the Hub's {name}: remove it")
    return _open_hub(name, configuration or None, revision, streaming, progress)


def holds_images(name: str) -> bool:
    """Whether a name is that of data with images in it, rather than of an image file."""
    path = Path(expand_home(name))
    return not path.is_file() or path.suffix.lower() in (LIST, ".parquet", *SHARDS)


def _open_path(path: Path, streaming: bool, unlabelled: bool, arrays: bool) -> Splits:
    from datasets import Dataset, load_from_disk

    if path.is_file():
        ending = path.suffix.lower()
        if ending == LIST:
            return listed_files(path, arrays=arrays)
        if ending in SHARDS:
            return _shards({split_of_parquet(PurePath(path.name)): [str(path)]}, path, streaming)
        if ending != ".parquet":
            raise UserError(
                f"{path} is another kind of file: give a folder of images, a list of files ({LIST}), parquet or .tar"
            )
        return _parquet({split_of_parquet(PurePath(path.name)): [str(path)]}, path, streaming)
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder: give a parquet file or a folder")
    if saved_by_datasets(path):
        refuse_pointers(sorted(path.rglob("*.arrow")), path)
        splits = _load(lambda: load_from_disk(str(path)), path)
        return {str(splits.split or "train"): splits} if isinstance(splits, Dataset) else splits
    found = walk(path, arrays=arrays)
    if found.shards and not found.images and not found.parquet and not found.metadata:
        return _shard_folder(found, streaming)
    if found.parquet or (found.metadata and not found.images):
        return _parquet_folder(found, streaming)
    if not found.images:
        raise found.no_images()
    found.warn()
    return _image_folder(found, unlabelled)


def saved_by_datasets(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder; images may lie beside a file of such a name."""
    parts = {"state.json": "*.arrow", "dataset_dict.json": "*/*.arrow"}  # of one split, and of several
    return any((folder / name).is_file() and any(folder.glob(rows)) for name, rows in parts.items())


def _shard_folder(found: FolderContent, streaming: bool) -> Splits:
    """Splits of WebDataset's tar files, by the names of the files and their folders."""
    found.warn()
    files = defaultdict(list)
    for file in found.shards:
        files[split_of_parquet(file)].append(str(found.root / file))
    return _shards(files, found.root, streaming)


def _shards(files: Mapping[str, list[str]], origin: Path, streaming: bool) -> Splits:
    """Splits of WebDataset's tar files; a class in `json` becomes the column `label` where there is no `cls`."""
    from datasets import load_dataset

    def load() -> Any:
        return {
            split: load_dataset("webdataset", data_files={split: _stamped(paths)}, split=split, streaming=streaming)
            for split, paths in files.items()
        }

    shards = [Path(file) for paths in files.values() for file in paths]
    refuse_pointers(shards, origin)
    if cut := [shard.name for shard in shards if not _ends_as_tar(shard)]:
        raise UserError(
            f"{len(cut)} of {len(shards)} .tar files of {origin} have no end mark, so they are cut short or no tar "
            f"files ({listed(cut)}): fetch or write them again"
        )
    return {split: rows if streaming else _json_label(rows) for split, rows in _load(load, origin).items()}


def _ends_as_tar(file: Path) -> bool:
    """Whether a file ends in a block of zeros: tarfile takes one that is cut in a header for a shorter one."""
    with file.open("rb") as opened:
        if opened.seek(0, os.SEEK_END) < TAR_BLOCK:
            return False
        opened.seek(-TAR_BLOCK, os.SEEK_END)
        return not any(opened.read())


def _json_label(rows: Any) -> Any:
    record = rows.features.get("json")
    names = [name for name in ("label", "class", "target", "cls") if isinstance(record, dict) and name in record]
    if not names or "cls" in rows.features or "label" in rows.features:
        return rows
    return rows.flatten().rename_column(f"json.{names[0]}", "label")


def _parquet_folder(found: FolderContent, streaming: bool) -> Splits:
    """Splits of parquet files; a metadata.parquet without images beside it counts as one."""
    files = defaultdict(list)
    for file in sorted([*found.parquet, *(file for file in found.metadata if file.suffix == ".parquet")]):
        files[split_of_parquet(file)].append(str(found.root / file))
    if not files:
        raise found.no_images()
    if found.images:
        warn_once(
            f"{found.root} holds parquet files and images: the {len(found.images)} images, {found.images[0]} first, "
            "are not read"
        )
    return _parquet(files, found.root, streaming)


def _image_folder(found: FolderContent, unlabelled: bool) -> Splits:
    """Splits of an image folder: `split/class/...`, `class/...`, `split/...` or images alone, see `image_layout`."""
    from datasets import ClassLabel, Dataset, Features, Image

    layout = image_layout(found.root, found.images, unlabelled=unlabelled or bool(found.metadata))
    if found.metadata:
        return _described_folder(found, layout.splits)
    number = {name: label for label, name in enumerate(layout.classes)}
    splits = {}
    for split, images in layout.splits.items():
        columns: dict[str, list[Any]] = {"image": [str(found.root / image) for image in images]}
        features = Features(image=Image(decode=False))
        if split in layout.labelled and layout.classes:
            columns["label"] = [number[layout.class_of(image)] for image in images]
            features["label"] = ClassLabel(names=layout.classes)
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits


def _described_folder(found: FolderContent, images: Mapping[str, list[PurePath]]) -> Splits:
    """Splits of the images that metadata files list, with their columns, as `datasets` reads them."""
    from datasets import load_dataset

    below: dict[PurePath, set[str]] = defaultdict(set)
    for split, group in images.items():
        for folder in {image.parent for image in group}:
            for parent in (folder, *folder.parents):
                below[parent].add(split)
    files = defaultdict(list)
    for file in found.metadata:
        if len(below[file.parent]) > 1:
            raise UserError(
                f"{found.root / file} lies above the splits {', '.join(sorted(below[file.parent]))}: put one into the "
                "folder of each split"
            )
        for split in below[file.parent]:
            files[split].append(str(found.root / file))
    without = sorted(images.keys() - files.keys())
    if without:
        raise UserError(f"{found.root} has metadata files, but none for its split {without[0]}: add one, or remove all")
    refuse_pointers([found.root / file for file in found.metadata], found.root)

    def load() -> Any:
        return {
            split: load_dataset("imagefolder", data_files={split: _stamped(files[split])}, split=split)
            for split in images
        }

    splits: Splits = _load(load, found.root)
    for split, rows in splits.items():
        if len(rows) != len(images[split]):
            warn_once(
                f"{found.root} ({split}) has {len(images[split])} images, but its metadata list {len(rows)}: only "
                "those are read"
            )
    return splits


def _parquet(files: Mapping[str, list[str]], origin: Path, streaming: bool) -> Splits:
    import pyarrow.parquet as pq
    from datasets import load_dataset

    def load() -> Any:
        # `datasets` cannot read files without rows.
        filled = {split: [file for file in paths if pq.read_metadata(file).num_rows] for split, paths in files.items()}
        filled = {split: paths for split, paths in filled.items() if paths}
        if not filled:
            raise UserError(f"{origin} has no rows")
        # Each split separately: read together, all would need the columns and types of the first.
        return {
            split: load_dataset(
                "parquet",
                data_files={split: _stamped(paths)},
                features=_common_features(paths),
                split=split,
                streaming=streaming,
            )
            for split, paths in filled.items()
        }

    refuse_pointers([Path(file) for paths in files.values() for file in paths], origin)
    splits: Splits = _load(load, origin)
    return splits


def _stamped(files: list[str]) -> Any:
    """Files by exact name, so that no path is taken for a pattern, with stamps that change when they do.

    `datasets` itself uses only the time of modification, which copying tools preserve.
    """
    from datasets.data_files import DataFilesList

    chained = next((file for file in files if "::" in file), None)
    if chained is not None:
        raise UserError(f"the path {chained} has '::', which `datasets` reads as a file in an archive: rename it")
    stamps = [Path(file).stat() for file in files]
    return DataFilesList(
        [str(Path(file).absolute()) for file in files],
        [(f"{stamp.st_ino} {stamp.st_size} {stamp.st_mtime_ns} {stamp.st_ctime_ns}",) for stamp in stamps],
    )


def _common_features(files: list[str]) -> Any:
    """The common columns of parquet files whose columns differ: a column of missing labels has no type."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Value

    schemas = [pq.read_schema(file) for file in files]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return None
    common = pa.unify_schemas([schema.remove_metadata() for schema in schemas], promote_options="permissive")
    features = Features.from_arrow_schema(common)
    for schema in schemas:
        for name, feature in Features.from_arrow_schema(schema).items():
            if not isinstance(feature, Value):
                features[name] = feature
    return features


def _load(load: Callable[[], Any], origin: Path) -> Any:
    """Runs a local load of `datasets` without progress bars; its errors become a `UserError`."""
    import datasets
    import pyarrow as pa

    with _quiet(bars=False), disk_errors(Path(datasets.config.HF_DATASETS_CACHE), OTHER_CACHE):
        try:
            return load()
        except (
            datasets.exceptions.DatasetsError,
            pa.ArrowException,
            tarfile.TarError,
            EOFError,
            ValueError,
            LookupError,  # of metadata without rows, or without what `datasets` writes
            FileNotFoundError,
        ) as error:
            _reraise_disk_error(error)
            odd = "it has no rows, or not what `datasets` writes" if isinstance(error, LookupError) else None
            raise UserError(f"cannot read {origin}: {odd or _reason(error)}") from error


def _open_hub(name: str, configuration: str | None, revision: str | None, streaming: bool, progress: bool) -> Splits:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable = False
    try:
        HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except RevisionNotFoundError as error:
        raise UserError(
            f"the Hub's data set {name} has no revision {revision!r}: give a branch, tag or commit of it by --revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no file or folder {name} here, nor a data set of that name on the Hub that you may read "
            "(for a private one, log in with `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise UserError(
            f"there is no file or folder {name}, and it is not a valid Hub id: give a path or ORG/NAME"
        ) from error
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code < 500:
            raise UserError(f"the Hub refuses the data set {name}: {_reason(error)}") from error
        unreachable = True
    except Exception:  # errors of its HTTP client, which differ between versions, and of its offline mode
        unreachable = True
    try:
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        with _quiet(bars=progress), _offline(unreachable), disk_errors(cache, OTHER_CACHE):
            try:
                splits: Splits = datasets.load_dataset(name, configuration, revision=revision, streaming=streaming)
            except Exception as error:
                _reraise_disk_error(error)
                raise
    except UserError:
        raise
    except Exception as error:
        if unreachable:
            raise UserError(
                f"there is no file or folder {name} here, and the Hugging Face Hub cannot be reached, nor is there a "
                f"copy of that data set in the cache: connect, or give a folder, parquet files or {SAMPLE_NAME}"
            ) from error
        raise UserError(f"cannot load the Hub's data set {name}: {_reason(error)}") from error
    if unreachable and rank() == 0:
        unchecked = f", whose revision may not be {revision!r}" if revision else ""
        logger.warning("the Hugging Face Hub cannot be reached: using the copy of %s in the cache%s", name, unchecked)
    return splits


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Silences the log of `datasets`, which repeats what it raises, and, unless `bars`, its progress bars."""
    import datasets

    verbosity, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars and not hidden:
            datasets.enable_progress_bars()


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Makes `datasets` use its cache directly instead of retrying the Hub."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reraise_disk_error(error: Exception) -> None:
    """Raises the disk error that `datasets` has wrapped, so that `disk_errors` recognises it."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
            raise cause from error


def _reason(error: Exception) -> str:
    """The text of the innermost cause that has one, on one line."""
    texts = [" ".join(str(cause).split()) for cause in causes(error)]
    return next((text[:300] for text in reversed(texts) if text), type(error).__name__)
