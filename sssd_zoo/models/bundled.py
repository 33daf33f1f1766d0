"""The weights that come with the package."""

from pathlib import Path
from typing import Any

import timm

from sssd_zoo.errors import UserError
from sssd_zoo.files import damage, read_json
from sssd_zoo.files.bundled import PACKAGE, cards_folder


def bundled_name(name: str) -> str:
    """The full name of bundled weights, MODEL.TAG, from that or from the model's name alone.

    Raises:
        UserError: if there are none.
    """
    known = timm.list_pretrained("sssd_*")
    if name in known:
        return name
    if name in {each.split(".")[0] for each in known}:
        default: Any = timm.get_pretrained_cfg(name)
        return f"{name}.{default.tag}"
    raise UserError(
        f"there are no bundled weights '{name}'; there are {', '.join(known)}, and ORG/NAME names some on the Hub"
    )


def bundled_weights(name: str) -> Path | None:
    """The file of the weights of MODEL.TAG, or of the model's default tag; None if they are not bundled."""
    config = timm.get_pretrained_cfg(name)
    file = Path(config.file) if config is not None and config.file else None
    return file if file is not None and file.parent == PACKAGE / "weights" else None


def check_bundled(weights: Path) -> None:
    """Refuses bundled weights whose sha256 is not the one on their card.

    Raises:
        UserError: if they differ, are cut short or missing.
    """
    card = read_json(cards_folder() / weights.stem / "metrics.json")
    if problem := damage(weights.parent, {weights.name: card["weights"]["sha256"]}):
        raise UserError(f"the bundled weights in {weights.parent} are damaged: {problem}; reinstall sssd-zoo")
