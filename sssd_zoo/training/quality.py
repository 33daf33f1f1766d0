"""Quality without labels, measured while a network is pretrained."""

import sys
from typing import Any

from tqdm import tqdm

from sssd_zoo.configs import QualityConfig, RuntimeConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.loading import ImageData
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import NotFiniteError
from sssd_zoo.evaluation.label_free import collapse_warning
from sssd_zoo.evaluation.subset import Subset, figures_of


class QualityMonitor:
    """Measures a trunk on a subset of the training images, as `tasks.Monitor` says.

    It draws from generators of its own and leaves the network as it was, so that the training goes on as without it,
    bit for bit. With several processes the main one measures, by its own BatchNorm statistics.

    Args:
        network: the trunk, which `training` trains.
        data: the images.
        config: when to measure.
        runtime: of the training.
        spec: of the network's inputs.

    Raises:
        UserError: if the best checkpoints are to be chosen by a figure that is not measured.
    """

    def __init__(
        self, network: Any, data: ImageData, config: QualityConfig, runtime: RuntimeConfig, spec: InputSpec
    ) -> None:
        if config.best_by != "loss" and config.quality_every == 0:
            raise UserError(f"--best_by {config.best_by} needs that figure: give --quality_every above 0")
        if config.best_by == "knn" and data.labels is None:
            raise UserError(
                "--best_by knn needs labels: the images have none, or they were not read (--label_column); choose "
                "another --best_by"
            )
        self.network, self.every, self.spec = network, config.quality_every, spec
        self.best_by: str = config.best_by
        self.subset = Subset(data, runtime.forward(), runtime.seed)

    def due(self, epoch: int, epochs: int) -> bool:
        """After every `quality_every` epochs, and after the last."""
        return self.every > 0 and ((epoch + 1) % self.every == 0 or epoch + 1 == epochs)

    def measure(self) -> dict[str, float]:
        """The figures, and a warning on stderr where they say that the embeddings have collapsed.

        None where features are not finite, with a warning, too: half precision may overflow in a network that trains
        well, as its optimiser leaves such steps out.
        """
        try:
            features = self.subset.features(self.network, self.spec)
        except NotFiniteError as error:
            tqdm.write(f"quality not measured: {error}", file=sys.stderr)
            return {}
        figures = figures_of([view[-1] for view in features], self.subset)
        if warning := collapse_warning(figures, "the network in training"):
            tqdm.write(warning, file=sys.stderr)
        return figures
