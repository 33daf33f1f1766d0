"""The settings of the methods."""

from dataclasses import dataclass
from typing import Literal

from sssd_zoo.configs.ranges import (
    AnchorScale,
    Channels,
    Checked,
    Clusters,
    Count,
    CountOrZero,
    CropScale,
    Fraction,
    LearningRate,
    Pixels,
    QueueSize,
    Temperature,
    Weight,
)
from sssd_zoo.configs.training import OptimConfig


@dataclass(kw_only=True)
class MoCoConfig(OptimConfig):
    """MoCo v2; the defaults are for 32-px images, recipes hold those for others.

    Args:
        epochs: passes over the data.
        batch_size: images per optimiser step, over all processes.
        lr: learning rate at its height; 0.06 is 0.03 per 256 images.
        dim: length of an embedding.
        queue_size: keys in the queue; not more than there are images.
        key_momentum: of the key encoder's moving average.
        temperature: of InfoNCE.
        symmetric: both views are queries and keys in turn; twice the cost of a step.
        splits: parts of the global batch with BatchNorm statistics of their own, the keys shuffled over them.
        crop_scale: smallest and largest share of the area that a view keeps.
        blur: probability of a Gaussian blur (0 at 32 px, 0.5 at 224).
        init: network whose trunk's weights to start from, a run folder or a timm name, to go on from weights that are
            there; by default new ones.
    """

    dim: Channels = 128
    queue_size: QueueSize = 4096
    key_momentum: Fraction = 0.99
    temperature: Temperature = 0.1
    symmetric: bool = True
    splits: Count = 8
    crop_scale: CropScale = (0.2, 1.0)
    blur: Fraction = 0.0
    init: str | None = None


@dataclass(kw_only=True)
class ClusterConfig(Checked):
    """k-means on the features of the pretrained network.

    Args:
        k: number of clusters asked for (paper: CIFAR-10 1000, CIFAR-100 500, ImageNet 5000).
        iterations: of k-means.
        redos: runs from different first centroids, the best kept.
        nearest: centroids to which each image's distance is kept; more than 1 allows soft labels.
        on_disk: keep the features in a file beside the labels and cluster them from there, to the same labels; by
            default where they would take more than half of the free memory.
    """

    k: Clusters = 1000
    iterations: Count = 20
    redos: Count = 1
    nearest: Count = 1
    on_disk: bool | None = None


@dataclass(kw_only=True)
class PretextConfig(Checked):
    """Which network's features are clustered: M_ssl. By default one like the student, pretrained on the same images.

    Args:
        features: a network to take as it is, nothing is pretrained then: any timm name, hf-hub:NAME, or a run folder.
        pretrain_model: timm name of the network to pretrain, where it is not to be the student's.
        pretrain_data: what to pretrain on (D_pre), where it is not `data`; given as that is.
        pretrain_split: of `pretrain_data`; by default 'train', or the only one.
    """

    features: str | None = None
    pretrain_model: str | None = None
    pretrain_data: str | None = None
    pretrain_split: str | None = None


@dataclass(kw_only=True)
class SelfDistillationConfig(OptimConfig):
    """Self distillation, equation 4 of the paper.

    Args:
        batch_size: images per optimiser step, over all processes.
        lr: learning rate at its height.
        alpha: weight of the KL term; 1 - alpha weighs the students' cross-entropies.
        lam: weight of the feature term.
        temperature: of the softmaxes in the KL term.
        crop: 'pad' shifts by up to an eighth of the side, 'resized' cuts boxes of `crop_scale` of the area.
        crop_scale: smallest and largest share of the area, for 'resized'.
        exits: 'plain', or 'attention' for exits that weigh their map by a mask first (BYOT's follow-up).
    """

    batch_size: Count = 128
    lr: LearningRate = 0.1
    alpha: Fraction = 0.3
    lam: Weight = 0.003
    temperature: Temperature = 1.0
    crop: Literal["pad", "resized"] = "pad"
    crop_scale: CropScale = (0.08, 1.0)
    exits: Literal["plain", "attention"] = "plain"


@dataclass(kw_only=True)
class AnchoredConfig(SelfDistillationConfig):
    """Self distillation, and beyond the paper its anchored form, see `sssd_zoo.tasks.anchored`.

    Args:
        anchor: weight of the anchor, by which every exit also predicts the features of the network that was clustered;
            0, as in the paper, leaves it out; the bundled CIFAR-10 network had 4.
    """

    anchor: Weight = 0.0


@dataclass(kw_only=True)
class SEEDConfig(OptimConfig):
    """SEED, a method that SSSD is compared with; the defaults are for 32-px images.

    Args:
        batch_size: images per optimiser step, over all processes.
        lr: learning rate at its height; the paper's 0.03 is per 256 images.
        queue_size: of the teacher's embeddings (paper: 65536); not more than there are images.
        temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax (0.01 in the paper's text, 1e-4 by default in its code).
        crop_scale: smallest and largest share of the area that a view keeps.
        blur: probability of a Gaussian blur (0 at 32 px, 0.5 at 224).
    """

    batch_size: Count = 256
    lr: LearningRate = 0.03
    weight_decay: Weight = 1e-4
    queue_size: QueueSize = 4096
    temperature: Temperature = 0.2
    teacher_temperature: Temperature = 0.01
    crop_scale: CropScale = (0.2, 1.0)
    blur: Fraction = 0.0


@dataclass(kw_only=True)
class DetectorConfig(Checked):
    """Faster R-CNN on a trunk.

    Args:
        model: run folder, or any timm model's name, for the trunk.
        pretrained: with its weights; 'false' gives the trunk new ones, to compare with.
        frozen_stages: of the trunk, from its stem on: 1 is the stem of a ResNet, 2 also its first stage. Their weights
            and their BatchNorm's statistics stay.
        batchnorm: of the trunk's other stages: 'train' uses the statistics of the global batch and learns scale and
            shift, 'eval' keeps the pretrained statistics and learns scale and shift, 'frozen' keeps all. The first is
            the default, as features learnt without labels are not scaled for detection (He et al. 2020, MoCo, section
            4.2); the others are for supervised trunks, or for a few images per step.
        short_side: of the images in pixels.
        long_side: of the images in pixels, at most; by default 5/3 of the short one.
        fpn_channels: of the feature pyramid.
        anchor_scale: side of an anchor over its map's stride.
        regions: per image that the box head is trained on.
    """

    model: str
    pretrained: bool = True
    frozen_stages: CountOrZero = 0
    batchnorm: Literal["train", "eval", "frozen"] = "train"
    short_side: Pixels = 800
    long_side: Pixels | None = None
    fpn_channels: Channels = 256
    anchor_scale: AnchorScale = 8.0
    regions: Count = 512
