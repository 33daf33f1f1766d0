"""`sssd distill`: self distillation, its anchored form and ClusterFit, on labels of any origin."""

from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from sssd_zoo.configs import (
    AnchoredConfig,
    ContrastiveConfig,
    DataConfig,
    DistillArgs,
    ForwardConfig,
    OptimConfig,
    RuntimeConfig,
    SelfDistillationConfig,
)
from sssd_zoo.data.inputs import InputSpec, input_spec, storage_default
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import ImageData, OpenedImages, load_images
from sssd_zoo.data.views import CachedViewLoader
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import feature_batches, feature_moments, features_with_map
from sssd_zoo.labels.fixed import fingerprint
from sssd_zoo.labels.origin import Name, labels_by_name, pseudo_labels_for
from sssd_zoo.labels.protocol import Labels
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.maps import shared_map
from sssd_zoo.models.networks import (
    check_channels,
    load_encoder,
    load_network,
    load_trunk,
    load_trunk_of,
    new_network,
    new_trunk,
    weights_digest,
)
from sssd_zoo.pipeline.view_cache import write_view_cache
from sssd_zoo.tasks import (
    AnchoredClusterFit,
    AnchoredSelfDistillation,
    ClusterFit,
    ContrastiveSelfDistillation,
    FrozenEncoder,
    LabelTask,
    SelfDistillation,
)
from sssd_zoo.training.engine import check_schedule, check_trainable
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import (
    RunSpec,
    announce,
    augment_settings,
    command_spec,
    method_settings,
    regularisation,
    run_training,
    start_training,
)

Method = Literal["sssd", "clusterfit"]


def distill_network(
    data: ImageData,
    labels: Labels,
    config: SelfDistillationConfig,
    runtime: RuntimeConfig,
    spec: RunSpec,
    *,
    method: Method = "sssd",
    init: str | None = None,
    encoder: str | None = None,
    teacher_size: int | None = None,
    positions: Tensor | None = None,
) -> dict[str, float]:
    """Trains a network on labels by `method`, and writes it into the run folder, see `run_training`.

    Args:
        data: the images.
        labels: what it is trained on.
        config: how to train.
        runtime: where and how.
        spec: the network.
        method: 'sssd' or 'clusterfit'.
        init: a network whose trunk's weights to start from.
        encoder: the network whose features the exits also predict, where `config` has an anchor.
        teacher_size: side in pixels of the encoder's views; by default what it was trained with.
        positions: of the images to train on, int64; by default all. Not with cached views, which are of all images.
    """
    config.augment.resolved(contrastive=False, channels=data.channels)
    torch.manual_seed(runtime.seed)
    model = new_student(spec.arch, labels.num_classes, method, config.exits, data)
    settings: dict[str, Any] = {"init": None}
    if init is not None:
        start = load_trunk_of(init)
        settings["init"] = weights_digest(start)  # the weights count, not where they lie
        load_trunk(model, start)
    if spec.continues is not None:
        model = load_network(str(spec.continues))
        settings |= {"continues": weights_digest(model)}
    views = input_spec(model, spec.size)
    loader = EpochLoader(data, config.batch_size, runtime.seed, positions)
    if method == "clusterfit":
        settings |= {"method": method, **views._asdict(), "crop": config.crop, "scale": config.crop_scale}
        settings |= {**regularisation(config), **augment_settings(config.augment)}
        task: LabelTask = ClusterFit(model, config, views)
    else:
        settings |= method_settings(config, type(config))
        task = exits_task(model, config, views)
    if isinstance(config, AnchoredConfig) and config.anchor:
        task, cached, anchor = anchored_task(
            model, data, config, runtime, spec, method=method, encoder=encoder, teacher_size=teacher_size
        )
        loader = loader if cached is None else cached
        settings |= anchor
    optim = OptimConfig.of(config)
    images = len(data) if positions is None else len(positions)
    check_schedule(optim)
    check_trainable(optim, make_accelerator(runtime).num_processes, images)
    settings |= {} if positions is None else {"positions": fingerprint(positions.numpy())}
    return run_training(
        task, loader, task.trained, spec, optim=optim, runtime=runtime, settings=settings, labels=labels
    )


def exits_task(model: Any, config: SelfDistillationConfig, views: InputSpec) -> LabelTask:
    """The task of a network with exits, without an anchor."""
    if isinstance(config, ContrastiveConfig):
        return ContrastiveSelfDistillation(model, config, views)
    return SelfDistillation(model, config, views)


def anchored_task(
    model: Any,
    data: ImageData,
    config: AnchoredConfig,
    runtime: RuntimeConfig,
    spec: RunSpec,
    *,
    method: Method,
    encoder: str | None,
    teacher_size: int | None,
) -> tuple[LabelTask, EpochLoader | None, dict[str, Any]]:
    """The task of a method with an anchor.

    Args:
        model: the network to train.
        data: the images.
        config: how to train.
        runtime: where and how.
        spec: the network.
        method: 'sssd' or 'clusterfit'.
        encoder: the network whose features the exits also predict.
        teacher_size: side in pixels of the encoder's views; by default what it was trained with.

    Returns:
        The task; the loader of cached views, where there are any; and the settings that tell it from others.

    Raises:
        UserError: see `frozen_encoder`.
    """
    forward, views = runtime.forward(), input_spec(model, spec.size)
    network, frozen = frozen_encoder(
        encoder, teacher_size, data, forward, (model, [views.size, *config.sizes]) if config.dense else None
    )
    settings: dict[str, Any] = {"anchor": config.anchor, "encoder": weights_digest(network)}
    settings |= {} if config.clusters else {"clusters": False}
    settings |= {"dense": True} if config.dense else {}
    settings |= {"cached_views": config.cached_views} if config.cached_views else {}
    settings |= {} if teacher_size is None else {"teacher_size": teacher_size}
    loader = None
    if config.cached_views:
        cache = spec.out / "view_cache"
        write = partial(write_view_cache, cache, network, data, config, forward, runtime.seed, frozen.map_shape)
        loader = CachedViewLoader(cache, write, data, config.batch_size, runtime.seed)
        frozen = frozen._replace(network=None)
    anchored = AnchoredClusterFit if method == "clusterfit" else AnchoredSelfDistillation
    return anchored(model, frozen, config, views), loader, settings


def new_student(arch: str, classes: int, method: Method, exits: str, data: ImageData | OpenedImages) -> Any:
    """A network with new weights: with exits for 'sssd', without for 'clusterfit'."""
    if method == "clusterfit":
        return new_trunk(arch, classes, data)
    kind: dict[str, Any] = {} if exits == "plain" else {"exits": exits}
    return new_network(arch, data, num_classes=classes, **kind)


def frozen_encoder(
    name: str | None,
    size: int | None,
    data: ImageData,
    forward: ForwardConfig,
    student: tuple[nn.Module, list[int]] | None,
) -> tuple[Any, FrozenEncoder]:
    """A network, and as what is to be predicted: with its features' moments over at most 10,000 of the images.

    Args:
        name: run folder or timm name.
        size: side of its views in pixels; by default what it was trained with.
        data: the images.
        forward: how to run it.
        student: the network whose last feature map is to predict that of this one, and the sides of its views, see
            `shared_map`.

    Raises:
        UserError: if none is named, it cannot be loaded, or one of the two has no map to learn.
    """
    if name is None:
        raise UserError("--anchor needs the network whose features the exits predict: give --encoder")
    network = load_encoder(name, size)
    check_channels(name, network, data)
    spec = input_spec(network)
    shape = None if student is None else shared_map(*student, network, spec.size)
    positions = torch.linspace(0, len(data) - 1, min(len(data), 10_000)).round().long()
    order = positions.split(forward.batch_size)
    mean, std = feature_moments(feature_batches(network, data, forward, order, features_with_map(shape)))
    return network, FrozenEncoder(network, spec, mean, std, shape)


def distill(args: DistillArgs) -> None:
    """`sssd distill`."""
    config = AnchoredConfig.of(args).resolved(encoder=args.encoder is not None)
    named = args.labels in get_args(Name)
    check_choices(args, config, named=named)
    runtime, out = start_training(args)
    pseudo = None if named else PseudoLabels.load(args.labels)
    data = load_images(
        DataConfig.of(args), default_size=storage_default(args.image_size), require_labels=args.labels == "true"
    )
    if pseudo is not None:
        labels = pseudo_labels_for(data, pseudo, args.soft)
    else:
        labels = labels_by_name(cast(Name, args.labels), data, args.k, runtime)
    spec = command_spec(args, data, out, exits=args.method == "sssd", title="distil")
    measured = distill_network(
        data,
        labels,
        config,
        runtime,
        spec,
        method=args.method,
        init=args.init,
        encoder=args.encoder,
        teacher_size=args.teacher_size,
    )
    trained = f"{spec.arch} trained by {args.method} on {len(data)} images of {data.name}, labels: {args.labels}"
    announce(out, trained, measured)


def check_choices(args: DistillArgs, config: AnchoredConfig, *, named: bool) -> None:
    """Raises `UserError` for arguments of `sssd distill` that exclude one another.

    Args:
        args: of the command.
        config: of the method, resolved.
        named: whether the labels are named, rather than in a folder.
    """
    if args.method == "clusterfit" and args.exits != "plain":
        raise UserError(f"--method clusterfit trains a network without exits: remove --exits {args.exits}")
    without = [name for name in ("alpha", "lam", "temperature") if getattr(args, name) != getattr(DistillArgs, name)]
    if args.method == "clusterfit" and without:
        raise UserError(f"--method clusterfit has no self distillation: remove --{without[0]}")
    if args.k != DistillArgs.k and args.labels not in ("random", "own"):
        raise UserError(f"--k is the number of 'random' and 'own' labels, and {args.labels!r} has its own: remove --k")
    if config.anchor and args.encoder is None:
        raise UserError("--anchor needs the network whose features the exits predict: give --encoder")
    if args.encoder is not None and not config.anchor:
        raise UserError("--encoder is the network of the anchor, which --anchor 0 disables: remove one of them")
    if not config.clusters and not config.anchor:
        raise UserError("--clusters false leaves nothing to learn without --anchor: give that and --encoder")
    for name in ("teacher_size", "cached_views", "dense"):
        if getattr(args, name) and not config.anchor:
            raise UserError(f"--{name} needs --encoder: add --encoder, or drop --{name}")
    if named and args.soft is not None:
        raise UserError(f"--soft applies to pseudo labels with distances to centroids, not to labels '{args.labels}'")
