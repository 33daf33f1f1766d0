"""Data sets that are objects of Python, as files that every command reads: of `datasets`, or with items by number.

What reads images (several processes, a run that resumes in another session, `sssd report`) needs them by a name. So
they are written as parquet files, images that are files as their paths alone, into a folder of the cache of `datasets`
that is named by its content: the same images are written once, and have the same name in the next session.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sssd_zoo.data.columns import image_column
from sssd_zoo.data.containers import channels_last
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.layout import SPLIT_NAMES
from sssd_zoo.data.sources import OTHER_CACHE
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plain
from sssd_zoo.files import disk_errors, sha256

USUAL = tuple(dict.fromkeys(SPLIT_NAMES.values()))  # splits that the data of several may have
ROWS = 256  # images written at a time
IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes of Pillow that PNG keeps; TIFF keeps the others
IN_NO_FILE = {"HSV": "RGB", "YCbCr": "RGB", "RGBa": "RGBA", "La": "LA", "PA": "RGBA"}  # modes, and what they become


def stored(data: Any) -> str:
    """The folder of parquet files that holds a data set, written unless it is there.

    Args:
        data: a `datasets.Dataset` or `DatasetDict`; an object with a length and items by number, such as a torch
            `Dataset` or a list, whose items are images or pairs of an image and its class; or a mapping of these by
            the names of their splits.

    Raises:
        UserError: if it is none of these, or an item is no image.
    """
    splits = dict(data) if isinstance(data, Mapping) else {split_of(data): data}
    wrong = [plain(split) for split in splits if split not in USUAL]
    if not splits or wrong:
        raise UserError(f"data has the splits {listed(wrong) or 'none'}: name them {', '.join(USUAL)}")
    root = cache_folder()
    with disk_errors(root, OTHER_CACHE):
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=".new-") as temporary:
            folder = Path(temporary) / "data"
            folder.mkdir()
            for split, part in splits.items():
                write_split(folder / f"{split}.parquet", part)
            content = "".join(f"{file.name} {sha256(file)}\n" for file in sorted(folder.iterdir()))
            digest = hashlib.sha256(content.encode()).hexdigest()[:16]
            target = root / f"{name_of(next(iter(splits.values())))}-{digest}"
            if not target.is_dir():
                try:
                    folder.rename(target)
                except OSError:
                    if not target.is_dir():  # another process has just written the same
                        raise
    return str(target)


def cache_folder() -> Path:
    """Where data sets are written."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "sssd_zoo"


def split_of(data: Any) -> str:
    """The split that a data set says it is, where it is one of the usual names; else 'train'."""
    return SPLIT_NAMES.get(str(getattr(data, "split", None)).lower(), "train")


def name_of(data: Any) -> str:
    """What a data set is called in reports: the name of a data set of `datasets`, or of a class."""
    while hasattr(data, "indices") and hasattr(data, "dataset"):  # torch's Subset
        data = data.dataset
    info = getattr(data, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or type(data).__name__
    return re.sub(r"[^\w-]+", "-", str(name)).strip("-_") or "data"


def write_split(path: Path, data: Any) -> None:
    """Writes one split as parquet.

    Raises:
        UserError: as `stored` does.
    """
    import datasets

    if isinstance(data, datasets.Dataset):
        rows = readable_columns(data)
        features, tables = rows.features, tables_of(rows)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "batch_sampler"):
        features = features_of(data)
        tables = tables_of_items(data, features)
    else:
        raise UserError(
            f"data is {plain(type(data).__name__)}, which has no items by number: give a folder, a Hub id, a "
            "datasets.Dataset, a torch Dataset with a length (of a DataLoader its .dataset), or a list of images"
        )
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def readable_columns(rows: Any) -> Any:
    """A data set of `datasets` with the columns that a setting can name, its images not decoded."""
    from datasets import ClassLabel, Image, Value

    kinds = (Image, ClassLabel, Value)
    kept = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, kinds) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    rows = rows.select_columns(kept)
    for name in kept:
        if isinstance(rows.features[name], Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def tables_of(rows: Any) -> Iterator[pa.Table]:
    """The rows of a data set of `datasets`, a part at a time; paths of files are absolute."""
    from datasets import Image

    images = [name for name, feature in rows.features.items() if isinstance(feature, (Image, dict))]
    rows = rows.with_format("arrow")
    with progress_bar(len(rows), "data", "img", delay=2, leave=False, disable=rank() != 0) as bar:
        for start in range(0, len(rows), ROWS):
            table = rows[start : start + ROWS]
            for name in images:
                found = [absolute(image) for image in table[name].to_pylist()]
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, pa.array(found, table.schema.field(name).type))
            yield table
            bar.update(len(table))


def absolute(image: dict[str, Any] | None) -> dict[str, Any] | None:
    """An undecoded image whose path, if it is a file of this disk, is absolute."""
    if image is None or image["bytes"] is not None or image["path"] is None or "://" in image["path"]:
        return image
    return {"bytes": None, "path": str(Path(image["path"]).absolute())}


def features_of(data: Any) -> Any:
    """The columns of a data set of items, as `datasets` describes them, by its first item.

    Raises:
        UserError: if it is no image, or another image each time, which random augmentation makes it.
    """
    from datasets import ClassLabel, Features, Image, Value

    features = Features({"image": Image(decode=False)})
    if len(data) == 0:
        raise UserError(f"the data set ({plain(type(data).__name__)}) has no items: give one with images")
    image, label = parts_of(data[0], 0)
    if encoded_image(image, 0) != encoded_image(parts_of(data[0], 0)[0], 0):
        raise UserError(
            "item 0 of the data set is another image each time it is read: give it without random augmentation "
            "(transform=None), as trainings augment their images themselves"
        )
    names = class_names(data)
    if isinstance(label, str):
        features["label"] = Value("string")
    elif label is not None:
        features["label"] = ClassLabel(names=names) if names and label < len(names) else Value("int64")
    return features


def class_names(data: Any) -> list[str] | None:
    """The names of the classes, which torchvision's data sets have as `classes`, of a subset too; or None."""
    while hasattr(data, "indices") and hasattr(data, "dataset"):
        data = data.dataset
    names = getattr(data, "classes", None)
    distinct = isinstance(names, (list, tuple)) and len(set(map(str, names))) == len(names)
    return [str(name) for name in names] if distinct and names else None


def tables_of_items(data: Any, features: Any) -> Iterator[pa.Table]:
    """The items of a data set, a part at a time."""
    kind = type(features["label"]).__name__ if "label" in features else None
    text = kind == "Value" and features["label"].dtype == "string"
    numbers = iter(range(len(data)))
    with progress_bar(len(data), "data", "img", delay=2, leave=False, disable=rank() != 0) as bar:
        while some := list(islice(numbers, ROWS)):
            columns: dict[str, list[Any]] = {name: [] for name in features}
            for number in some:
                image, label = parts_of(data[number], number)
                columns["image"].append(encoded_image(image, number))
                if (label is not None) != (kind is not None) or (kind and isinstance(label, str) != text):
                    raise UserError(
                        f"the class of item {number} of the data set is {plain(label)}, of another kind than that of "
                        "item 0: give every item a class, or none"
                    )
                if kind is not None:
                    columns["label"].append(label)
            yield pa.table(columns, schema=features.arrow_schema)
            bar.update(len(some))


def parts_of(item: Any, number: int) -> tuple[Any, int | str | None]:
    """An item's image, and its class if it has one.

    Raises:
        UserError: if the class is none.
    """
    if isinstance(item, Mapping):
        item = (item.get("image"), item.get("label"))
    if not isinstance(item, (tuple, list)):
        return item, None
    if len(item) not in (1, 2):
        raise UserError(f"item {number} of the data set has {len(item)} parts: give an image, or (image, class)")
    image, label = item[0], item[1] if len(item) == 2 else None
    if getattr(label, "shape", None) == ():  # a number of NumPy or torch
        label = label.item()  # type: ignore[union-attr]
    if label is not None and (not isinstance(label, (int, str)) or isinstance(label, bool)):
        raise UserError(
            f"the class of item {number} of the data set is {plain(type(label).__name__)}, and must be one whole "
            "number or text: give the images alone, or (image, class)"
        )
    return image, label


def encoded_image(image: Any, number: int) -> dict[str, Any]:
    """An image of a data set as `datasets` keeps it: its encoded bytes without loss, or its path if it is a file.

    Args:
        image: of Pillow; an array [H, W], [H, W, C] or [C, H, W], uint8, uint16 or floats from 0 to 1; a tensor
            [C, H, W] of these; the bytes of an image file; or its path.
        number: of the item, for errors.

    Raises:
        UserError: if it is something else.
    """
    if isinstance(image, (str, Path)):
        return {"bytes": None, "path": str(Path(image).absolute())}
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, Image.Image):
        file = getattr(image, "filename", "")
        if file and getattr(image, "tile", None) and image.tell() == 0:  # not decoded: it is as the file has it
            return {"bytes": None, "path": str(Path(file).absolute())}
        return {"bytes": picture_bytes(ImageOps.exif_transpose(image)), "path": None}
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16
        if array.ndim == 3 and (array.shape[-1] not in (1, 3, 4) or array.shape[0] in (1, 3, 4)):
            array = np.moveaxis(array, 0, -1)
        return {"bytes": array_bytes(array, number), "path": None}
    if isinstance(image, np.ndarray):
        return {"bytes": array_bytes(image, number), "path": None}
    raise UserError(
        f"item {number} of the data set is {plain(type(image).__name__)}, not an image: give images of Pillow, arrays, "
        "tensors or paths, alone or as (image, class)"
    )


def is_image(value: Any) -> bool:
    """Whether this is one image of Pillow, a tensor or an array, rather than a data set of several."""
    return isinstance(value, Image.Image) or (isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim <= 3)


def picture_bytes(picture: Image.Image) -> bytes:
    """An image of Pillow as a PNG file, or as TIFF where PNG does not have its mode."""
    file = io.BytesIO()
    if picture.mode in IN_NO_FILE:
        picture = picture.convert(IN_NO_FILE[picture.mode])
    if picture.mode in IN_PNG:
        picture.save(file, "PNG", compress_level=1)
    else:
        picture.save(file, "TIFF")
    return file.getvalue()


def array_bytes(array: NDArray[Any], number: int) -> bytes:
    """An array as PNG where that keeps it, else as .npy.

    Raises:
        UserError: if it has other axes than an image, another type than uint8, uint16, bool and floats, or floats
            outside of 0 to 1.
    """
    try:
        array = channels_last(array, None)
    except CorruptImageError as error:
        raise UserError(f"item {number} of the data set: {error}") from error
    if not array.size:
        raise UserError(f"item {number} of the data set has no pixels: its shape is {array.shape}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"item {number} of the data set has values from {array.min():g} to {array.max():g}: give uint8, or "
                "floats from 0 to 1, that is without normalisation by mean and std"
            )
        rounded = np.round(array * 255)
        if np.abs(array * 255 - rounded).max() < 1e-3:  # uint8 that ToTensor has divided
            array = rounded.astype(np.uint8)
    elif array.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"item {number} of the data set has values of the type {array.dtype}, whose range is not clear: give "
            "uint8, uint16 or floats from 0 to 1"
        )
    if array.dtype == np.uint8 and array.shape[-1] in (1, 3, 4):
        return picture_bytes(Image.fromarray(array[:, :, 0] if array.shape[-1] == 1 else np.ascontiguousarray(array)))
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def image_files(data: Any, folder: Path) -> list[str]:
    """The images of a data set as files, in its order: those that are none yet are written into `folder`.

    Raises:
        UserError: as `stored` does.
    """
    from datasets import Features

    parquet = folder / "data.parquet"
    write_split(parquet, data)
    column = image_column(Features.from_arrow_schema(pq.read_schema(parquet)), None, "the data set")
    paths: list[str] = []
    for batch in pq.ParquetFile(parquet).iter_batches(ROWS, columns=[column]):
        for image in batch[column].to_pylist():
            if image is not None and image["bytes"] is None and image["path"] is not None:
                paths.append(image["path"])
                continue
            paths.append(str(folder / f"item {len(paths)}"))
            Path(paths[-1]).write_bytes((image or {}).get("bytes") or b"")
    return paths
