"""Anchored self distillation, beyond the paper: every exit also predicts the features of a frozen encoder.

Clusters alone lose what the encoder that made them knew within and between clusters. The anchor keeps it: equation 4 of
the paper plus w sum_i (1 - cos(P_i F_i, z)), where z are the encoder's features of the same view, standardised per
dimension, F_i the features of exit i and P_i a linear predictor of its own, which is dropped after the training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import AnchoredConfig
from sssd_zoo.data.augment import BatchRandom, normalise, supervised_view
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.views import ViewBatch
from sssd_zoo.tasks.sssd import SelfDistillation


def anchor_loss(predictions: Sequence[Tensor], target: Tensor) -> Tensor:
    """The sum over exits of 1 - cos(prediction, target), the mean over the batch.

    Args:
        predictions: of the exits, [B, D] each.
        target: float32 [B, D].
    """
    cosines = [F.cosine_similarity(prediction.float(), target, dim=1).mean() for prediction in predictions]
    return (1 - torch.stack(cosines)).sum()


class FrozenEncoder(NamedTuple):
    """A network whose features the exits predict, and what standardises them.

    Attributes:
        network: a timm network with `num_classes=0`; None where its features come with the images.
        spec: what it wants of its images.
        feature_mean: float32 [D], of its features over the data.
        feature_std: float32 [D].
    """

    network: nn.Module | None
    spec: InputSpec
    feature_mean: Tensor
    feature_std: Tensor


class AnchoredSelfDistillation(SelfDistillation):
    """Self distillation whose exits also predict a frozen encoder's features of the view that they see.

    Args:
        model: see `LabelTask`.
        encoder: it stays as it is, in eval mode.
        config: of the method; `config.anchor` is the weight w.
        spec: see `Task`.
    """

    config: AnchoredConfig
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, model: nn.Module, encoder: FrozenEncoder, config: AnchoredConfig, spec: InputSpec) -> None:
        super().__init__(model, config, spec)
        self.weight = config.anchor or 0.0
        self.encoder = None if encoder.network is None else encoder.network.eval().requires_grad_(False)
        self.encoder_spec = encoder.spec
        self.register_buffer("feature_mean", encoder.feature_mean)
        self.register_buffer("feature_std", encoder.feature_std)
        width, dim = int(model.num_features), len(encoder.feature_mean)  # type: ignore[arg-type]
        self.predictors = nn.ModuleList(nn.Linear(width, dim) for _ in range(4))

    def train(self, mode: bool = True) -> "AnchoredSelfDistillation":
        """As a module's; the encoder stays in eval mode, or its BatchNorm would move."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def views(self, images: Tensor | ViewBatch, random: BatchRandom) -> dict[str, Any]:
        """One view as the network wants it, and as the encoder does, float32 [B, 3, side, side] each.

        Of images whose features are known, `features` instead of the latter, float16 [B, D].
        """
        if isinstance(images, ViewBatch):
            return {"images": self.inputs(images.images, images.views), "features": images.features}
        views = self.draw_views(images, random)
        size, mean, std = self.encoder_spec
        encoder = normalise(supervised_view(images, views, size, crop=self.config.crop), mean, std)
        return {"images": self.inputs(images, views), "encoder": encoder}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Equation 4, with the weighted anchor added, and the `anchor` by itself."""
        with torch.no_grad():
            features = self.encoder(batch["encoder"]) if self.encoder is not None else batch["features"]
            features = features.float()
            # A dimension that never moves, as of a dead ReLU, has nothing to predict.
            target = (features - self.feature_mean) * torch.where(self.feature_std > 1e-6, 1 / self.feature_std, 0.0)
        exits = self.model.forward_exits(batch["images"])  # type: ignore[operator]
        parts = self.distil(exits, batch["labels"])
        predictions = [predict(vectors) for predict, vectors in zip(self.predictors, exits.features, strict=True)]
        anchor = anchor_loss(predictions, target)
        return {**parts, "loss": parts["loss"] + self.weight * anchor, "anchor": anchor.detach()}
