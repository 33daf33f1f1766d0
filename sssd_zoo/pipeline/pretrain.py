"""`sssd pretrain`: MoCo v2 without labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sssd_zoo.configs import (
    DataConfig,
    MoCoConfig,
    OptimConfig,
    PretrainArgs,
    RuntimeConfig,
)
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loaders import EpochLoader, StreamLoader
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.data.streaming import StreamingImages, load_streaming
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.models.networks import (
    choose_model,
    choose_size,
    load_trunk,
    load_trunk_of,
    new_trunk,
    statistics,
)
from sssd_zoo.tasks import MoCo
from sssd_zoo.training.engine import check
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import announce, check_queue, method_settings, part, run_training


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
