"""Opens the data that a configuration names, one source or several joined to one data set."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sssd_zoo.configs import DataConfig
from sssd_zoo.data import columns, sources
from sssd_zoo.data.file_list import without_repeats
from sssd_zoo.data.pixels import PAGE
from sssd_zoo.data.walk import warn_once
from sssd_zoo.errors.text import listed

HEAD = 4096  # bytes by which files of one length are told apart first


def open_data(config: DataConfig, *, progress: bool, streaming: bool = False) -> sources.Splits:
    """The splits of the data, with a row for each image.

    The rows of several sources follow one another, split by split. They are labelled where all of them are. A file
    that lies in several of them is read once; of different files with the same content, which are told, all are read.

    Args:
        config: which data.
        progress: show the bars of downloads.
        streaming: read rows as they are asked for.

    Raises:
        UserError: if a source cannot be opened, as `sources.open_splits` says, or has no images.
    """
    names = [config.data] if isinstance(config.data, str) else config.data
    parts = [
        sources.open_splits(
            name,
            revision=config.revision,
            streaming=streaming,
            unlabelled=config.unlabelled or streaming,
            progress=progress,
            arrays=config.channels is not None,
            all_pages=config.pages == "all",
        )
        for name in names
    ]
    if len(parts) == 1:
        return parts[0]
    splits = dict.fromkeys(split for part in parts for split in part)
    named = dict(zip(names, parts, strict=True))
    if streaming:
        return {split: _join_streams(config, named, split) for split in splits}
    labels = {split: _labels(config, named, split) for split in splits}
    classes = _common_classes(labels.values())
    return {split: _join_rows(config, named, split, labels[split], classes) for split in splits}


def _join_streams(config: DataConfig, parts: Mapping[str, sources.Splits], split: str) -> Any:
    from datasets import Dataset, Image, concatenate_datasets

    streams = []
    for name, part in parts.items():
        if split in part:
            rows = part[split].to_iterable_dataset() if isinstance(part[split], Dataset) else part[split]
            rows = rows if rows.features is not None else rows._resolve_features()
            column = columns.image_column(rows.features, config.image_column, sources.short_name(name))
            target = config.image_column or "image"
            rows = rows.select_columns([column])
            rows = rows if column == target else rows.rename_column(column, target)
            streams.append(rows.cast_column(target, Image(decode=False)))
    return concatenate_datasets(streams)


def _join_rows(
    config: DataConfig,
    parts: Mapping[str, sources.Splits],
    split: str,
    labels: Sequence[columns.Labels] | None,
    classes: Sequence[str],
) -> Any:
    """The rows of a split of all parts that have it: images, labels where all have them, and pages."""
    from datasets import ClassLabel, Image, concatenate_datasets

    target, label = config.image_column or "image", config.label_column or "label"
    having = {name: part for name, part in parts.items() if split in part}
    number_of = {name: number for number, name in enumerate(classes)}
    joined, paths = [], []
    for number, (name, part) in enumerate(having.items()):
        column = columns.image_column(part[split].features, config.image_column, sources.short_name(name))
        paged = PAGE in part[split].column_names
        rows = part[split].select_columns([column, PAGE] if paged else [column])
        rows = rows if column == target else rows.rename_column(column, target)
        # This changes the schema alone: `cast` would copy all images into the cache once more.
        rows = rows.cast_column(target, Image(decode=False))
        if labels is not None:
            values = labels[number].renumbered(number_of)
            rows = rows.add_column(label, values, feature=ClassLabel(names=list(classes)))
        joined.append(rows)
        files = [] if rows.cache_files else rows.with_format("arrow")[:][target].to_pylist()
        paths.append([image["path"] for image in files] if files else [None] * len(rows))
    return _told(concatenate_datasets(joined), paths, list(having), split)


def _labels(config: DataConfig, parts: Mapping[str, sources.Splits], split: str) -> list[columns.Labels] | None:
    """The labels of every part that has the split; None unless all have them."""
    if config.unlabelled:
        return None
    found = {
        name: columns.read_labels(part, split, config.label_column, sources.short_name(name), required=False)
        for name, part in parts.items()
        if split in part
    }
    without = [sources.short_name(name) for name, labels in found.items() if labels is None]
    labelled = [labels for labels in found.values() if labels is not None]
    if without:
        if labelled:
            warn_once(f"the labels ({split}) are not used, as {listed(without)} has none")
        return None
    return labelled


def _common_classes(labels: Iterable[Sequence[columns.Labels] | None]) -> list[str]:
    """The names of all classes together, so that a class has the same number in every split and part."""
    several = [part.names for parts in labels for part in parts or ()]
    if all(names == several[0] for names in several):
        return several[0] if several else []
    return sorted({name for names in several for name in names})


def _told(rows: Any, paths: Sequence[Sequence[str | None]], names: Sequence[str], split: str) -> Any:
    """The rows without files that an earlier part has already; files of the same content in several parts are told."""
    every = [path for part in paths for path in dict.fromkeys(part) if path is not None]
    if not every:
        return rows
    where = " and ".join(sources.short_name(name) for name in names)
    kept, again = without_repeats(every)
    known = set(kept)
    if again:
        warn_once(f"{len(again)} files ({split}) lie in several of {where} ({listed(again)}): each is read once")
        # The pages of a file share its path, within the part that has the file first.
        owner = {path: number for number, part in reversed(list(enumerate(paths))) for path in part if path in known}
        whose = ((number, path) for number, part in enumerate(paths) for path in part)
        rows = rows.select([at for at, (number, path) in enumerate(whose) if path is None or owner.get(path) == number])
    if alike := _same_content([[path for path in dict.fromkeys(part) if path in known] for part in paths]):
        pairs = [" = ".join(group) for group in alike]
        warn_once(
            f"{len(alike)} images ({split}) lie in several of {where} under different names ({listed(pairs, 10)}): "
            "all of them are read; remove the copies if they should not count twice"
        )
    return rows


def _same_content(paths: Sequence[Sequence[str | None]]) -> list[list[str]]:
    """Groups of files of the same content in different parts, told apart by length, head, and then all bytes."""
    part_of = {path: number for number, part in enumerate(paths) for path in part if path is not None}

    def split(groups: list[list[str]], key: Any) -> list[list[str]]:
        result: dict[Any, list[str]] = defaultdict(list)
        for number, group in enumerate(groups):
            for path in group:
                try:
                    result[number, key(Path(path))].append(path)
                except OSError:  # decoding reports it
                    continue
        return [group for group in result.values() if len({part_of[path] for path in group}) > 1]

    groups = split([list(part_of)], lambda path: path.stat().st_size)
    groups = split(groups, _head)
    return split(groups, lambda path: hashlib.sha256(path.read_bytes()).digest())


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)
