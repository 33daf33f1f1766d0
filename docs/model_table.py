"""Writes the README's table of pretrained networks, and what `sssd models` lists: `python docs/model_table.py`."""

import sys
from pathlib import Path
from typing import Any

import timm

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.evaluation.reports.markdown import exact_duration, table
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.backbones import ANY
from sssd_zoo.pipeline.models import COSTS

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- pretrained networks: docs/model_table.py -->\n", "<!-- end -->\n"


def model_table(cards: Path) -> str:
    """One row for each folder in `cards`, in order of names, from its metrics.json."""
    rows = []
    for folder in sorted(path.parent for path in cards.glob("*/metrics.json")):
        results = read_json(folder / "metrics.json")
        ours = results["accuracy"][0]
        time = exact_duration(sum(step["seconds"] for step in results["times"]))
        machine = results["machine"].split(", torch")[0]
        rows.append(
            [
                f"[`{folder.name}`](hub_cards/{folder.name}/README.md)",
                f"{results['data']}, {results['images']:,} images at {results['image_size']} px"
                + (f", from the features of `{results['encoder']}`" if "encoder" in results else ""),
                *(f"{value:.2f}" for value in (*ours["exits"], ours["ensemble"])),
                f"{time}, {machine}",
            ]
        )
    exits = ["exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    return "\n".join(table(["name", "trained without labels on", *exits, "time and machine"], rows)) + "\n"


def with_table(readme: str, rows: str) -> str:
    """The README with the table between its two marks replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def model_costs() -> dict[str, Any]:
    """Parameters and MACs of every network of this package, at the image size that its stem is made for."""
    costs = {}
    for name in timm.list_models("sssd_*", exclude_filters=ANY):  # that one stands for all others
        size, classes = (32, 10) if name.endswith("_cifar") else (224, 1000)
        # On this device there are no weights to allocate and initialise.
        network: Any = timm.create_model(name, num_classes=classes, device="meta")
        parameters = sum(parameter.numel() for parameter in network.parameters())
        costs[name] = {"image_size": size, "parameters": parameters, "macs": multiply_adds(network, (3, size, size))}
    return costs


def main() -> None:
    """Rewrites README.md and costs.json; with `--check` only says whether they are current, by the exit status."""
    costs = model_costs()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    current = with_table(readme, model_table(ROOT / "hub_cards"))
    if "--check" in sys.argv[1:]:
        good = current == readme and costs == read_json(COSTS)
        raise SystemExit(0 if good else "README.md or costs.json is not current: run `python docs/model_table.py`")
    write_json(COSTS, costs)
    atomic_write_text(ROOT / "README.md", current)


if __name__ == "__main__":
    main()
