"""The images that networks are looked at with where no labels say how good they are, and all figures of a network."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sssd_zoo.configs import AugmentConfig, ForwardConfig
from sssd_zoo.data.augment import BatchRandom, contrastive_view
from sssd_zoo.data.inputs import InputSpec, input_spec
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed.hardware import compute_device
from sssd_zoo.evaluation.features import check_finite, exit_logits, pooled_features, run_network
from sssd_zoo.evaluation.label_free import (
    cluster_stability,
    embedding_figures,
    exit_agreement,
    neighbour_accuracy,
)

IMAGES = 2_000  # looked at, or all of fewer


def draw_subset(count: int, most: int, seed: int) -> Tensor:
    """Positions of the images that are looked at: all, or `most` of them drawn at random; int64, in random order."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randperm(count, generator=generator)[:most]


class Subset:
    """Images that networks are looked at with: the same images, and the same two views of them, for every network.

    Args:
        data: the images.
        forward: how to run networks; the views depend on its batch size.
        seed: of the draw, and of the views.
        most: images to look at.
        progress: show progress bars.
    """

    def __init__(
        self, data: ImageData, forward: ForwardConfig, seed: int, most: int = IMAGES, *, progress: bool = False
    ) -> None:
        self.data, self.forward, self.seed, self.progress = data, forward, seed, progress
        self.positions = draw_subset(len(data), most, seed)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labels(self) -> Tensor | None:
        """The labels of the images, int64 [N], where they have any."""
        return None if self.data.labels is None else torch.from_numpy(self.data.labels)[self.positions]

    def features(self, model: Any, spec: InputSpec | None = None) -> list[Tensor]:
        """Pooled features of the images and of their two views, float32 [E, N, D] each.

        Args:
            model: the network, brought to the device.
            spec: of its inputs, where they are not its own.

        Raises:
            UserError: if some are not finite.
        """
        spec = spec or input_spec(model)
        return [self._read(model, spec, view) for view in (None, 0, 1)]

    def logits(self, model: Any) -> Tensor:
        """Logits of the images, float32 [E, N, C]."""
        return self._read(model, input_spec(model), None, exit_logits)

    def _read(self, model: Any, spec: InputSpec, view: int | None, read: Any = pooled_features) -> Tensor:
        self.data.move(compute_device(self.forward.device))
        batches: Iterable[tuple[Tensor, Tensor]] = self.data.batches(self.positions.split(self.forward.batch_size))
        if view is not None:
            batches = self._viewed(batches, spec.size, view)
        total = len(self) if self.progress else None
        read = list(run_network(model, batches, self.forward, spec=spec, total=total, read=read))
        self.positions = torch.cat([index for index, _ in read])  # another image stands for one that cannot be decoded
        values = torch.cat([part for _, part in read], dim=1)
        check_finite(values)
        return values

    def _viewed(
        self, batches: Iterable[tuple[Tensor, Tensor]], size: int, view: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, each image as one MoCo v2 view of it, uint8 [B, C, size, size]."""
        for number, (index, images) in enumerate(batches):
            random = BatchRandom(self.seed, 2 * number + view)
            augment = AugmentConfig().resolved(contrastive=True, channels=images.shape[1])
            pixels = contrastive_view(images, random, size, augment=augment)
            yield index, (255 * pixels).round_().to(torch.uint8)


def figures_of(views: Sequence[Tensor], subset: Subset) -> dict[str, float]:
    """All figures of one exit; with labels, `knn` joins them: weighted kNN accuracy in percent.

    Args:
        views: features of the images and of their two views, float32 [N, D] each.
        subset: the images.
    """
    plain, first, second = views
    figures: dict[str, float] = {**embedding_figures(plain, first, second), **cluster_stability(plain, subset.seed)}
    if subset.labels is not None:
        accuracy = neighbour_accuracy(plain, subset.labels)
        figures |= {} if accuracy is None else {"knn": accuracy}
    return figures


def network_figures(model: Any, subset: Subset) -> dict[str, float]:
    """All figures of a network: those of its last exit by their names, those of the others as `std_exit_1`.

    With class heads on all exits also how often these agree, see `exit_agreement`.
    """
    features = subset.features(model)
    figures = figures_of([view[-1] for view in features], subset)
    for number, exit_features in enumerate(zip(*(view[:-1] for view in features), strict=True), start=1):
        figures |= {f"{name}_exit_{number}": value for name, value in figures_of(exit_features, subset).items()}
    if len(features[0]) > 1 and model.num_classes > 1:
        figures |= exit_agreement(subset.logits(model))
    return figures
