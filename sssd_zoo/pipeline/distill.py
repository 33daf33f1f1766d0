"""`sssd distill`: self distillation, its anchored form and ClusterFit, on labels of any origin."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch

from sssd_zoo.configs import (
    AnchoredConfig,
    DataConfig,
    DistillArgs,
    ForwardConfig,
    OptimConfig,
    RuntimeConfig,
    SelfDistillationConfig,
)
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.distributed.hardware import DTYPES, resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import feature_batches
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.labels.online import OwnLabels
from sssd_zoo.labels.pseudo_labels import PseudoLabels, random_labels
from sssd_zoo.labels.soft import SoftLabels
from sssd_zoo.models.networks import (
    choose_model,
    choose_size,
    load_network,
    load_trunk,
    load_trunk_of,
    new_trunk,
    statistics,
    weights_digest,
)
from sssd_zoo.tasks import AnchoredSelfDistillation, ClusterFit, SelfDistillation, Task
from sssd_zoo.training.engine import check
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import announce, digest, method_settings, part, run_training


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
