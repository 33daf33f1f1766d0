"""What a network is trained on: the one form that labels of any origin have for the training."""

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from sssd_zoo.data.inputs import InputSpec


class Targets(Protocol):
    """The labels of all images: a tensor int64 [N], or soft ones that are made on demand."""

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """The labels of some images.

        Args:
            positions: of the images, int64 [b].

        Returns:
            int64 [b], or soft ones, float32 [b, K].
        """
        ...


class Labels(Protocol):
    """What a network is trained on, whatever it comes from.

    Attributes:
        num_classes: K; hard labels are in 0..K-1.
        identity: what tells these labels from others, for the check on resume.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def identity(self) -> str:
        """A fingerprint, or a description where the labels are only made during the training."""
        ...

    def attach(self, network: nn.Module, out: Path, spec: InputSpec, steps_per_epoch: int) -> None:
        """Called once before the training with the network that is trained, for labels that come of it.

        Args:
            network: neither wrapped nor compiled.
            out: the run folder.
            spec: what the network wants of its images.
            steps_per_epoch: of the training.
        """
        ...

    def for_epoch(self, epoch: int, step: int = 0) -> Targets:
        """The labels of an epoch.

        Args:
            epoch: its number, from 0.
            step: the one in it that a resumed run continues from; 0 at the start of the epoch.
        """
        ...
