"""`sssd clusters`: a run's images in a folder per cluster, those nearest to its centroid first.

OUT/
    cluster-07/0001-beach.jpg   the image nearest to the centroid of cluster 7; or the folder has the cluster's name
    clusters.csv                every image: cluster, name, rank, squared distance to the centroid, row, path, file here
"""

import codecs
import csv
import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypedDict

import numpy as np

from sssd_zoo.configs import ClustersArgs, DataConfig
from sssd_zoo.data.containers import NUMPY, is_dicom
from sssd_zoo.data.images import EncodedImages
from sssd_zoo.data.objects import array_bytes
from sssd_zoo.data.opening import format_of
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plural
from sssd_zoo.evaluation.reports.markdown import config_of, read_results
from sssd_zoo.files import RUN_MARK, atomic_write_text, csv_text, disk_errors, read_json
from sssd_zoo.files.run_folder import atomic_dir, mark, open_out
from sssd_zoo.files.run_steps import newer
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.checks import read_config
from sssd_zoo.pipeline.mistakes import images_of_a_run

LISTING = "clusters.csv"
COLUMNS = ("cluster", "name", "rank", "distance", "row", "path", "file", "page")
LONGEST = 80  # characters of a folder's or a file's own name


class EarlierMark(TypedDict, total=False):
    """What is read of the mark of a folder that is written again."""

    files: list[str]


class Member(NamedTuple):
    """An image and its place, as clusters.csv lists it.

    `path` is where it came from, `page` which page of that file it is, counted from 1, if not all of it, and `file`
    where it lies now.
    """

    cluster: int
    name: str
    rank: int
    distance: float
    row: int
    path: str
    file: str
    page: int | None


def clusters(args: ClustersArgs) -> None:
    """`sssd clusters`."""
    out = open_out(args, "clusters")
    run = Path(args.run)
    fitted = (run / "labels" / "labels.parquet").is_file()
    pseudo = PseudoLabels.load(run / "labels" if fitted else run)
    images = open_images(args, run if fitted else None, pseudo)
    names = given_names(run, len(pseudo.centroids)) if fitted else {}
    found = list(members(pseudo, images, names))
    place_of = out.resolve()
    with atomic_dir(place_of, "clusters", earlier_images(place_of)) as folder:
        with disk_errors(out), progress_bar(len(found), "images", "img") as bar:
            for member in found:
                place(images, member, folder / member.file, args.link)
                bar.update(1)
        atomic_write_text(folder / LISTING, as_csv(found))
        mark(folder, "clusters", [member.file for member in found])
    folders = len({member.file.split("/")[0] for member in found})
    print(f"{plural(len(found), 'image')} in {plural(folders, 'folder')}: {out}")


def open_images(args: ClustersArgs, run: Path | None, pseudo: PseudoLabels) -> EncodedImages:
    """The images that were clustered.

    Raises:
        UserError: if they cannot be read, or are others.
    """
    if run is None and args.data is None:
        raise UserError(f"{args.run} holds pseudo labels without a run: say where their images are by --data")
    config = DataConfig(data=args.data or "") if run is None else config_of(run)[1]
    given = {name: getattr(args, name) for name in ("data", "image_column", "pages", "max_pixels", "revision")}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    with images_of_a_run(args.data):
        images = pseudo.open_images(config)
    return images


def given_names(run: Path, count: int) -> dict[int, str]:
    """The names that a run's clusters were given, by number.

    They are those of the network's classes, where these are the clusters: on labelled images they are true classes.
    """
    if not (run / "metrics.json").is_file() or read_results(run).get("accuracy"):  # unfinished, or labelled
        return {}
    if "labels" in newer(run):  # an interrupted `sssd fit --overwrite`: the network's classes are other clusters
        return {}
    names = read_config(run / "model" / "config.json").get("label_names")
    if not isinstance(names, list) or len(names) != count:
        return {}
    return {number: str(name) for number, name in enumerate(names) if name != f"cluster {number}"}


def members(pseudo: PseudoLabels, images: EncodedImages, names: dict[int, str]) -> Iterator[Member]:
    """All images by cluster, those nearest to the centroid first; clusters of the same name are one."""
    folders = folder_names(names, len(pseudo.centroids))
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(folders.values()))}
    group = np.array([numbers[folders[label]] for label in pseudo.labels.tolist()])
    order = np.lexsort((pseudo.rows, pseudo.distances, group))
    width = len(str(int(np.bincount(group).max())))
    files = images.files(np.sort(pseudo.rows))
    file_of = dict(zip(np.sort(pseudo.rows).tolist(), files, strict=True))
    rank, before = 0, -1
    for place in order.tolist():
        rank, before = (rank + 1 if group[place] == before else 1), group[place]
        label, row = int(pseudo.labels[place]), int(pseudo.rows[place])
        path, page = file_of[row], images.page(row)
        original = f"row-{row}" if path is None else PurePosixPath(path).name
        if page is not None:
            original = f"{PurePosixPath(original).stem}-page-{page + 1}"
        if path is None or page is not None:
            original += ending(images, row)
        yield Member(
            cluster=label,
            name=names.get(label, ""),
            rank=rank,
            distance=float(pseudo.distances[place]),
            row=row,
            path=path or "",
            file=f"{folders[label]}/{rank:0{width}}-{shortened(original)}",
            page=None if page is None else page + 1,
        )


def folder_names(names: dict[int, str], count: int) -> dict[int, str]:
    """The folder of each cluster: its name, with what no file system minds, or its number.

    Clusters of one name share a folder; other names that come out alike, also but for case, get their numbers.
    """
    width = len(str(count - 1))
    owners: dict[str, str] = {f"cluster-{number:0{width}}": "" for number in range(count)}
    folders = {}
    for number in range(count):
        name = names.get(number, "")
        folder = safe_name(name) if name else ""
        if not folder:
            folders[number] = f"cluster-{number:0{width}}"
            continue
        while owners.setdefault(folder.casefold(), name) != name:
            folder = f"{folder}-{number:0{width}}"
        folders[number] = folder
    return folders


def safe_name(name: str) -> str:
    """A name of visible letters, digits, spaces, dots, hyphens and underscores, which no system takes for another."""
    safe = re.sub(r"[^\w .-]+", "_", name)[:LONGEST].strip(" .-_")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe)  # by Windows
    return f"_{safe}" if reserved else safe


def shortened(file: str) -> str:
    """A file's name, cut where a number in front of it would make it too long for a file system."""
    stem, suffix = os.path.splitext(file)  # noqa: PTH122  of a name, which may be '.jpg'
    while len(os.fsencode(stem + suffix)) > 200:
        stem, suffix = stem[:-1], suffix[:20]
    return stem + suffix


def own_bytes(images: EncodedImages, row: int) -> bytes:
    """The bytes of an image that is no file of its own; of a page, those of a PNG file where that keeps its values."""
    data = images.read([row])[0].data
    return data if images.page(row) is None else array_bytes(np.load(io.BytesIO(data), allow_pickle=False), row)


def ending(images: EncodedImages, row: int) -> str:
    """What the file of an image that is no file of its own should end in, by its format: '.jpg', '.png' and so on."""
    data = own_bytes(images, row)
    if data.startswith(NUMPY):
        return ".npy"
    form = "dcm" if is_dicom(data) else format_of(data) or ""
    return {"JPEG": ".jpg", "TIFF": ".tif"}.get(form, f".{form.lower()}" if form else "")


def place(images: EncodedImages, member: Member, target: Path, link: str) -> None:
    """Copies or links one image.

    Raises:
        UserError: if it cannot be linked there.
    """
    target.parent.mkdir(exist_ok=True)
    if not member.path or member.page is not None:
        target.write_bytes(own_bytes(images, member.row))
        return
    source = Path(member.path).absolute()
    if link == "symbolic":
        target.symlink_to(source)
    elif link == "hard":
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise UserError(
                f"cannot make a hard link to {source}: {error.strerror}; give --link symbolic, or leave it out"
            ) from error
    else:
        shutil.copy2(source, target)


def as_csv(found: list[Member]) -> str:
    """The listing of all images."""
    return csv_text(COLUMNS, ([*one[:3], f"{one.distance:.6g}", *one[4:]] for one in found))


def earlier_images(out: Path) -> list[Path]:
    """The images that an earlier command put into a folder: those of its mark, or of the listing of earlier versions.

    The listing is not taken where there is a choice, as people edit it.
    """
    listed = read_json(out / RUN_MARK, EarlierMark).get("files") or listed_files(out / LISTING)
    images = []
    for name in listed:
        folder, _, own = name.partition("/")
        inside = own and "/" not in own and folder not in (".", "..") and own not in (".", "..")
        if inside and not (out / folder).is_symlink() and os.path.lexists(out / folder / own):
            images.append(out / folder / own)
    return images


def listed_files(listing: Path) -> list[str]:
    """The column 'file' of a listing, in whichever form a spreadsheet may have saved it; [] if there is none."""
    if not listing.is_file():
        return []
    data = listing.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error:
        return []
    return [row["file"] for row in rows if row.get("file")]
