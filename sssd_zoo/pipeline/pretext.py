"""What `sssd fit` and `sssd compare` begin with; above all M_ssl, whose features are clustered, and its origin.

It is pretrained by MoCo v2 (section 3.1 of the paper), on the images to distil (D_tar) or on others (D_pre, section
4.5), and may be of another size than the student; or it is any network that timm loads, and nothing is pretrained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm

from sssd_zoo.configs import (
    ClusterConfig,
    DataConfig,
    ForwardConfig,
    MoCoConfig,
    PretextConfig,
    QualityConfig,
    RuntimeConfig,
)
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code
from sssd_zoo.files import write_json
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.labels.pseudo_labels import PseudoLabels, quality
from sssd_zoo.models.networks import (
    check_sizes,
    choose_model,
    choose_size,
    input_spec,
    load_encoder,
    load_network,
    load_trunk,
    load_trunk_of,
    new_trunk,
    weights_digest,
)
from sssd_zoo.pipeline.pretrain import pretrain_network
from sssd_zoo.pipeline.pseudo_label import cluster_images, describe_labels
from sssd_zoo.pipeline.stages import Stage
from sssd_zoo.training.engine import check_trainable
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import RunSpec, check_queue


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
        return f"{code(self.arch)}, MoCo v2 for {self.config.epochs} epochs{start} on {where}"

    def network(self, out: Path) -> str:
        """What `load_network` loads it by, in a run folder."""
        return str(out / "pretrain") if self.source is not None else self.arch

    def inputs(self) -> dict[str, Any]:
        """What decides it, for the inputs of the stages that use it."""
        if self.source is None:
            at = {} if self.teacher_size is None else {"teacher_size": self.teacher_size}
            return {"arch": self.arch, "features": self.digest, **at}
        where = {"data": self.source.fingerprint, "images": len(self.source), "storage_size": self.source.size}
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
            network = load_encoder(model, self.teacher_size)
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

    def check_warm_start(self, arch: str) -> None:
        """Raises `UserError` unless the trunk of the student `arch` can start from its weights."""
        network = new_trunk(self.arch) if self.source is not None else load_trunk_of(self.arch)
        load_trunk(timm.create_model(arch), network)


def check_start(name: str, arch: str) -> str:
    """The digest of the weights of a network, whose trunk a network of `arch` can start from.

    Raises:
        UserError: if it cannot.
    """
    network = load_trunk_of(name)
    load_trunk(new_trunk(arch), network)
    return weights_digest(network)


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

    def spec(self, folder: Path, title: str) -> RunSpec:
        """The student, to be trained into `folder`."""
        return RunSpec(arch=self.arch, size=self.size, out=folder, title=title)


def set_up(
    args: Any,
    kind: str,
    trained: Sequence[str],
    *,
    warm: bool,
    require_labels: bool = False,
    complete: Callable[[int, str, int], Any] | None = None,
) -> Setup:
    """Opens the data, chooses the networks, and checks now all that would fail an hour in.

    Args:
        args: of `sssd fit` or `sssd compare`.
        kind: of folder, that the command writes.
        trained: names of the arguments that hold the trainings on D_tar after the pretext.
        warm: whether a student is to start from M_ssl's weights.
        require_labels: see `load_images`.
        complete: of the number of images, the device and the number of processes gives the arguments, where some of
            them depend on these.

    Raises:
        UserError: for arguments that cannot work.
    """
    if args.teacher_size is not None and args.features is None:
        raise UserError("--teacher_size is of the network of --features: give that too, or remove it")
    tune_cpu()
    runtime = RuntimeConfig.of(args)
    accelerator = make_accelerator(runtime)
    processes = accelerator.num_processes
    out = open_out(args, kind)
    config = DataConfig.of(args)
    # Larger images are stored at a size that serves the student and a network that is to look at them as it is.
    default_size = storage_default(args.image_size)
    if args.features is not None:
        default_size = max(
            default_size, storage_default(input_spec(load_encoder(args.features, args.teacher_size)).size)
        )
    data = load_images(config, default_size=default_size, require_labels=require_labels, progress=rank() == 0)
    size = choose_size(data, args.image_size)
    arch = choose_model(args.model, size)
    if complete is not None:
        args = complete(len(data), accelerator.device.type, processes)
    pretext = choose_pretext(args, config, args.pretrain, data, arch=arch, size=size, processes=processes)
    for optim in (getattr(args, name) for name in trained):
        check_trainable(optim, processes, len(data))
        check_sizes(arch, [size, *optim.sizes])
    if warm:
        pretext.check_warm_start(arch)
    if not 2 <= args.cluster.k <= len(data):
        raise UserError(
            f"K = {args.cluster.k} clusters of {len(data)} images; give --cluster.k from 2 to the number of images"
        )
    inputs = {
        "data": data.fingerprint,
        "images": len(data),
        "storage_size": data.size,
        "arch": arch,
        "image_size": size,
        "precision": resolve_precision(runtime.precision, runtime.device),
        "processes": processes,
    }
    forward = ForwardConfig(precision=runtime.precision, device=runtime.device)
    return Setup(args, out, runtime, config, data, size, arch, pretext, forward, inputs)


def choose_pretext(
    args: PretextConfig, config: DataConfig, moco: MoCoConfig, data: ImageData, *, arch: str, size: int, processes: int
) -> Pretext:
    """Reads D_pre, where it is another, or the network to take the features of, and checks that all can work.

    Args:
        args: what the user chose.
        config: of D_tar: how to decode.
        moco: of the pretext.
        data: D_tar.
        arch: timm name of the student.
        size: side of the views in pixels.
        processes: number of them.

    Raises:
        UserError: for choices that exclude one another, and for those that cannot train.
    """
    if args.features is not None:
        given = [name for name in ("pretrain_model", "pretrain_data", "pretrain_split") if getattr(args, name)]
        if given:
            raise UserError(f"--features uses a network without pretraining it: remove --{given[0]}")
        weights = weights_digest(load_network(args.features, num_classes=0))
        if moco.init is not None:
            raise UserError("--features uses a network without pretraining it: remove --pretrain.init")
        return Pretext(args.features, None, True, size, moco, weights, args.teacher_size)
    if args.pretrain_split is not None and args.pretrain_data is None:
        raise UserError("--pretrain_split selects a split of --pretrain_data: give that too, or use --split")
    pretrain_arch = choose_model(args.pretrain_model or arch, size)
    source = data
    if args.pretrain_data is not None:
        # Columns and revision are D_tar's. Images of D_pre that are larger than its are made as small (section 4.5).
        other = replace(
            config,
            data=args.pretrain_data,
            split=args.pretrain_split,
            image_column=None,
            label_column=None,
            unlabelled=True,
            revision=None,
        )
        source = load_images(other, default_size=data.size, progress=rank() == 0)
    check_trainable(moco, processes, len(source))
    check_queue(moco.queue_size, len(source))
    check_sizes(pretrain_arch, [size, *moco.sizes])
    start = ""
    if moco.init is not None:
        start = check_start(moco.init, pretrain_arch)
    return Pretext(pretrain_arch, source, source is data, size, moco, start)


def update_quality(folder: Path, data: ImageData) -> None:
    """Compares clusters with the true labels as they are now: they may have changed since, and the images not."""
    pseudo = PseudoLabels.load(folder)
    now = None if data.labels is None else quality(pseudo.labels_of(data.rows), data.labels)
    if now != pseudo.meta["quality"]:
        write_json(folder / "pseudo_labels.json", {**pseudo.meta, "quality": now})
