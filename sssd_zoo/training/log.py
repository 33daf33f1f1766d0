"""What a training writes while it runs: metrics.jsonl and the trackers."""

import json
import os
from pathlib import Path
from typing import Any

from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.files import atomic_write_text, disk_errors
from sssd_zoo.files.json_lines import read_metrics


class Log:
    """metrics.jsonl and the trackers; only the main process writes.

    Lines are appended. A resumed run first drops those after its checkpoint, and a half line that a kill may have left,
    so that its file ends up the same as that of a run that was never killed.

    Args:
        out: the run folder.
        config: says which trackers.
        step: optimiser steps done, more than 0 in a resumed run.
        is_main: whether this is the main process.
    """

    def __init__(self, out: Path, config: RuntimeConfig, step: int, is_main: bool) -> None:
        self.path, self.is_main = out / "metrics.jsonl", is_main
        self.tensorboard: Any = None
        self.trackio: Any = None
        if not is_main:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if "tensorboard" in config.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        if "trackio" in config.trackers:
            os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
            import trackio

            self.trackio = trackio
            trackio.init(project="sssd-zoo", name=out.name, embed=False)

    def write(self, values: dict[str, float]) -> None:
        """Appends a line of numbers, one of which is `step`."""
        if not self.is_main:
            return
        step = int(values["step"])
        with disk_errors(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            if self.tensorboard is not None:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, step)
        if self.trackio is not None:
            self.trackio.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def close(self) -> None:
        """Flushes the trackers."""
        if self.tensorboard is not None:
            with disk_errors(self.path):
                self.tensorboard.close()
        if self.trackio is not None:
            self.trackio.finish()
