"""What goes to the Hugging Face Hub: cards, publishing, Spaces."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sssd_zoo.hub.model_card import model_card, save_model_folder
    from sssd_zoo.models.saving import save_network

__all__ = ["model_card", "save_model_folder", "save_network"]


def __getattr__(name: str) -> Any:  # on demand, as a Space has the page of this package and little else
    modules = dict.fromkeys(__all__, "hub.model_card") | {"save_network": "models.saving"}
    if name not in modules:
        raise AttributeError(f"module 'sssd_zoo.hub' has no attribute '{name}'")
    return getattr(import_module(f"sssd_zoo.{modules[name]}"), name)
