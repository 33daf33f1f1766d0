"""Reads JSON Lines files such as metrics.jsonl."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_metrics(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The records of a JSON Lines file, [] if it does not exist; an incomplete last line is ignored.

    A line that is damaged or has no `key` is reported on stderr and left out, as it should not end the run.
    """
    if not path.exists():
        return []
    metrics = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        values = None
        with suppress(ValueError):
            values = json.loads(line)
        if isinstance(values, dict) and key in values:
            metrics.append(values)
        elif line:
            print(f"warning: line {number} of {path} is damaged and left out", file=sys.stderr)
    return metrics
