"""The single steps of the pipeline as functions of their arguments; `sssd_zoo.fit` chains them.

Data flows one way: data -> tasks over models -> engine -> clustering -> tasks -> engine -> probes. Each step reads and
writes folders only, so each can be run, resumed and replaced on its own.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import timm
import torch
import yaml
from torch import Tensor, nn

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo import report
from sssd_zoo.chunked_kmeans import CHUNK, kmeans_from_file
from sssd_zoo.clustering import Clustering, PseudoLabels, kmeans, normalise, random_labels
from sssd_zoo.config import (
    ClusterConfig,
    DistillArgs,
    ForwardConfig,
    KNNArgs,
    LinearArgs,
    MoCoConfig,
    ModelsArgs,
    PretrainArgs,
    ProbeConfig,
    PseudoLabelArgs,
    SEEDArgs,
    SEEDConfig,
    SelfDistillationConfig,
)
from sssd_zoo.data.loading import DataConfig, GlobalBatches, ImageData, fits_in_memory, load_images, split_names
from sssd_zoo.data.streaming import StreamingImages, load_streaming
from sssd_zoo.distributed import barrier, rank, world_size
from sssd_zoo.engine import (
    OptimConfig,
    RuntimeConfig,
    check,
    make_accelerator,
    read_metrics,
    resolve_precision,
    train,
    tune_cpu,
)
from sssd_zoo.errors import UserError
from sssd_zoo.feature_file import FeatureFile, shard, write_features
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.hub import cache_if_unreachable, hub_cards, save_network
from sssd_zoo.models import multiply_adds
from sssd_zoo.own_labels import OwnLabels
from sssd_zoo.probe import Probe, linear_probe, pooled_batches, stack_features
from sssd_zoo.probe import knn as knn_accuracy
from sssd_zoo.soft_labels import SoftLabels, nearest_centroids
from sssd_zoo.tasks import SEED, ClusterFit, MoCo, SelfDistillation, Task

Config = TypeVar("Config")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
# Settings that came after the first release, with their defaults: runs from before it can go on and are not done again.
ADDED = {"exits": "plain", "init": None}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def part(config: Any, kind: type[Config]) -> Config:
    """The fields of the dataclass `kind` out of a configuration that inherits from it."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})  # type: ignore[arg-type]


class EpochLoader:
    """Feeds the engine from a data set whose rows have numbers, each process its part of every global batch.

    Args:
        data: the images.
        batch_size: images per step, over all processes.
        seed: of the order.
        positions: int64, the images to take; by default all.
    """

    def __init__(self, data: ImageData, batch_size: int, seed: int, positions: Tensor | None = None) -> None:
        self.data, self.positions = data, positions
        count = len(data) if positions is None else len(positions)
        self.order = GlobalBatches(count, batch_size, seed, rank=rank(), world=world_size())
        self.steps_per_epoch = self.order.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from its step `start` on."""
        order = self.order.epoch(epoch, start)
        return self.data.batches(order if self.positions is None else (self.positions[index] for index in order))


class StreamLoader:
    """Feeds the engine from a stream.

    Args:
        data: the stream.
        batch_size: images per step, over all processes.
        seed: of the order.
        steps_per_epoch: where the stream does not know its length.

    Raises:
        UserError: if neither tells how long an epoch is.
    """

    def __init__(self, data: StreamingImages, batch_size: int, seed: int, steps_per_epoch: int | None) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        if steps_per_epoch is None and data.count is None:
            raise UserError(f"the stream of {data.name} does not tell its length; give --steps_per_epoch")
        self.steps_per_epoch = steps_per_epoch or (data.count or 0) // batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from its step `start` on."""
        stream = self.data.batches(self.batch_size, self.seed, epoch, start, rank(), world_size())
        return islice(stream, self.steps_per_epoch - start)


def choose_size(data: ImageData | StreamingImages, image_size: int | None) -> int:
    """The side of the views: as asked, else the images' own where they are small, else 224 px."""
    return image_size or (data.size if data.size <= 40 else 224)


def choose_model(name: str | None, size: int) -> str:
    """The network's name: as asked, else the one of this package whose stem is made for the size.

    Raises:
        UserError: if timm has no network of that name.
    """
    name = name or ("sssd_resnet18_cifar" if size <= 40 else "sssd_resnet18")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models("sssd_*"))
        raise UserError(f"timm has no model '{name}'; this package's are {close}")
    return name


def storage_default(image_size: int | None) -> int:
    """The side that larger images are stored at: an eighth more than the views' 224 px, or than what is asked for."""
    return round((image_size or 224) * 8 / 7)


def load_network(name: str, **kwargs: Any) -> Any:
    """A network with its weights: a folder that this package or timm wrote, else a timm name with pretrained weights.

    Of a run folder of `sssd fit` it is the network in its `model`.

    Args:
        name: the folder or the name.
        kwargs: of `timm.create_model`; `pretrained=False` gives the network with new weights.

    Raises:
        UserError: if there is neither, or the weights do not fit.
    """
    folder = Path(name)
    source = name
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        missing = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder} holds no network: {' and '.join(missing)} missing; did its run end?")
        source = f"local-dir:{folder}"
    elif not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name):
        raise UserError(f"there is no folder '{name}', and timm has no model of that name")
    options = {"pretrained": True, **kwargs}
    config = timm.get_pretrained_cfg(source) if ":" not in source else None
    repo = source.removeprefix("hf-hub:").split("@")[0] if source.startswith("hf-hub:") else None
    if config is not None and options["pretrained"]:
        repo = config.hf_hub_id
    try:
        with cache_if_unreachable(repo):
            return timm.create_model(source, **options)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"cannot load the network '{name}': {str(error)[:300]}") from error


def statistics(model: Any) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and spread of the channels and the side of the images that a timm network was trained with."""
    config = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"]), int(config["input_size"][-1])


def prepare_out(out: str, *, resume: bool, overwrite: bool) -> Path:
    """The run folder, or a clear refusal to mix a new run into an old one.

    Raises:
        UserError: if it holds a run and neither flag says what to do, or it is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    held = [
        name
        for name in ("checkpoints", "config.json", "pseudo_labels.json", "metrics.json")
        if (folder / name).exists()
    ]
    if held and not resume and not overwrite:
        raise UserError(f"{folder} already holds a run ({held[0]}); give --resume to go on, or --overwrite to drop it")
    return folder


def begin(folder: Path, config: Any) -> None:
    """Drops what `--overwrite` is to drop, once nothing can be wrong with the arguments, and writes them resolved."""
    if rank() == 0:
        if config.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        save_config(folder, config)
    barrier()


def save_config(folder: Path, config: Any) -> None:
    """Writes the resolved arguments as config.yaml."""
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False))


def check_sizes(arch: str, sizes: list[int]) -> None:
    """Refuses views that are too small for a network of this package.

    Below its smallest input a stage would stride over a map of one pixel, where oneDNN's bf16 convolutions (seen in
    torch 2.15) give weight gradients of uninitialised memory.

    Raises:
        UserError: naming the size.
    """
    config = timm.get_pretrained_cfg(arch)
    smallest = config.min_input_size[-1] if config and config.min_input_size else 1
    if min(sizes) < smallest:
        raise UserError(
            f"views of {min(sizes)} px are too small for {arch}, which wants at least {smallest}: give other sizes, or "
            "a network with the stem for small images (sssd_resnet18_cifar)"
        )


def run_training(
    task: Task,
    loader: EpochLoader | StreamLoader,
    *,
    network: nn.Module,
    arch: str,
    size: int,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    out: Path,
    settings: dict[str, Any],
    labels: Tensor | SoftLabels | None,
    title: str,
    relabel: OwnLabels | None = None,
    arguments: Any = None,
) -> dict[str, float]:
    """Trains a task and writes the network it is about, its log and its curves into the run folder.

    Args:
        task: the method.
        loader: the images.
        network: the part of the task to keep.
        arch: its timm name.
        size: side of the views in pixels.
        optim: how to train.
        runtime: where and how.
        out: the run folder.
        settings: what else decides the numbers, for the check on resume.
        labels: int64 [N] by position, soft ones, or none.
        relabel: gives them anew before each epoch.
        title: of the progress bar.
        arguments: of the command, where the run is one of its own, see `begin`.

    Returns:
        What `engine.train` measured.
    """
    check_sizes(arch, [size, *optim.sizes])
    if arguments is not None:
        begin(out, arguments)
    data = loader.data
    where = (data.fingerprint, len(data)) if isinstance(data, ImageData) else (data.name, data.count)
    identity = {"arch": arch, "image_size": size, "data": where[0], "images": where[1], "storage_size": data.size}
    measured = train(
        task,
        loader,
        optim=optim,
        runtime=runtime,
        out=out,
        identity={**identity, **settings},
        labels=labels,
        relabel=relabel,
        title=title,
    )
    if rank() == 0:
        report.loss_curves({title: read_metrics(out / "metrics.jsonl")}, out / "curves.png")
        save_network(out, network, arch, input_size=size)
    return measured


def settings_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration, to tell runs apart: at its default, one of `ADDED` is as good as not there."""
    return {name: value for name, value in asdict(config).items() if name not in ADDED or value != ADDED[name]}


def method_settings(config: Any, kind: type[OptimConfig]) -> dict[str, Any]:
    """The fields that `kind` adds to `OptimConfig`: a method's own settings."""
    common = {field.name for field in fields(OptimConfig)}
    return {name: value for name, value in settings_of(part(config, kind)).items() if name not in common}


def check_queue(queue_size: int, images: int | None) -> None:
    """Refuses a queue that would hold an image's own older embeddings; `images` is their number, where it is known."""
    if images is not None and queue_size > images:
        raise UserError(
            f"queue_size {queue_size} is larger than the data set of {images} images, so that an image's own old "
            f"embeddings would be among its negatives; give a queue_size of at most {max(1, images // 2)}"
        )


def new_trunk(arch: str, num_classes: int = 0) -> Any:
    """A network without exits, with new weights."""
    own: dict[str, Any] = {"output": "final"} if arch.startswith("sssd_") else {}
    return timm.create_model(arch, num_classes=num_classes, **own)


def pretrain_network(
    data: ImageData | StreamingImages,
    config: MoCoConfig,
    runtime: RuntimeConfig,
    *,
    arch: str,
    size: int,
    out: Path,
    steps_per_epoch: int | None = None,
    arguments: Any = None,
) -> dict[str, float]:
    """MoCo v2 on images; writes the trunk into `out`, see `run_training`.

    Raises:
        UserError: for settings that MoCo cannot work with.
    """
    processes = make_accelerator(runtime).num_processes
    images = len(data) if isinstance(data, ImageData) else data.count
    if images is not None and images < 2:
        raise UserError(f"{data.name} has {images} image; contrastive learning needs others to tell it from")
    check_queue(config.queue_size, images)
    optim = part(config, OptimConfig)
    check(optim, processes, images)
    if config.splits % processes or (config.batch_size // config.accumulate) % max(1, config.splits):
        raise UserError(
            f"splits {config.splits} must be a multiple of the {processes} processes and divide the batch of "
            f"{config.batch_size // config.accumulate}; choose splits or batch_size so"
        )
    start = None if config.init is None else load_trunk_of(config.init)
    torch.manual_seed(runtime.seed)
    trunk = new_trunk(arch)
    if start is not None:
        load_trunk(trunk, start)
    mean, std, _ = statistics(trunk)
    task = MoCo(
        trunk,
        size=size,
        mean=mean,
        std=std,
        dim=config.dim,
        queue_size=config.queue_size,
        momentum=config.key_momentum,
        temperature=config.temperature,
        symmetric=config.symmetric,
        splits=config.splits,
        scale=config.crop_scale,
        blur=config.blur,
    )
    if isinstance(data, ImageData):
        loader: EpochLoader | StreamLoader = EpochLoader(data, config.batch_size, runtime.seed)
    else:
        loader = StreamLoader(data, config.batch_size, runtime.seed, steps_per_epoch)
    return run_training(
        task,
        loader,
        network=trunk,
        arch=arch,
        size=size,
        optim=optim,
        runtime=runtime,
        out=out,
        settings=method_settings(config, MoCoConfig),
        labels=None,
        title="MoCo v2",
        arguments=arguments,
    )


def pretrain(args: PretrainArgs) -> None:
    """`sssd pretrain`."""
    tune_cpu()
    runtime = part(args, RuntimeConfig)
    make_accelerator(runtime)
    out = prepare_out(args.out, resume=args.resume, overwrite=args.overwrite)
    config = part(args, DataConfig)
    default_size = storage_default(args.image_size)
    data: ImageData | StreamingImages
    if config.streaming:
        data = load_streaming(config, default_size=default_size, progress=rank() == 0)
    else:
        # No later step reads these rows by number, so images too many for memory need no pass that verifies them first.
        data = load_images(config, default_size=default_size, progress=rank() == 0, verify=False)
    size = choose_size(data, args.image_size)
    arch = choose_model(args.model, size)
    measured = pretrain_network(
        data,
        part(args, MoCoConfig),
        runtime,
        arch=arch,
        size=size,
        out=out,
        steps_per_epoch=args.steps_per_epoch,
        arguments=args,
    )
    announce(out, f"{arch} pretrained on {data.name}", measured)


def announce(out: Path, what: str, measured: dict[str, float]) -> None:
    """Tells what was trained and where it lies."""
    if rank() == 0:
        print(f"{what}: final loss {measured['loss']:.4f}, {measured['images_per_second']:.0f} img/s; in {out}")


def feature_batches(
    model: Any,
    data: ImageData,
    config: ForwardConfig,
    order: Sequence[Tensor],
    read: Callable[[Any, Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `pooled_batches` reads of a network, batch by batch; `order` has positions, int64 [B]."""
    mean, std, size = statistics(model)
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")
    return pooled_batches(
        model.to(device, memory_format=torch.channels_last),
        data.batches(order),
        count=sum(map(len, order)),
        mean=mean,
        std=std,
        device=device,
        size=size,
        autocast=DTYPES[resolve_precision(config.precision, config.device)],
        progress=rank() == 0,
        read=read,
    )


def network_features(
    model: Any, data: ImageData, config: ForwardConfig, *, read: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """Pooled features of every exit for all images in order, float32 [exits, N, D], without moving the network.

    Args:
        model: the network.
        data: the images.
        config: how to run it.
        read: what to read instead, see `pooled_batches`.
    """
    order = torch.arange(len(data)).split(config.batch_size)
    return stack_features(feature_batches(model, data, config, order, read), len(data))


def cluster_images(
    network: Any, data: ImageData, config: ClusterConfig, forward: ForwardConfig, *, model: str, seed: int, out: Path
) -> PseudoLabels | None:
    """k-means on the L2-normalised features of a network's last exit; writes the pseudo labels to `out`.

    Every process calls it. Several share the images and write their features into one file beside `out`, from which the
    main process clusters; it is removed at the end. One process does so where the features do not fit in memory. All
    ways give the same labels.

    Args:
        network: with `num_classes=0`.
        data: the images.
        config: of k-means.
        forward: of the network.
        model: what the labels are to say of the network.
        seed: of k-means.
        out: folder to write.

    Returns:
        The labels in the main process, None in the others.
    """
    if config.nearest < 1:
        raise UserError(f"nearest {config.nearest} must be at least 1")
    settings: dict[str, Any] = {"seed": seed, "iterations": config.iterations, "redos": config.redos, "progress": True}
    wanted = 4 * len(data) * int(network.num_features) * (4 if getattr(network, "output", "") == "ensemble" else 1)
    on_disk = not fits_in_memory(wanted) if config.on_disk is None else config.on_disk
    clustering: Clustering | None = None
    near = None
    if world_size() == 1 and not on_disk:
        features = normalise(network_features(network, data, forward)[-1].numpy())
        clustering = kmeans(features, config.k, **settings)
        if config.nearest > 1:
            near = nearest_centroids([features], clustering.centroids, config.nearest)
    else:
        file = out.with_name(f".{out.name}.features.npy")
        try:
            order = shard(torch.arange(len(data)).split(forward.batch_size))
            write_features(file, len(data), feature_batches(network, data, forward, order))
            if rank() == 0 and on_disk:
                clustering = kmeans_from_file(file, config.k, **settings)
            elif rank() == 0:
                clustering = kmeans(np.load(file), config.k, **settings)
            if clustering is not None and config.nearest > 1:
                parts = (part for _, part in FeatureFile(file).chunks(CHUNK))
                near = nearest_centroids(parts, clustering.centroids, config.nearest)
        finally:
            if rank() == 0:
                file.unlink(missing_ok=True)
    if clustering is None:
        return None
    labels = PseudoLabels.from_clustering(
        clustering,
        rows=data.rows,
        data=data.name,
        split=data.split,
        fingerprint=data.fingerprint,
        model=model,
        seed=seed,
        iterations=config.iterations,
        redos=config.redos,
        truth=data.labels,
        near=near,
    )
    labels.save(out)
    return labels


def pseudo_label(args: PseudoLabelArgs) -> None:
    """`sssd pseudo-label`."""
    tune_cpu()
    make_accelerator(RuntimeConfig(precision=args.precision, device=args.device))
    out = prepare_out(args.out, resume=False, overwrite=args.overwrite)
    model = load_network(args.model, num_classes=0)
    data = load_images(part(args, DataConfig), default_size=storage_default(statistics(model)[2]))
    if args.k > len(data) or args.k < 2:
        raise UserError(f"K = {args.k} clusters of {len(data)} images; give a --k from 2 to the number of images")
    config, forward = part(args, ClusterConfig), part(args, ForwardConfig)
    labels = cluster_images(model, data, config, forward, model=args.model, seed=args.seed, out=out)
    if labels is not None:
        print(describe_labels(labels, out))
    barrier()


def describe_labels(labels: PseudoLabels, out: Path) -> str:
    """One line about pseudo labels for a person."""
    sizes, quality = labels.meta["sizes"], labels.meta["quality"]
    line = f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} images (K = {labels.meta['k_asked']} asked)"
    if quality:
        line += f", NMI {quality['nmi']:.3f}, purity {quality['purity']:.3f} against the true labels"
    return f"{line}; in {out}"


def distill_network(
    data: ImageData,
    labels: np.ndarray[Any, np.dtype[np.int64]] | int,
    config: SelfDistillationConfig,
    runtime: RuntimeConfig,
    *,
    arch: str,
    size: int,
    out: Path,
    labels_digest: str,
    soft: SoftLabels | None = None,
    init: str | None = None,
    title: str = "distil",
    method: Literal["sssd", "clusterfit"] = "sssd",
    arguments: Any = None,
) -> dict[str, float]:
    """Trains a network on loaded images by `method`, and writes it into `out`, see `run_training`.

    Args:
        data: the images.
        labels: int64 [N], or the number of clusters of the network's own features to train on, made before each epoch.
        config: how to train.
        runtime: where and how.
        arch: timm name of the network.
        size: side of the views in pixels.
        out: the run folder.
        labels_digest: of the labels, for the check on resume.
        soft: the labels to train on in their place, of the same clusters.
        init: a network whose trunk's weights to start from.
        title: of the progress bar.
        method: 'sssd' or 'clusterfit'.
        arguments: see `run_training`.
    """
    torch.manual_seed(runtime.seed)
    exits, classes = method == "sssd", labels if isinstance(labels, int) else int(labels.max()) + 1
    if exits and not arch.startswith("sssd_"):
        raise UserError(f"'{arch}' has no exits to distil into; use one of {', '.join(timm.list_models('sssd_*'))}")
    own_exits: dict[str, Any] = {} if config.exits == "plain" else {"exits": config.exits}
    model = timm.create_model(arch, num_classes=classes, **own_exits) if exits else new_trunk(arch, classes)
    if init is not None:
        load_trunk(model, load_trunk_of(init))
    mean, std, _ = statistics(model)
    views: dict[str, Any] = {"size": size, "mean": mean, "std": std, "crop": config.crop, "scale": config.crop_scale}
    if exits:
        task: Task = SelfDistillation(
            model, alpha=config.alpha, lam=config.lam, temperature=config.temperature, **views
        )
    else:
        task = ClusterFit(model, **views)
    settings = {"labels": labels_digest, "init": init}
    settings |= method_settings(config, SelfDistillationConfig) if exits else {"method": method, **views}
    optim = part(config, OptimConfig)
    check(optim, make_accelerator(runtime).num_processes, len(data))
    own = None
    if isinstance(labels, int):
        precision = resolve_precision(runtime.precision, runtime.device)
        own = OwnLabels(model, data, labels, out, size, mean, std, seed=runtime.seed, autocast=DTYPES[precision])
    return run_training(
        task,
        EpochLoader(data, config.batch_size, runtime.seed),
        network=model,
        arch=arch,
        size=size,
        optim=optim,
        runtime=runtime,
        out=out,
        settings=settings,
        labels=soft or (None if isinstance(labels, int) else torch.from_numpy(labels)),
        relabel=own,
        title=title,
        arguments=arguments,
    )


def load_trunk_of(name: str) -> Any:
    """The trunk of a network, without exits and classifiers; see `load_network`."""
    network = load_network(name, num_classes=0)
    if hasattr(network, "forward_exits"):
        network = load_network(name, num_classes=0, output="final")
    return network


def load_trunk(model: nn.Module, source: nn.Module) -> None:
    """Copies a trunk's weights into a network with exits.

    Raises:
        UserError: unless every weight of the source finds its place and the whole trunk is filled: one that silently
            stays behind is a wrong result.
    """
    weights, ours = source.state_dict(), model.state_dict()
    trunk = {name for name in ours if not name.startswith(("exit", "fc."))}
    wrong = [name for name, value in weights.items() if name not in ours or ours[name].shape != value.shape]
    wrong += sorted(trunk - weights.keys())
    if wrong:
        raise UserError(f"the weights to start from do not fit the trunk ({wrong[0]}); give a network of its own kind")
    model.load_state_dict(weights, strict=False)


def distill(args: DistillArgs) -> None:
    """`sssd distill`."""
    tune_cpu()
    runtime = part(args, RuntimeConfig)
    make_accelerator(runtime)
    out = prepare_out(args.out, resume=args.resume, overwrite=args.overwrite)
    if args.method == "clusterfit" and args.exits != "plain":
        raise UserError(f"--method clusterfit trains a network without exits: drop --exits {args.exits}")
    artefact = None if args.labels in ("random", "true", "own") else PseudoLabels.load(args.labels)
    if artefact is None and args.soft is not None:
        raise UserError(f"--soft is of pseudo labels with distances to centroids, not of labels '{args.labels}'")
    data = load_images(
        part(args, DataConfig), default_size=storage_default(args.image_size), require_labels=args.labels == "true"
    )
    labels: np.ndarray[Any, np.dtype[np.int64]] | int
    soft = None
    if artefact is not None:
        artefact.check(data.fingerprint)
        labels = artefact.labels_of(data.rows)
        soft = None if args.soft is None else SoftLabels(artefact, data.rows, args.soft)
    elif args.labels == "random":
        labels = random_labels(len(data), args.k, runtime.seed)
    elif args.labels == "own":
        if not 2 <= args.k <= len(data):
            raise UserError(f"K = {args.k} clusters of {len(data)} images; give a --k from 2 to the number of images")
        labels = args.k
    else:
        assert data.labels is not None  # load_images required them
        labels = data.labels
    size = choose_size(data, args.image_size)
    arch = choose_model(args.model, size)
    measured = distill_network(
        data,
        labels,
        part(args, SelfDistillationConfig),
        runtime,
        arch=arch,
        size=size,
        out=out,
        labels_digest=f"own, K = {labels}" if isinstance(labels, int) else digest(labels, args.soft),
        soft=soft,
        init=args.init,
        method=args.method,
        arguments=args,
    )
    words = f"{arch} trained by {args.method} on {len(data)} images of {data.name}, labels: {args.labels}"
    announce(out, words, measured)


def seed_network(
    data: ImageData,
    teacher: str,
    config: SEEDConfig,
    runtime: RuntimeConfig,
    *,
    arch: str,
    size: int,
    out: Path,
    teacher_size: int | None = None,
    arguments: Any = None,
) -> dict[str, float]:
    """SEED on loaded images; writes the student's trunk into `out`, see `run_training`.

    Args:
        data: the images.
        teacher: run folder or timm name.
        config: how to train.
        runtime: where and how.
        arch: timm name of the student.
        size: side of the student's views in pixels.
        out: the run folder.
        teacher_size: of the teacher's views; by default what it was trained with.
        arguments: see `run_training`.
    """
    optim = part(config, OptimConfig)
    check(optim, make_accelerator(runtime).num_processes, len(data))
    check_queue(config.queue_size, len(data))
    frozen_teacher = load_network(teacher, num_classes=0)
    torch.manual_seed(runtime.seed)
    trunk = new_trunk(arch)
    mean, std, _ = statistics(trunk)
    teacher_mean, teacher_std, own_size = statistics(frozen_teacher)
    teacher_size = teacher_size or own_size
    task = SEED(
        trunk,
        frozen_teacher,
        size=size,
        mean=mean,
        std=std,
        teacher_size=teacher_size,
        teacher_mean=teacher_mean,
        teacher_std=teacher_std,
        queue_size=config.queue_size,
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature,
        scale=config.crop_scale,
        blur=config.blur,
    )
    return run_training(
        task,
        EpochLoader(data, config.batch_size, runtime.seed),
        network=trunk,
        arch=arch,
        size=size,
        optim=optim,
        runtime=runtime,
        out=out,
        settings={**method_settings(config, SEEDConfig), "teacher": teacher, "teacher_size": teacher_size},
        labels=None,
        title="SEED",
        arguments=arguments,
    )


def seed(args: SEEDArgs) -> None:
    """`sssd seed`."""
    tune_cpu()
    runtime = part(args, RuntimeConfig)
    make_accelerator(runtime)
    out = prepare_out(args.out, resume=args.resume, overwrite=args.overwrite)
    data = load_images(part(args, DataConfig), default_size=storage_default(args.image_size))
    size = choose_size(data, args.image_size)
    arch = choose_model(args.model, size)
    measured = seed_network(
        data,
        args.teacher,
        part(args, SEEDConfig),
        runtime,
        arch=arch,
        size=size,
        out=out,
        teacher_size=args.teacher_size,
        arguments=args,
    )
    announce(out, f"{arch} taught by {args.teacher} on {len(data)} images of {data.name}", measured)


def digest(labels: np.ndarray[Any, np.dtype[np.int64]], soft: float | None = None) -> str:
    """A short fingerprint of labels; soft ones have their temperature added, for they come of the same centroids."""
    if soft is not None:
        return f"{digest(labels)}, soft {soft}"
    return hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Evaluation:
    """What probes are trained and measured on.

    Attributes:
        train: the labelled images of the probes.
        train_positions: int64, which of them.
        test: the images that are measured.
        test_positions: int64, which of them.
        words: where the test images come from, for people.
    """

    train: ImageData
    train_positions: Tensor
    test: ImageData
    test_positions: Tensor
    words: str

    def describe(self) -> str:
        """How many test images, and where they come from."""
        return f"{len(self.test_positions)} images, {self.words}"


def evaluation_data(
    data: ImageData, config: DataConfig, *, test_split: str | None, holdout: float, seed: int
) -> Evaluation:
    """The split to measure on: the one asked for, else 'test' or 'validation', else images held out by class.

    Raises:
        UserError: without labels, or if the splits have different classes.
    """
    assert data.labels is not None  # callers load with require_labels
    names = [name for name in split_names(config) if name != data.split.split("[")[0]]
    wanted = [test_split] if test_split else [name for name in ("test", "validation") if name in names]
    for name in wanted:
        if name == data.split:
            continue
        test = load_images(
            replace(config, split=name, storage_size=data.size),
            require_labels=test_split is not None,
            progress=rank() == 0,
        )
        if test.labels is None:
            continue
        if test.class_names != data.class_names:
            raise UserError(
                f"the splits {data.split} and {name} of {data.name} have different classes; give another --test_split"
            )
        return Evaluation(data, torch.arange(len(data)), test, torch.arange(len(test)), f"split {name}")
    from sklearn.model_selection import train_test_split

    if not 0 < holdout < 1:
        raise UserError(f"holdout {holdout} must be between 0 and 1")
    try:
        kept, held = train_test_split(np.arange(len(data)), test_size=holdout, stratify=data.labels, random_state=seed)
    except ValueError as error:
        raise UserError(f"cannot hold images of every class out of {data.name} to measure on: {error}") from error
    words = f"a part of split {data.split} held out from the probes (the network saw it, without labels)"
    return Evaluation(data, torch.from_numpy(np.sort(kept)), data, torch.from_numpy(np.sort(held)), words)


@dataclass(frozen=True)
class Features:
    """Features of an evaluation's images, and their labels.

    Attributes:
        train_x: float32 [exits, N, D].
        train_y: int64 [N].
        test_x: float32 [exits, M, D].
        test_y: int64 [M].
        classes: number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def evaluation_features(model: Any, evaluation: Evaluation, config: ForwardConfig) -> Features:
    """Runs a network over an evaluation's images."""
    train, test = evaluation.train, evaluation.test
    assert train.labels is not None
    assert test.labels is not None
    assert train.class_names is not None
    train_x = network_features(model, train, config)
    test_x = train_x if test is train else network_features(model, test, config)
    return Features(
        train_x[:, evaluation.train_positions],
        torch.from_numpy(train.labels)[evaluation.train_positions],
        test_x[:, evaluation.test_positions],
        torch.from_numpy(test.labels)[evaluation.test_positions],
        len(train.class_names),
    )


def probe_features(features: Features, config: ProbeConfig, seed: int) -> Probe:
    """Linear probes on every exit's features."""
    return linear_probe(
        features.train_x,
        features.train_y,
        features.test_x,
        features.test_y,
        features.classes,
        epochs=config.probe_epochs,
        lr=config.probe_lr,
        weight_decay=config.probe_weight_decay,
        seed=seed,
        progress=rank() == 0,
    )


def put_heads(model: Any, probe: Probe) -> None:
    """Makes the probes the network's classifiers."""
    classes = probe.weights.shape[1]
    model.reset_classifier(classes)
    heads = (
        [model.exit1.fc, model.exit2.fc, model.exit3.fc, model.fc]
        if len(probe.weights) > 1
        else [model.get_classifier()]
    )
    with torch.no_grad():
        for head, weight, bias in zip(heads, probe.weights, probe.biases, strict=True):
            head.weight.copy_(weight)
            head.bias.copy_(bias)


def accuracy_table(exits: list[float], ensemble: float | None) -> str:
    """Accuracies in percent, as lines for a terminal."""
    names = [f"exit {number}" for number in range(1, len(exits) + 1)] if len(exits) > 1 else ["accuracy"]
    lines = [f"  {name:9} {value:6.2f}" for name, value in zip(names, exits, strict=True)]
    if ensemble is not None and len(exits) > 1:
        lines.append(f"  {'ensemble':9} {ensemble:6.2f}")
    return "\n".join(lines)


def frozen(args: LinearArgs | KNNArgs) -> tuple[Any, Evaluation, Features]:
    """The network to measure, what it is measured on, and its features of that."""
    model = load_network(args.model)
    config = part(args, DataConfig)
    data = load_images(config, default_size=storage_default(statistics(model)[2]), require_labels=True)
    evaluation = evaluation_data(data, config, test_split=args.test_split, holdout=args.holdout, seed=args.seed)
    return model, evaluation, evaluation_features(model, evaluation, part(args, ForwardConfig))


def linear(args: LinearArgs) -> None:
    """`sssd linear`."""
    tune_cpu()
    out = None if args.out is None else prepare_out(args.out, resume=False, overwrite=args.overwrite)
    model, evaluation, features = frozen(args)
    probe = probe_features(features, part(args, ProbeConfig), args.seed)
    print(f"linear probes on {args.model}, accuracy in percent on {evaluation.describe()}:")
    print(accuracy_table(probe.exits, probe.ensemble))
    if out is not None:
        begin(out, args)
        put_heads(model, probe)
        metrics = {
            "data": evaluation.train.name,
            "test": evaluation.words,
            "seed": args.seed,
            "exits": probe.exits,
            "ensemble": probe.ensemble,
        }
        save_network(out, model, str(model.pretrained_cfg["architecture"]), label_names=evaluation.train.class_names)
        write_json(out / "metrics.json", metrics)
        print(f"the network with the probes as its heads is in {out}")


def knn(args: KNNArgs) -> None:
    """`sssd knn`."""
    tune_cpu()
    _, evaluation, features = frozen(args)
    accuracies = knn_features(features, args.neighbours, args.temperature)
    print(
        f"weighted {args.neighbours}-nearest-neighbour accuracy of {args.model} in percent on {evaluation.describe()}:"
    )
    print(accuracy_table(accuracies, None))


def knn_features(features: Features, neighbours: int, temperature: float) -> list[float]:
    """Weighted kNN accuracy of every exit's features, percent."""
    return [
        knn_accuracy(
            train,
            features.train_y,
            test,
            features.test_y,
            num_classes=features.classes,
            k=neighbours,
            temperature=temperature,
        )
        for train, test in zip(features.train_x, features.test_x, strict=True)
    ]


def models(args: ModelsArgs) -> None:
    """`sssd models`."""
    names = [name for name in timm.list_models(args.pattern) if name.startswith("sssd_")]
    if not names:
        raise UserError(
            f"no network of this package matches '{args.pattern}'; it has {', '.join(timm.list_models('sssd_*'))}"
        )
    print(
        f"{'model':20} {'px':>4} {'parameters':>11}  multiply-adds (millions): exit 1, 2, 3, 4 (trunk), all; exit heads"
    )
    for name in names:
        # What the stem is made for, whatever the weights that ship were trained on.
        size, classes = (32, 10) if name.endswith("_cifar") else (224, 1000)
        model: Any = timm.create_model(name, num_classes=classes)
        costs = multiply_adds(model, (3, size, size))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        heads = 100 * (costs["ensemble"] - costs["4"]) / costs["4"]
        millions = " ".join(f"{costs[key] / 1e6:8.1f}" for key in ("1", "2", "3", "4", "ensemble"))
        print(f"{name:20} {size:4} {parameters / 1e6:9.1f} M  {millions}  +{heads:.1f} %")
    tags = [tag for name in names for tag in timm.list_pretrained(f"{name}.*")]
    if tags:
        print(
            f"\n{'pretrained=True':30} linear-probe accuracy (%): exit 1, 2, 3, 4, ensemble; trained without labels on"
        )
    for tag in tags:
        results = read_json(hub_cards() / tag / "metrics.json")
        numbers = [value for row in results.get("accuracy", [])[:1] for value in (*row["exits"], row["ensemble"])]
        measured = " ".join(f"{value:6.2f}" for value in numbers) or "not measured"
        print(f"{tag:30} {measured}  {results['data']}, {results['images']:,} images, seed {results['seed']}")
