"""The arguments of every command."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sssd_zoo.configs.augment import AugmentConfig
from sssd_zoo.configs.data import MAX_PIXELS, DataConfig, DetectionDataConfig
from sssd_zoo.configs.evaluation import ForwardConfig, KNNConfig, ProbeConfig, QualityConfig
from sssd_zoo.configs.methods import (
    AnchoredConfig,
    ClusterConfig,
    ContrastiveConfig,
    DetectorConfig,
    Method,
    MoCoConfig,
    PretextConfig,
    SEEDConfig,
    SelfDistillationConfig,
    StudentConfig,
)
from sssd_zoo.configs.ranges import (
    LARGEST_COUNT,
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
    WallTime,
    Weight,
    Workers,
)
from sssd_zoo.configs.training import OptimConfig, RuntimeConfig


@dataclass(kw_only=True)
class PretrainArgs(DataConfig, RuntimeConfig, QualityConfig, MoCoConfig):
    """Pretrains a network without labels by MoCo v2.

    Args:
        out: run folder to write; timm loads it as `local-dir:OUT`.
        model: timm name of the network; by default one of this package's, chosen by the image size.
            A network of timm's keeps its own stem here; that for small images comes with the name sssd_NAME_cifar.
        image_size: side of the views in pixels; by default that of the stored images if it is at most 40, otherwise
            224.
        steps_per_epoch: steps that count as one epoch; needed for a stream of unknown length.
        resume: resume from the newest checkpoint in `out`.
        overwrite: discard the run in `out` and start again.
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
        model: run folder of the pretraining, or the name of any timm model.
        teacher_size: side in pixels that images are resized to for it; by default its own input size.
        out: folder to write the labels into.
        seed: random seed of k-means.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
    """

    model: str
    out: str
    teacher_size: Pixels | None = None
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class DistillArgs(DataConfig, RuntimeConfig, AnchoredConfig):
    """Trains a network on pseudo, random or true labels: by default a four-exit network by self distillation.

    Args:
        labels: folder of pseudo labels, 'random' (the baseline), 'true' (the upper bound), or 'own': clusters of the
            network's own features, recomputed before each epoch (DACSD).
        method: 'sssd' for self distillation, or 'clusterfit' for a network without exits on the same labels.
        out: run folder to write; timm loads it as `local-dir:OUT`.
        k: number of classes of 'random' and 'own' labels.
        model: timm name of the network; by default one of this package's, chosen by the image size. Any network
            of timm's that runs in stages can be given, such as mobilenetv4_conv_small: it gets four exits, and for
            views of at most 40 px a stem that suits them (docs/backbones.md).
        image_size: side of the views in pixels; by default that of the stored images if it is at most 40, otherwise
            224.
        init: run folder or timm name of a network whose trunk weights training starts from; by default random
            initialisation, as in the paper.
        encoder: network whose features every exit also predicts, see `anchor`: a run folder, or the name of any timm
            model.
        teacher_size: side in pixels that the views are resized to for `encoder`; by default its own input size.
        soft: temperature of soft labels, which weight the nearest centroids by distance, in units of the images' mean
            squared distance to their own centroid. By default labels are hard, as in the paper. Needs labels made with
            --nearest above 1.
        resume: resume from the newest checkpoint in `out`.
        overwrite: discard the run in `out` and start again.
    """

    labels: str
    out: str
    method: Literal["sssd", "clusterfit"] = "sssd"
    k: Clusters = 1000
    model: str | None = None
    image_size: Pixels | None = None
    init: str | None = None
    encoder: str | None = None
    teacher_size: Pixels | None = None
    soft: Temperature | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class SEEDArgs(DataConfig, RuntimeConfig, SEEDConfig):
    """Distils a frozen network, such as one pretrained without labels, into a smaller one by SEED.

    Args:
        teacher: run folder, or the name of any timm model.
        out: run folder to write; timm loads it as `local-dir:OUT`.
        model: timm name of the student network; by default one of this package's, chosen by the image size.
        image_size: side of the views in pixels; by default that of the stored images if it is at most 40, otherwise
            224.
        teacher_size: side in pixels that the views are resized to for the teacher; by default its own input size.
        resume: resume from the newest checkpoint in `out`.
        overwrite: discard the run in `out` and start again.
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
    """Trains a linear probe on every exit of a frozen network, and measures them: `sssd linear MODEL --data DATA`.

    Args:
        model: run folder, or the name of any timm model; also as the first word, without the flag.
        out: folder to write metrics.json and the network with the probes as its heads into; by default results are only
            printed.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out of `split`.
        seed: random seed of the probes and of the held-out fraction.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
    """

    model: str
    out: str | None = None
    test_split: str | None = None
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class KNNArgs(DataConfig, ForwardConfig, KNNConfig):
    """Measures every exit of a frozen network by weighted k-nearest neighbours: `sssd knn MODEL --data DATA`.

    Args:
        model: run folder, or the name of any timm model; also as the first word, without the flag.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out of `split`.
        holdout: fraction of the images to measure on, if the data set has no test or validation split.
        seed: random seed of the held-out fraction.
    """

    model: str
    test_split: str | None = None
    holdout: ProperFraction = 0.2
    seed: Seed = 0


@dataclass(kw_only=True)
class QualityArgs(DataConfig, ForwardConfig):
    """Measures how good a network is for images without labels, and says what to do next.

    Args:
        model: run folder, or the name of any timm model.
        images: number of images to look at, drawn at random.
        seed: random seed of the images, of their views and of k-means.
        format: 'table', or 'json' for programs.
    """

    model: str
    images: Clusters = 2000
    seed: Seed = 0
    format: Literal["table", "json"] = "table"


@dataclass(kw_only=True)
class FitArgs(DataConfig, RuntimeConfig, QualityConfig, PretextConfig):
    """Runs the whole pipeline: pretrains, clusters, distils, measures and reports. Rerun it to resume.

    Args:
        out: run folder to write.
        model: timm name of the student network; by default one of this package's, chosen by the image size. Any network
            of timm's that runs in stages can be given, such as mobilenetv4_conv_small: it gets four exits, and for
            views of at most 40 px a stem that suits them (docs/backbones.md).
        method: 'contrastive' self distillation, which starts from the weights of the network that was clustered and
            goes on with the pretext at every exit, by default with AdamW and random resized crops (docs/methods.md);
            'anchored' self distillation, in which every exit also predicts the features that were clustered
            (docs/anchored.md); or 'sssd', the method of the paper. By default 'contrastive', but 'anchored' with
            `features` or a `distill.anchor` above 0, and 'sssd' with `init`, `pretrain_model`, `distill.mix` or
            `distill.anchor 0`.
        image_size: side of the views in pixels; by default that of the stored images if it is at most 40, otherwise
            224.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out of `split`.
        pretrain: MoCo v2.
        cluster: k-means.
        distill: self distillation; settings of another method than `method` are refused, or have no effect.
        augment: augmentations of all trainings, in place of those of `pretrain` and `distill`.
        warm_start: initialise the distilled network's trunk from the network that was clustered, not at random as in
            the paper. By default with the method 'contrastive', unless `features`, `init` or `pretrain_model` is given.
        init: another network to initialise that trunk from: a run folder, or a timm name with weights, such as
            sssd_resnet18_cifar.cifar10.
        soft: temperature of soft labels, see `sssd distill`; needs `cluster.nearest` above 1, such as 8. By default
            labels are hard.
        probe: linear probes, if the data set has labels.
        baseline: also distil on random labels, as a baseline, if the data set has labels to measure by.
        budget: wall time of the whole run on this machine, such as 30m, 2h or 1h30m: the epochs of all stages are
            chosen to fit it approximately, from a few timed steps.
        more_epochs: train the distilled network of a finished run for this many more epochs, from its weights, by a new
            cosine schedule from the learning rate of `distill` to 0 (a warm restart). '[20, 10]' adds 10 epochs to a
            run that had 20 more.
        overwrite: redo what `out` holds from other settings or data; results that do not depend on them are reused.
        keep_checkpoints: keep the checkpoints of trainings that are complete. By default they are removed, as they take
            many times the space of the networks.
    """

    out: str
    model: str | None = None
    method: Method | None = None
    image_size: Pixels | None = None
    test_split: str | None = None
    pretrain: MoCoConfig = field(default_factory=MoCoConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    distill: StudentConfig = field(default_factory=StudentConfig)
    augment: AugmentConfig | None = None
    warm_start: bool | None = None
    init: str | None = None
    soft: Temperature | None = None
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    baseline: bool = True
    budget: WallTime | None = None
    more_epochs: Count | list[Count] = field(default_factory=list)
    overwrite: bool = False
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        """Raises `SettingsError` for invalid values; one number of `more_epochs` is a list of it."""
        super().__post_init__()
        if isinstance(self.more_epochs, int):
            self.more_epochs = [self.more_epochs]

    @property
    def student(self) -> AnchoredConfig | ContrastiveConfig:
        """The settings of `distill` that its method has.

        Raises:
            SettingsError: if they contradict one another.
        """
        return (ContrastiveConfig if self.method == "contrastive" else AnchoredConfig).of(self.distill)

    @property
    def extensions(self) -> list[int]:
        """The epochs of each further training of the distilled network, in turn."""
        return [self.more_epochs] if isinstance(self.more_epochs, int) else self.more_epochs


@dataclass(kw_only=True)
class CompareArgs(DataConfig, RuntimeConfig, PretextConfig):
    """Trains and measures several methods on the same images, and reports them beside the paper's results.

    Args:
        out: folder to write; results already there are reused if their settings are the same.
        methods: any of 'sssd', 'random' (BYOT on random labels), 'true' (BYOT on true labels), 'clusterfit', 'seed' and
            'dacsd'; variants of SSSD: 'sssd-warm' (trunk initialised from M_ssl), 'sssd-redos' (best of several runs of
            k-means), 'sssd-soft' (soft labels), 'anchored' and 'anchored-warm' (docs/anchored.md);
            'contrastive', which starts from M_ssl's weights, too, and goes on with the pretext (docs/methods.md);
            'clusterfit-anchored'; and 'pretext', M_ssl itself.
        epochs: epochs of single methods in place of those of `distill`, `contrastive` and `seed_method`, such as
            '{clusterfit: 6}', to give all the same training time; for 'pretext' those of MoCo.
        variants: more methods, each one of those that learn pseudo labels with some settings of `distill` changed, by
            names of your own: '{anchored-mixup: {method: anchored, mix: mixup}}'.
        seeds: random seeds; every method is run once for each. They replace --seed.
        model: timm name of the student network; by default one of this package's, chosen by the image size. Any network
            of timm's that runs in stages can be given, such as mobilenetv4_conv_small: it gets four exits, and for
            views of at most 40 px a stem that suits them (docs/backbones.md).
        image_size: side of the views in pixels; by default that of the stored images if it is at most 40, otherwise
            224.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out of `split`.
        pretrain: MoCo v2.
        cluster: k-means; its k is also the number of classes of random labels and of DACSD's.
        distill: training of all methods that learn from labels, but 'contrastive'.
        contrastive: training of 'contrastive'.
        seed_method: SEED.
        augment: augmentations of all trainings, in place of those of `pretrain`, `distill`, `contrastive` and
            `seed_method`.
        redos: number of random initialisations of k-means for 'sssd-redos'.
        soft: temperature of the soft labels of 'sssd-soft', which cover each image's 8 nearest centroids.
        probe: linear probes.
        also: folders of other comparisons, on other data or pretexts, to include in the same tables.
        overwrite: redo what `out` holds from other settings or data; results that do not depend on them are reused.
        keep_checkpoints: keep the checkpoints of trainings that are complete. By default they are removed, as they take
            many times the space of the networks.
    """

    out: str
    methods: Annotated[
        list[
            Literal[
                "sssd",
                "random",
                "true",
                "clusterfit",
                "seed",
                "dacsd",
                "sssd-warm",
                "sssd-redos",
                "sssd-soft",
                "anchored",
                "anchored-warm",
                "contrastive",
                "clusterfit-anchored",
                "pretext",
            ]
        ],
        Items(1),
    ] = field(default_factory=lambda: ["sssd", "random", "clusterfit", "seed", "dacsd", "true"])
    epochs: dict[str, Count] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    model: str | None = None
    image_size: Pixels | None = None
    test_split: str | None = None
    pretrain: MoCoConfig = field(default_factory=MoCoConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    distill: AnchoredConfig = field(default_factory=AnchoredConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    seed_method: SEEDConfig = field(default_factory=SEEDConfig)
    augment: AugmentConfig | None = None
    redos: Count = 5
    soft: Temperature = 0.2
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    also: list[str] = field(default_factory=list)
    overwrite: bool = False
    keep_checkpoints: bool = False


@dataclass(kw_only=True)
class EarlyExitArgs(DataConfig):
    """Calibrates a network's early exit on held-out images: a temperature per exit, and thresholds that meet a budget.

    Give one budget: --points_lost, --answers_changed, --multiply_adds or --latency. The default is --points_lost 0.5;
    for images without labels, which need no temperatures, --answers_changed 0.5.

    Args:
        model: folder of a network or of a run, timm name, or hf-hub:NAME; its four exits must be trained classifiers.
        out: folder to write: the calibrated network with its thresholds, and early_exit/ with the report and figure.
        split: split that the classifiers were not trained on; by default 'test' or 'validation', without labels also
            the only one. A fraction of it is used for calibration, and results are measured on the rest.
        calibration_split: split to calibrate on instead; results are then measured on all of `split`.
        holdout: fraction of `split` to calibrate on, stratified by class where there are labels.
        points_lost: minimise the cost while losing at most this many percentage points of accuracy against the
            ensemble, with 95 percent confidence on other images of the same kind. Needs labels. The exits share a
            threshold.
        answers_changed: minimise the cost while changing at most this percentage of the ensemble's predictions, with 95
            percent confidence. Needs no labels. The exits share a threshold.
        multiply_adds: maximise the accuracy (without labels the agreement with the ensemble) at an average cost of at
            most this many million MACs per image.
        latency: the same at an average latency of at most this many milliseconds per image, at batch size 1 on this
            machine.
        batch_size: images per forward pass where nothing is timed.
        device: 'auto' uses a CUDA GPU if there is one; 'cpu' never does.
        runs: number of timed runs of each network, interleaved.
        seed: random seed of the calibration images and of the timed images.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
    """

    model: str
    out: str
    calibration_split: str | None = None
    holdout: ProperFraction = 0.5
    points_lost: Percent | None = None
    answers_changed: Percent | None = None
    multiply_adds: Positive | None = None
    latency: Positive | None = None
    batch_size: Count = 256
    device: Literal["auto", "cpu"] = "auto"
    runs: Count = 10
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class ExportArgs(Checked):
    """Exports a network for deployment, with or without this package; see docs/deploy.md.

    Args:
        model: folder of a network or of a run, timm name, or hf-hub:NAME.
        out: file to write; a folder for safetensors and for the stages of early exit.
        output: an exit's number ('4' and 'final' are the same), 'ensemble', 'all' for one graph with four outputs, or
            'early-exit' for one graph per stage; as safetensors the last three are the whole network. By default
            'ensemble', for --format timm '4'.
        format: 'onnx' or 'torch-export', both with a dynamic batch size; 'safetensors', which timm loads with this
            package; 'timm', exit 4 as timm's own network; or 'transformers', the whole network with its code, for
            trust_remote_code. All but 'safetensors' load without this package.
        thresholds: thresholds of early exit at exits 1 to 3, 0 to 1, for what has all exits: --output early-exit, and
            the formats safetensors and transformers; by default those stored with the network.
        int8: also write the ONNX graph quantised to int8, and measure both: their accuracy where the images have
            labels, otherwise how often they agree.
        data: images for --int8, given as for the other commands.
        image_column: column of `data` that holds the images; by default found by its type or name.
        label_column: column of `data` that holds the labels; by default found by its type or name.
        pages: 'first' reads the first page of a TIFF or DICOM file with several, 'all' makes an image of each.
        max_corrupt: number of undecodable images to skip before giving up; each one is named.
        max_pixels: largest number of pixels an image may have to be decoded.
        workers: number of threads or processes that decode images; by default one for each CPU, at most 16.
        revision: commit, branch or tag of the data set on the Hub; by default the latest.
        unlabelled: ignore the labels of `data`, for instance where its classes are not the network's.
        split: split to calibrate the activation ranges on; by default 'train', or the only one.
        test_split: split to measure on; by default 'test' or 'validation', otherwise half of `split`.
        calibration_images: number of images of `split` to calibrate on.
        batch_size: images per forward pass while calibrating.
        seed: random seed of the choice of calibration images.
        overwrite: replace `out` if it is an earlier export.
    """

    model: str
    out: str
    output: Literal["1", "2", "3", "4", "final", "ensemble", "all", "early-exit"] | None = None
    format: Literal["onnx", "torch-export", "safetensors", "timm", "transformers"] = "onnx"
    thresholds: Thresholds | None = None
    int8: bool = False
    data: str | Names | None = None
    image_column: str | None = None
    label_column: str | None = None
    pages: Literal["first", "all"] = "first"
    max_corrupt: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS
    workers: Workers | None = None
    revision: str | None = None
    unlabelled: bool = False
    split: str | None = None
    test_split: str | None = None
    calibration_images: Count = 256
    batch_size: Count = 64
    seed: Seed = 0
    overwrite: bool = False


@dataclass(kw_only=True)
class PredictArgs(ForwardConfig):
    """Classifies images, and reports which exit answered.

    Args:
        model: folder of a network or of a run, timm name, or hf-hub:NAME.
        images: image files, or folders of them.
        output: an exit's number, 'final', 'ensemble', or 'early-exit', where images that no exit is confident about are
            listed under exit 4 and get the ensemble's answer. 'auto' is early exit if the network has thresholds or
            --thresholds is given, otherwise the network's default output, which is the ensemble if all exits are
            loaded.
        thresholds: thresholds of early exit at exits 1 to 3, 0 to 1; by default those stored with the network.
        format: 'table', or 'jsonl' for one JSON object per image.
        max_corrupt: number of undecodable images to skip before giving up; each one is named.
        max_pixels: largest number of pixels an image may have to be decoded: a small file can expand to gigabytes. JPEG
            is decoded at reduced resolution and counted at that size.
        precision: precision of the trunk; 'auto' uses fp32 for early exit, which is calibrated in fp32; otherwise bf16
            where the hardware supports it, fp16 on older GPUs, and fp32.
    """

    model: str
    images: Names
    output: Literal["auto", "1", "2", "3", "4", "final", "ensemble", "early-exit"] = "auto"
    thresholds: Thresholds | None = None
    format: Literal["table", "jsonl"] = "table"
    max_corrupt: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS


@dataclass(kw_only=True)
class ReportArgs(ForwardConfig):
    """Writes report.html of a finished run: its results, and its clusters with their images to look at and name.

    `sssd fit` writes it at its end, too.

    Args:
        run: run folder of `sssd fit`.
        data: where the run's images are now, if they have moved; several sources as in '[A, B]'.
        images: maximum number of images to show; if there are more, a sample spread over each cluster is shown.
    """

    run: str
    data: str | Names | None = None
    images: Count = 10_000


@dataclass(kw_only=True)
class RenameArgs(Checked):
    """Names the clusters that a network predicts: `sssd rename RUN NAMES.csv`.

    Clusters with the same name become one class.

    Args:
        model: run folder of `sssd fit`, or folder of a network.
        names: CSV file with the columns 'cluster' and 'name', as report.html saves it; clusters that it leaves out keep
            their names.
    """

    model: str
    names: str


@dataclass(kw_only=True)
class EmbedArgs(DataConfig, ForwardConfig):
    """Writes the features of images into a file, with the path or row of each; rerun it to resume.

    `sssd embed MODEL --data DATA --out FILE`.

    Args:
        model: folder of a network or of a run, any timm name, or hf-hub:NAME.
        out: file to write; its extension sets the format: .parquet, .csv or .npy (docs/features.md).
        exits: an exit's number, 'final' (the last; of networks without exits, their pooled features), or 'all'.
        dtype: 'fp16' takes half the space of 'fp32'.
        normalise: divide every embedding by its L2 norm, so that a product of two is their cosine similarity.
        image_size: side in pixels that images are resized to for the network; by default its own input size.
        max_corrupt: number of undecodable images to leave out before giving up; by default any number of them are left
            out, named and counted.
        overwrite: replace `out` if this command wrote it, and discard an unfinished file of other settings.
    """

    model: str
    out: str
    exits: Literal["1", "2", "3", "4", "final", "all"] = "final"
    dtype: Literal["fp32", "fp16"] = "fp32"
    normalise: bool = False
    image_size: Pixels | None = None
    max_corrupt: CountOrZero = LARGEST_COUNT
    overwrite: bool = False


@dataclass(kw_only=True)
class SearchArgs(ForwardConfig):
    """Finds the images of a file of `sssd embed` that are nearest to others: `sssd search MODEL INDEX IMAGES`.

    Args:
        model: the network that made the file: folder of a network or of a run, timm name, or hf-hub:NAME.
        index: file of `sssd embed`.
        images: image files, or folders of them.
        exit: exit whose embeddings are compared, if the file has several; by default the last of them.
        k: number of images to find for each.
        format: 'table', or 'jsonl' for one JSON object per image found.
        out: CSV file to also write the results to.
        max_corrupt: number of undecodable images to skip before giving up; each one is named.
        max_pixels: largest number of pixels an image may have to be decoded: a small file can expand to gigabytes. JPEG
            is decoded at reduced resolution and counted at that size.
        overwrite: replace `out` if this command wrote it.
    """

    model: str
    index: str
    images: Names
    exit: Literal["1", "2", "3", "4", "final"] | None = None
    k: Count = 10
    format: Literal["table", "jsonl"] = "table"
    out: str | None = None
    max_corrupt: CountOrZero = 0
    max_pixels: Count = MAX_PIXELS
    overwrite: bool = False


@dataclass(kw_only=True)
class ClustersArgs(Checked):
    """Copies or links the images of a run into a folder per cluster, and lists them in clusters.csv.

    Args:
        run: run folder of `sssd fit`, or a folder of pseudo labels.
        out: folder to write.
        link: 'hard' or 'symbolic' links instead of copies; images that are not files, such as rows of parquet or pages
            of a file, are written as files.
        data: where the images are now, if not where the run found them; needed for a folder of pseudo labels. Several
            sources as in '[A, B]'.
        image_column: column that holds the images; by default as the run read it, or found by its type or name.
        pages: 'first' or 'all' pages of TIFF and DICOM files, as for the labels; by default as the run read them.
        max_pixels: largest number of pixels of a page, as for the labels; by default as the run read them.
        revision: commit, branch or tag of the data set on the Hub; by default that of the run, or the latest.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
    """

    run: str
    out: str
    link: Literal["none", "hard", "symbolic"] = "none"
    data: str | Names | None = None
    image_column: str | None = None
    pages: Literal["first", "all"] | None = None
    max_pixels: Count | None = None
    revision: str | None = None
    overwrite: bool = False


@dataclass(kw_only=True)
class FinetuneArgs(DataConfig, RuntimeConfig, SelfDistillationConfig):
    """Fine-tunes networks on class-balanced subsets of the labels, over several seeds. Rerun it to resume.

    Args:
        out: folder to write; results already there are reused if their settings are the same.
        models: networks to fine-tune: run folders, timm names (with their pretrained weights), and 'scratch' for the
            first of the others randomly initialised, as a baseline.
        method: 'final' trains the trunk and a new FC layer with cross-entropy, as in the paper; 'exits' trains all
            exits of a network of this package by self distillation.
        fractions: fractions of each class's labels, above 0 and up to 1 (paper: 0.01, 0.1 to 0.5), at least one label
            per class. For a given seed, smaller subsets are contained in larger ones.
        per_class: numbers of labels per class, instead of fractions.
        seeds: random seeds of the subsets, the initialisation and the training. They replace --seed.
        image_size: side of the views in pixels; by default that of the stored images if it is at most 40, otherwise
            224. A network's own size is not taken over: give it here.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out of `split`.
        holdout: fraction of the images held out of training to measure on, if the data set has no test or validation
            split.
        epochs: passes over the labelled images.
        min_steps: minimum number of optimiser steps; small subsets are repeated for more epochs to reach it.
        batch_size: images per optimiser step, over all processes; smaller if there are fewer labelled images.
        lr: peak learning rate of the new classifiers of a pretrained network.
        trunk_lr: peak learning rate of the trunk of a pretrained network.
        scratch_lr: peak learning rate of a network trained from scratch, for all its parameters.
        weight_decay: weight decay, applied to all parameters; the paper fine-tunes without it.
        deploy: leave one network to use in OUT/model: all exits by self distillation on the most labels, with its card.
        overwrite: redo what `out` holds from other settings or data; results that do not depend on them are reused.
        keep_checkpoints: keep the checkpoints of trainings that are complete. By default they are removed, as they take
            many times the space of the networks.
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
    deploy: bool = True
    overwrite: bool = False
    keep_checkpoints: bool = False


@dataclass(kw_only=True)
class DetectArgs(DetectionDataConfig, DetectorConfig, RuntimeConfig, OptimConfig):
    """Fine-tunes Faster R-CNN on a network's trunk and measures it; the defaults are for Pascal VOC 07+12.

    Args:
        out: run folder to write.
        lr: peak learning rate; the default 0.02 is for 16 images.
        sizes: progressive resizing: short sides of the images in pixels for successive equal parts of training, such as
            [160, 240]. By default all images have `short_side`.
        test_data: sources to measure on, given like `data`; by default those of `data`.
        test_split: split to measure on; by default 'test' or 'val', the first that exists and shares no images with
            the training split.
        voc: also report the 11-point AP50 of VOC2007.
        resume: resume from the newest checkpoint in `out`.
        overwrite: discard the run in `out` and start again.
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
    """Measures the average precision of a trained detector: `sssd detect-eval MODEL --data DATA`.

    Args:
        model: run folder of `sssd detect`; also as the first word, without the flag.
        split: split to measure on; by default 'test' or 'val'. A COCO file is measured whole, and so is a `datasets`
            source with a single split.
        classes: class names, which must be the detector's; by default they are.
        batch_size: images per forward pass.
        precision: precision of the forward pass; in half precision many scores are equal.
        short_side: short side of the images in pixels; by default as in training.
        voc: also report the 11-point AP50 of VOC2007.
        out: folder to write metrics.json and pictures of detections beside the ground truth into; by default results
            are only printed.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
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
    """Serves a page to try a network on, or publishes it as a Space: `sssd space RUN`.

    Args:
        run: run folder of `sssd fit` or `sssd finetune`, folder of a network, or its name:
            'sssd_resnet18_cifar.cifar10', 'hf-hub:...'.
        port: port of the page on this machine; by default the first free one from 7860 on.
        run_images: show images of the run's data set, as examples and beside their clusters. By default the page on
            this machine shows them, and with --push they are not published.
        push: ORG/NAME of a Space on the Hugging Face Hub to publish, instead of serving the page here.
        private: make the Space private; an existing public Space of that name is refused.
        dry_run: list the files that would be published and their sizes, and stop.
    """

    run: str
    port: Port | None = None
    run_images: bool | None = None
    push: str | None = None
    private: bool = False
    dry_run: bool = False


@dataclass(kw_only=True)
class ModelsArgs(Checked):
    """Lists the networks of this package with the cost of each exit, and the bundled weights with their accuracies.

    Args:
        pattern: shell pattern of the network names to list.
    """

    pattern: str = "sssd_*"


@dataclass(kw_only=True)
class CardArgs(Checked):
    """Collects a trained network's model card, config, metrics, logs, recipe and figures: `sssd card RUN --out FOLDER`.

    Args:
        run: run folder of `sssd fit`; also as the first word, without the flag.
        out: folder to write.
        name: timm name and tag of the weights if they are bundled with the package, such as
            'sssd_resnet18_cifar.cifar10'.
        weights: file to write the half-precision weights to; by default model.safetensors in `out`.
        calibrated: folder that `sssd early-exit` made from the run; its network, which has thresholds, is used.
        paper: row of the paper's tables to show for comparison, such as 'CIFAR-10: ResNet-18, 200 epochs'.
        license: licence of the weights, as the Hub names it, such as 'apache-2.0'; by default none is stated.
        remarks: sentences to add to the card that no file of the run contains, such as where the images come from.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
    """

    run: str
    out: str
    name: str | None = None
    weights: str | None = None
    calibrated: str | None = None
    paper: str | None = None
    license: str | None = None
    remarks: list[str] = field(default_factory=list)
    overwrite: bool = False


@dataclass(kw_only=True)
class RepoConfig(Checked):
    """Where and how to publish on the Hub.

    Args:
        repo: Hub repository, ORG/NAME; created if it does not exist.
        private: make the repository private; an existing public one is refused.
        revision: branch to commit to, created if it does not exist; by default 'main'.
        tag: tag of the commit; existing tags are never moved.
        pull_request: open a pull request instead of committing to the branch.
        commit_message: first line of the commit message.
        dry_run: list the files that would be published and their sizes, and stop.
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

    Log in with `hf auth login`, or set HF_TOKEN.

    Args:
        run: run folder of `sssd fit`, or folder of `sssd card`.
        calibrated: folder that `sssd early-exit` made from the run; its network, which has thresholds, is published.
        include: shell patterns of other files in `run` to publish, such as 'report.md' or '[report.md, "*.svg"]'.
        license: licence of the weights of a run, as the Hub names it, such as 'apache-2.0'; by default none is stated.
            A folder of `sssd card` states its own.
    """

    run: str
    calibrated: str | None = None
    include: list[str] | str = field(default_factory=list)
    license: str | None = None


@dataclass(kw_only=True)
class PublishLabelsArgs(RepoConfig):
    """Publishes pseudo labels as a data set on the Hub: `sssd publish-labels FOLDER --repo R`.

    Log in with `hf auth login`, or set HF_TOKEN.

    Args:
        labels: folder of pseudo labels, or a run folder of `sssd fit`.
        license: licence of the labels, as the Hub names it, such as 'cc-by-4.0'; by default none is stated.
    """

    labels: str
    license: str | None = None


@dataclass(kw_only=True)
class PullArgs(Checked):
    """Downloads a published network or pseudo labels, and verifies their sha256: `sssd pull NAME --out FOLDER`.

    Args:
        name: bundled weights, such as 'sssd_resnet18_cifar.cifar10', or a Hub repository, ORG/NAME or hf-hub:ORG/NAME.
        out: folder to write.
        labels: the repository holds pseudo labels, not a network.
        revision: branch, tag or commit of the repository; by default 'main'.
        overwrite: replace what an earlier run of this command wrote into `out`; other files are kept.
    """

    name: str
    out: str
    labels: bool = False
    revision: str | None = None
    overwrite: bool = False


@dataclass(kw_only=True)
class CleanArgs(Checked):
    """Removes what a run no longer needs: the checkpoints and caches of its complete stages. Nothing else is touched.

    Args:
        run: folder of `sssd fit`, `compare`, `finetune`, or of a single training.
        dry_run: only say what would be removed.
    """

    run: str
    dry_run: bool = False
