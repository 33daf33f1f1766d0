"""Self-supervised self distillation: multi-exit networks for timm. Importing the package registers the models.

timm takes seconds to import, and reading a command's arguments does without it. So the models are registered at once
where timm is imported already, and as soon as it is imported otherwise: `timm.create_model` finds them either way.

The commands are functions here, such as `sssd_zoo.fit`; see `sssd_zoo.api`, which is imported with the first of them.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `__getattr__` imports them
    from sssd_zoo.api import (
        distill,
        early_exit,
        embed,
        export,
        finetune,
        fit,
        knn,
        linear,
        predict,
        pretrain,
        pseudo_label,
    )

__all__ = [
    "__version__",
    "distill",
    "early_exit",
    "embed",
    "export",
    "finetune",
    "fit",
    "knn",
    "linear",
    "models",
    "predict",
    "pretrain",
    "pseudo_label",
]


class _AfterTimm(MetaPathFinder):
    """Imports `sssd_zoo.models` right after timm."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Timm's spec as the other finders have it, with a loader that imports the models at its end."""
        if fullname != "timm":
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("sssd_zoo.models")
                sys.meta_path.remove(self)  # not before: after a Ctrl-C in between, timm is imported anew

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("sssd_zoo.models")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("sssd-zoo")
        except PackageNotFoundError:  # run from a checkout that is not installed
            return "0+unknown"
    if name in __all__:
        return getattr(importlib.import_module("sssd_zoo.api"), name)
    raise AttributeError(f"module 'sssd_zoo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "timm" in sys.modules:
    importlib.import_module("sssd_zoo.models")
else:
    sys.meta_path.insert(0, _AfterTimm())
