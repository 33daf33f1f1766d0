"""Where images come from: the shipped sample, the Hub, folders, parquet files, `save_to_disk` folders.

Each becomes splits of Hugging Face `datasets`, whose columns `columns.py` then looks at.
"""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.files import disk_errors

logger = logging.getLogger("sssd_zoo")

SAMPLE_NAME = "cifar10-sample"
SAMPLE_FOLDER = Path(__file__).with_name("sample")
EXTENSIONS = tuple(
    f".{kind}"
    for kind in ("jpg", "jpeg", "jfif", "png", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm", "pnm", "jp2")
)
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsupervised"), "unlabeled"),
    "extra": "extra",
}
HUB_TIMEOUT = 10.0  # seconds: without a first short look, `datasets` retries an unreachable Hub for half a minute

Splits = Mapping[str, Any]  # split name -> Dataset or IterableDataset


def short_name(data: str) -> str:
    """What to call the data in files that are passed on: a Hub id as it is, a path without the folders above it."""
    try:
        path = Path(data).expanduser()
        return path.resolve().name if path.exists() else data
    except OSError:  # longer than any path
        return data


def open_splits(data: str, *, revision: str | None = None, streaming: bool = False, progress: bool = True) -> Splits:
    """Opens the splits of a data set.

    Args:
        data: 'cifar10-sample'; a path of an image folder, a parquet file, a folder of parquet files or a
            `save_to_disk` folder; or a Hub id, with `:configuration` behind it where the data set has several.
        revision: commit or branch, for the Hub.
        streaming: read rows as they are asked for.
        progress: show the bars of downloads.

    Returns:
        Splits by name; `IterableDataset` of the Hub's and of parquet files when streaming, otherwise `Dataset`.

    Raises:
        UserError: if there is nothing of that name, or nothing to read in it.
    """
    if data == SAMPLE_NAME:
        files = {split: [str(SAMPLE_FOLDER / f"{split}.parquet")] for split in ("train", "test")}
        return _parquet(files, SAMPLE_FOLDER, streaming)
    path = Path(data).expanduser()
    if path.exists():
        return _open_path(path, streaming)
    name, _, configuration = data.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix == ".parquet":
        raise UserError(f"no file or folder {data}: give an image folder, parquet, a Hub id or {SAMPLE_NAME}")
    return _open_hub(name, configuration or None, revision, streaming, progress)


def _open_path(path: Path, streaming: bool) -> Splits:
    from datasets import Dataset, load_from_disk

    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"{path} is a file of another kind: give a parquet file or a folder")
        return _parquet({_split_of(PurePath(path.name)): [str(path)]}, path, streaming)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        splits = _load(lambda: load_from_disk(str(path)), path)
        return {str(splits.split or "train"): splits} if isinstance(splits, Dataset) else splits
    images, parquet, others, folders = _walk(path)
    if parquet:
        files = defaultdict(list)
        for file in parquet:
            files[_split_of(file)].append(str(path / file))
        return _parquet(files, path, streaming)
    if images:
        return _image_folder(path, images, folders)
    if others:
        raise UserError(f"{path} holds no images: none of its {others} files ends in {' '.join(EXTENSIONS)}")
    raise UserError(f"{path} is empty: give a folder with images or parquet files")


def _walk(root: Path) -> tuple[list[PurePath], list[PurePath], int, list[PurePath]]:
    """Image and parquet files below `root` as sorted relative paths, the number of other files, and the folders."""
    images, parquet, others, visited = [], [], 0, []
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        visited.append(PurePath(folder).relative_to(root))
        for name in files:
            path = visited[-1] / name
            if name.startswith("."):
                continue
            if path.suffix.lower() in EXTENSIONS:
                images.append(path)
            elif path.suffix == ".parquet":
                parquet.append(path)
            else:
                others += 1
    return sorted(images, key=PurePath.as_posix), sorted(parquet, key=PurePath.as_posix), others, visited


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _split_of(path: PurePath) -> str:
    """The split that a file's folders or the words of its name tell of; 'train' if none does."""
    for part in (*path.parts[:-1], *re.split(r"[-_.\s]", path.stem)):
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return "train"


def _image_folder(root: Path, files: list[PurePath], folders: list[PurePath]) -> Splits:
    """Splits of an image folder: `split/class/...`, `class/...`, `split/...` or images alone.

    The sub-folders are splits if all that hold images have names of splits. Below, the first sub-folder is the class,
    and an empty one is a class without rows. Images beside class folders, or a single class folder, leave the split
    without labels.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    split_folders = all(len(file.parts) > 1 and file.parts[0].lower() in SPLIT_NAMES for file in files)

    def split_of(path: PurePath) -> str | None:
        return SPLIT_NAMES.get(path.parts[0].lower()) if split_folders else "train"

    depth = 1 if split_folders else 0  # of the class among the parts of a path
    groups = defaultdict(list)
    for file in files:
        groups[split_of(file)].append(file)
    labelled = {split for split, group in groups.items() if all(len(file.parts) > depth + 1 for file in group)}
    names = sorted(
        {path.parts[depth] for path in folders if len(path.parts) == depth + 1 and split_of(path) in labelled}
    )
    number = {name: label for label, name in enumerate(names)}
    splits = {}
    for split, group in groups.items():
        columns: dict[str, list[Any]] = {"image": [str(root / file) for file in group]}
        features = Features(image=Image(decode=False))
        if split in labelled and len(names) > 1:
            columns["label"] = [number[file.parts[depth]] for file in group]
            features["label"] = ClassLabel(names=names)
        splits[str(split)] = Dataset.from_dict(columns, features=features)
    return splits


def _parquet(files: Mapping[str, list[str]], origin: Path, streaming: bool) -> Splits:
    import pyarrow.parquet as pq
    from datasets import load_dataset

    def load() -> Any:
        # Files without rows, which `datasets` cannot read, say nothing.
        filled = {split: [file for file in paths if pq.read_metadata(file).num_rows] for split, paths in files.items()}
        filled = {split: paths for split, paths in filled.items() if paths}
        if not filled:
            raise UserError(f"{origin} has no rows")
        return load_dataset("parquet", data_files=filled, streaming=streaming)

    splits: Splits = _load(load, origin)
    return splits


def _load(load: Callable[[], Any], origin: Path) -> Any:
    """Runs a local load of `datasets` without its bars; what it cannot read becomes a `UserError`."""
    import datasets
    import pyarrow as pa

    with _quiet(bars=False), disk_errors(Path(datasets.config.HF_DATASETS_CACHE)):
        try:
            return load()
        except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, FileNotFoundError) as error:
            _reraise_disk_error(error)
            raise UserError(f"cannot read {origin}: {_reason(error)}") from error


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
        raise UserError(f"the Hub's data set {name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no file or folder {name} here, nor a data set of that name on the Hub that you may read "
            "(for a private one, log in with `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise UserError(f"no file or folder {name}, and that is not a name the Hub can have") from error
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code < 500:
            raise UserError(f"the Hub refuses the data set {name}: {_reason(error)}") from error
        unreachable = True
    except Exception:  # its HTTP client's errors, which differ between versions, and its offline mode
        unreachable = True
    try:
        with _quiet(bars=progress), _offline(unreachable), disk_errors(Path(datasets.config.HF_DATASETS_CACHE)):
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
    """Silences `datasets` for a while: its log, which repeats what it raises, and unless `bars` its progress bars."""
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
    """Makes `datasets` go straight to its cache instead of trying the Hub again and again."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _reraise_disk_error(error: Exception) -> None:
    """`datasets` wraps a full disk into an error of its own; `disk_errors` wants to see the bare one."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
            raise cause from error


def _reason(error: Exception) -> str:
    """The innermost cause that says anything, on one line."""
    texts = [" ".join(str(cause).split()) for cause in _causes(error)]
    return next((text[:300] for text in reversed(texts) if text), type(error).__name__)
