"""Which images are read, and how."""

from dataclasses import dataclass
from typing import Literal

from sssd_zoo.configs.ranges import Checked, Count, CountOrZero, DistinctNames, Names, Pixels, Workers

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs; decoding that many takes up to 1 GB


@dataclass(kw_only=True)
class DataConfig(Checked):
    """Which images to read, and how.

    Args:
        data: 'cifar10-sample' (ships with the package), a Hub id such as uoft-cs/cifar10 (`id:configuration` where it
            has several), an image folder with or without class sub-folders, a parquet file or a folder of them, or a
            `save_to_disk` folder.
        split: of the data set; by default 'train', or the only one. 'train[:20000]' and 'train[10%:20%]' are parts of
            it by rows, where nothing streams.
        image_column: of the data set; by default found by its type or name.
        label_column: of the data set; by default found by its type or name, and labels are optional.
        unlabelled: use no labels, whatever the data have: for images in sub-folders that are no classes, such as dates
            or cameras.
        storage_size: side in pixels of the square that each image is stored as; by default the images' own if all are
            square, alike and at most 96 px, otherwise a size that fits the model.
        max_corrupt: images that may be skipped because they cannot be decoded; each one is named.
        max_pixels: images of more cannot be decoded: a small file may hold a picture that takes gigabytes. JPEG is
            decoded at a fraction of its size and counts as that.
        in_memory: decode all images once and keep them; by default if they take at most half of the free memory.
        streaming: never hold the whole set, not even on disk: for pretraining on sets of the Hub.
        workers: threads or processes that decode.
        revision: commit or branch of a data set on the Hub.
    """

    data: str
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    unlabelled: bool = False
    storage_size: Pixels | None = None
    max_corrupt: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS
    in_memory: bool | None = None
    streaming: bool = False
    workers: Workers = 2
    revision: str | None = None


@dataclass(kw_only=True)
class DetectionDataConfig(Checked):
    """Which images with boxes to read, and how.

    Args:
        data: one or several, joined: roots of Pascal VOC trees (Annotations, ImageSets/Main, JPEGImages), COCO JSON
            files, Hub ids, parquet files or `save_to_disk` folders with a column of objects.
        split: a list of ImageSets/Main, or a split of `datasets`; several are joined by '+', as in train+val.
        image_folder: of COCO's images; by default the JSON file's own folder or one beside it.
        objects_column: of `datasets`: holds `bbox`, and `category`, `label` or `labels`, for each object.
        box_format: of `datasets`: 'xywh' as COCO has them, or 'xyxy'.
        classes: their names; by default those that the data have. Objects of others cannot be used.
        max_bad: how many images and objects that cannot be used may be left out, each one named: images without file or
            annotation, listed twice, or of another size than their annotation says, and objects without a box, without
            area or of unknown classes.
        max_pixels: images of more cannot be used: a small file may hold a picture that takes gigabytes.
        workers: processes that decode.
    """

    data: Names
    split: str | None = None
    image_folder: str | None = None
    objects_column: str = "objects"
    box_format: Literal["xywh", "xyxy"] = "xywh"
    classes: DistinctNames | None = None
    max_bad: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS
    workers: Workers = 2
