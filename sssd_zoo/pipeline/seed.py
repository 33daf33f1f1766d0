"""`sssd seed`: SEED, a method to compare with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sssd_zoo.configs import (
    DataConfig,
    OptimConfig,
    RuntimeConfig,
    SEEDArgs,
    SEEDConfig,
)
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.models.networks import (
    choose_model,
    choose_size,
    load_network,
    new_trunk,
    statistics,
)
from sssd_zoo.tasks import SEED
from sssd_zoo.training.engine import check
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import announce, check_queue, method_settings, part, run_training


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
