"""Finds a data set's split, image column and label column, and reads the labels."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_zoo.data.layout import SPLIT_NAMES, composed
from sssd_zoo.data.sources import Splits
from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed

logger = logging.getLogger("sssd_zoo")

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixels", "pixel_values", "jpg", "png", "jpeg", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")


@dataclass
class Labels:
    """The labels of a split: `values`, int64 [N] in 0..C-1, and the C class `names`."""

    values: NDArray[np.int64]
    names: list[str]

    def renumbered(self, numbers: Mapping[str, int]) -> NDArray[np.int64]:
        """The values by other numbers of the classes' names."""
        return np.array([numbers[name] for name in self.names], dtype=np.int64)[self.values]


def pick_split(splits: Splits, split: str | None, name: str) -> str:
    """The name of the split asked for ('val' finds 'validation'); by default 'train', or the only split.

    Raises:
        UserError: if there is no split of that name, or no default.
    """
    if split is None:
        if "train" in splits or len(splits) == 1:
            return "train" if "train" in splits else next(iter(splits))
        raise UserError(f"{name} has no split 'train': choose one with split: {', '.join(splits)}")
    if split in splits:
        return split
    canonical = SPLIT_NAMES.get(split.lower())
    if canonical is None or canonical not in splits:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(splits)}")
    return canonical


def take_split(splits: Splits, selection: str | None, name: str) -> tuple[Splits, str]:
    """The split asked for, which may be a slice of one: 'train[:20000]', 'train[10%:20%]', as `datasets` writes it.

    Args:
        splits: all splits.
        selection: a split as for `pick_split`, or a slice of one, its bounds as row numbers or percentages.
        name: name of the data, for messages.

    Returns:
        The splits, with the slice as an additional one, and the name of the one asked for.

    Raises:
        UserError: as `pick_split` does, and for a slice that is malformed or has no rows.
    """
    if selection is None or "[" not in selection:
        return splits, pick_split(splits, selection, name)
    parsed = re.fullmatch(r"([^\[]+)\[(\d+%?)?:(\d+%?)?\]", selection)
    if parsed is None:
        raise UserError(f"split {selection!r}: write a part of a split like 'train[:20000]' or 'train[10%:20%]'")
    split = pick_split(splits, parsed[1], name)
    rows = splits[split]

    def row(text: str) -> int:
        return min(len(rows), round(len(rows) * int(text[:-1]) / 100) if text.endswith("%") else int(text))

    start, end = row(parsed[2] or "0"), row(parsed[3] or "100%")
    if start >= end:
        raise UserError(f"{name} has no rows in {selection!r}: {split} has {len(rows)}")
    part = f"{split}[{parsed[2] or ''}:{parsed[3] or ''}]"
    return {**splits, part: rows.select(range(start, end))}, part


def image_column(features: Mapping[str, Any], column: str | None, name: str) -> str:
    """The column of the images: the one asked for, the only one of type Image, or the one with a usual name.

    Raises:
        UserError: if there is none, there are several candidates, or the one asked for holds something else.
    """
    from datasets import Image

    names = ", ".join(features)
    if column is not None:
        if column not in features:
            raise UserError(f"{name} has no column {column!r} for image_column: choose one of {names}")
        if not _may_hold_images(features[column]):
            kind = _kind(features[column])
            raise UserError(f"column {column!r} of {name} holds {kind}, not images: choose another of {names}")
        return column
    candidates = [key for key, feature in features.items() if isinstance(feature, Image)]
    if not candidates:
        candidates = [key for key in IMAGE_COLUMNS if key in features and _may_hold_images(features[key])]
    usual = [key for key in IMAGE_COLUMNS if key in candidates]
    if len(candidates) > 1 and not usual:
        raise UserError(f"{name} has several columns of images, {', '.join(candidates)}: choose one with image_column")
    if not candidates:
        raise UserError(f"{name} has no column of images: it has {names}; name one with image_column")
    return usual[0] if usual else candidates[0]


def read_labels(splits: Splits, split: str, label_column: str | None, name: str, *, required: bool) -> Labels | None:
    """Reads the labels of a split: class numbers of the data set, or values numbered in sorted order.

    Names and numbers are those of all splits together, so that they mean the same in each. A row with a negative or
    missing label is unlabelled, as in test splits on the Hub. Whole numbers may be stored as floats, as pandas does if
    a label is missing. Names are in Unicode's composed form (NFC).

    Args:
        splits: all splits.
        split: the one to read.
        label_column: the column; None finds it.
        name: name of the data, for messages.
        required: make unlabelled rows and classes without rows errors; otherwise they are warnings.

    Returns:
        The labels, or None unless all rows have one.

    Raises:
        UserError: if the column asked for does not exist or holds no classes; if labels are required and a row has
            none, or a class has no rows.
    """
    column = _label_column(splits[split], label_column, f"{name} ({split})")
    if column is None:
        if required:
            held = ", ".join(splits[split].features)
            raise UserError(
                f"{name} ({split}) has no labels, which this step needs: name the column with label_column "
                f"(columns: {held}), or put the images of each class into a sub-folder of its own"
            )
        return None
    values, names = _class_numbers(splits, split, column, name)
    missing = int((values < 0).sum())
    if missing:
        problem = f"{missing} of {len(values)} rows of {name} ({split}) have no label in column {column!r}"
        if required:
            raise UserError(f"{problem}: label them, remove them, or choose another split")
        if missing < len(values) and rank() == 0:
            logger.warning("%s: no label is used and no accuracy is measured, unless you label or remove them", problem)
        return None
    empty = [names[label] for label in np.flatnonzero(np.bincount(values, minlength=len(names)) == 0)]
    if empty:
        problem = f"{len(empty)} of {len(names)} classes have no rows in {name} ({split}): {listed(empty, 10)}"
        if required:
            raise UserError(f"{problem}; add rows of these classes, or remove the classes from the data set")
        if rank() == 0:
            logger.warning("%s", problem)
    return Labels(values, names)


def _may_hold_images(feature: Any) -> bool:
    from datasets import Image, Value

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def _may_hold_classes(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "bool") or "int" in feature.dtype or _is_float(feature)
    return isinstance(feature, ClassLabel)


def _is_float(feature: Any) -> bool:
    return "float" in _kind(feature)


def _holds_classes(rows: Any, column: str) -> bool:
    """Whether a column may hold classes; numbers stored as floats must be whole or missing."""
    feature = rows.features[column]
    if not _is_float(feature):
        return _may_hold_classes(feature)
    values = _column(rows, column)
    return all(value is None or math.isnan(value) or value.is_integer() for value in values)


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _label_column(rows: Any, column: str | None, name: str) -> str | None:
    from datasets import ClassLabel

    features: dict[str, Any] = rows.features
    if column is not None:
        if column not in features:
            raise UserError(f"{name} has no column {column!r} for label_column: choose one of {', '.join(features)}")
        if not _holds_classes(rows, column):
            raise UserError(
                f"column {column!r} of {name} holds {_kind(features[column])}, not one class per row: choose another "
                "with label_column"
            )
        return column
    usual = [key for key in LABEL_COLUMNS if key in features]
    for key in usual:
        if _holds_classes(rows, key):
            return key
    class_labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(class_labels) == 1:
        return class_labels[0]
    if usual and rank() == 0:
        kind = "fractions" if _is_float(features[usual[0]]) else _kind(features[usual[0]])
        logger.warning("column %r of %s holds %s, not one class per row: it is not used", usual[0], name, kind)
    return None


def _class_numbers(splits: Splits, split: str, column: str, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Class numbers of a split, int64 [N], negative if unlabelled, and the class names."""
    from datasets import ClassLabel

    feature = splits[split].features[column]
    values = _values(splits[split], column)
    if isinstance(feature, ClassLabel):
        numbers = np.array([-1 if value is None else value for value in values], dtype=np.int64)
        if numbers.max(initial=-1) >= len(feature.names):
            raise UserError(f"column {column!r} of {name} ({split}) has label {numbers.max()}, beyond its class names")
        # Two spellings of a name in Unicode are one class.
        names = list(dict.fromkeys(map(composed, feature.names)))
        place = {name: number for number, name in enumerate(names)}
        classes = np.array([place[composed(spelt)] for spelt in feature.names] + [-1], dtype=np.int64)
        return classes[np.maximum(numbers, -1)], names
    all_values = {
        value
        for rows in splits.values()
        if column in rows.features
        and _is_text(rows.features[column]) == _is_text(feature)
        and not isinstance(rows.features[column], ClassLabel)
        and _holds_classes(rows, column)
        for value in _values(rows, column)
    }
    kept = sorted(value for value in all_values if value is not None and (isinstance(value, str) or value >= 0))
    number = {value: label for label, value in enumerate(kept)}
    return np.array([number.get(value, -1) for value in values], dtype=np.int64), [str(value) for value in kept]


def _is_text(feature: Any) -> bool:
    return "string" in _kind(feature)


def _values(rows: Any, column: str) -> list[Any]:
    """The values of a label column: whole numbers as int, None for a missing label."""
    values = _column(rows, column)
    if _is_float(rows.features[column]):
        return [None if value is None or math.isnan(value) else int(value) for value in values]
    return [composed(value) if isinstance(value, str) else value for value in values]


def _column(rows: Any, column: str) -> list[Any]:
    values: list[Any] = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return values
