"""`sssd rename`: gives the clusters that a network predicts the names in a CSV file.

The names go into the network's config.json, which `predict`, `export`, `space`, `card` and transformers read. Clusters
of one name become one class, see `models.merged`. Of a run they are also kept in RUN/cluster_names.json, so that
`sssd fit` and `sssd report` find them again.
"""

import csv
import io
from pathlib import Path
from typing import Any, TypedDict

from sssd_zoo.configs import RenameArgs
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plain
from sssd_zoo.evaluation.reports.markdown import read_results
from sssd_zoo.files import damage, expand_home, read_json, recorded_sha256, sha256, write_json
from sssd_zoo.files.network_link import link_network
from sssd_zoo.files.run_folder import check_writable, claim, kind_of
from sssd_zoo.files.run_steps import check_of_one_piece
from sssd_zoo.models.checks import read_config
from sssd_zoo.models.networks import check_folder
from sssd_zoo.models.saving import class_descriptions

LARGEST_FILE = 10_000_000  # bytes of a CSV file
LONGEST_NAME = 200  # characters
LABELS = ("label_names", "label_descriptions")  # of config.json, which timm copies into pretrained_cfg


class Naming(TypedDict):
    """What cluster_names.json holds: the sha256 of the labels.parquet whose clusters these are, and their names."""

    labels: str
    names: list[str]


def rename(args: RenameArgs) -> None:
    """`sssd rename`."""
    run, folder = find(Path(args.model.removeprefix("local-dir:")))
    check_writable(run or folder)
    check_folder(folder, args.model)
    config = read_config(folder / "config.json")
    classes = config.get("num_classes") or 0
    if not classes:
        raise UserError(f"the network in {folder} has no classes to name: it gives features")
    before = config.get("label_names") or [f"cluster {number}" for number in range(classes)]
    given = read_names(Path(args.names), classes)
    names = [given.get(number, name) for number, name in enumerate(before)]
    if run is not None:
        check_of_one_piece(run)
        check_labels(run / "labels")
    claim(run or folder, kind_of(run or folder) or "network")
    if run is not None:
        naming: Naming = {"labels": sha256(run / "labels" / "labels.parquet"), "names": names}
        write_json(run / "cluster_names.json", naming)
        link_network(run)  # before a copy of the network by the run's name differs from it
    write_json(folder / "config.json", renamed(config, names))
    print(f"{folder}: {classes} clusters, {len(set(names))} answers of different names")
    print(
        f"named: {listed([repr(plain(name)) for name in dict.fromkeys(given[number] for number in sorted(given))], 10)}"
    )
    print(f"to use them: sssd predict {plain(args.model)} IMAGES")


def check_labels(labels: Path) -> None:
    """Raises `UserError` if the labels whose clusters are named are damaged: their names would not be found again."""
    file = "labels.parquet"
    recorded = recorded_sha256(read_json(labels / "pseudo_labels.json"), [file])
    if wrong := damage(labels, recorded) if (labels / file).exists() else f"{file} is missing":
        raise UserError(f"{labels} is damaged ({wrong}): run the command of this run again, which repairs it")


def find(given: Path) -> tuple[Path | None, Path]:
    """The run, if it is one, and the folder of the network to rename.

    Raises:
        UserError: if there is none that predicts clusters.
    """
    if not given.is_dir():
        raise UserError(f"there is no folder '{given}': give the run folder of `sssd fit`, or the folder of a network")
    named, given = given, given.resolve()  # '.' and a link do not say what the folder is called, and where it lies
    for step in (given, given.parent):  # the network of the step 'probe' lies in a folder of its own
        if (step.parent / "steps" / f"{step.name}.json").is_file():
            raise UserError(f"{named} is of a step of a run, whose files are checked: give the run, {step.parent}")
    run = given.parent if given.name == "model" else given
    if "finetune" in (kind_of(run), kind_of(given.parent)):
        raise UserError(f"{named} was trained by `sssd finetune` on classes, not clusters, so there is nothing to name")
    if kind_of(run) != "fit":
        if kind_of(given) == "card" and read_results(given).get("accuracy"):
            raise UserError(f"the network of {named} predicts classes, as its card says, not clusters: nothing to name")
        return None, given
    if read_results(run).get("accuracy"):
        raise UserError(
            f"the network of {run} predicts the classes of its data, not clusters, so there is nothing to name; "
            "`sssd fit --unlabelled` trains one that predicts clusters"
        )
    return run, run / "model"


def renamed(config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A network's config.json with other names of its classes."""
    changed = {**config, "label_names": names, "label_descriptions": class_descriptions(names)}
    if isinstance(config.get("pretrained_cfg"), dict):
        changed["pretrained_cfg"] = {**config["pretrained_cfg"], **{key: changed[key] for key in LABELS}}
    return changed


def cluster_names(run: Path) -> list[str]:
    """What the clusters of a run are called: as `sssd rename` left them, if the labels are the same; else by number."""
    labels, kept = run / "labels", run / "cluster_names.json"
    count = len(read_json(labels / "pseudo_labels.json")["sizes"])
    if kept.is_file():
        naming: Naming = read_json(kept, Naming)
        if naming["labels"] == sha256(labels / "labels.parquet") and len(naming["names"]) == count:
            return naming["names"]
        print(f"{kept} names the clusters of earlier labels, so it is not used")
    return [f"cluster {number}" for number in range(count)]


def read_names(path: Path, clusters: int) -> dict[int, str]:
    """The names in a CSV file, by the cluster's number.

    It may be any that a spreadsheet writes: with commas, semicolons or tabs, in UTF-8 or UTF-16, with other columns.

    Args:
        path: of the file.
        clusters: how many there are.

    Raises:
        UserError: that says in which line is what.
    """
    text = read_text(path)
    head = text.splitlines()[0] if text.strip() else ""
    delimiter = max(",;\t", key=head.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(f"cannot read {path} as CSV: {error}") from error
    columns = [cell.strip().lower() for cell in rows[0]] if rows else []
    for column in ("cluster", "name"):
        if columns.count(column) != 1:
            what = "no column" if column not in columns else "two columns"
            raise UserError(f"{path} has {what} '{column}' in its first line: it needs 'cluster' and 'name', once each")
    names: dict[int, str] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        cells = dict(zip(columns, row, strict=False))
        number = cluster_number(cells.get("cluster", ""), clusters, f"row {line} of {path}")
        if number in names:
            raise UserError(f"row {line} of {path} names cluster {number} once more: keep one of its rows")
        names[number] = checked_name(cells.get("name", ""), number, f"row {line} of {path}")
    if not names:
        raise UserError(f"{path} names no cluster: give it a row for each, such as 0{delimiter}cats")
    return names


def read_text(path: Path) -> str:
    """The text of a CSV file.

    Raises:
        UserError: if it is no file, too large, or neither UTF-8 nor marked as UTF-16.
    """
    path = Path(expand_home(str(path)))
    if not path.is_file():
        raise UserError(f"there is no file '{path}': report.html of the run saves one, NAMES.csv")
    with path.open("rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise UserError(f"{path} has more than {LARGEST_FILE:,} bytes, too many for names of clusters")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as 'CSV UTF-8'") from error


def cluster_number(cell: str, clusters: int, where: str) -> int:
    """The cluster's number in a cell such as '7' or 'cluster 7'; raises `UserError` if there is no such cluster."""
    digits = cell.strip().lower().removeprefix("cluster").strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) < clusters):
        raise UserError(f"{where}: there is no cluster '{plain(cell, 40)}'; they are numbered 0 to {clusters - 1}")
    return int(digits)


def checked_name(cell: str, number: int, where: str) -> str:
    """The name in a cell, without spaces around it; raises `UserError` for one that no terminal could show."""
    name = cell.strip()
    if not name:
        raise UserError(f"{where}: the name of cluster {number} is empty; give one, or remove the row")
    if len(name) > LONGEST_NAME or plain(name) != name:
        raise UserError(
            f"{where}: the name of cluster {number} has more than {LONGEST_NAME} characters or invisible ones, such as "
            "a line break; shorten it"
        )
    return name
