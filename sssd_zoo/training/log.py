"""What a training writes while it runs: metrics.jsonl and the trackers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.files import atomic_write_text, disk_errors
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.training.trackers import Trackers, grid_of_views


class Log:
    """metrics.jsonl and the trackers; only the main process writes.

    Lines are appended. A resumed run first drops those after its checkpoint, and a half line that a kill may have left,
    so that its file ends up the same as that of a run that was never killed.

    Args:
        out: the run folder.
        config: says which trackers.
        step: optimiser steps done, more than 0 in a resumed run.
        is_main: whether this is the main process.
        settings: of the training, for the trackers.
    """

    def __init__(self, out: Path, config: RuntimeConfig, step: int, is_main: bool, settings: dict[str, Any]) -> None:
        self.path, self.is_main = out / "metrics.jsonl", is_main
        self.trackers: Trackers | None = None
        if not is_main:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if config.trackers:
            self.trackers = Trackers(config.trackers, out, step, settings)

    def write(self, values: dict[str, float]) -> None:
        """Appends a line of numbers, one of which is `step`; any names, which the trackers get, too."""
        if not self.is_main:
            return
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self.trackers is not None:
            self.trackers.log({name: value for name, value in values.items() if name != "step"}, int(values["step"]))

    def write_views(self, batch: dict[str, Any], mean: Sequence[float], std: Sequence[float], step: int) -> None:
        """Gives the trackers, if there are any, a picture of a batch's augmented views; see `grid_of_views`."""
        if self.trackers is not None and (grid := grid_of_views(batch, mean, std)) is not None:
            self.trackers.log_image("views", grid, step)

    def close(self) -> None:
        """Flushes the trackers."""
        if self.trackers is not None:
            self.trackers.close()
