"""The arguments of every step, as dataclasses: one definition for the scripts, the `sssd` command and the recipes."""

from dataclasses import dataclass, field
from typing import Literal

from sssd_zoo.data.loading import DataConfig
from sssd_zoo.engine import OptimConfig, RuntimeConfig


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
    """

    dim: int = 128
    queue_size: int = 4096
    key_momentum: float = 0.99
    temperature: float = 0.1
    symmetric: bool = True
    splits: int = 8
    crop_scale: tuple[float, float] = (0.2, 1.0)
    blur: float = 0.0


@dataclass(kw_only=True)
class ClusterConfig:
    """k-means on the features of the pretrained network.

    Args:
        k: number of clusters asked for (paper: CIFAR-10 1000, CIFAR-100 500, ImageNet 5000).
        iterations: of k-means.
        redos: runs from different first centroids, the best kept.
    """

    k: int = 1000
    iterations: int = 20
    redos: int = 1


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
    """

    batch_size: int = 128
    lr: float = 0.1
    alpha: float = 0.3
    lam: float = 0.003
    temperature: float = 1.0
    crop: Literal["pad", "resized"] = "pad"
    crop_scale: tuple[float, float] = (0.08, 1.0)


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

    batch_size: int = 256
    lr: float = 0.03
    weight_decay: float = 1e-4
    queue_size: int = 4096
    temperature: float = 0.2
    teacher_temperature: float = 0.01
    crop_scale: tuple[float, float] = (0.2, 1.0)
    blur: float = 0.0


@dataclass(kw_only=True)
class ProbeConfig:
    """Linear probes: one linear layer per exit on frozen features.

    Args:
        probe_epochs: passes over the features.
        probe_lr: learning rate at its height, falling to 0 by a cosine.
        probe_weight_decay: of the layers' weights.
        holdout: share of the images kept from the probes to measure them, where the data have no split for that.
    """

    probe_epochs: int = 30
    probe_lr: float = 2e-3
    probe_weight_decay: float = 0.05
    holdout: float = 0.2


@dataclass(kw_only=True)
class ForwardConfig:
    """How a trained network is run over images.

    Args:
        batch_size: images per forward pass.
        precision: of the forward pass; 'auto' takes bf16 where the hardware has it, else fp32.
        device: 'auto' takes the GPU if there is one.
    """

    batch_size: int = 256
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"


@dataclass(kw_only=True)
class PretrainArgs(DataConfig, RuntimeConfig, MoCoConfig):
    """Pretrains a network without labels by MoCo v2.

    Args:
        out: run folder to write; timm loads it by `local-dir:OUT`.
        model: timm name of the network; by default one of this package for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        steps_per_epoch: for a stream whose data set does not tell its length.
        resume: go on from the newest checkpoint in `out`.
        overwrite: drop what `out` holds and start anew.
    """

    out: str
    model: str | None = None
    image_size: int | None = None
    steps_per_epoch: int | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class PseudoLabelArgs(DataConfig, ForwardConfig, ClusterConfig):
    """Clusters the features of a pretrained network into pseudo labels.

    Args:
        model: run folder of the pretraining, or any timm model's name.
        out: folder of the labels to write.
        seed: of k-means.
        overwrite: replace what `out` holds.
    """

    model: str
    out: str
    seed: int = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class DistillArgs(DataConfig, RuntimeConfig, SelfDistillationConfig):
    """Trains a network on pseudo, random or true labels: by default a four-exit one that teaches itself.

    Args:
        labels: folder of pseudo labels, 'random' (the baseline), 'true' (the upper reference), or 'own': clusters of
            the network's own features, anew before each epoch (DACSD).
        method: 'sssd', or 'clusterfit' for the network without exits on the same labels.
        out: run folder to write; timm loads it by `local-dir:OUT`.
        k: number of classes of 'random' and 'own' labels.
        model: timm name of a network of this package; by default that for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        init: run folder whose weights the trunk starts from; by default it starts from scratch, as in the paper.
        resume: go on from the newest checkpoint in `out`.
        overwrite: drop what `out` holds and start anew.
    """

    labels: str
    out: str
    method: Literal["sssd", "clusterfit"] = "sssd"
    k: int = 1000
    model: str | None = None
    image_size: int | None = None
    init: str | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class SEEDArgs(DataConfig, RuntimeConfig, SEEDConfig):
    """Distils a frozen network, such as one pretrained without labels, into a smaller one by SEED.

    Args:
        teacher: run folder, or any timm model's name.
        out: run folder to write; timm loads it by `local-dir:OUT`.
        model: timm name of the student; by default one of this package for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        teacher_size: side that the views are resized to for the teacher; by default what it was trained with.
        resume: go on from the newest checkpoint in `out`.
        overwrite: drop what `out` holds and start anew.
    """

    teacher: str
    out: str
    model: str | None = None
    image_size: int | None = None
    teacher_size: int | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class LinearArgs(DataConfig, ForwardConfig, ProbeConfig):
    """Trains a linear probe on every exit of a frozen network and measures them and their ensemble.

    Args:
        model: run folder, or any timm model's name.
        out: folder to write: metrics.json, and the network with the probes as its heads; by default only prints.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        seed: of the probes.
        overwrite: replace what `out` holds.
    """

    model: str
    out: str | None = None
    test_split: str | None = None
    seed: int = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class KNNArgs(DataConfig, ForwardConfig):
    """Measures every exit of a frozen network by a weighted nearest-neighbour vote.

    Args:
        model: run folder, or any timm model's name.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        neighbours: that vote.
        temperature: of their weights, exp(cosine / temperature).
        holdout: share of the images that are measured, where the data have no split for that.
        seed: of the held-out part.
    """

    model: str
    test_split: str | None = None
    neighbours: int = 200
    temperature: float = 0.1
    holdout: float = 0.2
    seed: int = 0


@dataclass(kw_only=True)
class FitArgs(DataConfig, RuntimeConfig):
    """Does it all: pretrains, labels, distils, measures and reports. Run it again to go on where it stopped.

    Args:
        out: run folder to write.
        model: timm name of a network of this package; by default that for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        pretrain: MoCo v2.
        cluster: k-means.
        distill: self distillation.
        warm_start: let the trunk of the distilled network start from the pretrained weights, not from scratch as in
            the paper.
        probe: linear probes, where there are labels.
        baseline: also distil on random labels, where there are true ones to compare by.
    """

    out: str
    model: str | None = None
    image_size: int | None = None
    test_split: str | None = None
    pretrain: MoCoConfig = field(default_factory=MoCoConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    distill: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    warm_start: bool = False
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    baseline: bool = True


@dataclass(kw_only=True)
class CompareArgs(DataConfig, RuntimeConfig):
    """Trains and measures several methods on the same images, and reports them beside the paper's figures.

    Args:
        out: folder to write; what is there already of the same settings is reused.
        methods: any of 'sssd', 'random' (BYOT on random labels), 'true' (BYOT on true labels), 'clusterfit', 'seed',
            'dacsd'.
        seeds: of the runs; each does every method once. They take the place of --seed.
        model: timm name of a network of this package; by default that for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        pretrain: MoCo v2.
        cluster: k-means; its K is also that of random and of DACSD's labels.
        distill: of all methods that learn labels.
        seed_method: SEED.
        probe: linear probes.
    """

    out: str
    methods: list[Literal["sssd", "random", "true", "clusterfit", "seed", "dacsd"]] = field(
        default_factory=lambda: ["sssd", "random", "clusterfit", "seed", "dacsd", "true"]
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    model: str | None = None
    image_size: int | None = None
    test_split: str | None = None
    pretrain: MoCoConfig = field(default_factory=MoCoConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    distill: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    seed_method: SEEDConfig = field(default_factory=SEEDConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass(kw_only=True)
class ModelsArgs:
    """Lists the networks of this package with what each exit costs.

    Args:
        pattern: which networks, as a shell pattern.
    """

    pattern: str = "sssd_*"


@dataclass(kw_only=True)
class CardArgs:
    """Assembles what is to be known of a trained network in one folder: card, config, metrics, logs, recipe, figures.

    Args:
        run: run folder of `sssd fit`.
        out: folder to write.
        name: timm name and tag of the weights, where they ship with the package: 'sssd_resnet18_cifar.cifar10'.
        weights: file for the weights in half precision; by default model.safetensors in `out`.
        paper: row of the paper's table 1 to stand beside ours, such as 'CIFAR-10: ResNet-18, 200 epochs'.
        overwrite: replace what `out` holds.
    """

    run: str
    out: str
    name: str | None = None
    weights: str | None = None
    paper: str | None = None
    overwrite: bool = False


@dataclass(kw_only=True)
class SpaceArgs:
    """Shows a page to try a network on, or publishes it as a Space: `sssd space RUN`.

    Args:
        run: run folder of `sssd fit`, a folder with a network, or a name: 'sssd_resnet18_cifar.cifar10', 'hf-hub:...'.
        port: of the page on this machine; by default the first that is free from 7860 on.
        run_images: show images of the run's data, as examples and beside their clusters; they are published too.
        push: ORG/NAME of a Space on the Hugging Face Hub to publish, instead of showing the page here.
        private: make the Space private; a public one of that name is refused.
        dry_run: list the files that would be published and their sizes, and stop.
    """

    run: str
    port: int | None = None
    run_images: bool = True
    push: str | None = None
    private: bool = False
    dry_run: bool = False
