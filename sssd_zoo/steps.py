"""The training steps of the pipeline as functions of their arguments; `sssd_zoo.fit` chains them.

Data flows one way: data -> tasks over models -> engine -> clustering -> tasks -> engine -> probes. Each step reads and
writes folders only, so each can be run, resumed and replaced on its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.chunked_kmeans import CHUNK, kmeans_from_file
from sssd_zoo.clustering import Clustering, PseudoLabels, kmeans, normalise, random_labels
from sssd_zoo.config import (
    AnchoredConfig,
    ClusterConfig,
    DistillArgs,
    ForwardConfig,
    MoCoConfig,
    PretrainArgs,
    PseudoLabelArgs,
    SEEDArgs,
    SEEDConfig,
    SelfDistillationConfig,
)
from sssd_zoo.data.loading import DataConfig, ImageData, fits_in_memory, load_images
from sssd_zoo.data.streaming import StreamingImages, load_streaming
from sssd_zoo.distributed import barrier, rank, world_size
from sssd_zoo.engine import OptimConfig, RuntimeConfig, check, make_accelerator, resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.evaluate import DTYPES, feature_batches, network_features
from sssd_zoo.feature_file import FeatureFile, remove_features, shard, write_features
from sssd_zoo.networks import (
    choose_model,
    choose_size,
    load_network,
    load_trunk,
    load_trunk_of,
    new_trunk,
    statistics,
    storage_default,
    weights_digest,
)
from sssd_zoo.own_labels import OwnLabels
from sssd_zoo.run_folder import open_out
from sssd_zoo.runs import (
    EpochLoader,
    StreamLoader,
    announce,
    check_queue,
    digest,
    method_settings,
    part,
    run_training,
)
from sssd_zoo.soft_labels import SoftLabels, nearest_centroids
from sssd_zoo.tasks import SEED, AnchoredSelfDistillation, ClusterFit, MoCo, SelfDistillation, Task


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
    out = open_out(args, "training")
    config = replace(part(args, DataConfig), unlabelled=True, label_column=None)
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
    settings: dict[str, Any] = {"seed": seed, "iterations": config.iterations, "redos": config.redos, "progress": True}
    wanted = 4 * len(data) * int(network.num_features) * (4 if getattr(network, "output", "") == "ensemble" else 1)
    on_disk = not fits_in_memory(wanted) if config.on_disk is None else config.on_disk
    clustering: Clustering | None = None
    near = None
    file = out.with_name(f".{out.name}.features.npy")
    if rank() == 0:
        remove_features(file)  # of a run killed while it clustered
    if world_size() == 1 and not on_disk:
        features = normalise(network_features(network, data, forward)[-1].numpy())
        clustering = kmeans(features, config.k, **settings)
        if config.nearest > 1:
            near = nearest_centroids([features], clustering.centroids, config.nearest)
    else:
        try:
            order = shard(torch.arange(len(data)).split(forward.batch_size))
            write_features(file, len(data), feature_batches(network, data, forward, order))
            if rank() == 0 and on_disk:
                clustering = kmeans_from_file(file, config.k, **settings)
            elif rank() == 0:
                clustering = kmeans(np.load(file), config.k, **settings)
            if clustering is not None and config.nearest > 1:
                parts = (rows for _, rows in FeatureFile(file).chunks(CHUNK))
                near = nearest_centroids(parts, clustering.centroids, config.nearest)
        finally:
            if rank() == 0:
                remove_features(file)
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
    make_accelerator(RuntimeConfig(device=args.device))
    out = open_out(args, "labels")
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
    encoder: str | None = None,
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
        encoder: the network whose features the exits also predict, where `config` has an anchor.
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
    anchor = config.anchor if isinstance(config, AnchoredConfig) and exits else 0.0
    settings = {"labels": labels_digest, "init": init}
    settings |= method_settings(config, type(config)) if exits else {"method": method, **views}
    losses: dict[str, Any] = {"alpha": config.alpha, "lam": config.lam, "temperature": config.temperature}
    if anchor:
        if encoder is None:
            raise UserError(f"an anchor of weight {anchor:g} wants the network to predict: give --encoder")
        frozen = load_network(encoder, num_classes=0)
        settings["encoder"] = weights_digest(frozen)
        forward = ForwardConfig(precision=runtime.precision, device=runtime.device)
        task: Task = AnchoredSelfDistillation(
            model, frozen, weight=anchor, **encoder_statistics(frozen, data, forward), **losses, **views
        )
    elif exits:
        task = SelfDistillation(model, **losses, **views)
    else:
        task = ClusterFit(model, **views)
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


def encoder_statistics(encoder: Any, data: ImageData, forward: ForwardConfig) -> dict[str, Any]:
    """What an encoder wants of its images, and its features' moments over at most 10,000 of them, evenly spaced."""
    positions = torch.linspace(0, len(data) - 1, min(len(data), 10_000)).round().long()
    batches = feature_batches(encoder, data, forward, positions.split(forward.batch_size))
    features = torch.cat([pooled[-1] for _, pooled in batches])
    mean, std, size = statistics(encoder)
    moments = {"feature_mean": features.mean(0), "feature_std": features.std(0)}
    return {"encoder_mean": mean, "encoder_std": std, "encoder_size": size, **moments}


def distill(args: DistillArgs) -> None:
    """`sssd distill`."""
    tune_cpu()
    runtime = part(args, RuntimeConfig)
    make_accelerator(runtime)
    out = open_out(args, "training")
    if args.method == "clusterfit" and args.exits != "plain":
        raise UserError(f"--method clusterfit trains a network without exits: drop --exits {args.exits}")
    artefact = None if args.labels in ("random", "true", "own") else PseudoLabels.load(args.labels)
    if args.method == "clusterfit" and args.anchor:
        raise UserError("--method clusterfit has no anchor: drop --anchor")
    if args.anchor and args.encoder is None:
        raise UserError("--anchor wants the network whose features the exits predict: give --encoder")
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
        part(args, AnchoredConfig),
        runtime,
        arch=arch,
        size=size,
        out=out,
        labels_digest=f"own, K = {labels}" if isinstance(labels, int) else digest(labels, args.soft),
        soft=soft,
        init=args.init,
        encoder=args.encoder,
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
    out = open_out(args, "training")
    config = replace(part(args, DataConfig), unlabelled=True, label_column=None)
    data = load_images(config, default_size=storage_default(args.image_size))
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
