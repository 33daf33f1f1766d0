"""Self-supervised self distillation: multi-exit ResNets for timm. Importing the package registers the models."""

from sssd_zoo.errors import quiet_start

with quiet_start():
    from importlib.metadata import PackageNotFoundError, version

    from sssd_zoo import models

    try:
        __version__ = version("sssd-zoo")
    except PackageNotFoundError:  # run from a checkout that is not installed
        __version__ = "0+unknown"

__all__ = ["__version__", "models"]
