"""Stages that are done once: what `sssd fit`, `sssd compare` and `sssd finetune` are made of."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from sssd_zoo.distributed import barrier, on_main, print_main, rank
from sssd_zoo.distributed.hardware import describe_machine
from sssd_zoo.errors import UserError
from sssd_zoo.files import RUN_MARK, damage, read_json, sha256_of, write_json
from sssd_zoo.files.run_folder import (
    CHECKPOINTS,
    adopt,
    check_writable,
    checkpoints_in,
    drop,
    kind_of,
    mark,
    remove,
    replace,
)
from sssd_zoo.pipeline.forecast import Forecast
from sssd_zoo.training.checkpoints import OtherRun, diverged, steps_done

# Inputs that came after the first release: of a step done before there were any, they are as they are now.
LATER = ("true_labels", "labels")
CALLED = {"measured_on": "true labels", "true_labels": "true labels"}  # what inputs are called
DIGESTS = {  # inputs whose values tell nothing to a reader
    "data": "other images",
    "measured_on": "other true labels, or others held out",
    "true_labels": "other true labels",
    "held_out": "other images held out",
    "test_positions": "other images held out, which the first seed draws",
}
ARGUMENTS = {"labels": "cluster"}  # stages whose settings are arguments of another name


class Record(TypedDict):
    """What steps/ keeps of a step: what it was made of, what it gave (None while it runs), and its files' digests."""

    inputs: dict[str, Any]
    result: dict[str, Any] | None
    sha256: NotRequired[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run, declared: `Stages.run` does it, or takes the result that is there.

    Attributes:
        name: of the stage and its folder.
        action: does it, into the folder given; its result is kept in steps/.
        settings: that decide its numbers; they take the place of the common inputs of the same names.
        later: gives those that only the results of earlier stages say.
        after: the stages whose results it reads.
        all_processes: every process takes part (training); else the main one alone.
        measured_on: of a stage that measures, the digest of the true labels: for others of the same images it is
            repeated without being asked to, as its figures would be wrong.
        unasked: it is repeated where its inputs differ without being asked to.
        then: called in the main process after it, also where it was done before; returns whether it changed a file.
    """

    name: str
    action: Callable[[Path], dict[str, Any]]
    settings: dict[str, Any]
    later: Callable[[], dict[str, Any]] | None = None
    after: tuple[str, ...] = ()
    all_processes: bool = False
    measured_on: str | None = None
    unasked: bool = False
    then: Callable[[], bool] | None = None


class Survey(NamedTuple):
    """What lies in a run folder before its stages run.

    Attributes:
        done: names of the stages that have a result of the same inputs.
        begun: of the others, the optimiser steps that each resumes from; 0 where it begins.
        changes: inputs of results that are not to be repeated, there and now, by their names.
    """

    done: set[str]
    begun: dict[str, int]
    changes: dict[str, tuple[Any, Any]]


class Stages:
    """Runs stages once: one that has a result of the same inputs is skipped.

    The inputs of a stage are its settings and the inputs of all stages before it, so a change concerns it and all after
    it, and what does not depend on it stays. What was made with other inputs is replaced if `overwrite` says so, and
    not before the new result is complete: until then it is made in a folder beside, from which a killed run resumes.
    A result whose files are damaged is made again, too.

    Args:
        out: the run folder.
        inputs: what all stages depend on.
        overwrite: repeat stages that were made with other inputs; else they are refused.
        keep_checkpoints: keep the checkpoints of a training that is complete; they take many times the space of its
            network, and nothing reads them any more.

    Attributes:
        forecast: says which step of how many a stage is, and how long those to come take.
    """

    def __init__(
        self, out: Path, inputs: dict[str, Any], *, overwrite: bool = False, keep_checkpoints: bool = False
    ) -> None:
        self.forecast: Forecast | None = None
        self.out, self.common, self.overwrite, self.keep_checkpoints = out, inputs, overwrite, keep_checkpoints
        self.results: dict[str, dict[str, Any]] = {}
        self.inputs: dict[str, dict[str, Any]] = {}

    def run(self, stage: Stage) -> dict[str, Any]:
        """Runs one stage, or takes its result as it is.

        Returns:
            The stage's result and its `seconds`.

        Raises:
            UserError: if it was done with other inputs, and is not to be overwritten; or if the folder in its place
                was not made by this package.
        """
        inputs = self._inputs(stage, {} if stage.later is None else stage.later())
        folder, before = on_main(lambda: self._state(stage.name))
        changed = [] if before is None else _differences(before["inputs"], inputs)
        wrong = on_main(lambda: damage(folder, before.get("sha256", {})) if before else None)
        if before is not None and not wrong and not changed and before["result"] is not None:
            print_main(f"[{stage.name}] done before{self._where(stage.name)}")
            self.results[stage.name] = before["result"]
        else:
            self._announce(stage, folder, before, inputs, wrong)
            self._perform(stage, inputs, new=bool(changed))
            self.results[stage.name] = read_json(self._places(stage.name)[1], Record)["result"]
        if stage.then is not None and rank() == 0 and stage.then():
            record = self._places(stage.name)[1]
            write_json(record, {**_read_record(record), "sha256": sha256_of(folder, _read_later(folder))})
        return self.results[stage.name]

    def _inputs(self, stage: Stage, later: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides a stage's result, as its record has it; of `later`, what is known."""
        inputs = {**self.common, **stage.settings, **later}
        for earlier in stage.after:
            added = {k: v for k, v in self.inputs[earlier].items() if k not in self.common or self.common[k] != v}
            inputs |= {f"{earlier}.{key}": value for key, value in added.items()}
        self.inputs[stage.name] = inputs = json.loads(json.dumps(inputs))
        return inputs if stage.measured_on is None else {**inputs, "measured_on": stage.measured_on}

    def _may_repeat(self, changed: list[str], stage: Stage) -> bool:
        """Whether a stage that was made with other inputs may be made again."""
        return self.overwrite or stage.unasked or changed == ["measured_on"]

    def _where(self, name: str) -> str:
        """Which step a stage is, and how long the rest takes, as far as that is known."""
        return "" if self.forecast is None else f": {self.forecast.describe(name)}"

    def survey(self, stages: Sequence[Stage]) -> Survey:
        """What lies in the folder of each stage before any of them runs."""
        done, begun, changes = set(), {}, {}
        late: set[str] = set()  # stages with inputs that only results of earlier ones say
        for stage in stages:
            inputs = self._inputs(stage, {})
            late |= set() if stage.later is None else {stage.name}
            _, before = on_main(partial(self._state, stage.name))
            theirs = {} if before is None else _comparable(before["inputs"], inputs, stage.name, late)
            changed = [] if before is None else _differences(theirs, inputs)
            if before is not None and not changed and before["result"] is not None:
                done.add(stage.name)
                continue
            if before is not None and changed and not self._may_repeat(changed, stage):
                for key in changed:
                    if not key.startswith(tuple(f"{earlier}." for earlier in stage.after)):  # that stage names it
                        name = key if key in self.common else f"{ARGUMENTS.get(stage.name, stage.name)}.{key}"
                        changes[name] = (before["inputs"].get(key), inputs.get(key))
            begun[stage.name] = on_main(partial(self._steps_done, stage.name, inputs, late))
        return Survey(done, begun, changes)

    def refuse_others(self, stages: Sequence[Stage]) -> None:
        """Raises `UserError` for a result that was made with other inputs and is not to be repeated."""
        if changes := self.survey(stages).changes:
            raise _of_others(self.out, changes)

    def _steps_done(self, name: str, inputs: dict[str, Any], late: set[str]) -> int:
        """The optimiser steps that a training of these inputs resumes from; `late` as in `_comparable`."""
        for new in (False, True):
            folder, record = self._places(name, new=new)
            if not record.exists():
                continue
            if not _differences(_comparable(_read_record(record)["inputs"], inputs, name, late), inputs):
                return steps_done(folder / "checkpoints")
        return 0

    def _announce(
        self, stage: Stage, folder: Path, before: dict[str, Any] | None, inputs: dict[str, Any], wrong: str | None
    ) -> None:
        """Says why a stage is done, or refuses to do it over a result of other inputs."""
        name, changed = stage.name, [] if before is None else _differences(before["inputs"], inputs)
        if wrong:
            print_main(f"[{name}] repeated, because {folder} is damaged: {wrong}")
        if before is not None and changed and not self._may_repeat(changed, stage):
            raise _of_others(folder, {key: (before["inputs"].get(key), inputs.get(key)) for key in changed})
        if changed:
            print_main(f"[{name}] repeated, for {self._described(stage, changed)}")
        print_main(f"[{name}]{self._where(name)} -> {folder}")

    def _described(self, stage: Stage, changed: list[str]) -> str:
        """What changed of a stage's inputs: its own by their names, and the earlier stages whose inputs did."""
        known = {path.stem for path in (self.out / "steps").glob("*.json")} | {*stage.after}
        own = [CALLED.get(key, key) for key in changed if key.partition(".")[0] not in known or key in known]
        earlier = [
            name for name in stage.after if name not in own and any(key.startswith(f"{name}.") for key in changed)
        ]
        parts = [f"other {', '.join(own[:5])}"] if own else []
        return " and ".join([*parts, *(f"another result of [{name}]" for name in earlier)]) or "other earlier stages"

    def _perform(self, stage: Stage, inputs: dict[str, Any], *, new: bool) -> None:
        """Does a stage; where it is `new`, beside the old result, which it then replaces."""
        folder, record = self._places(stage.name, new=new)
        if rank() == 0:
            _prepare(folder, record, inputs)
        barrier()
        began = time.perf_counter()
        result = self._act(stage, folder)
        barrier()
        if rank() == 0:
            if not record.exists():
                raise UserError(
                    f"{self.out} was removed while [{stage.name}] ran, and what earlier stages made with it"
                )
            seconds = time.perf_counter() - began
            if self.forecast is not None:
                self.forecast.finished(stage.name, seconds)
            # A report that is made again on another machine says whose times these are.
            where = {"machine": describe_machine(self.common["precision"])} if "precision" in self.common else {}
            result = {"seconds": round(seconds, 1), **where, **result}
            write_json(record, {"inputs": inputs, "result": result, "sha256": sha256_of(folder, _read_later(folder))})
            self._finish_replacing(stage.name)
            if not self.keep_checkpoints:
                remove(self._places(stage.name)[0], CHECKPOINTS)
        barrier()

    def _act(self, stage: Stage, folder: Path) -> dict[str, Any]:
        """Does a stage; with `overwrite` once more from the beginning, where its checkpoints are another run's."""
        if not stage.all_processes and rank():
            return {}
        try:
            return stage.action(folder)
        except OtherRun:
            if not self.overwrite:
                raise
        print_main(f"[{stage.name}] begun anew, as its checkpoints are of another run")
        if rank() == 0:
            remove(folder, CHECKPOINTS)
        if stage.all_processes:
            barrier()
        return stage.action(folder)

    def _places(self, name: str, *, new: bool = False) -> tuple[Path, Path]:
        """The folder and the record of a step; of `new`, those beside, which are to take their place."""
        called = f".{name}.new" if new else name
        return self.out / called, self.out / "steps" / f"{called}.json"

    def _state(self, name: str) -> tuple[Path, dict[str, Any] | None]:
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
        before = _read_record(record)
        checkpoints = folder / "checkpoints"
        begun = before["result"] is not None or (bool(checkpoints_in(checkpoints)) and not diverged(checkpoints))
        return folder, before if begun else None

    def _finish_replacing(self, name: str) -> None:
        """Puts a step that was made beside the old one in its place, if it is complete; after a kill once more."""
        new, new_record = self._places(name, new=True)
        if not new_record.exists() or _read_record(new_record)["result"] is None:
            return
        folder, record = self._places(name)
        if new.exists():
            replace(new, folder, "step")
        new_record.replace(record)


def _read_record(path: Path) -> dict[str, Any]:
    """The record of a stage.

    Raises:
        UserError: if it is damaged, that says what to do.
    """
    try:
        record: dict[str, Any] = read_json(path, Record)
    except UserError as error:
        raise UserError(f"{error}; remove this file to make the stage again") from error
    return record


def _read_later(folder: Path) -> list[Path]:
    """The files of a stage that later ones read; training's checkpoints have records of their own."""
    files = [path for kind in ("safetensors", "json", "parquet") for path in folder.rglob(f"*.{kind}")]
    return [path for path in files if path.relative_to(folder).parts[0] != "checkpoints" and path.name != RUN_MARK]


def _prepare(folder: Path, record: Path, inputs: dict[str, Any]) -> None:
    """Notes what a step is about to do; what is there of the same inputs is half done, and it resumes from that."""
    if record.exists() and _differences(_read_record(record)["inputs"], inputs):
        drop(folder, "step")
    if kind_of(folder) is None:
        mark(folder, "step")
    write_json(record, {"inputs": inputs, "result": None})


def _comparable(theirs: dict[str, Any], ours: dict[str, Any], name: str, late: set[str]) -> dict[str, Any]:
    """The inputs of a record of the stage `name`, less those that are not known yet of the stages `late`."""
    return {
        key: value
        for key, value in theirs.items()
        if key in ours or not ({name, *key.split(".")[:-1]} & late and key.rpartition(".")[2] in LATER)
    }


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    theirs = {**{key: value for key, value in ours.items() if key.rpartition(".")[2] in LATER}, **theirs}
    return sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))


def _of_others(folder: Path, changes: Mapping[str, tuple[Any, Any]]) -> UserError:
    """The error for a result of other inputs; `changes` are their values there and now, by their names."""
    return UserError(
        f"{folder} was made with other settings or data ({describe_changes(changes)}): give a new --out, or "
        "--overwrite to repeat what depends on them"
    )


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """What differs, in words: the first names with their values there and now."""
    told: dict[str, None] = {}
    for key, (there, now) in changes.items():
        digest = DIGESTS.get(key.rpartition(".")[2])
        told[digest or f"{key}: {_shortened(there)} there, {_shortened(now)} now"] = None
    return "; ".join([*list(told)[:4], *([f"and {len(told) - 4} more"] if len(told) > 4 else [])])


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}..."
