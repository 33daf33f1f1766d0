"""`sssd models`: the networks of this package and the bundled weights.

It reads files only. Building the networks gives the same figures, as a test checks, but timm takes seconds to import;
`python docs/model_table.py` writes `models/costs.json` anew.
"""

from fnmatch import fnmatch
from typing import Any

from sssd_zoo.configs import ModelsArgs
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json
from sssd_zoo.files.bundled import PACKAGE, cards_folder

COSTS = PACKAGE / "models/costs.json"


def models(args: ModelsArgs) -> None:
    """`sssd models`."""
    costs = read_json(COSTS)
    names = [name for name in costs if fnmatch(name, args.pattern)]
    if not names:
        raise UserError(f"no network of this package matches '{args.pattern}'; it has {', '.join(costs)}")
    print(f"{'model':20} {'px':>4} {'parameters':>11}  MACs (millions): exit 1, 2, 3, 4 (trunk), all; exit heads")
    for name in names:
        print(architecture_line(name, costs[name]))
    tags = [folder.name for name in names for folder in sorted(cards_folder().glob(f"{name}.*"))]
    if tags:
        print(
            f"\n{'pretrained=True':30} linear-probe accuracy (%): exit 1, 2, 3, 4, ensemble; trained without labels on"
        )
    for tag in tags:
        print(weights_line(tag))


def architecture_line(name: str, cost: dict[str, Any]) -> str:
    """Size and cost of a network at the image size that its stem is made for."""
    macs = cost["macs"]
    heads = 100 * (macs["ensemble"] - macs["4"]) / macs["4"]
    millions = " ".join(f"{macs[key] / 1e6:8.1f}" for key in ("1", "2", "3", "4", "ensemble"))
    return f"{name:20} {cost['image_size']:4} {cost['parameters'] / 1e6:9.1f} M  {millions}  +{heads:.1f} %"


def weights_line(tag: str) -> str:
    """Accuracies of bundled weights, and what they were trained on."""
    results = read_json(cards_folder() / tag / "metrics.json")
    values = [value for row in results.get("accuracy", [])[:1] for value in (*row["exits"], row["ensemble"])]
    accuracies = " ".join(f"{value:6.2f}" for value in values) or "not measured"
    return f"{tag:30} {accuracies}  {results['data']}, {results['images']:,} images, seed {results['seed']}"
