"""`sssd seed`: SEED, a method to compare with."""

from dataclasses import replace

import torch

from sssd_zoo.configs import (
    DataConfig,
    OptimConfig,
    RuntimeConfig,
    SEEDArgs,
    SEEDConfig,
)
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.models.networks import check_channels, load_encoder, new_trunk, weights_digest
from sssd_zoo.tasks import SEED
from sssd_zoo.training.engine import check_schedule, check_trainable
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import (
    RunSpec,
    announce,
    check_queue,
    command_spec,
    method_settings,
    run_training,
    start_training,
)


def seed_network(
    data: ImageData,
    teacher: str,
    config: SEEDConfig,
    runtime: RuntimeConfig,
    spec: RunSpec,
    *,
    teacher_size: int | None = None,
) -> dict[str, float]:
    """SEED on loaded images; writes the student's trunk into the run folder, see `run_training`.

    Args:
        data: the images.
        teacher: run folder or timm name.
        config: how to train.
        runtime: where and how.
        spec: the student.
        teacher_size: side of the teacher's views in pixels; by default what it was trained with.
    """
    optim = OptimConfig.of(config)
    check_schedule(optim)
    check_trainable(optim, make_accelerator(runtime).num_processes, len(data))
    check_queue(config.queue_size, len(data))
    config.augment.resolved(contrastive=True, channels=data.channels, blur=config.blur)
    frozen_teacher = load_encoder(teacher, teacher_size)
    check_channels(teacher, frozen_teacher, data)
    teacher_spec = input_spec(frozen_teacher)
    torch.manual_seed(runtime.seed)
    trunk = new_trunk(spec.arch, data=data)
    task = SEED(trunk, frozen_teacher, config, input_spec(trunk, spec.size), teacher_spec)
    loader = EpochLoader(data, config.batch_size, runtime.seed)
    taught_by = {"teacher": weights_digest(frozen_teacher), "teacher_size": teacher_spec.size}
    settings = {**method_settings(config, SEEDConfig), **taught_by}
    return run_training(task, loader, trunk, spec, optim=optim, runtime=runtime, settings=settings)


def seed(args: SEEDArgs) -> None:
    """`sssd seed`."""
    runtime, out = start_training(args)
    config = replace(DataConfig.of(args), unlabelled=True, label_column=None)
    data = load_images(config, default_size=storage_default(args.image_size))
    spec = command_spec(args, data, out, "SEED")
    measured = seed_network(data, args.teacher, SEEDConfig.of(args), runtime, spec, teacher_size=args.teacher_size)
    announce(out, f"{spec.arch} taught by {args.teacher} on {len(data)} images of {data.name}", measured)
