"""`sssd models`: the networks of this package and the bundled weights."""

from typing import Any

import timm

from sssd_zoo.configs import ModelsArgs
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.networks import hub_cards


def models(args: ModelsArgs) -> None:
    """`sssd models`."""
    names = [name for name in timm.list_models(args.pattern) if name.startswith("sssd_")]
    if not names:
        raise UserError(
            f"no network of this package matches '{args.pattern}'; it has {', '.join(timm.list_models('sssd_*'))}"
        )
    print(
        f"{'model':20} {'px':>4} {'parameters':>11}  multiply-adds (millions): exit 1, 2, 3, 4 (trunk), all; exit heads"
    )
    for name in names:
        # What the stem is made for, whatever the weights that ship were trained on.
        size, classes = (32, 10) if name.endswith("_cifar") else (224, 1000)
        model: Any = timm.create_model(name, num_classes=classes)
        costs = multiply_adds(model, (3, size, size))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        heads = 100 * (costs["ensemble"] - costs["4"]) / costs["4"]
        millions = " ".join(f"{costs[key] / 1e6:8.1f}" for key in ("1", "2", "3", "4", "ensemble"))
        print(f"{name:20} {size:4} {parameters / 1e6:9.1f} M  {millions}  +{heads:.1f} %")
    tags = [tag for name in names for tag in timm.list_pretrained(f"{name}.*")]
    if tags:
        print(
            f"\n{'pretrained=True':30} linear-probe accuracy (%): exit 1, 2, 3, 4, ensemble; trained without labels on"
        )
    for tag in tags:
        results = read_json(hub_cards() / tag / "metrics.json")
        numbers = [value for row in results.get("accuracy", [])[:1] for value in (*row["exits"], row["ensemble"])]
        measured = " ".join(f"{value:6.2f}" for value in numbers) or "not measured"
        print(f"{tag:30} {measured}  {results['data']}, {results['images']:,} images, seed {results['seed']}")
