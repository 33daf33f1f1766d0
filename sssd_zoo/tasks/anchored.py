"""Anchored self distillation, beyond the paper: every exit also predicts the features of a frozen encoder.

Clusters alone lose what the encoder that made them knew within and between clusters. The anchor keeps it: equation 4 of
the paper plus w sum_i (1 - cos(P_i F_i, z)), where z are the encoder's features of the same view, standardised per
dimension, F_i the features of exit i and P_i a linear predictor of its own, which is dropped after the training. With
`config.dense` the network's last feature map M predicts the encoder's, m, position by position, by a 1x1 convolution Q:
that adds w mean_p (1 - cos(Q M_p, m_p)). The larger of the two maps is average-pooled to the size of the smaller.
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
from sssd_zoo.models.maps import MapShape, averaged, feature_map, features_and_map, map_shape
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
    """The mean over positions and the batch of 1 - cos(prediction, target).

    Args:
        predict: a 1x1 convolution of C to D channels.
        last_map: of the network, [B, C, h, w].
        target: float32 [B, D, side, side]. Small views may have fewer positions: the target is pooled to them.
    """
    side = min(last_map.shape[-1], target.shape[-1])
    prediction = predict(averaged(last_map, side))
    return 1 - F.cosine_similarity(prediction.float(), averaged(target, side), dim=1).mean()


class FrozenEncoder(NamedTuple):
    """A network whose features the exits predict, and what standardises them.

    Attributes:
        network: a timm network with `num_classes=0`; None where its features come with the images.
        spec: what it wants of its images.
        feature_mean: float32 [D], of its features over the data.
        feature_std: float32 [D].
        map_shape: of its feature map, which the features then end with, see `features_and_map`; None where the map is
            not predicted.
    """

    network: nn.Module | None
    spec: InputSpec
    feature_mean: Tensor
    feature_std: Tensor
    map_shape: MapShape | None = None


class Anchor(nn.Module):
    """What a method needs to be anchored: the frozen encoder, and linear predictors of its features and feature map.

    Args:
        encoder: it stays as it is, in eval mode.
        width: of an exit's features.
        exits: number of exits.
        weight: w.
        map_width: channels of the network's last feature map; used where that predicts the encoder's.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, encoder: FrozenEncoder, width: int, exits: int, weight: float, map_width: int) -> None:
        super().__init__()
        self.encoder = None if encoder.network is None else encoder.network.eval().requires_grad_(False)
        self.spec, self.weight = encoder.spec, weight
        self.register_buffer("feature_mean", encoder.feature_mean)
        self.register_buffer("feature_std", encoder.feature_std)
        self.map_shape = encoder.map_shape or MapShape(0, 0)
        self.pooled = len(encoder.feature_mean) - self.map_shape.numbers
        self.predictors = nn.ModuleList(nn.Linear(width, self.pooled) for _ in range(exits))
        if encoder.map_shape is not None:
            self.map_predictor = nn.Conv2d(map_width, encoder.map_shape.channels, 1)

    def train(self, mode: bool = True) -> "Anchor":
        """As a module's; the encoder stays in eval mode, or its BatchNorm would move."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def views(self, task: LabelTask, images: Tensor | ViewBatch, random: BatchRandom) -> dict[str, Any]:
        """One view as the task's network wants it, and as the encoder does, float32 [B, C, side, side] each.

        Of images whose features are known, `features` instead of the latter, float16 [B, D], see `target`. The encoder
        never sees mixed images: its features of two are mixed instead, as their labels are.
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
        """The encoder's standardised features of a batch of `views`, float32 [B, D]; its map at their end, if asked."""
        if self.encoder is None:
            known: Tensor = batch["features"]
        else:
            known = features_and_map(self.encoder, batch["encoder"], self.map_shape.side)
        # A dimension that never moves, as of a dead ReLU, has nothing to predict; nor has one of cached features, which
        # are float16, that moves less than they resolve.
        moves = self.feature_std > 1e-6
        if self.encoder is None:
            moves &= self.feature_std > self.feature_mean.abs() * 2**-11
        scale = torch.where(moves, 1 / self.feature_std, 0.0)
        target = (known.float() - self.feature_mean) * scale
        return blend(target, batch["own"][:, None]) if "own" in batch else target

    def add(
        self, parts: dict[str, Tensor], features: Sequence[Tensor], last_map: Tensor | None, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Adds the weighted anchor to the `loss` of a method's parts, and the `anchor` and `dense` by themselves.

        Args:
            parts: of the method.
            features: of the exits, [B, width] each.
            last_map: the network's last feature map, [B, map_width, h, w], where it predicts the encoder's.
            batch: of `views`.
        """
        target = self.target(batch)
        predictions = [predict(vectors) for predict, vectors in zip(self.predictors, features, strict=True)]
        losses = {"anchor": anchor_loss(predictions, target[:, : self.pooled])}
        if last_map is not None:
            maps = target[:, self.pooled :].unflatten(1, (self.map_shape.channels, self.map_shape.side, -1))
            losses["dense"] = dense_loss(self.map_predictor, last_map, maps)
        added = {name: loss.detach() for name, loss in losses.items()}
        return {**parts, "loss": parts["loss"] + self.weight * sum(losses.values()), **added}


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
        self.dense = encoder.map_shape is not None
        map_width = map_shape(model, spec.size).channels if self.dense else 0
        self.anchor = Anchor(encoder, width, self.exits, config.anchor or 0.0, map_width)
        self.clusters = config.clusters

    def views(self, images: Tensor | ViewBatch, random: BatchRandom) -> dict[str, Any]:
        """See `Anchor.views`."""
        return self.anchor.views(self, images, random)

    def add_anchor(
        self, parts: dict[str, Tensor], features: Sequence[Tensor], last: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """See `Anchor.add`; `last` is what the network's last stage gave, in its own layout."""
        return self.anchor.add(parts, features, feature_map(last, self.model) if self.dense else None, batch)

    def below(self, features: Tensor) -> Tensor:
        """Features as the classifiers see them: without a gradient where the clusters are not to change them."""
        return features if self.clusters else features.detach()


class AnchoredSelfDistillation(Anchored, SelfDistillation):
    """Self distillation whose exits, and last map if asked, also predict a frozen encoder's features of their view."""

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
        return self.add_anchor(parts, features, last, batch)


class AnchoredClusterFit(Anchored, ClusterFit):
    """ClusterFit whose features also predict a frozen encoder's: what the anchor does without exits."""

    exits = 1

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The cross-entropy with the anchor added."""
        model: Any = self.model
        last = model.forward_features(batch["images"])
        features = model.forward_head(last, pre_logits=True)
        logits = model.get_classifier()(self.below(features))
        return self.add_anchor(self.fit(logits, self.labels_of(batch, logits.shape[1])), [features], last, batch)
