"""COCO's JSON (Lin et al. 2014)."""

import json
from pathlib import Path
from typing import Any

from sssd_zoo.data.detection.annotations import (
    Annotated,
    Annotations,
    Object,
    clean_name,
    decoded_text,
    find_file,
    is_set,
    stated_size,
    to_corners,
)
from sssd_zoo.errors import UserError
from sssd_zoo.files import expand_home

SAMPLED_FILES = 100  # images that are looked for in each candidate folder


def is_coco(path: Path) -> bool:
    """Whether a path names a JSON file."""
    return path.suffix.lower() == ".json"


def read_coco(path: Path, image_folder: str | None) -> Annotations:
    """COCO's JSON (Lin et al. 2014); a crowd is kept as a difficult object, which is neither trained on nor counted.

    Args:
        path: the JSON file.
        image_folder: that its file names are relative to; by default it is looked for beside the file.

    Raises:
        UserError: if it cannot be read, or is not COCO's JSON.
    """
    try:
        content = json.loads(decoded_text(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    annotations = Annotations()
    try:
        categories = _by_id(content["categories"], "name", path, annotations)
        files = _by_id(content["images"], "file_name", path, annotations)
        sizes = {str(image["id"]): stated_size(image.get("width"), image.get("height")) for image in content["images"]}
        objects: dict[str, list[Object]] = {key: [] for key in files}
        for place, thing in enumerate(content["annotations"]):
            key, category, box = str(thing.get("image_id")), str(thing.get("category_id")), thing.get("bbox")
            where = f"annotation {thing.get('id', f'number {place}')} of {files.get(key, 'no image')}"
            corners = to_corners(box, "xywh")
            if key not in files:
                annotations.bad.append(f"{where}: there is no image {key}")
            elif category not in categories:
                annotations.bad.append(f"{where}: there is no category {category}")
            elif corners is None:
                annotations.bad.append(
                    f"{where}: {'it has no box' if not box else f'its box is not four numbers, {box}'}"
                )
            else:
                objects[key].append(Object(clean_name(categories[category]), corners, is_set(thing.get("iscrowd"))))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not COCO JSON with images, annotations and categories ({error!r}): give the instances file"
        ) from error
    annotations.classes = [clean_name(name) for name in categories.values()]
    folder = _image_folder(path, image_folder, list(files.values()))
    for key, file in files.items():
        annotations.images.append(Annotated(file, find_file(folder, [file]) or folder / file, objects[key], sizes[key]))
    return annotations


def _by_id(entries: list[dict[str, Any]], field_name: str, path: Path, annotations: Annotations) -> dict[str, str]:
    """A field of COCO's images or categories by id; ids may be numbers or text.

    Raises:
        UserError: if two entries share an id, as in files merged by hand: their boxes cannot be told apart.
    """
    values: dict[str, str] = {}
    for entry in entries:
        key, value = str(entry["id"]), str(entry[field_name])
        if values.get(key, value) != value:
            raise UserError(
                f"{path} has two entries with id {key}, {values[key]} and {value}, so their boxes "
                "cannot be told apart: give them distinct ids, and update the annotations"
            )
        if key in values:
            annotations.bad.append(f"{value}: it is listed twice")
        values[key] = value
    return values


def _image_folder(path: Path, image_folder: str | None, files: list[str]) -> Path:
    """The folder of COCO's images: the one given, otherwise the JSON file's or one beside it with most of them."""
    if image_folder is not None:
        return Path(expand_home(image_folder))
    split = path.stem.removeprefix("instances_")
    candidates = [path.parent, path.parent.parent / split, path.parent / split]
    sampled = files[:: max(1, len(files) // SAMPLED_FILES)]
    return max(candidates, key=lambda candidate: sum(find_file(candidate, [file]) is not None for file in sampled))
