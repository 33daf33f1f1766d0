"""`sssd fit --budget`: the epochs that fit into a wall time, chosen once and kept for the calls that resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from sssd_zoo.configs import FitArgs
from sssd_zoo.configs.ranges import seconds_of
from sssd_zoo.distributed import on_main
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json, write_json
from sssd_zoo.pipeline.defaults import EPOCH_SETTINGS
from sssd_zoo.training.engine import check_schedule

FILE = "budget.json"
MARGIN = 0.95  # of the time left: fits, figures and the report are not measured


class Chosen(TypedDict):
    """What budget.json holds: the epochs, and what they were chosen for."""

    epochs: int
    chosen_for: dict[str, Any]


def with_epochs(args: FitArgs, epochs: int) -> FitArgs:
    """The arguments with so many epochs of every training."""
    return replace(args, pretrain=replace(args.pretrain, epochs=epochs), distill=replace(args.distill, epochs=epochs))


def check_epochs(args: FitArgs, epochs: int) -> None:
    """Raises `UserError` if the epochs that were chosen are no more than a training's warm-up, or its milestones."""
    for name in EPOCH_SETTINGS:
        warm_up = getattr(args, name.removesuffix(".epochs")).warmup_epochs
        if warm_up >= epochs:
            raise UserError(
                f"--budget {args.budget} is enough for {epochs} epochs of each training, and "
                f"{name.removesuffix('.epochs')}.warmup_epochs {warm_up:g} must be fewer: give more time, or a shorter "
                "warm-up"
            )
    chosen = with_epochs(args, epochs)
    for config in (chosen.pretrain, chosen.distill):
        check_schedule(config)


def chosen_in(out: Path) -> Chosen | None:
    """What an earlier call chose in this folder, or None.

    Raises:
        UserError: if the file is damaged.
    """
    path = out / FILE
    try:
        return read_json(path, Chosen) if path.is_file() else None
    except UserError as error:
        raise UserError(
            f"{error}; the epochs that it held are in {out / 'config.yaml'}: give them instead of --budget, by "
            f"{' and '.join(f'--{name}' for name in EPOCH_SETTINGS)}"
        ) from error


def keep(out: Path, epochs: int, chosen_for: dict[str, Any]) -> None:
    """Writes what was chosen, in the main process."""
    on_main(lambda: write_json(out / FILE, {"epochs": epochs, "chosen_for": chosen_for}))


def serves(before: Chosen, chosen_for: dict[str, Any]) -> bool:
    """Whether epochs that were chosen before are to stay: the time, the images and the trainings are the same."""
    there = before["chosen_for"]
    # Those of earlier versions have the settings of all stages.
    trained = [settings for settings in there.get("settings", []) if "epochs" in settings]
    return {**there, "settings": trained} == chosen_for


def as_budget(seconds: float) -> str:
    """A time as `--budget` takes it: '1h30m'."""
    minutes, rest = divmod(round(seconds), 60)
    parts = ((minutes // 60, "h"), (minutes % 60, "m"), (rest, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


def describe_kept(budget: str, took: float) -> str:
    """What a run took of its budget, in percent."""
    return f"{100 * took / seconds_of(budget):.0f} percent of the --budget of {budget}"
