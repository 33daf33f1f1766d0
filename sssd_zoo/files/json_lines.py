"""Reading of metrics.jsonl and its like."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_metrics(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] if there is none; a half line at its end, left by a kill, is ignored.

    A line that is damaged, or tells no `key`, is named on stderr and left out: it is worth less than the run.
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
