"""Where the files lie that come with the package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def cards_folder() -> Path:
    """The folder of the cards of the bundled weights and of the templates: in the wheel, else in the checkout."""
    installed = PACKAGE / "hub_cards"
    return installed if installed.is_dir() else PACKAGE.parent / "hub_cards"
