"""The arguments of every command."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from sssd_zoo.configs.data import MAX_PIXELS, DataConfig, DetectionDataConfig
from sssd_zoo.configs.evaluation import ForwardConfig, ProbeConfig
from sssd_zoo.configs.methods import (
    AnchoredConfig,
    ClusterConfig,
    DetectorConfig,
    MoCoConfig,
    PretextConfig,
    SEEDConfig,
    SelfDistillationConfig,
)
from sssd_zoo.configs.ranges import (
    Checked,
    Clusters,
    Count,
    CountOrZero,
    DistinctNames,
    Epochs,
    Items,
    LearningRate,
    Milestones,
    Names,
    Percent,
    Pixels,
    Port,
    Positive,
    PositiveFraction,
    PositiveLearningRate,
    ProperFraction,
    Seed,
    Seeds,
    Temperature,
    Thresholds,
    Weight,
)
from sssd_zoo.configs.training import OptimConfig, RuntimeConfig


@dataclass(kw_only=True)
class PretrainArgs(DataConfig, RuntimeConfig, MoCoConfig):
    """Pretrains a network without labels by MoCo v2.

    Args:
        out: run folder to write; timm loads it by `local-dir:OUT`.
        model: timm name of the network; by default one of this package for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        steps_per_epoch: for a stream whose data set does not tell its length.
        resume: go on from the newest checkpoint in `out`.
        overwrite: drop the run that `out` holds and start anew.
    """

    out: str
    model: str | None = None
    image_size: Pixels | None = None
    steps_per_epoch: Count | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class PseudoLabelArgs(DataConfig, ForwardConfig, ClusterConfig):
    """Clusters the features of a pretrained network into pseudo labels.

    Args:
        model: run folder of the pretraining, or any timm model's name.
        out: folder of the labels to write.
        seed: of k-means.
        overwrite: replace what such a command wrote into `out`; other files stay.
    """

    model: str
    out: str
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class DistillArgs(DataConfig, RuntimeConfig, AnchoredConfig):
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
        encoder: the network whose features every exit also predicts, where `anchor` is more than 0: run folder, or any
            timm model's name.
        soft: temperature of soft labels by the distances to the nearest centroids, in units of the images' mean squared
            distance to their own; by default the labels are hard, as in the paper. Needs labels with --nearest over 1.
        resume: go on from the newest checkpoint in `out`.
        overwrite: drop the run that `out` holds and start anew.
    """

    labels: str
    out: str
    method: Literal["sssd", "clusterfit"] = "sssd"
    k: Clusters = 1000
    model: str | None = None
    image_size: Pixels | None = None
    init: str | None = None
    encoder: str | None = None
    soft: Temperature | None = None
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
        overwrite: drop the run that `out` holds and start anew.
    """

    teacher: str
    out: str
    model: str | None = None
    image_size: Pixels | None = None
    teacher_size: Pixels | None = None
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
        overwrite: replace what such a command wrote into `out`; other files stay.
    """

    model: str
    out: str | None = None
    test_split: str | None = None
    seed: Seed = 0
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
    neighbours: Count = 200
    temperature: Temperature = 0.1
    holdout: ProperFraction = 0.2
    seed: Seed = 0


@dataclass(kw_only=True)
class FitArgs(DataConfig, RuntimeConfig, PretextConfig):
    """Does it all: pretrains, labels, distils, measures and reports. Run it again to go on where it stopped.

    Args:
        out: run folder to write.
        model: timm name of the student, a network of this package; by default that for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        pretrain: MoCo v2.
        cluster: k-means.
        distill: self distillation.
        warm_start: let the trunk of the distilled network start from the pretrained weights, not from scratch as in
            the paper.
        soft: temperature of soft labels, see `sssd distill`; wants `cluster.nearest` over 1, such as 8.
        probe: linear probes, where there are labels.
        baseline: also distil on random labels, where there are true ones to compare by.
        overwrite: make anew what `out` holds of other settings or data; what does not depend on them is reused.
    """

    out: str
    model: str | None = None
    image_size: Pixels | None = None
    test_split: str | None = None
    pretrain: MoCoConfig = field(default_factory=MoCoConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    distill: AnchoredConfig = field(default_factory=AnchoredConfig)
    warm_start: bool = False
    soft: Temperature | None = None
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    baseline: bool = True
    overwrite: bool = False


@dataclass(kw_only=True)
class CompareArgs(DataConfig, RuntimeConfig, PretextConfig):
    """Trains and measures several methods on the same images, and reports them beside the paper's figures.

    Args:
        out: folder to write; what is there already of the same settings is reused.
        methods: any of 'sssd', 'random' (BYOT on random labels), 'true' (BYOT on true labels), 'clusterfit', 'seed',
            'dacsd'; and SSSD with one thing changed: 'sssd-warm' (the trunk starts from M_ssl's weights), 'sssd-redos'
            (the best of several k-means), 'sssd-soft' (soft labels).
        seeds: of the runs; each does every method once. They take the place of --seed.
        model: timm name of the student, a network of this package; by default that for the size of the images.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        pretrain: MoCo v2.
        cluster: k-means; its K is also that of random and of DACSD's labels.
        distill: of all methods that learn labels.
        seed_method: SEED.
        redos: of the k-means of 'sssd-redos'.
        soft: temperature of the labels of 'sssd-soft', which are over each image's 8 nearest centroids.
        probe: linear probes.
        also: folders of other comparisons, with other data or pretexts, whose rows are to stand in the same tables.
        overwrite: make anew what `out` holds of other settings or data; what does not depend on them is reused.
    """

    out: str
    methods: Annotated[
        list[Literal["sssd", "random", "true", "clusterfit", "seed", "dacsd", "sssd-warm", "sssd-redos", "sssd-soft"]],
        Items(1),
    ] = field(default_factory=lambda: ["sssd", "random", "clusterfit", "seed", "dacsd", "true"])
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    model: str | None = None
    image_size: Pixels | None = None
    test_split: str | None = None
    pretrain: MoCoConfig = field(default_factory=MoCoConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    distill: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    seed_method: SEEDConfig = field(default_factory=SEEDConfig)
    redos: Count = 5
    soft: Temperature = 0.2
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    also: list[str] = field(default_factory=list)
    overwrite: bool = False


@dataclass(kw_only=True)
class EarlyExitArgs(DataConfig):
    """Calibrates a network's early exit on held-out images: a temperature per exit, and thresholds for a budget.

    The budget is one of --points_lost, --multiply_adds and --latency; without any it is --points_lost 0.5.

    Args:
        model: folder of a network or a run, its timm name, or hf-hub:NAME; its four exits must be trained classifiers.
        out: folder to write: the calibrated network with its thresholds, and early_exit/ with the report and figure.
        split: labelled split that the classifiers were not trained on; by default 'test' or 'validation'. A part of it
            calibrates, and all is measured on the rest.
        calibration_split: calibrate on this split instead, and measure on all of `split`.
        holdout: share of `split` to calibrate on, drawn by class.
        points_lost: run as little as possible, and lose at most so many points of accuracy against the full network,
            that is the final classifier or the ensemble, whichever is better, with 95 percent confidence.
        multiply_adds: be as accurate as possible with at most so many million multiply-adds an image on average.
        latency: be as accurate as possible in at most so many milliseconds an image on average, one by one, here.
        batch_size: images per forward pass where nothing is timed.
        device: 'auto' takes the GPU if there is one.
        runs: timed runs of every network, in turn.
        seed: of the calibrating part and of the timed images.
        overwrite: replace what such a command wrote into `out`; other files stay.
    """

    model: str
    out: str
    calibration_split: str | None = None
    holdout: ProperFraction = 0.5
    points_lost: Percent | None = None
    multiply_adds: Positive | None = None
    latency: Positive | None = None
    batch_size: Count = 256
    device: Literal["auto", "cpu"] = "auto"
    runs: Count = 10
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class ExportArgs(Checked):
    """Writes a network for deployment: ONNX, torch.export or safetensors; see docs/deploy.md.

    Args:
        model: folder of a network or a run, its timm name, or hf-hub:NAME.
        out: file to write, or folder for safetensors and for the stages of early exit.
        output: an exit's number ('4' and 'final' are the same), 'ensemble', 'all' for one graph with four outputs, or
            'early-exit' for a graph per stage; safetensors of the last three are the whole network.
        format: 'onnx' (its batch size is dynamic, as torch-export's), 'torch-export' or 'safetensors'.
        thresholds: of early exit; by default those stored with the network.
        int8: also write the ONNX graph in int8, and measure both.
        data: labelled images for --int8, as for the other commands.
        split: of them, to calibrate activations' ranges on; by default 'train', or the only one.
        test_split: split to measure on; by default 'test' or 'validation', else half of `split`.
        calibration_images: that many images of `split` calibrate.
        batch_size: images per forward pass of those.
        seed: of the choice of calibrating images.
        overwrite: replace `out`, where it is an older export.
    """

    model: str
    out: str
    output: Literal["1", "2", "3", "4", "final", "ensemble", "all", "early-exit"] = "ensemble"
    format: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    thresholds: Thresholds | None = None
    int8: bool = False
    data: str | None = None
    split: str | None = None
    test_split: str | None = None
    calibration_images: Count = 256
    batch_size: Count = 64
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class PredictArgs(ForwardConfig):
    """Classifies images, and says which exit answered.

    Args:
        model: folder of a network or a run, its timm name, or hf-hub:NAME.
        images: image files, or folders of them.
        output: an exit's number, 'final', 'ensemble' or 'early-exit', where an image that no exit is sure of is listed
            under exit 4 and has the ensemble's answer; 'auto' is early exit where the network has thresholds or they
            are given, else what the network answers by itself: all of it the ensemble.
        thresholds: of early exit; by default those stored with the network.
        format: 'table', or 'jsonl' for a line of JSON per image.
        max_corrupt: images that may be skipped because they cannot be decoded; each one is named.
        max_pixels: images of more cannot be decoded: a small file may hold a picture that takes gigabytes. JPEG is
            decoded at a fraction of its size and counts as that.
        precision: of the trunk; 'auto' takes fp32 for early exit, which is calibrated in it, else bf16 where the
            hardware has it.
    """

    model: str
    images: Names
    output: Literal["auto", "1", "2", "3", "4", "final", "ensemble", "early-exit"] = "auto"
    thresholds: Thresholds | None = None
    format: Literal["table", "jsonl"] = "table"
    max_corrupt: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS


@dataclass(kw_only=True)
class FinetuneArgs(DataConfig, RuntimeConfig, SelfDistillationConfig):
    """Fine-tunes networks on a few labels, class-balanced, over several seeds; run it again to go on where it stopped.

    Args:
        out: folder to write; what is there already of the same settings is reused.
        models: to start from: run folders, timm names (with their pretrained weights), and 'scratch', new weights for
            the first of the others, to compare with.
        method: 'final' trains the trunk and a new FC by cross-entropy, as the paper does; 'exits' all exits of a
            network of this package by self distillation.
        fractions: shares of each class's labels, 0..1 (paper: 0.01, 0.1 to 0.5), at least one label of each class.
            Smaller subsets of a seed are parts of its larger ones.
        per_class: numbers of labels of each class, in the place of fractions.
        seeds: of the subsets, the new classifiers and the training. They take the place of --seed.
        image_size: side of the views in pixels; by default the images' own up to 40 px, else 224.
        test_split: split to measure on; by default 'test' or 'validation', else a part held out of `split`.
        holdout: share of the images kept from training to measure on, where the data have no split for that.
        epochs: passes over the labelled images.
        min_steps: optimiser steps at least, so that a few labels are seen more often.
        batch_size: images per optimiser step, over all processes; less where there are fewer labelled images.
        lr: learning rate at its height of the new classifiers of a network that has weights already.
        trunk_lr: learning rate at its height of the rest of it.
        scratch_lr: learning rate at its height of a network from scratch, for all of it.
        weight_decay: of all parameters; the paper fine-tunes without regularisation.
        overwrite: make anew what `out` holds of other settings or data; what does not depend on them is reused.
    """

    out: str
    models: DistinctNames
    method: Literal["final", "exits"] = "final"
    fractions: list[PositiveFraction] = field(default_factory=lambda: [0.01, 0.1, 0.2, 0.3, 0.4, 0.5])
    per_class: list[Count] = field(default_factory=list)
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    image_size: Pixels | None = None
    test_split: str | None = None
    holdout: ProperFraction = 0.2
    epochs: Count = 60
    min_steps: CountOrZero = 0
    lr: PositiveLearningRate = 0.01
    trunk_lr: LearningRate = 0.01
    scratch_lr: LearningRate = 0.1
    weight_decay: Weight = 0.0
    overwrite: bool = False


@dataclass(kw_only=True)
class DetectArgs(DetectionDataConfig, DetectorConfig, RuntimeConfig, OptimConfig):
    """Fine-tunes Faster R-CNN on a network's trunk and measures it; the defaults are for Pascal VOC 07+12.

    Args:
        out: run folder to write.
        epochs: passes over the data.
        batch_size: images per optimiser step, over all processes.
        lr: learning rate at its height; 0.02 is for 16 images.
        weight_decay: of all parameters, BatchNorm's and biases too.
        schedule: 'cosine' falls to 0, 'step' is multiplied by `gamma` at each of `milestones`.
        warmup_epochs: of linear growth from 0.
        milestones: epochs, for 'step'.
        sizes: short sides of the images in pixels over equal parts of the training, such as [160, 240]; by default all
            are of `short_side`.
        test_data: to measure on; by default that of `data`.
        test_split: to measure on; by default 'test' or 'val' where there is one.
        voc: also measure VOC2007's AP50, of 11 points.
        resume: go on from the newest checkpoint in `out`.
        overwrite: drop the run that `out` holds and start anew.
    """

    out: str
    epochs: Count = 24
    batch_size: Count = 16
    lr: LearningRate = 0.02
    weight_decay: Weight = 1e-4
    schedule: Literal["cosine", "step"] = "step"
    warmup_epochs: Epochs = 0.1
    milestones: Milestones = field(default_factory=lambda: [18, 22])
    test_data: Names | None = None
    test_split: str | None = None
    voc: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class DetectEvalArgs(DetectionDataConfig, ForwardConfig):
    """Measures a trained detector by average precision.

    Args:
        model: run folder of `sssd detect`.
        split: to measure on; by default 'test' or 'val'.
        classes: to measure; they must be the detector's, which is the default.
        batch_size: images per forward pass.
        precision: of the forward pass; in half precision scores tie.
        short_side: of the images in pixels; by default as in training.
        voc: also measure VOC2007's AP50, of 11 points.
        out: folder to write: metrics.json, and pictures of detections beside the truth; by default only prints.
        overwrite: replace what such a command wrote into `out`; other files stay.
    """

    model: str
    batch_size: Count = 4
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    short_side: Pixels | None = None
    voc: bool = False
    out: str | None = None
    overwrite: bool = False


@dataclass(kw_only=True)
class SpaceArgs(Checked):
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
    port: Port | None = None
    run_images: bool = True
    push: str | None = None
    private: bool = False
    dry_run: bool = False


@dataclass(kw_only=True)
class ModelsArgs(Checked):
    """Lists the networks of this package with what each exit costs, and the weights that ship with their accuracies.

    Args:
        pattern: which networks, as a shell pattern.
    """

    pattern: str = "sssd_*"


@dataclass(kw_only=True)
class CardArgs(Checked):
    """Assembles what is to be known of a trained network in one folder: card, config, metrics, logs, recipe, figures.

    Args:
        run: run folder of `sssd fit`.
        out: folder to write.
        name: timm name and tag of the weights, where they ship with the package: 'sssd_resnet18_cifar.cifar10'.
        weights: file for the weights in half precision; by default model.safetensors in `out`.
        calibrated: folder that `sssd early-exit` made of the run: its network, which has thresholds, is taken.
        paper: row of the paper's tables to stand beside ours, such as 'CIFAR-10: ResNet-18, 200 epochs'.
        license: of the weights, as the Hub names it.
        remarks: sentences for the card that no file of the run tells, such as where the images come from.
        overwrite: replace what such a command wrote into `out`; other files stay.
    """

    run: str
    out: str
    name: str | None = None
    weights: str | None = None
    calibrated: str | None = None
    paper: str | None = None
    license: str = "apache-2.0"
    remarks: list[str] = field(default_factory=list)
    overwrite: bool = False


@dataclass(kw_only=True)
class RepoConfig(Checked):
    """Where on the Hub something goes, and how.

    Args:
        repo: the Hub repository, ORG/NAME; made if it is not there.
        private: make it private; a public one of that name is refused.
        revision: branch to commit to, made if it is not there; by default 'main'.
        tag: for the commit; a tag that is there is never moved.
        pull_request: open a pull request instead of committing to the branch.
        commit_message: first line of the commit's message.
        dry_run: list the files and their sizes, and stop.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    pull_request: bool = False
    commit_message: str | None = None
    dry_run: bool = False


@dataclass(kw_only=True)
class PublishArgs(RepoConfig):
    """Publishes a trained network with its card on the Hub, and loads it back to compare: `sssd publish RUN --repo R`.

    Log in by `hf auth login`, or set HF_TOKEN.

    Args:
        run: run folder of `sssd fit`, or a folder of `sssd card`.
        calibrated: folder that `sssd early-exit` made of the run: its network, which has thresholds, is published.
        include: shell patterns of other files of `run` to go with it, such as 'report.md' or '[report.md, "*.svg"]'.
        license: of the weights, as the Hub names it.
    """

    run: str
    calibrated: str | None = None
    include: list[str] | str = field(default_factory=list)
    license: str = "apache-2.0"


@dataclass(kw_only=True)
class PublishLabelsArgs(RepoConfig):
    """Publishes pseudo labels as a data set on the Hub: `sssd publish-labels FOLDER --repo R`.

    Log in by `hf auth login`, or set HF_TOKEN.

    Args:
        labels: folder of pseudo labels.
        license: of the labels, as the Hub names it.
    """

    labels: str
    license: str = "apache-2.0"


@dataclass(kw_only=True)
class PullArgs(Checked):
    """Fetches a published network or labels, and checks the sha256 of what came: `sssd pull NAME --out FOLDER`.

    Args:
        name: weights that ship, such as 'sssd_resnet18_cifar.cifar10', or a Hub repository, ORG/NAME.
        out: folder to write.
        labels: the repository holds pseudo labels.
        revision: branch, tag or commit of the repository.
        overwrite: replace what such a command wrote into `out`; other files stay.
    """

    name: str
    out: str
    labels: bool = False
    revision: str | None = None
    overwrite: bool = False
