"""What `sssd fit` and `sssd compare` begin with; above all M_ssl, whose features are clustered, and its origin.

It is pretrained by MoCo v2 (section 3.1 of the paper), on the images to distil (D_tar) or on others (D_pre, section
4.5), and may be of another size than the student; or it is any network that timm loads, and nothing is pretrained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sssd_zoo.configs import (
    AnchoredConfig,
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    ForwardConfig,
    MoCoConfig,
    QualityConfig,
    RuntimeConfig,
)
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, plural
from sssd_zoo.files import read_json, write_json
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.labels.pseudo_labels import PseudoLabels, quality
from sssd_zoo.models.networks import load_encoder, load_network, weights_digest
from sssd_zoo.pipeline.defaults import Scale
from sssd_zoo.pipeline.mistakes import Mistakes
from sssd_zoo.pipeline.preflight import Preflight, Trained, encoder_like
from sssd_zoo.pipeline.pretrain import pretrain_network
from sssd_zoo.pipeline.pseudo_label import cluster_images, describe_labels
from sssd_zoo.pipeline.stages import Stage
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import RunSpec


@dataclass(frozen=True)
class Pretext:
    """M_ssl, and what it is pretrained on.

    Attributes:
        arch: its timm name; of `features`, what the user called it.
        source: D_pre, or None where nothing is pretrained.
        same_data: whether D_pre is D_tar.
        size: side of the pretext's views in pixels.
        config: of MoCo.
        digest: of the weights of `features`, or of those that the pretraining starts from; empty for new ones.
        teacher_size: side in pixels of the images that `features` looks at, where it is not the network's own.
    """

    arch: str
    source: ImageData | None
    same_data: bool
    size: int
    config: MoCoConfig
    digest: str
    teacher_size: int | None = None

    @property
    def after(self) -> tuple[str, ...]:
        """The stages that make it."""
        return ("pretrain",) if self.source is not None else ()

    @property
    def description(self) -> str:
        """What it is, in Markdown."""
        if self.source is None:
            at = "" if self.teacher_size is None else f" at {self.teacher_size} px"
            return f"{code(short_name(self.arch))}, as it is{at}"
        where = "the same images" if self.same_data else f"{code(self.source.name)}, {len(self.source):,} images"
        start = f" from the weights of {code(short_name(self.config.init))}" if self.config.init else ""
        return f"{code(self.arch)}, MoCo v2 for {plural(self.config.epochs, 'epoch')}{start} on {where}"

    def network(self, out: Path) -> str:
        """What `load_network` loads it by, in a run folder."""
        return str(out / "pretrain") if self.source is not None else self.arch

    def load(self, out: Path) -> Any:
        """The network, without a classifier, which a run folder holds if it was pretrained; see `load_encoder`."""
        return load_encoder(self.network(out), self.teacher_size)

    def encoder_like(self) -> tuple[Any, InputSpec]:
        """The network or, where it is yet to be pretrained, one of its kind; see `preflight.encoder_like`."""
        features = self.arch if self.source is None else None
        return encoder_like(features, self.teacher_size, self.arch, self.source, self.size)

    def inputs(self) -> dict[str, Any]:
        """What decides it, for the inputs of the stages that use it."""
        if self.source is None:
            at = {} if self.teacher_size is None else {"teacher_size": self.teacher_size}
            return {"arch": self.arch, "features": self.digest, **at}
        where = self.source.identity
        start = {"init": self.digest} if self.digest else {}  # the weights count, not where they lie
        return {"arch": self.arch, **where, **start}

    def pretrain_stages(
        self, settings: dict[str, Any], runtime: RuntimeConfig, quality: QualityConfig | None = None
    ) -> list[Stage]:
        """Pretrains it, where it is to be pretrained; `quality` changes none of its numbers."""
        source = self.source
        if source is None:
            return []

        def pretrain(folder: Path) -> dict[str, Any]:
            spec = RunSpec(arch=self.arch, size=self.size, out=folder, title="MoCo v2")
            return dict(pretrain_network(source, self.config, runtime, spec, quality=quality))

        inputs = {**settings, **self.inputs()}
        return [Stage(name="pretrain", action=pretrain, settings=inputs, all_processes=True)]

    def label_stage(self, setup: "Setup", config: ClusterConfig, out: Path, seed: int, name: str = "labels") -> Stage:
        """Clusters its features of D_tar into pseudo labels.

        Args:
            setup: the images, and how to run networks.
            config: of k-means.
            out: the run folder.
            seed: of k-means.
            name: of the stage.
        """
        model, data = self.network(out), setup.data

        def label(folder: Path) -> dict[str, Any]:
            network = self.load(out)
            labels = cluster_images(network, data, config, setup.forward, model=model, seed=seed, out=folder)
            if labels is None:
                return {}
            print(describe_labels(labels, folder))
            return {"k": labels.meta["k"]}

        # Where the features lie does not change the labels.
        settings = {"k": config.k, "iterations": config.iterations, "redos": config.redos}
        settings |= {"nearest": config.nearest} if config.nearest > 1 else {}
        settings |= {} if self.after else self.inputs()
        return Stage(
            name=name,
            action=label,
            settings=settings,
            after=self.after,
            all_processes=True,
            then=lambda: update_quality(out / name, data),
        )


@dataclass(frozen=True)
class Setup:
    """What `sssd fit` and `sssd compare` begin with.

    Attributes:
        args: of the command, complete.
        out: the run folder.
        runtime: where and how to run.
        config: of the images.
        data: the images to distil, D_tar.
        size: side of the student's views in pixels.
        arch: the student's timm name.
        pretext: M_ssl.
        forward: how to run trained networks.
        inputs: what all stages depend on, but the seed.
    """

    args: Any
    out: Path
    runtime: RuntimeConfig
    config: DataConfig
    data: ImageData
    size: int
    arch: str
    pretext: Pretext
    forward: ForwardConfig
    inputs: dict[str, Any]

    def with_args(self, args: Any) -> "Setup":
        """The same with other settings of the trainings."""
        return replace(self, args=args, pretext=replace(self.pretext, config=args.pretrain))

    def spec(self, folder: Path, title: str) -> RunSpec:
        """The student, to be trained into `folder`."""
        return RunSpec(arch=self.arch, size=self.size, out=folder, title=title)


def with_augment(args: Any, methods: Sequence[str]) -> Any:
    """The arguments with `--augment`, where it is given, in the settings of every method.

    Args:
        args: of `sssd fit` or `sssd compare`.
        methods: names of the arguments that hold the methods' settings.

    Raises:
        UserError: if a method has augmentations of its own too.
    """
    if args.augment is None:
        return args
    for name in methods:
        if getattr(args, name).augment != AugmentConfig():
            raise UserError(f"--augment is for all trainings, --{name}.augment for one: give one of them")
    changed = {name: replace(getattr(args, name), augment=args.augment) for name in methods}
    return replace(args, augment=None, **changed)


def set_up(
    args: Any,
    kind: str,
    trained: Trained,
    *,
    warm: bool,
    anchored: Mapping[str, AnchoredConfig],
    pretext: bool = True,
    require_labels: bool = False,
    complete: Callable[[Scale], Any] | None = None,
    mistakes: Mistakes | None = None,
) -> Setup:
    """Opens the data, chooses the networks, and checks now all that would fail an hour in.

    All mistakes are told at once, before any image is decoded.

    Args:
        args: of `sssd fit` or `sssd compare`.
        kind: of folder, that the command writes.
        trained: gives the settings of the trainings on D_tar after the pretext, by their names in the arguments.
        warm: whether a student is to start from M_ssl's weights.
        anchored: the settings of the trainings that have an anchor, by their names in the arguments.
        pretext: whether a training needs M_ssl.
        require_labels: see `load_images`.
        complete: gives the arguments, where some of them depend on the images and on the device.
        mistakes: what is wrong already, to be told with the rest.

    Raises:
        UserError: for arguments that cannot work.
    """
    mistakes = mistakes or Mistakes()
    tune_cpu()
    runtime = RuntimeConfig.of(args)
    accelerator = usable_accelerator(runtime, mistakes)
    scale: dict[str, Any] = {"device": accelerator.device.type, "processes": accelerator.num_processes}
    out = Path(args.out)
    with mistakes.noted():
        out = open_out(args, kind)
    preflight = Preflight(
        args, trained, warm=warm, anchored=anchored, pretext=pretext, complete=complete, mistakes=mistakes
    )
    images, other, size = preflight.open(require_labels=require_labels)
    networks, args = preflight.settle(size, images=len(images), pretrain_images=len(other or images), **scale)
    data = images.load(progress=rank() == 0)
    source = data if other is None else other.load(progress=rank() == 0)
    if (len(data), len(source)) != (len(images), len(other or images)):  # what cannot be decoded is left out
        networks, args = preflight.settle(size, images=len(data), pretrain_images=len(source), **scale)
    if args.features is None:
        network = Pretext(networks.pretext, source, source is data, size, args.pretrain, networks.start)
    else:
        weights = weights_digest(load_network(args.features, num_classes=0))
        network = Pretext(args.features, None, True, size, args.pretrain, weights, args.teacher_size)
    inputs = {
        **data.identity,
        "arch": networks.student,
        "image_size": size,
        "precision": resolve_precision(runtime.precision, runtime.device),
        "processes": accelerator.num_processes,
    }
    forward = runtime.forward()
    runtime = RuntimeConfig.of(args)
    return Setup(args, out, runtime, DataConfig.of(args), data, size, networks.student, network, forward, inputs)


def usable_accelerator(runtime: RuntimeConfig, mistakes: Mistakes) -> Accelerator:
    """The run's Accelerator; where its settings cannot work here, which is noted, one of other settings."""
    with mistakes.noted():
        return make_accelerator(runtime)
    return make_accelerator(replace(runtime, precision="auto", compile=False))


def update_quality(folder: Path, data: ImageData) -> bool:
    """Compares clusters with the true labels as they are now: they may have changed since, and the images not.

    Returns:
        Whether the file was written anew.
    """
    pseudo, path = PseudoLabels.load(folder), folder / "pseudo_labels.json"
    now = None if data.labels is None else quality(pseudo.labels_of(data.rows), data.labels)
    if now == pseudo.meta["quality"]:
        return False
    write_json(path, {**read_json(path), "quality": now})
    return True
