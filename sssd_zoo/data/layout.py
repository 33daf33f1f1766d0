"""Finds splits and classes in the names of files and folders.

The rules are those of `datasets` (its data_files.py and folder_based_builder.py, version 5.2), so that a folder has the
same splits and classes in both. Ambiguous folders are refused.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from sssd_zoo.data.walk import warn_once
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plural

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsupervised"), "unlabeled"),
    "extra": "extra",
}
_SEPARATORS = re.compile(r"([-._\s\d]+)")


@dataclass
class Layout:
    """How the images of a folder are grouped.

    Attributes:
        splits: the images of each split, paths relative to the folder.
        depth: index of the path part that is the class.
        labelled: the splits whose images all lie in class folders.
        classes: names of the classes, in Unicode's composed form (NFC); empty if there are fewer than two.
    """

    splits: dict[str, list[PurePath]]
    depth: int
    labelled: set[str]
    classes: list[str]

    def class_of(self, path: PurePath) -> str:
        """The class of an image of a labelled split."""
        return composed(path.parts[self.depth])


def composed(name: str) -> str:
    """A name in Unicode's composed form: macOS writes the names of files decomposed."""
    return unicodedata.normalize("NFC", name)


def split_word(name: str) -> str | None:
    """The split that a word of a name stands for: 'train' in train2017, train_images and my-train."""
    words = _SEPARATORS.split(name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def split_of_parquet(path: PurePath) -> str:
    """The split of a parquet file, by its folders or else its own name; 'train' if neither names one."""
    for folder in path.parts[:-1]:
        if (split := split_word(folder)) is not None:
            return split
    # File names of the Hub contain the split: 'fold_1-00000-of-00002'.
    numbered = re.fullmatch(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*", path.stem)
    if numbered is not None:
        return SPLIT_NAMES.get(numbered[1].lower(), numbered[1])
    return split_word(path.stem) or "train"


def image_layout(root: Path, images: list[PurePath], *, unlabelled: bool = False) -> Layout:
    """Groups the images of a folder into splits and classes.

    Splits are folders that contain the class folders, or else words in the names of all files. Images beside the split
    folders are left out, as in `datasets`, with a warning. A split with images beside class folders, or with a single
    class folder, has no labels. A folder that holds all images is skipped.

    Args:
        root: the folder, for messages.
        images: paths relative to it, in order.
        unlabelled: treat no folder as a class.

    Raises:
        UserError: if it is unclear which folders are splits, or which are classes.
    """
    base = _shared_depth(images)
    by_folder = _split_folders(root, images, base)
    by_name = {} if by_folder else _split_files(root, images)
    splits: dict[str, list[PurePath]] = defaultdict(list)
    beside = []
    for image in images:
        split = by_name.get(image.stem) if by_name else by_folder.get(_folder(image, base)) if by_folder else "train"
        if split is None:
            beside.append(image.as_posix())
        else:
            splits[split].append(image)
    if beside:
        warn_once(
            f"left out {plural(len(beside), 'image')} of {root} beside the folders of its splits ({listed(beside)})"
        )
    depth = base
    if by_folder:
        depth = _shared_depth([image for group in splits.values() for image in group], base + 1)
    _refuse_splits_below(root, images, base)
    if unlabelled:
        return Layout(splits, depth, set(), [])
    labelled = _labelled(root, splits, depth)
    classes = {composed(image.parts[depth]) for split in labelled for image in splits[split]}
    layout = Layout(splits, depth, labelled, sorted(classes) if len(classes) > 1 else [])
    if layout.classes:
        _refuse_nested_classes(root, layout)
    return layout


def _folder(image: PurePath, depth: int) -> str:
    """The folder at this depth of a path, '' for a file at this depth."""
    return image.parts[depth] if len(image.parts) > depth + 1 else ""


def _shared_depth(images: list[PurePath], depth: int = 0) -> int:
    """The depth below the folders, from `depth` on, that contain all images and are not splits."""
    while all(len(image.parts) > depth + 2 for image in images):
        names = {image.parts[depth] for image in images}
        if len(names) != 1 or split_word(names.pop()) is not None:
            break
        depth += 1
    return depth


def _sure_splits(names: Iterable[str], *, alone: bool) -> dict[str, str]:
    """The names that must be splits: on their own (train, test2017), or beside another split of the same pattern.

    Args:
        names: of files or folders side by side.
        alone: whether a name can be a split on its own.
    """
    patterns: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if (split := split_word(name)) is not None:
            words = _SEPARATORS.split(name.lower())
            pattern = "".join("*" if word in SPLIT_NAMES else re.sub(r"\d+", "#", word) for word in words)
            patterns[pattern][name] = split
    return {
        name: split
        for pattern, splits in patterns.items()
        if len(set(splits.values())) > 1 or (alone and re.fullmatch(r"[-._\s#]*\*[-._\s#]*", pattern))
        for name, split in splits.items()
    }


def _split_folders(root: Path, images: list[PurePath], base: int) -> dict[str, str]:
    """The folders at this depth that are splits, mapped to their splits; {} if none are."""
    names = sorted({_folder(image, base) for image in images} - {""})
    flat = {_folder(image, base) for image in images} == set(names)
    maybe = {name: split for name in names if (split := split_word(name)) is not None}
    sure = _sure_splits(names, alone=True)
    if len(maybe) == len(names) and (len(names) == 1 or len(set(maybe.values())) > 1):
        sure = maybe
    others = [name for name in names if name not in sure]
    found = set(sure.values())
    if not sure and len(set(maybe.values())) < 2:
        return {}
    if sure and not others and flat:
        return sure
    if "train" in found and (not others or len(found) > 1):
        return sure
    if found == {"train"} and len(others) > 1 and all(len(image.parts) == base + 2 for image in images):
        return {}  # one class of several is called train
    look = listed(sorted(sure or maybe))
    beside = listed([name for name in names if name not in (sure or maybe)] or ["images"])
    raise UserError(
        f"{root} has folders named like splits ({look}) beside others ({beside}), so which images to train on is not "
        "clear: put those to train on into a folder 'train', or rename the folders"
    )


def _split_files(root: Path, images: list[PurePath]) -> dict[str, str]:
    """The splits in the names of all files (train_001.png, test_001.png), by their stems; {} if none."""
    stems = {image.stem for image in images}
    sure = _sure_splits(stems, alone=False)
    if sure and len(sure) < len(stems):
        raise UserError(
            f"the names of {len(sure)} of {len(images)} images of {root} tell of splits ({listed(sorted(sure))}), and "
            "the others do not: put the images of each split into a folder of its own (train, test)"
        )
    return sure


def _refuse_splits_below(root: Path, images: list[PurePath], base: int) -> None:
    """Raises `UserError` if splits lie deeper than expected: their images would all be mixed."""
    children: dict[PurePath, set[str]] = defaultdict(set)
    for parts in {image.parts[:-1] for image in images}:
        for depth in range(base + 1, len(parts)):
            children[PurePath(*parts[:depth])].add(parts[depth])
    for folder, names in sorted(children.items()):
        if len(set(_sure_splits(names, alone=True).values())) > 1:
            raise UserError(
                f"{root} has splits in a sub-folder, {folder.as_posix()} ({listed(sorted(names))}): give that folder "
                "itself, or put the splits above all other folders"
            )


def _labelled(root: Path, splits: Mapping[str, list[PurePath]], depth: int) -> set[str]:
    """The splits whose images all lie in class folders, some of which the training split has too."""
    labelled = set()
    for split, images in splits.items():
        loose = [image.as_posix() for image in images if len(image.parts) <= depth + 1]
        if not loose:
            labelled.add(split)
        elif len(loose) < len(images):
            warn_once(
                f"{root} ({split}) has no labels: {len(loose)} of its images lie beside the sub-folders "
                f"({listed(loose)}); for labels, move them into class folders; --unlabelled says that there are none"
            )
    known = {composed(image.parts[depth]) for image in splits.get("train", ()) if "train" in labelled}
    for split in sorted(labelled - {"train"} if known else ()):
        names = {composed(image.parts[depth]) for image in splits[split]}
        if names.isdisjoint(known):
            warn_once(f"{root} ({split}) has no labels: its folders ({listed(sorted(names))}) are not classes of train")
            labelled.discard(split)
    return labelled


def _refuse_nested_classes(root: Path, layout: Layout) -> None:
    """Raises `UserError` if class folders contain differently named folders: it is unclear which are the classes."""
    below = {image.parts[layout.depth + 1 : -1]: image for split in layout.labelled for image in layout.splits[split]}
    if len(below) > 1:
        examples = sorted(image.parent.as_posix() for image in below.values())
        raise UserError(
            f"the images of {root} lie in sub-folders of sub-folders ({listed(examples)}), so which folders are its "
            "classes is not clear: give --unlabelled if none are, or put the images of each class into one folder"
        )
