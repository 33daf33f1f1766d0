"""What the engine asks of a method."""

from typing import Any, Protocol

from torch import Tensor, nn

from sssd_zoo.configs import SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom, draw_views, normalise, supervised_view
from sssd_zoo.data.inputs import InputSpec


class Monitor(Protocol):
    """What looks at a network while it is trained, without touching the training."""

    @property
    def best_by(self) -> str:
        """The figure, higher being better, that the checkpoints to keep as the best are chosen by, or 'loss'."""
        ...

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to measure after this epoch, counted from 0, of so many."""
        ...

    def measure(self) -> dict[str, float]:
        """The figures of the network as it is now, for the log; called in the main process alone."""
        ...


class Task(nn.Module):
    """A method: views of a batch in, its loss and the parts of it out.

    Everything that a resumed run needs (a queue, a second encoder) is a parameter or a buffer of the module, so that
    the engine's checkpoint holds it.

    Args:
        spec: side of the views, and what they are normalised by.

    Attributes:
        size: side of the views in pixels; the engine changes it where a training goes through several.
        global_batchnorm: whether BatchNorm's statistics are to be those of the global batch, of all processes.
        compiled: whether to compile what `views` computes on an accelerator.
        monitor: what measures the network after some epochs, if anything does.
    """

    global_batchnorm = True
    compiled = False
    monitor: Monitor | None = None

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.size, self.mean, self.std = spec

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What to train, as torch's optimisers take it: `params`, and `lr_scale` where a group's rate is not the run's.

        The first group's rate is the one in the log.
        """
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def views(self, images: Any, random: BatchRandom) -> dict[str, Any]:
        """Augments a batch on its device.

        Args:
            images: uint8 [B, 3, S, S], or a batch of the loader's own kind: this process's part of the global batch.
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
            batch: of `views`, and `labels` where the run has them: int64 [B], or soft, float32 [B, K].

        Returns:
            `loss`, a scalar with a gradient, and any further scalars for the log. All are means over the process's
            part of the batch.
        """
        raise NotImplementedError


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """The fraction of images whose label, or the greatest of a soft one, is the first answer: a scalar."""
    return (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).float().mean()


class LabelTask(Task):
    """A method that trains a classifier on labels of any origin: one cropped and flipped view of each image.

    Args:
        model: a timm network with one class per label.
        config: of the views and, for methods that have weights, of the loss.
        spec: see `Task`.
        trunk_scale: learning rate of all but the classifiers, as a fraction of the run's.
    """

    def __init__(
        self, model: nn.Module, config: SelfDistillationConfig, spec: InputSpec, *, trunk_scale: float = 1.0
    ) -> None:
        super().__init__(spec)
        self.model, self.config, self.trunk_scale = model, config, trunk_scale

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The classifiers, and the rest at its own rate."""
        if self.trunk_scale == 1:
            return super().parameter_groups()
        names = self.model.pretrained_cfg["classifier"]  # type: ignore[index]  # a name, or several
        heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        return [
            {"params": [value for name, value in named if name.startswith(heads)]},
            {
                "params": [value for name, value in named if not name.startswith(heads)],
                "lr_scale": self.trunk_scale,
            },
        ]

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """One view, float32 [B, 3, size, size]."""
        return {"images": self.inputs(images, self.draw_views(images, random))}

    def draw_views(self, images: Tensor, random: BatchRandom) -> Tensor:
        """Which part of each image is seen; see `augment.draw_views`."""
        config = self.config
        return draw_views(random, len(images), images.shape[-1], crop=config.crop, scale=config.crop_scale)

    def inputs(self, images: Tensor, views: Tensor) -> Tensor:
        """The network's inputs of images, uint8 [B, 3, S, S], and views of them: float32 [B, 3, size, size]."""
        return normalise(supervised_view(images, views, self.size, crop=self.config.crop), self.mean, self.std)
