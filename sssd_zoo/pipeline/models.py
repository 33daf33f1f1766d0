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
    width = max(map(len, names))
    print(f"{'model':{width}} {'px':>4} {'parameters':>11}  MACs (millions): exit 1, 2, 3, 4 (trunk), all; exit heads")
    for name in names:
        print(architecture_line(name, costs[name], width))
    tags = [folder.name for name in names for folder in sorted(cards_folder().glob(f"{name}.*"))]
    if tags:
        width = max(map(len, tags))
        head = "linear-probe accuracy (%): exit 1, 2, 3, 4, ensemble; trained without labels on"
        print(f"\n{'pretrained=True':{width}} {head}")
    for tag in tags:
        print(weights_line(tag, width))


def architecture_line(name: str, cost: dict[str, Any], width: int) -> str:
    """Size and cost of a network at the image size that its stem is made for, the name in `width` columns."""
    macs = cost["macs"]
    heads = 100 * (macs["ensemble"] - macs["4"]) / macs["4"]
    millions = " ".join(f"{macs[key] / 1e6:8.1f}" for key in ("1", "2", "3", "4", "ensemble"))
    return f"{name:{width}} {cost['image_size']:4} {cost['parameters'] / 1e6:9.1f} M  {millions}  +{heads:.1f} %"


def weights_line(tag: str, width: int) -> str:
    """Accuracies of bundled weights, and what they were trained on, the name in `width` columns."""
    results = read_json(cards_folder() / tag / "metrics.json")
    values = [value for row in results.get("accuracy", [])[:1] for value in (*row["exits"], row["ensemble"])]
    accuracies = " ".join(f"{value:6.2f}" for value in values) or "not measured"
    return f"{tag:{width}} {accuracies}  {results['data']}, {results['images']:,} images, seed {results['seed']}"
