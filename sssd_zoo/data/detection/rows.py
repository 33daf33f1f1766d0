"""Splits of `datasets` whose rows hold an image and a list of objects, or an object of lists."""

from typing import Any

import numpy as np

from sssd_zoo.configs import DetectionDataConfig
from sssd_zoo.data import sources
from sssd_zoo.data.columns import pick_split
from sssd_zoo.data.detection.annotations import (
    Annotated,
    Annotations,
    Object,
    clean_name,
    is_set,
    stated_size,
    to_corners,
)
from sssd_zoo.data.loading import open_encoded
from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError


def read_rows(source: str, config: DetectionDataConfig) -> Annotations:
    """Splits of `datasets` whose rows hold an image and a list of objects, or an object of lists.

    Raises:
        UserError: if there is no such split or column, or it holds no boxes and categories.
    """
    splits = sources.open_splits(source, progress=rank() == 0)
    annotations, name = Annotations(), sources.short_name(source)
    for part in config.split.split("+") if config.split else [None]:
        split = pick_split(splits, part, name)
        rows, column = splits[split], config.objects_column
        if column not in rows.features:
            raise UserError(
                f"{name} has no column '{column}' of objects: choose one of {', '.join(rows.features)} by "
                "--objects_column"
            )
        feature = _fields(rows.features[column])
        label = next((key for key in ("category", "label", "labels", "category_id") if key in feature), None)
        if label is None or "bbox" not in feature:
            raise UserError(f"column '{column}' of {name} needs bbox and category; it has {', '.join(feature)}")
        names: list[str] | None = getattr(_inner(feature[label]), "names", None)
        images = open_encoded(rows, None, name, config.max_pixels)
        files = images.files(np.arange(len(rows)))
        read = [column, *(size for size in ("width", "height") if size in rows.features)]
        for row, values in enumerate(rows.select_columns(read)):
            where, objects = f"{split} {row}", []
            try:
                things = _listed(values[column])
            except ValueError:
                annotations.bad.append(f"{where}: its lists of objects are of different lengths")
                continue
            for thing in things:
                box, value = to_corners(thing.get("bbox"), config.box_format), thing.get(label)
                known = isinstance(value, int) and 0 <= value < len(names or ())
                if box is None:
                    annotations.bad.append(f"{where}: an object has no box of four numbers")
                elif value is None or (names and not known):
                    annotations.bad.append(f"{where}: an object has the unknown class {value}")
                else:
                    text = clean_name(names[value] if names else value)
                    objects.append(Object(text, box, is_set(thing.get("difficult")) or is_set(thing.get("iscrowd"))))
            stated = stated_size(values.get("width"), values.get("height"))
            annotations.images.append(Annotated(where, (images, row), objects, stated, files[row]))
        here = list(names) if names else sorted({thing.name for image in annotations.images for thing in image.objects})
        annotations.classes += [class_name for class_name in here if class_name not in annotations.classes]
    return annotations


def _listed(things: Any) -> list[dict[str, Any]]:
    """The objects of a row, stored as a list of objects, an object of lists, or None.

    Raises:
        ValueError: if the lists are of different lengths.
    """
    if isinstance(things, dict):
        keys, columns = list(things), [values or [] for values in things.values()]
        return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
    return [thing or {} for thing in things or []]


def _inner(feature: Any) -> Any:
    """The feature inside any nested lists."""
    return _inner(feature.feature) if hasattr(feature, "feature") else feature


def _fields(feature: Any) -> dict[str, Any]:
    """The fields of a column of objects, whether it is a list of structs or a struct of lists."""
    inner = _inner(feature)
    return dict(inner) if isinstance(inner, dict) else {}
