"""What an earlier `sssd fit` left in its folder: how it differs from what is asked for now, and what goes with it."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from sssd_zoo.configs import FitArgs, RuntimeConfig
from sssd_zoo.configs.methods import Method
from sssd_zoo.configs.ranges import seconds_of
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.files import RUN_MARK, read_json
from sssd_zoo.files.run_folder import drop, kind_of
from sssd_zoo.files.run_steps import newer
from sssd_zoo.files.untrusted import flat, read_yaml
from sssd_zoo.pipeline.budget import as_budget, chosen_in
from sssd_zoo.pipeline.stages import Survey, describe_changes

# Where and how a run executes, which does not change what it gives.
HOW = {field.name for field in fields(RuntimeConfig)} - {"seed", "precision"}
HOW |= {"out", "overwrite", "keep_checkpoints", "workers", "in_memory", "max_pixels", "max_corrupt", "budget"}
HOW |= {"cluster.on_disk", "more_epochs"}
# What the stages know by content: images by their fingerprint, weights by their digest, 'by default' by what it became.
CONTENT = {"data", "split", "image_column", "label_column", "storage_size", "revision", "unlabelled", "test_split"}
CONTENT |= {"model", "image_size", "features", "teacher_size", "init", "pretrain.init", "precision"}
CONTENT |= {"pretrain_model", "pretrain_data", "pretrain_split"}


def finished_settings(out: Path) -> dict[str, Any]:
    """The arguments of the finished run in a folder, nested ones by dotted names; {} if there is none.

    Raises:
        UserError: if its config.yaml cannot be read.
    """
    if not (out / "metrics.json").is_file() or not (out / "config.yaml").is_file():
        return {}
    content = read_yaml(out / "config.yaml")
    return flat(content) if isinstance(content, dict) else {}


def method_there(out: Path, usual: Method) -> Method | None:
    """The method of the run in a folder, `usual` if there is none; None for a run that did not save it."""
    if not (out / "config.yaml").is_file() or kind_of(out) != "fit":
        return usual
    content = read_yaml(out / "config.yaml")
    there = content.get("method") if isinstance(content, dict) else None
    return there if there in get_args(Method) else None


def more_epochs_there(out: Path) -> list[int]:
    """What `more_epochs` of the finished run in a folder was; [] if there is none."""
    there = finished_settings(out).get("more_epochs") or []
    return there if isinstance(there, list) else [there]


def is_extension(there: list[int], now: list[int]) -> bool:
    """Whether a run goes on with another of fewer extensions."""
    return len(now) > len(there) and now[: len(there)] == there


def changed_settings(out: Path, args: FitArgs) -> dict[str, tuple[Any, Any]]:
    """The settings, there and now, in which the finished run in a folder differs, as far as no stage compares them."""
    there = finished_settings(out)
    if not there:
        return {}
    now = flat(json.loads(json.dumps(asdict(args))))
    usual = flat(json.loads(json.dumps(asdict(FitArgs(data="data", out="out")))))
    there = {**usual, **there}  # one of an earlier version lacks those that are new
    unused = ("pretrain.", "quality_every", "best_by") if args.features is not None else ()
    names = [name for name in now if name not in HOW | CONTENT and not name.startswith(unused)]
    if there["method"] is None:  # of an earlier version, which did not save what it became
        names.remove("method")
    return {name: (there.get(name), now[name]) for name in names if there.get(name) != now[name]}


def recorded_stages(out: Path) -> list[str]:
    """The names of the stages that have a record in a run folder."""
    return sorted(path.stem for path in (out / "steps").glob("*.json") if not path.name.startswith("."))


def other_budget(out: Path, args: FitArgs, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[str, str | None]]:
    """The budget, there and now, where it is another that chose the epochs there, which nobody gave; else {}."""
    epochs = {there for name, (there, _) in changes.items() if name.endswith(".epochs")}
    there = chosen_in(out) if epochs else None
    if there is None or epochs != {there["epochs"]}:
        return {}
    seconds = there["chosen_for"]["seconds"]
    return {} if args.budget and seconds_of(args.budget) == seconds else {"budget": (as_budget(seconds), args.budget)}


def check_earlier(out: Path, args: FitArgs, stages: Iterable[str], survey: Survey) -> None:
    """Refuses a folder with the results of other settings or data, unless they are to be overwritten.

    Args:
        out: the run folder.
        args: of the command, complete.
        stages: names of the stages to run.
        survey: of them.

    Raises:
        UserError: that says what differs.
    """
    if args.overwrite:
        return
    changes = changed_settings(out, args)
    there = more_epochs_there(out)
    if there and there != args.extensions and not is_extension(there, args.extensions):
        changes["more_epochs"] = (there, args.extensions)
    # What a stage got from a setting that is named already need not be named again.
    changes |= {name: values for name, values in survey.changes.items() if not changes or "." not in name}
    stale = [name for name in recorded_stages(out) if name not in stages]
    if not changes and stale:
        changes = {"stages": (", ".join([*stages, *stale]), ", ".join(stages))}
    changes = {**other_budget(out, args, changes), **changes}
    if changes and (again := newer(out)):
        raise UserError(
            f"{out} is not finished: a `sssd fit --overwrite` with other settings or data was interrupted after it had "
            f"made {listed(again)} again; give --overwrite, with its arguments to finish it or with these, or another "
            "--out"
        )
    if changes:
        raise UserError(
            f"{out} was made with other settings or data ({describe_changes(changes)}): give a new --out, or "
            "--overwrite to repeat what depends on them and to remove other results (files of yours stay)"
        )


def remove_stages(out: Path, kept: Iterable[str], *, unfinished: bool) -> None:
    """Removes the results of stages that are not to be kept; files that no stage writes stay where they are.

    Args:
        out: the run folder.
        kept: names of the stages to keep.
        unfinished: also remove what an interrupted `--overwrite` began to put in the place of these.
    """
    for name in recorded_stages(out):
        new = f".{name}.new"
        for called in (*(() if name in kept else (name,)), *((new,) if unfinished or name not in kept else ())):
            folder = out / called
            if folder.is_dir() and kind_of(folder) is not None:
                drop(folder, "step")
                if [path.name for path in folder.iterdir()] == [RUN_MARK]:
                    (folder / RUN_MARK).unlink()
                with suppress(OSError):  # it holds files of the user's
                    folder.rmdir()
            (out / "steps" / f"{called}.json").unlink(missing_ok=True)


def remove_figures(out: Path, kept: Iterable[str]) -> None:
    """Removes the figures that the earlier report in a folder has, and that the new one does not."""
    if not (out / "metrics.json").is_file():
        return
    try:
        content = read_json(out / "metrics.json")
    except UserError:  # damaged: it is written anew, and the figures that it named stay
        return
    there = content.get("figures") if isinstance(content, dict) else None
    for path in there if isinstance(there, dict) else {}:
        if path not in kept and re.fullmatch(r"figures/[\w-]+\.(png|svg)", str(path)):
            (out / path).unlink(missing_ok=True)
