"""Steps that are done once: what `sssd fit` and `sssd compare` are made of."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from sssd_zoo.distributed import barrier, rank
from sssd_zoo.engine import machine
from sssd_zoo.files import read_json, write_json


class Record(TypedDict):
    """What steps/ keeps of a step: what it was made of, and what it gave; None while it runs."""

    inputs: dict[str, Any]
    result: dict[str, Any] | None


class Stages:
    """Runs steps once: a step that has a result of the same inputs is skipped.

    The inputs of a step are its settings and the inputs of all steps before it, so a change runs it and all after it
    again, and what does not depend on it stays.

    Args:
        out: the run folder.
        inputs: what all steps depend on.
    """

    def __init__(self, out: Path, inputs: dict[str, Any]) -> None:
        self.out, self.common = out, inputs
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
    ) -> dict[str, Any]:
        """Runs one step, or takes its result as it is.

        Args:
            name: of the step and its folder.
            step: does it, into the folder given; its result is kept in steps/.
            settings: that decide its numbers; they take the place of the common inputs of the same names.
            after: the steps whose results it reads.
            all_processes: every process takes part (training); else the main one alone.

        Returns:
            The step's result and its `seconds`.
        """
        folder, record = self.out / name, self.out / "steps" / f"{name}.json"
        inputs = {**self.common, **settings}
        for earlier in after:
            added = {k: v for k, v in self.inputs[earlier].items() if k not in self.common or self.common[k] != v}
            inputs |= {f"{earlier}.{key}": value for key, value in added.items()}
        self.inputs[name] = inputs = json.loads(json.dumps(inputs))
        before = read_json(record, Record) if record.exists() and folder.exists() else None
        barrier()
        if before is not None and before["inputs"] == inputs and before["result"] is not None:
            say(f"[{name}] done before")
            self.results[name] = before["result"]
            return self.results[name]
        if before is not None and before["inputs"] != inputs:
            theirs = before["inputs"]
            changed = sorted(key for key in theirs.keys() | inputs.keys() if theirs.get(key) != inputs.get(key))
            say(f"[{name}] done again, for other {', '.join(changed[:5])}")
        say(f"[{name}] -> {folder}")
        if rank() == 0:
            if before is None or before["inputs"] != inputs:
                shutil.rmtree(folder, ignore_errors=True)
            write_json(record, {"inputs": inputs, "result": None})
        barrier()
        began = time.perf_counter()
        result = step(folder) if all_processes or rank() == 0 else {}
        barrier()
        if rank() == 0:
            seconds = round(time.perf_counter() - began, 1)
            write_json(record, {"inputs": inputs, "result": {"seconds": seconds, **result}})
        barrier()
        self.results[name] = read_json(record, Record)["result"]
        return self.results[name]


def machine_words(precision: str) -> str:
    """What computes, in words."""
    found = machine()
    processes = f"{found['processes']} x " if found["processes"] > 1 else ""
    return f"{found['device']}, {processes}{found['threads']} threads, torch {found['torch']}, {precision}"


def say(text: str) -> None:
    """Prints on the main process."""
    if rank() == 0:
        print(text, flush=True)
