"""What the engine asks of a method."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sssd_zoo.configs import AugmentConfig, SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom, draw_views, normalise, put, supervised_view
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.mixing import blend, blend_labels, draw_mixing
from sssd_zoo.models.multi_exit import MultiExit, classifier_names


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
        fixed_shapes: whether the shapes are the same at every step, so that cuDNN may time its algorithms once.
        compiled: whether to compile what `views` computes on an accelerator.
        monitor: what measures the network after some epochs, if anything does.
    """

    global_batchnorm = True
    fixed_shapes = True
    compiled = False
    monitor: Monitor | None = None

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.size, self.mean, self.std = spec
        self._augment: dict[tuple[int, float | None], AugmentConfig] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What to train, as torch's optimisers take it: `params`, and `lr_scale` where a group's rate is not the run's.

        The first group's rate is the one in the log.
        """
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def views(self, images: Any, random: BatchRandom) -> dict[str, Any]:
        """Augments a batch on its device.

        Args:
            images: uint8 or uint16 [B, C, S, S], or a batch of the loader's own kind: this process's part of the
                global batch.
            random: the step's random numbers.

        Returns:
            What `forward` takes, less the labels.
        """
        raise NotImplementedError

    def resolve(self, augment: AugmentConfig, images: Tensor, blur: float | None = None) -> AugmentConfig:
        """The method's augmentations with all defaults, for images of these channels; resolved only once.

        Args:
            augment: of the method.
            images: [B, C, S, S].
            blur: the method's own `blur` where it is a contrastive one, else None.
        """
        channels = images.shape[1]
        key = (channels, blur)
        if key not in self._augment:
            self._augment[key] = augment.resolved(contrastive=blur is not None, channels=channels, blur=blur or 0.0)
        return self._augment[key]

    def before_step(self) -> None:
        """Called once before every optimiser step, however many batches it accumulates."""

    def after_step(self) -> None:
        """Called once after every optimiser step."""

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
        trunk_scale: learning rate of all but the classifiers and the exits, as a fraction of the run's.

    Attributes:
        averaged: the moving average of the network, where `config.ema` asks for one.
        trained: what a run keeps: `averaged` where it exists, otherwise `model`.
    """

    steps: Tensor

    def __init__(
        self, model: nn.Module, config: SelfDistillationConfig, spec: InputSpec, *, trunk_scale: float = 1.0
    ) -> None:
        super().__init__(spec)
        self.model, self.config, self.trunk_scale = model, config, trunk_scale
        self.averaged = copy.deepcopy(model).requires_grad_(False) if config.ema else None
        if self.averaged is not None:
            self.register_buffer("steps", torch.zeros(()))

    @property
    def trained(self) -> nn.Module:
        """The network to keep."""
        return self.model if self.averaged is None else self.averaged

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the averaged network, of weights and BatchNorm statistics; faster at first, as timm's ModelEmaV3 does.

        The decay of step t is min(ema, (1 + t) / (10 + t)), or the initial weights would stay in a short training.
        """
        if self.averaged is None:
            return
        weight = torch.clamp(9 / (10 + self.steps), min=1 - self.config.ema)
        for average, value in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight.to(value.dtype))
            else:
                average.copy_(value)
        self.steps += 1

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The classifiers and the exits, which may be new, and the rest at its own rate."""
        if self.trunk_scale == 1:
            return super().parameter_groups()
        exits = ("exit1", "exit2", "exit3") if isinstance(self.model, MultiExit) else ()
        heads = tuple(f"{name}." for name in (*classifier_names(self.model), *exits))
        named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        return [
            {"params": [value for name, value in named if name.startswith(heads)]},
            {
                "params": [value for name, value in named if not name.startswith(heads)],
                "lr_scale": self.trunk_scale,
            },
        ]

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """One view, float32 [B, C, size, size]; see `mixed`."""
        return self.mixed({"images": self.inputs(images, self.draw_views(images, random))}, random)

    def mixed(self, batch: dict[str, Any], random: BatchRandom) -> dict[str, Any]:
        """A batch whose `images` are mixed as `config.mix` says, with the fraction of each that is its `own` image's.

        Args:
            batch: `images`, float32 [B, C, size, size], and others, which stay as they are.
            random: the step's random numbers.
        """
        if self.config.mix == "none":
            return batch
        images = batch["images"]
        own = put(draw_mixing(random, len(images), images.shape[-1], self.config.mix), images)
        mixed = blend(images, own).contiguous(memory_format=torch.channels_last)
        return {**batch, "images": mixed, "own": own.mean((1, 2, 3))}

    def labels_of(self, batch: dict[str, Any], classes: int) -> Tensor:
        """The labels of a batch: as they are, or float32 [B, classes] where its images are mixed."""
        labels: Tensor = batch["labels"]
        return blend_labels(labels, batch["own"], classes) if "own" in batch else labels

    def draw_views(self, images: Tensor, random: BatchRandom) -> Tensor:
        """Which part of each image is seen; see `augment.draw_views`."""
        config = self.config
        augment = self.resolve(config.augment, images)
        return draw_views(
            random, len(images), images.shape[-1], crop=config.crop, scale=config.crop_scale, augment=augment
        )

    def inputs(self, images: Tensor, views: Tensor) -> Tensor:
        """The network's inputs of images, uint8 or uint16 [B, C, S, S], and views: float32 [B, C, size, size]."""
        return normalise(supervised_view(images, views, self.size, crop=self.config.crop), self.mean, self.std)
