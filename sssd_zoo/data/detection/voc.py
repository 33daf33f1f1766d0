"""Pascal VOC trees (Everingham et al. 2010)."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from sssd_zoo.data.detection.annotations import (
    Annotated,
    Annotations,
    Object,
    clean_name,
    decoded_text,
    find_file,
    is_set,
    stated_size,
)
from sssd_zoo.data.formats import EXTENSIONS
from sssd_zoo.errors import UserError


def is_voc(path: Path) -> bool:
    """Whether a folder is the root of a Pascal VOC tree."""
    return (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()


def read_voc(root: Path, split: str) -> Annotations:
    """A Pascal VOC tree (Everingham et al. 2010): ImageSets/Main/SPLIT.txt names the images.

    Raises:
        UserError: if it has no such split, or an annotation is missing or cannot be read.
    """
    annotations, names = Annotations(), set()
    for part in split.split("+"):
        listed = root / "ImageSets" / "Main" / f"{part}.txt"
        if not listed.is_file():
            there = ", ".join(sorted(file.stem for file in listed.parent.glob("*.txt")))
            raise UserError(f"{root} has no split '{part}': ImageSets/Main has {there or 'no lists'}")
        for line in decoded_text(listed.read_bytes()).splitlines():
            if not line.strip():
                continue
            identifier, annotation = _annotation(root / "Annotations", line.strip())
            try:
                tree = _xml(annotation)
                objects = [_object(element) for element in tree.iter("object")]
            except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
                annotations.bad.append(f"{identifier}: its annotation cannot be read ({error})")
                continue
            names |= {thing.name for thing in objects if thing.name}
            stated = (tree.findtext("filename") or "").replace("\\", "/").rsplit("/", 1)[-1].strip()
            suffixes = [suffix for known in EXTENSIONS for suffix in (known, known.upper())]
            image = find_file(root / "JPEGImages", [*(f"{identifier}{suffix}" for suffix in suffixes), stated])
            annotations.images.append(
                Annotated(
                    identifier,
                    image or root / "JPEGImages" / f"{identifier}.jpg",
                    objects,
                    stated_size(tree.findtext("size/width"), tree.findtext("size/height")),
                )
            )
    annotations.classes = sorted(names)
    return annotations


def _annotation(folder: Path, line: str) -> tuple[str, Path]:
    """The image name in a line of a list, and its annotation file.

    In the list of one class each name is followed by 1, 0 or -1, for whether the image shows the class; the annotation
    is more precise. A name may also contain spaces and end like that ("photo 1"): the files that exist decide.
    """
    bare = re.sub(r"\s+(-1|0|1)$", "", line)
    for name in (line, bare):
        if file := find_file(folder, [f"{name}.xml"]):
            return name, file
    return bare, folder / f"{bare}.xml"


def _xml(path: Path) -> ElementTree.Element:
    """The root of an XML file, whose declared encoding may be wrong."""
    data = path.read_bytes()
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        return ElementTree.fromstring(decoded_text(data))


def _object(element: ElementTree.Element) -> Object:
    name = clean_name(element.findtext("name") or "")
    corners = [float(element.findtext(f"bndbox/{corner}") or "nan") for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = corners
    # Equal corners are a mistake, not a box one pixel wide: its area stays 0, so that it is reported.
    shift = 1.0 if right > left and bottom > top else 0.0
    return Object(name, (left - shift, top - shift, right, bottom), is_set(element.findtext("difficult")))
