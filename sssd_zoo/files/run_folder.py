"""Run folders: what a command may write, replace and remove. Nothing else in this package removes a folder.

Every folder that a command creates has a mark that states its kind. A folder with files but no mark is the user's:
nothing is written into it. In a marked folder only the files of its kind are ever replaced or removed; all other files
are kept.
"""

import atexit
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sssd_zoo.distributed import on_main
from sssd_zoo.errors import UserError
from sssd_zoo.files import (
    LITTER,
    RUN_MARK,
    disk_errors,
    expand_home,
    lock,
    old_name,
    publish_dir,
    temporary_name,
    write_json,
)


class Kind(NamedTuple):
    """A kind of folder: its description for messages, and the files written into it, as patterns of `Path.glob`."""

    words: str
    files: tuple[str, ...]


VIEW_CACHE = tuple(f"view_cache/{name}" for name in ("views.json", "views.npy", "features.npy", ".*.partial"))
STEP = "step-" + 8 * "[0-9]"  # the folder of a checkpoint
CHECKPOINTS = (f"checkpoints/{STEP}", f"checkpoints/.{STEP}.*")
TRACKERS = ("trackers.json", "trackio", "mlflow", "wandb", "comet", ".aim", "dvclive", "swanlog")
CORRUPT = "corrupt.tsv"  # the images that were skipped, and why
TRAINING = (
    CORRUPT,
    *VIEW_CACHE,
    *CHECKPOINTS,
    *("config.yaml", "metrics.jsonl", "curves.png", "config.json", "model.safetensors", "own_labels.jsonl"),
    *("own_labels/epoch-*.npy", "views.png", "tensorboard/events.out.tfevents.*", *TRACKERS),
)
NETWORK = ("config.json", "model.safetensors")
LABEL_ARRAYS = ("labels.parquet", "centroids.safetensors")  # their record, the JSON, holds the digests of these
LABELS = (*LABEL_ARRAYS, "pseudo_labels.json")
EARLY_EXIT = ("early_exit/report.md", "early_exit/report.json", "early_exit/figure.png")
CARD_FIGURES = tuple(f"figures/{name}.png" for name in ("accuracy", "cluster_sizes", "curves", "early_exit"))
EVAL_RESULTS = (".eval_results/exit_[1-4].yaml", ".eval_results/ensemble.yaml")
# Of sssd_zoo/models: what a folder for transformers runs.
TRANSFORMERS_CODE = (
    *("modeling_sssd.py", "building.py", "multi_exit.py", "multi_exit_resnet.py"),
    *("staged.py", "stages.py", "exits.py"),
)
KINDS = {
    "fit": Kind("a run of `sssd fit`", ()),
    "compare": Kind("a comparison of `sssd compare`", ()),
    "finetune": Kind("runs of `sssd finetune`", ()),
    "training": Kind("a training run", TRAINING),
    "detector": Kind("a run of `sssd detect`", (*TRAINING, "detector.json", "metrics.json", "detections.png")),
    "detections": Kind("measurements of `sssd detect-eval`", ("config.yaml", "metrics.json", "detections.png")),
    "probe": Kind("a network of `sssd linear`", (*NETWORK, "config.yaml", "metrics.json")),
    "labels": Kind("pseudo labels", LABELS),
    "pulled-labels": Kind("pseudo labels of `sssd pull`", (*LABELS, "README.md")),
    "network": Kind("a network", NETWORK),  # its mark lists README.md where this package wrote that, too
    "transformers": Kind("a network for transformers", (*NETWORK, *TRANSFORMERS_CODE)),
    "early-exit": Kind("a network of `sssd early-exit`", (*NETWORK, *EARLY_EXIT)),
    "card": Kind(
        "a network with its card",
        (
            *(*NETWORK, *EARLY_EXIT, "README.md", "metrics.json", "recipe.yaml", "pretrain.jsonl", "distill.jsonl"),
            *(*CARD_FIGURES, "figures/clusters.png", *EVAL_RESULTS),  # clusters.png: of earlier versions
        ),
    ),
    "graphs": Kind("graphs of `sssd export`", ("stage[1-4].onnx", "early_exit.json")),
    "clusters": Kind("images of `sssd clusters`", ("clusters.csv",)),  # its mark lists the images
    # What says whose the parts are goes last, so that a kill never leaves parts alone.
    "embedding": Kind("an unfinished embedding of `sssd embed`", ("part-*.npz", "identity.json")),
    # A step of fit, compare or finetune whose folder is not marked more closely.
    "step": Kind(
        "a step of a run",
        (*TRAINING, *LABELS, "metrics.json", *(f"network/{name}" for name in (*NETWORK, "README.md", RUN_MARK))),
    ),
}
# Folders of versions without marks, recognised by keys in config.yaml: of one of `OURS`, which hardly any other program
# has beside the usual ones, and the first of `BEFORE_MARKS`.
OURS = {"image_column", "voc"}
BEFORE_MARKS = {
    "methods": "compare",
    "models": "finetune",
    "pretrain": "fit",
    "frozen_stages": "detector",
    "probe_epochs": "probe",
    "voc": "detections",
    "epochs": "training",
}
RESULTS = (
    *("checkpoints", "config.json", "pseudo_labels.json", "metrics.json", "early_exit.json"),
    *("model.safetensors", "labels.parquet", "clusters.csv"),
)
# Arguments that are only read, never written: images, and the folders of networks and labels.
SOURCES = (
    *("data", "pretrain_data", "test_data", "image_folder"),
    *("model", "models", "init", "features", "encoder", "teacher", "labels"),
)

_at_exit = ExitStack()


def open_out(args: Any, kind: str) -> Path:
    """Creates, marks, locks and tidies a command's --out folder; every process calls it.

    It is called before the data are read, so that a run folder among them is recognised by its mark.

    Args:
        args: arguments of the command: `out`, `SOURCES`, and `resume` and `overwrite` if it has them.
        kind: the kind, of `KINDS`, that the command writes.

    Raises:
        UserError: unless the folder is new, empty, or of this kind and may be written to.
    """
    folder = Path(expand_home(args.out))

    def make() -> None:
        with disk_errors(folder):
            check_out(folder, kind, args)
            claim(folder, kind)

    on_main(make)
    return folder


def check_out(folder: Path, kind: str, args: Any) -> None:
    """Raises the errors of `open_out`, after restoring a folder whose replacement was interrupted."""
    restore(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--out {folder} is a link to {folder.readlink()}, which does not exist: make that first")
    for name in SOURCES:
        # What a training calls `model` is an architecture, after which people name the folder.
        value = None if name == "model" and kind in ("training", "fit", "compare") else getattr(args, name, None)
        for source in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
            if contains(folder, source):
                raise UserError(
                    f"--{name} {source} lies in --out {folder}, where it could be overwritten: give a separate "
                    f"--out, such as {folder / 'run'}"
                )
    resume, overwrite = getattr(args, "resume", None), getattr(args, "overwrite", False)
    if resume and overwrite:
        raise UserError("--resume goes on with what --overwrite discards: remove one of them")
    check_writable(folder, kind)
    result = next((name for name in RESULTS if (folder / name).exists()), None) if KINDS[kind].files else None
    if result and not resume and not overwrite:
        ways = "--overwrite to replace it" if resume is None else "--resume to resume it, or --overwrite to discard it"
        raise UserError(f"{folder} already holds {KINDS[kind].words} ({result}); give {ways}")


def contains(folder: Path, source: str) -> bool:
    """Whether a source exists on this disk and is the folder or lies in it; of a run, its network counts."""
    path = Path(expand_home(source).removeprefix("local-dir:"))
    places = [path, path / "model"] if (path / "model.safetensors").exists() else [path]
    return any(place.exists() and place.resolve().is_relative_to(folder.resolve()) for place in places)


def occupants(folder: Path) -> list[str]:
    """The visible contents of a folder that could be lost: files, and folders with files in them."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    shown = [path for path in there if not path.name.startswith(".")]
    return [path.name for path in shown if not path.is_dir() or any(below.is_file() for below in path.rglob("*"))]


def check_writable(folder: Path, kind: str | None = None) -> None:
    """Refuses a folder of the user's, and one of another kind.

    Args:
        folder: the folder to write into; it need not exist.
        kind: the kind it must have; None allows any kind of this package.

    Raises:
        UserError: that says what it holds.
    """
    others = occupants(folder)
    if not others:
        return
    actual = kind_of(folder)
    if actual is None:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"{folder} was not made by sssd-zoo and holds {named}; nothing in it is touched: give a new folder, such "
            f"as {folder / 'run'}"
        )
    if kind is not None and actual != kind:
        words = KINDS[actual].words if actual in KINDS else f"'{actual}' of another version"
        raise UserError(f"{folder} holds {words}, which this command does not write: give another --out")


def kind_of(folder: Path) -> str | None:
    """The kind of a folder of this package, by its mark or, in versions without marks, by its files; else None."""
    if (folder / RUN_MARK).is_file():
        return str(_content(folder / RUN_MARK).get("kind", "unknown"))
    settings = _content(folder / "config.yaml")
    if {"data", "out", "workers"} <= settings.keys() and OURS & settings.keys():
        return next((kind for key, kind in BEFORE_MARKS.items() if key in settings), None)
    if {"fingerprint", "k_asked"} <= _content(folder / "pseudo_labels.json").keys():
        return "pulled-labels" if (folder / "README.md").exists() else "labels"
    if {"stages", "thresholds"} <= _content(folder / "early_exit.json").keys():
        return "graphs"
    network = str(_content(folder / "config.json").get("architecture", ""))
    if network and "sha256" in (_content(folder / "metrics.json").get("weights") or {}):
        return "card"
    if network and (folder / "early_exit" / "report.json").is_file():
        return "early-exit"
    if any((path / "checkpoint.json").exists() for path in checkpoints_in(folder / "checkpoints")):
        return "training"
    return "network" if network.startswith("sssd_") else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whatever else lies there, of similar names too, is the user's."""
    return sorted(path for path in folder.glob(STEP) if path.is_dir())


def _content(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; {} if the file is missing or holds anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def mark(folder: Path, kind: str, files: Sequence[str] = ()) -> None:
    """Creates a folder if necessary, and marks it as one of this package, of `kind`.

    Args:
        folder: to mark.
        kind: of `KINDS`.
        files: the files in it, by their relative paths, whose names no pattern of the kind tells from the user's.
    """
    write_json(folder / RUN_MARK, {"package": "sssd-zoo", "kind": kind, **({"files": list(files)} if files else {})})


def adopt(folder: Path, kind: str) -> None:
    """Marks a recorded folder of a version without marks, if it holds files of the kind."""
    actual = kind_of(folder) or (kind if files_of(folder, kind) else None)
    if actual is not None and not (folder / RUN_MARK).exists():
        mark(folder, actual)


def claim(folder: Path, kind: str) -> None:
    """Creates, marks and locks a folder for this process until `release_all`, and tidies it up.

    Raises:
        UserError: if another command uses the folder, or nothing can be written into it.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # of file systems that are no disks, such as /proc
        raise UserError(f"the folder {folder} cannot be made there: give another --out") from error
    marked = (folder / RUN_MARK).exists()
    with disk_errors(folder):
        try:
            lock.take(folder)
            if not marked:
                mark(folder, kind)
        finally:
            _at_exit.callback(_let_go, folder, made, marked)
        tidy(folder)


def _let_go(folder: Path, made: list[Path], marked: bool) -> None:
    """Unlocks a folder; removes it if nothing was written into it."""
    lock.release(folder)
    if not marked and folder.is_dir() and [path.name for path in folder.iterdir()] == [RUN_MARK]:
        (folder / RUN_MARK).unlink()
    with suppress(OSError):  # stops at the first folder that is not empty
        for path in made:
            path.rmdir()


def release_all() -> None:
    """Releases all locks of this process, at the end of a command."""
    _at_exit.close()


atexit.register(release_all)


def restore(folder: Path) -> None:
    """Restores a folder if a command was killed between the two renames of its replacement."""
    folder = folder.resolve()
    if folder.exists() or not folder.parent.is_dir():
        return
    for path in folder.parent.glob(old_name(Path(_escaped(folder.name)), "*").name):
        litter = LITTER.fullmatch(path.name)
        if litter and not lock.alive(int(litter["pid"])) and kind_of(path):
            path.rename(folder)
            return


def tidy(out: Path) -> None:
    """Removes incomplete files of killed commands in a folder of this package, and beside it or a file."""
    out = out.resolve()
    # Not that of labels.v2, say, which may be in use, where this is of labels.
    near = [path for dots in (".", "..") for path in out.parent.glob(f"{dots}{_escaped(out.name)}.sssd-*")]
    beside = [path for path in near if path.name.startswith(f".{out.name}.") or path.name.endswith(".partial")]
    for path in [*(path for path in beside if path.is_file() or kind_of(path)), *out.rglob(".*.sssd-*")]:
        litter = LITTER.fullmatch(path.name)
        if litter is None or not path.exists() or (litter["pid"] and lock.alive(int(litter["pid"]))):
            continue
        original = path.with_name(litter["name"])
        if path == old_name(original, litter["pid"]) and not original.exists():
            path.rename(original)
        else:
            _remove(path)


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def files_of(folder: Path, kind: str) -> list[Path]:
    """The files in a folder of this package that are of a kind; what else lies there is the user's."""
    found = [path for pattern in KINDS[kind].files for path in folder.glob(pattern)]
    card = folder / "README.md"
    carded = kind == "network" and card.name in (_content(folder / RUN_MARK).get("files") or [])
    return [*found, card] if carded and card.is_file() else found


def drop(folder: Path, kind: str) -> None:
    """Removes the files of a kind from a folder; all other files, and the folder, are kept."""
    remove(folder, KINDS[kind].files)


def remove(folder: Path, patterns: tuple[str, ...]) -> None:
    """Removes the files that match the patterns in a folder of this package, and sub-folders left empty."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        _remove(path)
        for above in path.relative_to(folder).parents[:-1]:
            with suppress(OSError):  # it holds other things
                (folder / above).rmdir()


def discard(folder: Path, kind: str) -> None:
    """Removes the files of a kind, and their folder; it stays where it holds anything else."""
    for path in files_of(folder, kind):  # a network's card, too
        _remove(path)
    drop(folder, kind)
    lock.release(folder)
    if [path.name for path in folder.iterdir()] == [RUN_MARK]:
        (folder / RUN_MARK).unlink()
        folder.rmdir()


def replace(temporary: Path, folder: Path, kind: str, others: Collection[Path] = ()) -> None:
    """Replaces `folder` by the complete folder `temporary`, keeping files in it that are not of this kind.

    Args:
        temporary: the new folder.
        folder: the old one, if there is one.
        kind: of the new one, of `KINDS`.
        others: see `atomic_dir`.

    Raises:
        UserError: if `folder` is not this package's.
    """
    check_writable(folder)
    if folder.is_dir():
        replaced = {*files_of(folder, kind), *others}
        for place in temporary.rglob("*"):
            there = folder / place.relative_to(temporary)
            if place.is_dir() and there not in replaced and (there.is_symlink() or there.is_file()):
                what = "link" if there.is_symlink() else "file"
                raise UserError(f"{there} is a {what}, and a folder of that name is to be written: move it away")
        inner = {file.parent for file in replaced} - {folder}
        left_out = replaced | {path for path in inner if replaced.issuperset(path.iterdir())}

        def skipped(directory: str, names: list[str]) -> list[str]:
            place = Path(directory)
            there = temporary / place.relative_to(folder)
            return [name for name in names if place / name in left_out or (there / name).is_file()]

        # Hard links, so that one of the two folders has all files whenever the command is killed.
        shutil.copytree(folder, temporary, ignore=skipped, copy_function=_link, symlinks=True, dirs_exist_ok=True)
    publish_dir(temporary, folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def atomic_dir(path: str | Path, kind: str, others: Collection[Path] = ()) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` if the block succeeds, and is removed otherwise.

    In an older folder of this package at `path` the files of the kind are replaced. Between two renames neither folder
    exists for an instant, so readers that must always find one keep more than one, as checkpoints do.

    Args:
        path: the folder to write.
        kind: its kind, of `KINDS`.
        others: further files of the older folder that are replaced, below `path` without its links.

    Raises:
        UserError: if `path` holds files that this package did not write.
    """
    path = Path(path).resolve()
    check_writable(path)
    temporary = temporary_name(path)
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            mark(temporary, kind)
            yield temporary
            if kind == "network" and (temporary / "README.md").exists():
                mark(temporary, kind, ["README.md"])
            replace(temporary, path, kind, others)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: Path, overwrite: bool, words: str, known: Callable[[Path], bool]) -> None:
    """Refuses to overwrite a file, except one of the kind with `overwrite`; removes an incomplete one.

    Args:
        path: the file to write, or a link to it; see `follow_link` of `atomic_write_bytes`.
        overwrite: whether an existing file may be replaced.
        words: description of the kind, for messages.
        known: whether a file is of the kind.

    Raises:
        UserError: naming what exists there.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist: make that first, or remove it")
    tidy(path)
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} already exists; give --overwrite to replace it")
    if not known(path):
        raise UserError(f"{path} is not {words}, so it is kept: give another name")
