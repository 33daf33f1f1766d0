"""Which steps a run's network and report were made of: an interrupted `sssd fit --overwrite` leaves newer ones."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.files import read_json


def digests(run: Path, steps: Iterable[str]) -> dict[str, str]:
    """The sha256 of what the records of steps say of their inputs and results, by the names of those that are done."""
    found = {}
    for name in steps:
        path = run / "steps" / f"{name}.json"
        record = read_json(path) if path.is_file() else None
        if isinstance(record, dict) and record.get("result") is not None:
            content = json.dumps([record.get("inputs"), record["result"]], sort_keys=True)
            found[name] = hashlib.sha256(content.encode()).hexdigest()
    return found


def newer(run: Path) -> list[str]:
    """The steps that were made again, or begun again, after the network and the report of a run.

    None where there is no report yet, or it is of an earlier version, which did not record its steps.
    """
    path = run / "metrics.json"
    results = read_json(path) if path.is_file() else None
    made_of = results.get("steps") if isinstance(results, dict) else None
    if not isinstance(made_of, dict):
        return []
    now = digests(run, made_of)
    return [name for name, digest in made_of.items() if now.get(name) != digest]


def check_of_one_piece(run: Path) -> None:
    """Refuses a run whose network and report were made of other steps than lie in it now.

    Raises:
        UserError: that says what to do.
    """
    try:
        again = newer(run)
    except UserError as error:
        raise UserError(f"{error}; run the command that made {run} again, which repairs it") from error
    if again:
        raise UserError(
            f"{run} is not finished: a `sssd fit` was interrupted after it had made {listed(again)} again, and the "
            "network and the report are those of before; run that command again, with --overwrite if it had that"
        )
