"""What the engine asks of a method."""

from typing import Any

from torch import Tensor, nn

from sssd_zoo.data.augment import BatchRandom


class Task(nn.Module):
    """A method: views of a batch in, its loss and the parts of it out.

    Everything that a resumed run needs (a queue, a second encoder) is a parameter or a buffer of the module, so that
    the engine's checkpoint holds it.

    Attributes:
        global_batchnorm: whether BatchNorm's statistics are to be those of the global batch, of all processes.
    """

    global_batchnorm = True

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """Augments a batch on its device.

        Args:
            images: uint8 [B, 3, S, S], this process's part of the global batch.
            random: the step's random numbers.

        Returns:
            What `forward` takes, less the labels.
        """
        raise NotImplementedError

    def before_step(self) -> None:
        """Called once before every optimiser step, however many batches it accumulates."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            batch: of `views`, and `labels`, int64 [B], where the run has them.

        Returns:
            `loss`, a scalar with a gradient, and any further scalars for the log. All are means over the process's
            part of the batch.
        """
        raise NotImplementedError
