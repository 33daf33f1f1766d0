"""The settings of the methods."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from sssd_zoo.configs.augment import AugmentConfig
from sssd_zoo.configs.ranges import (
    AnchorScale,
    Channels,
    Checked,
    Clusters,
    Count,
    CountOrZero,
    CropScale,
    Fraction,
    FractionBelowOne,
    LearningRate,
    Names,
    Pixels,
    QueueSize,
    SettingsError,
    Temperature,
    Weight,
)
from sssd_zoo.configs.training import OptimConfig

Method = Literal["sssd", "anchored", "contrastive"]  # forms of self distillation

# Weights of the anchor loss: where a public encoder is distilled, and where the features are the run's own.
ANCHOR, OWN_ANCHOR = 4.0, 1.0


@dataclass(kw_only=True)
class MomentumContrastConfig(Checked):
    """Instance discrimination with a momentum encoder and a queue of keys: what MoCo v2 shares with others.

    Args:
        dim: dimension of the embeddings.
        queue_size: number of keys in the queue; at most the number of images.
        key_momentum: momentum of the key encoder's exponential moving average.
        splits: number of groups that the batch is split into for BatchNorm, the keys shuffled across them; a multiple
            of the number of processes.
        blur: probability of Gaussian blur; 0.5 is usual at 224 px, 0 at 32 px.
    """

    dim: Channels = 128
    queue_size: QueueSize = 4096
    key_momentum: Fraction = 0.99
    splits: Count = 8
    blur: Fraction = 0.0


@dataclass(kw_only=True)
class MoCoConfig(MomentumContrastConfig, OptimConfig):
    """MoCo v2; the defaults are for 32-px images on a GPU. Recipes have others, `sssd fit` chooses others on a CPU.

    Args:
        lr: peak learning rate; the default 0.06 is 0.03 per 256 images.
        temperature: temperature of the InfoNCE loss.
        symmetric: symmetric loss: each view is the query once and the key once. This doubles the cost of a step.
        crop_scale: smallest and largest fraction of an image's area that a random resized crop keeps.
        augment: flips, rotation, jitter, blur and grey of the views.
        init: run folder or timm name of a network whose trunk weights training starts from; by default random
            initialisation.
    """

    temperature: Temperature = 0.1
    symmetric: bool = True
    crop_scale: CropScale = (0.2, 1.0)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: str | None = None

    def __post_init__(self) -> None:
        """Raises `SettingsError` also for augmentations that contradict one another."""
        super().__post_init__()
        self.augment.resolved(contrastive=True, blur=self.blur)


@dataclass(kw_only=True)
class ClusterConfig(Checked):
    """k-means on the features of the pretrained network.

    Args:
        k: number of clusters to form; empty ones are dropped (paper: CIFAR-10 1000, CIFAR-100 500, ImageNet 5000).
        iterations: iterations of k-means.
        redos: number of random initialisations; the best clustering is kept.
        nearest: number of nearest centroids to store with each image; soft labels need more than 1.
        on_disk: keep the features in a file beside the labels and cluster from there; the labels are the same. By
            default where the features would need more than half of the free memory.
    """

    k: Clusters = 1000
    iterations: Count = 20
    redos: Count = 1
    nearest: Count = 1
    on_disk: bool | None = None


@dataclass(kw_only=True)
class PretextConfig(Checked):
    """M_ssl, the network whose features are clustered; by default the student architecture, pretrained on `data`.

    Args:
        features: existing network whose features are clustered (the paper's M_ssl), instead of pretraining one: any
            timm name, hf-hub:NAME, or a run folder.
        teacher_size: side in pixels that images are resized to for the network of `features`; by default its own input
            size. Smaller is faster.
        pretrain_model: timm name of the network to pretrain; by default the student architecture.
        pretrain_data: images to pretrain on (D_pre), given like `data`; by default those of `data`.
        pretrain_split: split of `pretrain_data`; by default 'train', or the only one.
    """

    features: str | None = None
    teacher_size: Pixels | None = None
    pretrain_model: str | None = None
    pretrain_data: str | Names | None = None
    pretrain_split: str | None = None


@dataclass(kw_only=True)
class SelfDistillationConfig(OptimConfig):
    """Self distillation, equation 4 of the paper.

    Args:
        alpha: weight of the KL term; the students' cross-entropy terms are weighted by 1 - alpha.
        lam: weight of the feature term (lambda).
        temperature: softmax temperature in the KL term.
        crop: 'pad' shifts the image by up to an eighth of its side; 'resized' takes a random resized crop.
        crop_scale: smallest and largest fraction of an image's area that a 'resized' crop keeps.
        augment: flips, rotation, jitter, blur and grey of the views.
        exits: type of the exits: 'plain', or 'attention', which masks the feature map by learnt attention first (BYOT's
            follow-up).
        mix: 'mixup' or 'cutmix' mixes pairs of images and their labels, beyond the paper.
        ema: decay of a moving average of the weights, such as 0.999, which is kept instead of the last weights; beyond
            the paper. By default, 0, there is none.
    """

    batch_size: Count = 128
    lr: LearningRate = 0.1
    alpha: Fraction = 0.3
    lam: Weight = 0.003
    temperature: Temperature = 1.0
    crop: Literal["pad", "resized"] = "pad"
    crop_scale: CropScale = (0.08, 1.0)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    exits: Literal["plain", "attention"] = "plain"
    mix: Literal["none", "mixup", "cutmix"] = "none"
    ema: FractionBelowOne = 0.0

    def __post_init__(self) -> None:
        """Raises `SettingsError` also for augmentations that contradict one another."""
        super().__post_init__()
        self.augment.resolved(contrastive=False)


@dataclass(kw_only=True)
class AnchoredConfig(SelfDistillationConfig):
    """Self distillation, and its anchored form, which is not in the paper: see `sssd_zoo.tasks.anchored`.

    Args:
        anchor: weight of the anchor loss, by which every exit also predicts the features of a frozen network; 0, as in
            the paper, disables it. By default 4 where such a network is given (`sssd fit --features`, `sssd distill
            --encoder`), and 0 where the features are those of the run's own pretraining, or 1 with `sssd fit --method
            anchored`.
        cached_views: number of views of every image whose features are computed once and kept in a file while the
            network trains, which sees one of them in each epoch. For a network that is slow compared with the student.
            By default each step computes the features of a new view.
        clusters: let the network learn the clusters beside the features. 'false' trains it on the features alone: the
            classifiers learn the clusters without changing what is below them.
        dense: let the network's last feature map predict that of the frozen network, too, position by position. Both
            need at least 2 x 2 positions. The file of `cached_views` then holds these maps as well.
    """

    anchor: Weight | None = None
    cached_views: CountOrZero = 0
    clusters: bool = True
    dense: bool = False

    def __post_init__(self) -> None:
        """Raises `SettingsError` also where mixed images would have no map of the frozen network."""
        super().__post_init__()
        if self.dense and self.mix != "none":
            raise SettingsError(f"dense needs images that are not mixed, and mix is {self.mix}: remove one of them")

    def resolved(self, *, encoder: bool, own: float = 0.0) -> Self:
        """The same with the default of `anchor` filled in: with a public `encoder`, or else that of `own` features."""
        return self if self.anchor is not None else replace(self, anchor=ANCHOR if encoder else own)


@dataclass(kw_only=True)
class ContrastConfig(MomentumContrastConfig):
    """The contrast of contrastive self distillation, see `sssd_zoo.tasks.contrastive`.

    Args:
        contrast: weight of the contrast, by which every exit also recognises another view of its image.
        contrast_temperature: temperature of the InfoNCE loss.
        blur: probability of Gaussian blur in the query's view; 0.5 is usual at 224 px, 0 at 32 px.
    """

    contrast: Weight = 3.0
    contrast_temperature: Temperature = 0.1
    splits: Count = 4


@dataclass(kw_only=True)
class ContrastiveConfig(ContrastConfig, SelfDistillationConfig):
    """Contrastive self distillation, beyond the paper: see `sssd_zoo.tasks.contrastive`. Defaults are for 32-px images.

    Args:
        crop: of the key's view: 'resized', a random resized crop as the query's, or 'pad', which shifts the image.
        crop_scale: smallest and largest fraction of an image's area that a random resized crop keeps.
        augment: flips, rotation, jitter, blur and grey: of the query's view as in MoCo, of the key's as in methods that
            learn from labels.
    """

    optimizer: str = "adamw"
    lr: LearningRate = 0.001
    weight_decay: Weight = 0.05
    crop: Literal["pad", "resized"] = "resized"
    crop_scale: CropScale = (0.2, 1.0)

    def __post_init__(self) -> None:
        """Raises `SettingsError` also for mixed images, whose other view there is not."""
        super().__post_init__()
        self.augment.resolved(contrastive=True, blur=self.blur)
        if self.mix != "none":
            raise SettingsError(f"contrastive training has no other view of mixed images: remove mix {self.mix}")


@dataclass(kw_only=True)
class StudentConfig(ContrastConfig, AnchoredConfig):
    """Self distillation in each of its forms, of which `sssd fit --method` chooses one.

    Args:
        contrast: method 'contrastive': weight of the contrast, by which every exit also recognises another view of its
            image.
        contrast_temperature: method 'contrastive': temperature of the InfoNCE loss.
        dim: method 'contrastive': dimension of the embeddings that are compared.
        queue_size: method 'contrastive': number of keys in the queue; at most the number of images.
        key_momentum: method 'contrastive': momentum of the key encoder's exponential moving average.
        splits: method 'contrastive': number of groups that the batch is split into for BatchNorm, the keys shuffled
            across them; a multiple of the number of processes.
        blur: method 'contrastive': probability of Gaussian blur in the query's view; 0.5 is usual at 224 px, 0 at 32
            px.
    """


@dataclass(kw_only=True)
class SEEDConfig(OptimConfig):
    """SEED, a method that SSSD is compared with; the defaults are for 32-px images.

    Args:
        lr: peak learning rate; the paper uses 0.03 per 256 images.
        queue_size: number of teacher embeddings in the queue (paper: 65536); at most the number of images.
        temperature: softmax temperature of the student.
        teacher_temperature: softmax temperature of the teacher (paper: 0.01; default of its code: 1e-4).
        crop_scale: smallest and largest fraction of an image's area that a random resized crop keeps.
        blur: probability of Gaussian blur; 0.5 is usual at 224 px, 0 at 32 px.
        augment: flips, rotation, jitter, blur and grey of the views.
    """

    batch_size: Count = 256
    lr: LearningRate = 0.03
    weight_decay: Weight = 1e-4
    queue_size: QueueSize = 4096
    temperature: Temperature = 0.2
    teacher_temperature: Temperature = 0.01
    crop_scale: CropScale = (0.2, 1.0)
    blur: Fraction = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Raises `SettingsError` also for augmentations that contradict one another."""
        super().__post_init__()
        self.augment.resolved(contrastive=True, blur=self.blur)


@dataclass(kw_only=True)
class DetectorConfig(Checked):
    """Faster R-CNN on a trunk.

    Args:
        model: run folder or timm name of the network that gives the trunk.
        pretrained: use the network's weights; 'false' initialises the trunk at random, as a baseline.
        frozen_stages: number of stages of the trunk to freeze, from the stem on: 1 is the stem of a ResNet, 2 also its
            first stage. Weights and BatchNorm statistics of frozen stages stay fixed.
        batchnorm: BatchNorm in the other stages of the trunk: 'train' uses the statistics of the global batch and
            learns scale and shift, 'eval' keeps the pretrained statistics and learns scale and shift, 'frozen' keeps
            all of them. 'train' is the default because features learnt without labels are not scaled for detection (He
            et al. 2020, MoCo, section 4.2); the others suit supervised trunks or few images per step.
        short_side: short side of the images in pixels.
        long_side: maximum long side of the images in pixels; by default 5/3 of the short side.
        fpn_channels: channels of the feature pyramid.
        anchor_scale: side of the anchors, as a multiple of the stride of their feature map.
        regions: number of regions sampled per image to train the box head on.
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

    def longest(self) -> int:
        """Maximum long side of the images in pixels."""
        return self.long_side or round(self.short_side * 5 / 3)
