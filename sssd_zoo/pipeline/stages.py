"""Steps that are done once: what `sssd fit`, `sssd compare` and `sssd finetune` are made of."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from sssd_zoo.distributed import barrier, on_main, rank
from sssd_zoo.distributed.hardware import machine
from sssd_zoo.errors import UserError
from sssd_zoo.files import RUN_MARK, damage, read_json, sha256_of, write_json
from sssd_zoo.files.run_folder import adopt, check_writable, drop, kind_of, mark, replace
from sssd_zoo.training.checkpoints import diverged

# Inputs that came after the first release: of a step done before there were any, they are as they are now.
LATER = ("true_labels",)
CALLED = {"measured_on": "true labels", "true_labels": "true labels"}  # what inputs are called


class Record(TypedDict):
    """What steps/ keeps of a step: what it was made of, and what it gave; None while it runs."""

    inputs: dict[str, Any]
    result: dict[str, Any] | None


class Stages:
    """Runs steps once: a step that has a result of the same inputs is skipped.

    The inputs of a step are its settings and the inputs of all steps before it, so a change concerns it and all after
    it, and what does not depend on it stays. What was made with other inputs is replaced if `overwrite` says so, and
    not before the new result is complete: until then it is made in a folder beside, from which a killed run resumes.
    A result whose files are damaged is made again, too.

    Args:
        out: the run folder.
        inputs: what all steps depend on.
        overwrite: make steps anew that were made with other inputs; else they are refused.
    """

    def __init__(self, out: Path, inputs: dict[str, Any], *, overwrite: bool = False) -> None:
        self.out, self.common, self.overwrite = out, inputs, overwrite
        self.results: dict[str, dict[str, Any]] = {}
        self.inputs: dict[str, dict[str, Any]] = {}

    def run(
        self,
        name: str,
        step: Callable[[Path], dict[str, Any]],
        settings: dict[str, Any],
        *,
        after: tuple[str, ...] = (),
        all_processes: bool = False,
        measured_on: str | None = None,
    ) -> dict[str, Any]:
        """Runs one step, or takes its result as it is.

        Args:
            name: of the step and its folder.
            step: does it, into the folder given; its result is kept in steps/.
            settings: that decide its numbers; they take the place of the common inputs of the same names.
            after: the steps whose results it reads.
            all_processes: every process takes part (training); else the main one alone.
            measured_on: of a step that measures, the digest of the true labels: for others of the same images it is
                done again without being asked to, as its figures would be wrong.

        Returns:
            The step's result and its `seconds`.

        Raises:
            UserError: if it was done with other inputs, and is not to be overwritten; or if the folder in its place
                was not made by this package.
        """
        inputs = {**self.common, **settings}
        for earlier in after:
            added = {k: v for k, v in self.inputs[earlier].items() if k not in self.common or self.common[k] != v}
            inputs |= {f"{earlier}.{key}": value for key, value in added.items()}
        self.inputs[name] = inputs = json.loads(json.dumps(inputs))
        wanted = inputs if measured_on is None else {**inputs, "measured_on": measured_on}
        folder, before = on_main(lambda: self._found(name))
        changed = [] if before is None else _differences(before["inputs"], wanted)
        wrong = on_main(lambda: damage(folder, before.get("sha256", {})) if before else None)
        if wrong:
            say(f"[{name}] done again, for {folder} is damaged: {wrong}")
        elif before is not None and not changed and before["result"] is not None:
            say(f"[{name}] done before")
            self.results[name] = before["result"]
            return self.results[name]
        if before is not None and changed and not self.overwrite and changed != ["measured_on"]:
            raise UserError(
                f"{folder} was made with other settings or data ({_words(changed, before['inputs'], wanted)}): give a "
                "new --out, or --overwrite to make anew what depends on them"
            )
        if changed:
            say(f"[{name}] done again, for other {', '.join(CALLED.get(key, key) for key in changed[:5])}")
        say(f"[{name}] -> {folder}")
        folder, record = self._places(name, new=bool(changed))
        if rank() == 0:
            _prepare(folder, record, wanted)
        barrier()
        began = time.perf_counter()
        result = step(folder) if all_processes or rank() == 0 else {}
        barrier()
        if rank() == 0:
            if not record.exists():
                raise UserError(f"{self.out} was removed while [{name}] ran, and what earlier steps made with it")
            seconds = round(time.perf_counter() - began, 1)
            # What later steps read. Training's checkpoints have records of their own.
            files = [path for kind in ("safetensors", "json", "parquet") for path in folder.rglob(f"*.{kind}")]
            files = [
                path for path in files if path.relative_to(folder).parts[0] != "checkpoints" and path.name != RUN_MARK
            ]
            result = {"seconds": seconds, **result}
            write_json(record, {"inputs": wanted, "result": result, "sha256": sha256_of(folder, files)})
            self._finish_replacing(name)
        barrier()
        self.results[name] = read_json(self._places(name)[1], Record)["result"]
        return self.results[name]

    def _places(self, name: str, *, new: bool = False) -> tuple[Path, Path]:
        """The folder and the record of a step; of `new`, those beside, which are to take their place."""
        called = f".{name}.new" if new else name
        return self.out / called, self.out / "steps" / f"{called}.json"

    def _found(self, name: str) -> tuple[Path, dict[str, Any] | None]:
        """A step's folder, and the record of what lies in it: None where there is nothing that took any time.

        Raises:
            UserError: if what lies in its place is not this package's.
        """
        self._finish_replacing(name)
        folder, record = self._places(name)
        if record.exists():
            adopt(folder, "step")
        check_writable(folder)
        if not record.exists() or not folder.exists():
            return folder, None
        before = read_json(record, Record)
        checkpoints = folder / "checkpoints"
        begun = before["result"] is not None or (any(checkpoints.glob("step-*")) and not diverged(checkpoints))
        return folder, before if begun else None

    def _finish_replacing(self, name: str) -> None:
        """Puts a step that was made beside the old one in its place, if it is complete; after a kill once more."""
        new, new_record = self._places(name, new=True)
        if not new_record.exists() or read_json(new_record, Record)["result"] is None:
            return
        folder, record = self._places(name)
        if new.exists():
            replace(new, folder, "step")
        new_record.replace(record)


def _prepare(folder: Path, record: Path, inputs: dict[str, Any]) -> None:
    """Notes what a step is about to do; what is there of the same inputs is half done, and it resumes from that."""
    if record.exists() and _differences(read_json(record, Record)["inputs"], inputs):
        drop(folder, "step")
    if kind_of(folder) is None:
        mark(folder, "step")
    write_json(record, {"inputs": inputs, "result": None})


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    theirs = {**{key: ours[key] for key in LATER if key in ours}, **theirs}
    return sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))


def _words(changed: list[str], theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    named = [f"{key}: {theirs.get(key)!r:.30} there, {ours.get(key)!r:.30} now" for key in changed[:4]]
    return "; ".join(named + [f"and {len(changed) - 4} more"] * (len(changed) > 4))


def machine_words(precision: str) -> str:
    """What computes, in words."""
    found = machine()
    processes = f"{found['processes']} x " if found["processes"] > 1 else ""
    return f"{found['device']}, {processes}{found['threads']} threads, torch {found['torch']}, {precision}"


def say(text: str) -> None:
    """Prints on the main process."""
    if rank() == 0:
        print(text, flush=True)
