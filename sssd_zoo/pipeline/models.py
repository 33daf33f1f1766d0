"""`sssd models`: the networks of this package and the bundled weights."""

from typing import Any

import timm

from sssd_zoo.configs import ModelsArgs
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.bundled import cards_folder


def models(args: ModelsArgs) -> None:
    """`sssd models`."""
    names = [name for name in timm.list_models(args.pattern) if name.startswith("sssd_")]
    if not names:
        raise UserError(
            f"no network of this package matches '{args.pattern}'; it has {', '.join(timm.list_models('sssd_*'))}"
        )
    print(f"{'model':20} {'px':>4} {'parameters':>11}  MACs (millions): exit 1, 2, 3, 4 (trunk), all; exit heads")
    for name in names:
        print(architecture_line(name))
    tags = [tag for name in names for tag in timm.list_pretrained(f"{name}.*")]
    if tags:
        print(
            f"\n{'pretrained=True':30} linear-probe accuracy (%): exit 1, 2, 3, 4, ensemble; trained without labels on"
        )
    for tag in tags:
        print(weights_line(tag))


def architecture_line(name: str) -> str:
    """Size and cost of a network at the image size that its stem is made for."""
    size, classes = (32, 10) if name.endswith("_cifar") else (224, 1000)
    # On this device there are no weights to allocate and initialise.
    model: Any = timm.create_model(name, num_classes=classes, device="meta")
    costs = multiply_adds(model, (3, size, size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = 100 * (costs["ensemble"] - costs["4"]) / costs["4"]
    millions = " ".join(f"{costs[key] / 1e6:8.1f}" for key in ("1", "2", "3", "4", "ensemble"))
    return f"{name:20} {size:4} {parameters / 1e6:9.1f} M  {millions}  +{heads:.1f} %"


def weights_line(tag: str) -> str:
    """Accuracies of bundled weights, and what they were trained on."""
    results = read_json(cards_folder() / tag / "metrics.json")
    values = [value for row in results.get("accuracy", [])[:1] for value in (*row["exits"], row["ensemble"])]
    accuracies = " ".join(f"{value:6.2f}" for value in values) or "not measured"
    return f"{tag:30} {accuracies}  {results['data']}, {results['images']:,} images, seed {results['seed']}"
