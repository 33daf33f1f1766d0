"""Writes the README's table of pretrained networks from hub_cards/: `python docs/model_table.py`."""

import sys
from pathlib import Path

from sssd_zoo.evaluation.reports.markdown import duration, table
from sssd_zoo.files import atomic_write_text, read_json

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- pretrained networks: docs/model_table.py -->\n", "<!-- end -->\n"


def model_table(cards: Path) -> str:
    """One row for each folder in `cards`, in order of names, from its metrics.json."""
    rows = []
    for folder in sorted(path.parent for path in cards.glob("*/metrics.json")):
        results = read_json(folder / "metrics.json")
        ours = results["accuracy"][0]
        # A network that was trained on from its own earlier weights keeps the records of those trainings beside it.
        slices = [*map(read_json, sorted(folder.glob("slices/*/metrics.json"))), results]
        time = duration(sum(step["seconds"] for part in slices for step in part["times"]))
        if len(slices) > 1:
            time += f" in {len(slices)} slices"
        machines = dict.fromkeys(
            part["machine"].split(", torch")[0].replace(", 1 threads", ", 1 thread") for part in slices
        )
        rows.append(
            [
                f"[`{folder.name}`](hub_cards/{folder.name}/README.md)",
                f"{results['data']}, {results['images']:,} images at {results['image_size']} px",
                *(f"{value:.2f}" for value in (*ours["exits"], ours["ensemble"])),
                f"{time}, {', then '.join(machines)}",
            ]
        )
    head = ["name", "trained without labels on", "exit 1", "exit 2", "exit 3", "exit 4", "ensemble", "training"]
    return "\n".join(table(head, rows)) + "\n"


def with_table(readme: str, rows: str) -> str:
    """The README with the table between its two marks replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def main() -> None:
    """Rewrites README.md; with `--check` only says whether it is current, by the exit status."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    current = with_table(readme, model_table(ROOT / "hub_cards"))
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if current == readme else "README.md: run `python docs/model_table.py`")
    atomic_write_text(ROOT / "README.md", current)


if __name__ == "__main__":
    main()
