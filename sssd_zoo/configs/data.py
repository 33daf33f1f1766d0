"""Which images are read, and how."""

from dataclasses import dataclass
from typing import Literal

from sssd_zoo.configs.ranges import (
    Checked,
    Count,
    CountOrZero,
    DistinctNames,
    ImageChannels,
    Names,
    Pixels,
    SettingsError,
    Workers,
)

MAX_PIXELS = 89_478_485  # above this Pillow warns of decompression bombs; decoding takes up to 1 GB


@dataclass(kw_only=True)
class DataConfig(Checked):
    """Which images to read, and how.

    Args:
        data: 'cifar10-sample' (bundled), a Hub id such as uoft-cs/cifar10 (`id:configuration` if it has several), an
            image folder with or without class sub-folders, a text file with the path of an image or a folder on each
            line, a parquet or WebDataset file or a folder of them, or a `save_to_disk` folder; or several of these,
            as in '[A, B]', whose rows are concatenated.
        split: split to read; by default 'train', or the only one. 'train[:20000]' and 'train[10%:20%]' select rows; not
            available with --streaming.
        image_column: column that holds the images; by default found by its type or name.
        label_column: column that holds the labels; by default found by its type or name. Labels are optional unless a
            command needs them.
        unlabelled: ignore all labels, for instance where sub-folders are dates or cameras rather than classes.
        channels: read images as they are stored, with this number of channels, 1 to 16, and 8 or 16 bits each; their
            mean and std are then measured. By default as RGB of 8 bits, which --channels 3 is, too, unless images have
            more bits.
        bits: bits per channel to keep with `channels`, 8 or 16; by default 16 if images of a sample have more than 8.
        pages: 'first' reads the first page of a TIFF or DICOM file with several, 'all' makes an image of each.
        storage_size: side in pixels of the square that each image is stored as; by default the images' own size if all
            are square, equal in size and at most 96 px, otherwise a size that fits the network.
        max_corrupt: number of undecodable images to skip before giving up; each one is named.
        max_pixels: largest number of pixels an image may have to be decoded: a small file can expand to gigabytes. JPEG
            is decoded at reduced resolution and counted at that size.
        in_memory: decode all images once and keep them in memory; by default if they need at most half of the free
            memory.
        streaming: read the images as a stream without downloading the data set; only for `sssd pretrain`, every
            other command refuses it.
        workers: number of threads or processes that decode images. By default one for each CPU, at most 16; of streams,
            and while the CPUs also run the network, 2.
        revision: commit, branch or tag of the data set on the Hub; by default the latest.
    """

    data: str | Names
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    unlabelled: bool = False
    channels: ImageChannels | None = None
    bits: Literal[8, 16] | None = None
    pages: Literal["first", "all"] = "first"
    storage_size: Pixels | None = None
    max_corrupt: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS
    in_memory: bool | None = None
    streaming: bool = False
    workers: Workers | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Raises `SettingsError` also for settings that contradict one another."""
        super().__post_init__()
        if self.bits is not None and self.channels is None:
            raise SettingsError("bits are kept as they are only with channels: give --channels too, or remove --bits")
        if self.pages == "all" and self.streaming:
            raise SettingsError(
                "pages 'all' needs row numbers, which a stream does not have: remove --pages or --streaming"
            )


@dataclass(kw_only=True)
class DetectionDataConfig(Checked):
    """Which images with boxes to read, and how.

    Args:
        data: one or several sources, concatenated: roots of Pascal VOC trees (Annotations, ImageSets/Main, JPEGImages),
            COCO JSON files, Hub ids, parquet files, or `save_to_disk` folders with a column of objects.
        split: list in ImageSets/Main, or split of a `datasets` source; '+' joins several, as in train+val. COCO files
            have no splits. By default 'trainval' of a VOC tree; 'train', or the only split, of other sources.
        image_folder: folder of the COCO images; by default the JSON file's own folder or one beside it.
        objects_column: column of a `datasets` source that holds, for each object, `bbox` and one of `category`,
            `category_id`, `label` and `labels`.
        box_format: box format of a `datasets` source in pixels: 'xywh' as in COCO, or 'xyxy'.
        classes: class names; by default those in the data. Objects of other classes are unusable.
        max_bad: number of unusable images and objects to leave out before giving up; each one is named. Unusable are
            images that have no file or annotation, are listed twice, or differ in size from their annotation, and
            objects that have no box, an empty box or an unknown class.
        max_pixels: largest number of pixels an image may have to be used: a small file can expand to gigabytes.
        workers: number of processes that decode images. By default one for each CPU, at most 16; while the CPUs also
            run the network, 2.
    """

    data: Names
    split: str | None = None
    image_folder: str | None = None
    objects_column: str = "objects"
    box_format: Literal["xywh", "xyxy"] = "xywh"
    classes: DistinctNames | None = None
    max_bad: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS
    workers: Workers | None = None
