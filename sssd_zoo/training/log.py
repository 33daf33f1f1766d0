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

    A line is written at every `log_every` steps. The file is appended to; a resume first drops the lines after its
    checkpoint, and a half line that a kill may have left, so it ends as that of a run never killed.
    """

    def __init__(self, out: Path, config: RuntimeConfig, step: int, main: bool) -> None:
        self.path, self.main = out / "metrics.jsonl", main
        self.trackers: list[Any] = []
        if not main:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if "tensorboard" in config.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self.trackers.append(SummaryWriter(out / "tensorboard", purge_step=step + 1))
        self.trackio = None
        if "trackio" in config.trackers:
            os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
            import trackio

            self.trackio = trackio
            trackio.init(project="sssd-zoo", name=out.name, embed=False)

    def write(self, values: dict[str, float]) -> None:
        """Appends one line; `values` holds `step` and numbers."""
        if not self.main:
            return
        with disk_errors(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            for writer in self.trackers:
                for name, value in values.items():
                    writer.add_scalar(name, value, int(values["step"]))
        if self.trackio is not None:
            self.trackio.log(
                {name: value for name, value in values.items() if name != "step"}, step=int(values["step"])
            )

    def close(self) -> None:
        """Flushes the trackers."""
        with disk_errors(self.path):
            for writer in self.trackers:
                writer.close()
        if self.main and self.trackio is not None:
            self.trackio.finish()
