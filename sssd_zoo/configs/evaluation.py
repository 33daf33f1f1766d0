"""How a trained network is run and measured."""

from dataclasses import dataclass
from typing import Literal

from sssd_zoo.configs.ranges import Checked, Count, CountOrZero, ProperFraction, Temperature, Weight


@dataclass(kw_only=True)
class ProbeConfig(Checked):
    """Linear probes: one linear classifier per exit, fitted to frozen features until it converges.

    Args:
        probe_epochs: maximum number of L-BFGS iterations, each one or a few passes over all features; fitting ends
            earlier once the loss stops falling.
        probe_weight_decay: weight decay of the probes; by default chosen for each exit on a tenth of the training
            images.
        holdout: fraction of the images held out of the probes' training to measure them on, if the data set has no test
            or validation split; `sssd fit` trains the network on these too, without their labels.
    """

    probe_epochs: Count = 500
    probe_weight_decay: Weight | None = None
    holdout: ProperFraction = 0.2


@dataclass(kw_only=True)
class KNNConfig(Checked):
    """Weighted k-nearest-neighbour classification of frozen features.

    Args:
        neighbours: number of neighbours (k); the default is lowered to the number of training images if need be.
        temperature: temperature of the neighbours' weights, exp(cosine similarity / temperature).
    """

    neighbours: Count = 200
    temperature: Temperature = 0.1


@dataclass(kw_only=True)
class QualityConfig(Checked):
    """Quality without labels, measured while a network is pretrained.

    Args:
        quality_every: epochs between measurements of the network on at most 2,000 of the training images, for
            metrics.jsonl, the curves and the trackers; 0 for none. With labels, weighted kNN joins them (`sssd
            pretrain` reads labels only where --label_column names them).
        best_by: what the checkpoints of --keep_best are chosen by: the lowest 'loss', or the highest value of one of
            these metrics, among checkpoints of epochs that were measured. The network that is written is always that of
            the last epoch.
    """

    quality_every: CountOrZero = 10
    best_by: Literal["loss", "two_view_consistency", "rank_me", "knn"] = "loss"


@dataclass(kw_only=True)
class ForwardConfig(Checked):
    """How a trained network is run on images.

    Args:
        batch_size: images per forward pass.
        precision: precision of the forward pass; 'auto' uses bf16 where the hardware supports it, fp16 on older GPUs,
            and fp32 otherwise.
        device: 'auto' uses a CUDA GPU if there is one; 'cpu' never does.
    """

    batch_size: Count = 256
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
