"""Labels of any origin, by the name that `sssd distill --labels` gives them."""

from typing import Literal

from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed.hardware import autocast_dtype
from sssd_zoo.errors import UserError
from sssd_zoo.labels.fixed import FixedLabels
from sssd_zoo.labels.online import OnlineLabels, epochs_to_keep
from sssd_zoo.labels.protocol import Labels
from sssd_zoo.labels.pseudo_labels import PseudoLabels, random_labels
from sssd_zoo.labels.soft import SoftLabels

Name = Literal["random", "true", "own"]


def pseudo_labels_for(data: ImageData, pseudo: PseudoLabels, soft: float | None = None) -> Labels:
    """Pseudo labels for the images that they were made from: hard, or soft by a temperature.

    Raises:
        UserError: if they were made from other images, or keep too little to be soft.
    """
    pseudo.check(data.fingerprint, len(data))
    return FixedLabels(pseudo.labels_of(data.rows)) if soft is None else SoftLabels(pseudo, data.rows, soft)


def labels_by_name(name: Name, data: ImageData, k: int, runtime: RuntimeConfig) -> Labels:
    """Labels that need no folder.

    Args:
        name: 'random', 'true', or 'own' for clusters of the features of the network that is trained (DACSD).
        data: the images.
        k: number of classes of 'random' and 'own'.
        runtime: its seed is theirs, and its precision that of the forward passes of 'own'.

    Raises:
        UserError: if so many images do not make so many classes, or have no true labels.
    """
    if name == "random":
        return FixedLabels(random_labels(len(data), k, runtime.seed))
    if name == "own":
        autocast = autocast_dtype(runtime.precision, runtime.device)
        return OnlineLabels(data, k, runtime.seed, autocast=autocast, kept=epochs_to_keep(runtime))
    if data.labels is None:
        raise UserError(f"{data.name} has no true labels to train on")
    return FixedLabels(data.labels)
