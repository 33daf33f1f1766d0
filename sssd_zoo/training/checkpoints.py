"""Checkpoints: complete or absent, sealed, and refused by a run of other settings."""

import hashlib
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.files import damage, disk_errors, publish_dir, read_json, sha256_of, write_json
from sssd_zoo.files.run_folder import STEP, checkpoints_in

# What may be changed when a run that diverged is resumed: the settings that its message says to try.
REMEDIES = ("optim.lr", "optim.warmup_epochs", "optim.clip_grad", "precision")
# What checkpoints of earlier versions do not say of a stream: it is taken to be as it is now.
LATER = {"split", "revision", "steps_per_epoch"}


class OtherRun(UserError):
    """A checkpoint was written by a run of other settings, data or architecture."""


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        step: optimiser steps done.
        epoch_sum: sum of the losses of the current epoch's steps.
        epoch_count: number of these steps.
        seconds: of training, those before a resume included.
    """

    step: int = 0
    epoch_sum: float = 0.0
    epoch_count: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Progress":
        """That of a checkpoint, from its record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    @property
    def epoch_loss(self) -> float:
        """Mean loss of the current epoch's steps; 0 before the first."""
        return self.epoch_sum / max(1, self.epoch_count)


class Checkpoints:
    """The checkpoints of a run: folders `step-00000123`, complete or absent.

    Each holds what the accelerator saves and checkpoint.json: the progress and, where the epoch has begun, its mean
    loss `epoch_loss`; `figures` that a monitor measured at that step; the run's `identity`; the `sha256` of the other
    files; in `not_finite_at`, if training from it diverged, the step whose loss was not finite; and in `seal` the
    sha256 of all this.

    Args:
        folder: that holds them.
        identity: everything that decides the run's numbers; a run of another identity cannot be resumed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def saved(self) -> list[tuple[Path, dict[str, Any]]]:
        """All complete checkpoints whose records can be read, with those, oldest first."""
        pairs = [(path, read_record(path)) for path in checkpoints_in(self.folder)]
        return sorted(((path, record) for path, record in pairs if record), key=lambda pair: pair[1]["step"])

    def save(
        self,
        accelerator: Accelerator,
        progress: Progress,
        keep_last: int,
        keep_best: int,
        *,
        figures: dict[str, float] | None = None,
        best_by: str = "loss",
    ) -> None:
        """Writes a checkpoint of everything the accelerator prepared, and removes those no longer to be kept.

        Args:
            accelerator: of the run.
            progress: of the run.
            keep_last: checkpoints to keep, the newest; at least one.
            keep_best: checkpoints to keep, those of the lowest loss, or of the highest figure.
            figures: that a monitor measured at this step.
            best_by: 'loss', or the figure; checkpoints without that figure are not among the best.

        Raises:
            UserError: in every process if one of them cannot write its part; nothing is left of it.
        """
        target = self.folder / f"step-{progress.step:08d}"
        # All processes write into one folder (each its own random state), so it cannot be a temporary of one of them.
        partial = self.folder / f".{target.name}.partial"
        try:
            self._write_state(accelerator, partial)
            if accelerator.is_main_process:
                with disk_errors(self.folder):
                    write_record(partial, self._record(progress, partial, figures or {}))
                    publish_dir(partial, target)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            self._remove_superseded(progress.step, keep_last, keep_best, best_by)
        accelerator.wait_for_everyone()

    def _write_state(self, accelerator: Accelerator, partial: Path) -> None:
        """Writes every process's part of the state into a new folder; the error of one is raised in all."""
        with disk_errors(self.folder):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                self.folder.mkdir(exist_ok=True)  # not its parent: a run folder that was removed stays so
                partial.mkdir()
        accelerator.wait_for_everyone()
        errors: list[UserError] = []
        try:
            with disk_errors(self.folder):
                accelerator.save_state(str(partial))
        except UserError as error:
            errors = [error]
        for first in gather_object(errors):
            raise first

    def _record(self, progress: Progress, partial: Path, figures: dict[str, float]) -> dict[str, Any]:
        """What checkpoint.json of a folder, complete but for it, is to hold."""
        record = asdict(progress)
        if progress.epoch_count:
            record["epoch_loss"] = progress.epoch_loss
        record |= {"figures": figures} if figures else {}
        return {**record, "identity": self.identity, "sha256": sha256_of(partial, partial.iterdir())}

    def _remove_superseded(self, step: int, keep_last: int, keep_best: int, best_by: str) -> None:
        """Removes all but the last and the best, once that of `step` is written."""
        # Later ones are damaged, or from before the run was resumed at an earlier one.
        saved = [(path, record) for path, record in self.saved() if record["step"] <= step]
        if best_by == "loss":
            best_first = sorted(saved, key=lambda pair: pair[1].get("epoch_loss", math.inf))
        else:
            measured = [pair for pair in saved if best_by in pair[1].get("figures", {})]
            best_first = sorted(measured, key=lambda pair: -pair[1]["figures"][best_by])
        kept = {path for path, _ in saved[-max(1, keep_last) :]} | {path for path, _ in best_first[:keep_best]}
        for path in checkpoints_in(self.folder):
            if path not in kept:
                shutil.rmtree(path)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole and led to a finite loss, with its record, or None.

        Those passed over are named on stderr, and what a run killed while it wrote a checkpoint has left is removed.

        Raises:
            UserError: if it was written by a run of other settings, data or architecture, or all are damaged.
        """
        for partial in self.folder.glob(f".{STEP}.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        changeable: tuple[str, ...] = ()
        any_damaged = False
        for path in reversed(checkpoints_in(self.folder)):
            record = read_record(path)
            problem = damage(path, record.get("sha256", {})) if record else "checkpoint.json cannot be read"
            if problem or not record:
                any_damaged = True
                print(f"warning: the checkpoint {path} is damaged and passed over: {problem}", file=sys.stderr)
                continue
            if "not_finite_at" in record:
                changeable = REMEDIES
                if record["not_finite_at"] == record["step"]:
                    print(f"the checkpoint {path} led to a loss that is not finite: it is passed over", file=sys.stderr)
                    continue
            self._check_identity(path, record["identity"], changeable)
            return path, record
        if any_damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole, so the run cannot be resumed: remove that folder to train "
                "from the beginning"
            )
        return None

    def _check_identity(self, path: Path, saved: dict[str, Any], changeable: tuple[str, ...]) -> None:
        """Raises `OtherRun` if the identity saved at `path` differs from the run's in more than `changeable` keys."""
        keys = (saved.keys() | self.identity.keys()) - set(changeable) - (LATER - saved.keys())
        different = sorted(key for key in keys if saved.get(key) != self.identity.get(key))
        if different:
            changes = "; ".join(
                f"{key}: {saved.get(key)!r} there, {self.identity.get(key)!r} now" for key in different[:4]
            )
            raise OtherRun(
                f"cannot resume from {path}: it was written by another run ({changes}); use a new --out, or --overwrite"
            )

    def load(self, accelerator: Accelerator, path: Path) -> None:
        """Reads a checkpoint into everything the accelerator prepared.

        Raises:
            UserError: if it cannot be read, as may be with one of an earlier version, which has no sha256 to check.
        """
        try:
            accelerator.load_state(str(path))
        except Exception as error:  # whatever the formats' readers make of bytes that they did not write
            raise UserError(
                f"cannot read the checkpoint {path} ({str(error)[:200]}): remove it to resume from the one before it"
            ) from error

    def record_divergence(self, problem: str, step: int) -> UserError:
        """Notes in the newest checkpoint that training from it diverged.

        Args:
            problem: what is not finite, and where.
            step: the number, from 0, of the step whose loss it is; the first one after the checkpoint of that step.

        Returns:
            The error to raise, which says how to resume.
        """
        # A later one is damaged: the run did not come from it.
        saved = [(path, record) for path, record in self.saved() if record["step"] <= step]
        good = [path for path, record in saved if record["step"] < step]
        if saved and rank() == 0:
            path, record = saved[-1]
            write_record(path, {**record, "not_finite_at": step})
        origin = (
            f"where the command has --resume, that goes on from the last good checkpoint, {good[-1]}"
            if good
            else "there is no good checkpoint, so it starts from scratch"
        )
        return UserError(
            f"{problem}; run it again with a lower lr, warmup_epochs, clip_grad or precision fp32 ({origin})"
        )


def diverged(folder: Path) -> bool:
    """Whether the training whose checkpoints lie in a folder ended in a loss that is not finite."""
    records = [read_record(path) for path in checkpoints_in(folder)]
    return bool(records) and "not_finite_at" in (records[-1] or {})


def steps_done(folder: Path) -> int:
    """The optimiser steps of the newest checkpoint in a folder whose record can be read; 0 if there is none."""
    records = [read_record(path) for path in checkpoints_in(folder)]
    return max((int(record["step"]) for record in records if record), default=0)


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's checkpoint.json, without its seal; None if it is damaged."""
    try:
        content = read_json(checkpoint / "checkpoint.json")
    except UserError:
        return None
    needed = {"identity", *(field.name for field in fields(Progress))}
    complete = isinstance(content, dict) and needed <= content.keys()
    if complete and content.pop("seal", None) in (None, seal(content)):  # none in those of earlier versions
        return dict(content)
    return None


def write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    """Writes a checkpoint's checkpoint.json, sealed."""
    write_json(checkpoint / "checkpoint.json", {**record, "seal": seal(record)})


def seal(record: dict[str, Any]) -> str:
    """The sha256 of a record, kept in it, by which damage to it shows as the other files' sha256 show theirs."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
