"""Anchored self distillation, beyond the paper: every exit also predicts the features of a frozen encoder.

Clusters alone lose what the encoder that made them knew within and between clusters. The anchor keeps it: equation 4 of
the paper plus w sum_i (1 - cos(P_i F_i, z)), where z are the encoder's features of the same view, standardised per
dimension, F_i the features of exit i and P_i a linear predictor of its own, which is dropped after the training. With
`config.dense` the network's last map predicts the encoder's last map in the same way, place by place: that adds
w mean_p (1 - cos(Q M_p, m_p)) over the places p of the smaller of the two maps, to which the other is averaged.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import AnchoredConfig
from sssd_zoo.data.augment import BatchRandom, normalise, supervised_view
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.mixing import blend
from sssd_zoo.data.views import ViewBatch
from sssd_zoo.models.exits import Exits
from sssd_zoo.models.maps import features_and_map, map_shape, spatial_map
from sssd_zoo.models.multi_exit import classifiers, feature_width
from sssd_zoo.tasks.base import LabelTask
from sssd_zoo.tasks.clusterfit import ClusterFit
from sssd_zoo.tasks.sssd import SelfDistillation


def anchor_loss(predictions: Sequence[Tensor], target: Tensor) -> Tensor:
    """The sum over exits of 1 - cos(prediction, target), the mean over the batch.

    Args:
        predictions: of the exits, [B, D] each.
        target: float32 [B, D].
    """
    cosines = [F.cosine_similarity(prediction.float(), target, dim=1).mean() for prediction in predictions]
    return (1 - torch.stack(cosines)).sum()


def dense_loss(predict: Callable[[Tensor], Tensor], last_map: Tensor, target: Tensor) -> Tensor:
    """1 - cos(prediction, target) of each place, the mean over places and the batch.

    Args:
        predict: a 1x1 convolution of C to D channels.
        last_map: of the network, [B, C, h, w]; averaged to the target's places.
        target: float32 [B, D, side, side]; averaged to the map's places where these are fewer, as with smaller views.
    """
    side = min(last_map.shape[-1], target.shape[-1])
    prediction = predict(F.adaptive_avg_pool2d(last_map, side))
    return 1 - F.cosine_similarity(prediction.float(), F.adaptive_avg_pool2d(target, side), dim=1).mean()


class FrozenEncoder(NamedTuple):
    """A network whose features the exits predict, and what standardises them.

    Attributes:
        network: a timm network with `num_classes=0`; None where its features come with the images.
        spec: what it wants of its images.
        feature_mean: float32 [D], of its features over the data; with those of its map, see `features_and_map`.
        feature_std: float32 [D].
        map_side: of its map in the features; 0 where there is none.
        map_channels: of its map in the features.
    """

    network: nn.Module | None
    spec: InputSpec
    feature_mean: Tensor
    feature_std: Tensor
    map_side: int = 0
    map_channels: int = 0


class Anchor(nn.Module):
    """What a method needs to be anchored: the frozen encoder, and a linear predictor of its features for each exit.

    Args:
        encoder: it stays as it is, in eval mode.
        width: of an exit's features.
        exits: number of exits.
        weight: w.
        map_width: channels of the network's last map, where that predicts the encoder's.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, encoder: FrozenEncoder, width: int, exits: int, weight: float, map_width: int) -> None:
        super().__init__()
        self.encoder = None if encoder.network is None else encoder.network.eval().requires_grad_(False)
        self.spec, self.weight = encoder.spec, weight
        self.register_buffer("feature_mean", encoder.feature_mean)
        self.register_buffer("feature_std", encoder.feature_std)
        self.side = encoder.map_side
        self.pooled = len(encoder.feature_mean) - encoder.map_channels * self.side**2
        self.predictors = nn.ModuleList(nn.Linear(width, self.pooled) for _ in range(exits))
        if self.side:
            self.map_predictor = nn.Conv2d(map_width, encoder.map_channels, 1)

    def train(self, mode: bool = True) -> "Anchor":
        """As a module's; the encoder stays in eval mode, or its BatchNorm would move."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def views(self, task: LabelTask, images: Tensor | ViewBatch, random: BatchRandom) -> dict[str, Any]:
        """One view as the task's network wants it, and as the encoder does, float32 [B, 3, side, side] each.

        Of images whose features are known, `features` instead of the latter, float16 [B, D]. The encoder never sees
        mixed images: its features of two are mixed instead, as their labels are.
        """
        if isinstance(images, ViewBatch):
            batch = {"images": task.inputs(images.images, images.views), "features": images.features}
            return task.mixed(batch, random)
        views = task.draw_views(images, random)
        size, mean, std = self.spec
        encoder = normalise(supervised_view(images, views, size, crop=task.config.crop), mean, std)
        return task.mixed({"images": task.inputs(images, views), "encoder": encoder}, random)

    @torch.no_grad()
    def target(self, batch: dict[str, Any]) -> Tensor:
        """The encoder's standardised features of a batch of `views`, float32 [B, D], with those of its map if asked."""
        if self.encoder is None:
            known: Tensor = batch["features"]
        else:
            known = features_and_map(self.encoder, batch["encoder"], self.side)
        # A dimension that never moves, as of a dead ReLU, has nothing to predict.
        scale = torch.where(self.feature_std > 1e-6, 1 / self.feature_std, 0.0)
        target = (known.float() - self.feature_mean) * scale
        return blend(target, batch["own"][:, None]) if "own" in batch else target

    def add(self, parts: dict[str, Tensor], features: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Adds the weighted anchor to the `loss` of a method's parts, and the `anchor` by itself.

        Args:
            parts: of the method.
            features: of the exits, [B, width] each.
            target: see `target`.
        """
        predictions = [predict(vectors) for predict, vectors in zip(self.predictors, features, strict=True)]
        anchor = anchor_loss(predictions, target[:, : self.pooled])
        return {**parts, "loss": parts["loss"] + self.weight * anchor, "anchor": anchor.detach()}

    def add_map(self, parts: dict[str, Tensor], last_map: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Adds the weighted `dense` loss of the network's last map, [B, map_width, h, w]; see `add`."""
        target_map = target[:, self.pooled :].unflatten(1, (-1, self.side, self.side))
        dense = dense_loss(self.map_predictor, last_map, target_map)
        return {**parts, "loss": parts["loss"] + self.weight * dense, "dense": dense.detach()}


class Anchored(LabelTask):
    """A method with an anchor: what `AnchoredSelfDistillation` and `AnchoredClusterFit` add to theirs.

    Args:
        model: see `LabelTask`.
        encoder: what is predicted.
        config: of the method; `config.anchor` is the weight w.
        spec: see `Task`.

    Attributes:
        exits: number of exits whose features predict the encoder's.
    """

    exits: int

    def __init__(self, model: nn.Module, encoder: FrozenEncoder, config: AnchoredConfig, spec: InputSpec) -> None:
        super().__init__(model, config, spec)
        width = feature_width(model)
        map_width = map_shape(model, spec.size)[0] if encoder.map_side else 0
        self.anchor = Anchor(encoder, width, self.exits, config.anchor or 0.0, map_width)
        self.clusters = config.clusters

    def views(self, images: Tensor | ViewBatch, random: BatchRandom) -> dict[str, Any]:
        """See `Anchor.views`."""
        return self.anchor.views(self, images, random)

    def anchored(
        self, parts: dict[str, Tensor], features: Sequence[Tensor], last: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """A method's parts with the anchor of the exits' features added, and of the last stage's result if asked."""
        target = self.anchor.target(batch)
        parts = self.anchor.add(parts, features, target)
        return self.anchor.add_map(parts, spatial_map(last, self.model), target) if self.anchor.side else parts

    def below(self, features: Tensor) -> Tensor:
        """Features as the classifiers see them: without a gradient where the clusters are not to change them."""
        return features if self.clusters else features.detach()


class AnchoredSelfDistillation(Anchored, SelfDistillation):
    """Self distillation whose exits also predict a frozen encoder's features of the view that they see."""

    exits = 4

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Equation 4 with the anchor added."""
        exits, last = self.model.exits_and_map(batch["images"])  # type: ignore[operator]
        features = exits.features
        if not self.clusters:
            below = [self.below(vectors) for vectors in features]
            logits = [classify(vectors) for classify, vectors in zip(classifiers(self.model), below, strict=True)]
            exits = Exits(logits, below)
        parts = self.distil(exits, self.labels_of(batch, exits.logits[-1].shape[1]))
        return self.anchored(parts, features, last, batch)


class AnchoredClusterFit(Anchored, ClusterFit):
    """ClusterFit whose features also predict a frozen encoder's: what the anchor does without exits."""

    exits = 1

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The cross-entropy with the anchor added."""
        model: Any = self.model
        last = model.forward_features(batch["images"])
        features = model.forward_head(last, pre_logits=True)
        logits = model.get_classifier()(self.below(features))
        return self.anchored(self.fit(logits, self.labels_of(batch, logits.shape[1])), [features], last, batch)
