"""`sssd pretrain`: MoCo v2 without labels."""

from dataclasses import replace

import torch

from sssd_zoo.configs import (
    ContrastiveConfig,
    DataConfig,
    MoCoConfig,
    OptimConfig,
    PretrainArgs,
    QualityConfig,
    RuntimeConfig,
    SEEDConfig,
)
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loaders import EpochLoader, StreamLoader
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.data.streaming import StreamingImages, load_streaming
from sssd_zoo.distributed import rank
from sssd_zoo.errors import UserError
from sssd_zoo.models.networks import load_trunk, load_trunk_of, new_trunk, weights_digest
from sssd_zoo.pipeline.mistakes import Mistakes
from sssd_zoo.tasks import MoCo
from sssd_zoo.training.engine import check_schedule, check_trainable
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.quality import QualityMonitor
from sssd_zoo.training.runs import (
    RunSpec,
    announce,
    check_queue,
    command_spec,
    method_settings,
    run_training,
    start_training,
)


def pretrain_network(
    data: ImageData | StreamingImages,
    config: MoCoConfig,
    runtime: RuntimeConfig,
    spec: RunSpec,
    *,
    steps_per_epoch: int | None = None,
    quality: QualityConfig | None = None,
) -> dict[str, float]:
    """MoCo v2 on images; writes the trunk into the run folder, see `run_training`.

    Args:
        data: the images.
        config: of MoCo.
        runtime: where and how to run.
        spec: what is trained, and where it is kept.
        steps_per_epoch: of a stream of unknown length.
        quality: when to measure the trunk without labels; by default never. Streams are not measured.

    Raises:
        UserError: for settings that MoCo cannot work with.
    """
    optim = OptimConfig.of(config)
    config.augment.resolved(contrastive=True, channels=data.channels, blur=config.blur)
    check_moco(config, data, make_accelerator(runtime).num_processes)
    start = None if config.init is None else load_trunk_of(config.init)
    torch.manual_seed(runtime.seed)
    trunk = new_trunk(spec.arch, data=data)
    settings = method_settings(config, MoCoConfig)
    if start is not None:
        settings["init"] = weights_digest(start)  # the weights count, not where they lie
        load_trunk(trunk, start)
    task = MoCo(trunk, config, input_spec(trunk, spec.size))
    if isinstance(data, ImageData):
        loader: EpochLoader | StreamLoader = EpochLoader(data, config.batch_size, runtime.seed)
        if quality is not None:
            task.monitor = QualityMonitor(trunk, data, quality, runtime, input_spec(trunk, spec.size))
    else:
        loader = StreamLoader(data, config.batch_size, runtime.seed, steps_per_epoch)
        settings["steps_per_epoch"] = loader.steps_per_epoch
    return run_training(task, loader, trunk, spec, optim=optim, runtime=runtime, settings=settings)


def check_moco(config: MoCoConfig, data: ImageData | StreamingImages, processes: int) -> None:
    """Raises `UserError` with all settings that MoCo cannot work with on these images and so many processes."""
    images = data.count
    if images is not None and images < 2:
        raise UserError(f"{data.name} has {images} image; contrastive learning needs at least 2")
    mistakes = Mistakes()
    note_training(mistakes, config, processes, images)
    mistakes.tell()


def note_training(
    mistakes: Mistakes,
    config: OptimConfig,
    processes: int,
    images: int | None,
    where: str = "",
    *,
    schedule: bool = True,
) -> None:
    """Notes the settings that a training cannot work with.

    Args:
        mistakes: to note them in.
        config: of the training.
        processes: number of them.
        images: number of them; None where it is not known.
        where: what goes before each message.
        schedule: check the schedule, too, which depends on the epochs.
    """
    with mistakes.noted(where):
        check_trainable(config, processes, images)
    if schedule:
        with mistakes.noted(where):
            check_schedule(config)
    if isinstance(config, MoCoConfig | ContrastiveConfig | SEEDConfig):
        with mistakes.noted(where):
            check_queue(config.queue_size, images)
    if isinstance(config, MoCoConfig | ContrastiveConfig):
        with mistakes.noted(where):
            check_splits(config, processes)


def check_splits(config: MoCoConfig | ContrastiveConfig, processes: int) -> None:
    """Raises `UserError` unless the processes and the batch can be split as `config` says."""
    images, parts = config.batch_size // config.accumulate, max(1, config.splits)
    if config.splits % processes:
        raise UserError(f"splits {config.splits} must be a multiple of the {processes} processes; change splits")
    if images % parts:
        raise UserError(
            f"splits {config.splits} must divide the batch of {images} into equal parts, in which BatchNorm sees it; "
            "change splits or batch_size"
        )
    if images // parts < 2:
        raise UserError(
            f"splits {config.splits} must be lower for a batch of {images}, as BatchNorm needs at least 2 images in "
            "each part: lower splits or raise batch_size"
        )


def pretrain(args: PretrainArgs) -> None:
    """`sssd pretrain`."""
    if args.steps_per_epoch is not None and not args.streaming:
        raise UserError("--steps_per_epoch is for --streaming, and an epoch is all images: remove it")
    if args.best_by != "loss" and args.streaming:
        raise UserError(f"--best_by {args.best_by} is not measured with --streaming: remove one of them")
    runtime, out = start_training(args)
    config = DataConfig.of(args)
    if args.label_column is None or args.streaming:
        config = replace(config, unlabelled=True, label_column=None)
    default_size = storage_default(args.image_size)
    data: ImageData | StreamingImages
    if config.streaming:
        data = load_streaming(config, default_size=default_size, progress=rank() == 0)
    else:
        # No later step reads these rows by number, so images too many for memory need no pass that verifies them first.
        data = load_images(config, default_size=default_size, progress=rank() == 0, verify=False)
    spec = command_spec(args, data, out, "MoCo v2")
    measured = pretrain_network(
        data,
        MoCoConfig.of(args),
        runtime,
        spec,
        steps_per_epoch=args.steps_per_epoch,
        quality=QualityConfig.of(args),
    )
    announce(out, f"{spec.arch} pretrained on {data.name}", measured)
