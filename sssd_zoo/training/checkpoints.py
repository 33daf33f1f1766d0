"""Checkpoints: complete or absent, sealed, and refused by a run of other settings."""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.files import damage, disk_errors, publish_dir, read_json, sha256_of, write_json

# What a run may go on with otherwise after a loss that was not finite, and what its message says to try.
CURES = ("optim.lr", "optim.warmup_epochs", "optim.clip_grad", "precision")


class Checkpoints:
    """The checkpoints of a run: folders `step-00000123`, complete or absent.

    Each holds what the accelerator saves and checkpoint.json: the record that `save` was given, the run's identity, the
    sha256 of the other files, in `not_finite_at` the step whose loss was not finite in a run that came from it, and in
    `seal` the sha256 of all this.

    Args:
        folder: that holds them.
        identity: everything that decides the run's numbers; a resume with another is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def saved(self) -> list[tuple[Path, dict[str, Any]]]:
        """All complete checkpoints whose records can be read, with those, oldest first."""
        found = [(path, _record(path)) for path in sorted(self.folder.glob("step-*"))]
        return sorted(((path, record) for path, record in found if record), key=lambda item: item[1]["step"])

    def save(self, accelerator: Accelerator, record: dict[str, Any], keep_last: int, keep_best: int) -> None:
        """Writes a checkpoint of all that the accelerator prepared and drops those no longer wanted.

        Raises:
            UserError: in every process if one of them cannot write its part; nothing is left of it.
        """
        target = self.folder / f"step-{record['step']:08d}"
        # All processes write into one folder (each its own random state), so it cannot be a temporary of one of them.
        partial = self.folder / f".{target.name}.partial"
        try:
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
            if accelerator.is_main_process:
                with disk_errors(self.folder):
                    sums = sha256_of(partial, partial.iterdir())
                    _write_record(partial, {**record, "identity": self.identity, "sha256": sums})
                    publish_dir(partial, target)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            # Later ones are damaged, or of a course that the run has left: it came from an earlier one.
            saved = [item for item in self.saved() if item[1]["step"] <= record["step"]]
            by_loss = sorted(saved, key=lambda item: item[1].get("epoch_loss", math.inf))
            wanted = {path for path, _ in saved[-max(1, keep_last) :]} | {path for path, _ in by_loss[:keep_best]}
            for path in self.folder.glob("step-*"):
                if path not in wanted:
                    shutil.rmtree(path)
        accelerator.wait_for_everyone()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole and led to a finite loss, or none; those passed over are named.

        Raises:
            UserError: if it was written by a run of other settings, data or architecture, or all are damaged.
        """
        for litter in self.folder.glob(".step-*.partial"):  # of a run killed while it wrote a checkpoint
            shutil.rmtree(litter, ignore_errors=True)
        cures: tuple[str, ...] = ()
        damaged = False
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            record = _record(path)
            wrong = damage(path, record.get("sha256", {})) if record else "checkpoint.json cannot be read"
            if wrong or not record:
                damaged = True
                print(f"warning: the checkpoint {path} is damaged and passed over: {wrong}", file=sys.stderr)
                continue
            if "not_finite_at" in record:
                cures = CURES
                if record["not_finite_at"] == record["step"]:
                    print(f"the checkpoint {path} led to a loss that is not finite: it is passed over", file=sys.stderr)
                    continue
            self._check_identity(path, record["identity"], cures)
            return path, record
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole, so the run cannot be resumed: remove that folder to train "
                "from the beginning"
            )
        return None

    def _check_identity(self, path: Path, theirs: dict[str, Any], cures: tuple[str, ...]) -> None:
        keys = (theirs.keys() | self.identity.keys()) - set(cures)
        different = sorted(key for key in keys if theirs.get(key) != self.identity.get(key))
        if different:
            changes = "; ".join(
                f"{key}: {theirs.get(key)!r} there, {self.identity.get(key)!r} now" for key in different[:4]
            )
            raise UserError(
                f"cannot resume from {path}: it is of another run ({changes}); use a new --out, or --overwrite"
            )

    def load(self, accelerator: Accelerator, path: Path) -> None:
        """Reads a checkpoint into all that the accelerator prepared.

        Raises:
            UserError: if it cannot be read, as one from before there was a sha256 to tell that it is damaged.
        """
        try:
            accelerator.load_state(str(path))
        except Exception as error:  # whatever the formats' readers make of bytes that they did not write
            raise UserError(
                f"cannot read the checkpoint {path} ({str(error)[:200]}): remove it to resume from the one before it"
            ) from error

    def not_finite(self, what: str, step: int) -> UserError:
        """Notes in the newest checkpoint that training from it failed, and gives the error that says how to go on.

        Args:
            what: is not finite, and where.
            step: whose loss it is, counted from 0, so that of a checkpoint of that step it was the first.
        """
        # A later one is damaged: the run did not come from it.
        saved = [item for item in self.saved() if item[1]["step"] <= step]
        good = [path for path, record in saved if record["step"] < step]
        if saved and rank() == 0:
            path, record = saved[-1]
            _write_record(path, {**record, "not_finite_at": step})
        kept = f"the last good checkpoint is {good[-1]}" if good else "without a good checkpoint it starts anew"
        return UserError(f"{what}; resume the run with a lower lr, warmup_epochs, clip_grad or precision fp32 ({kept})")


def diverged(checkpoints: Path) -> bool:
    """Whether a training with this folder of checkpoints ended in a loss that is not finite, by its newest record."""
    records = [_record(path) for path in sorted(checkpoints.glob("step-*"))]
    return bool(records) and "not_finite_at" in (records[-1] or {})


def _record(checkpoint: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's record, None if it is damaged."""
    try:
        content = read_json(checkpoint / "checkpoint.json")
    except UserError:
        return None
    whole = isinstance(content, dict) and {"step", "epoch_sum", "epoch_count", "seconds", "identity"} <= content.keys()
    if whole and content.pop("seal", None) in (None, _seal(content)):  # none in those of earlier versions
        return dict(content)
    return None


def _write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    write_json(checkpoint / "checkpoint.json", {**record, "seal": _seal(record)})


def _seal(record: dict[str, Any]) -> str:
    """The sha256 of a record, which is in it, as it tells those of the other files."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
