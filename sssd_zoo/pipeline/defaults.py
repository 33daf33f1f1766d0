"""The settings of `sssd fit` that depend on the images and on the device: what is not given is chosen here, and said.

At the paper's sizes, what the paper gives is followed: 50,000 images give 1,000 clusters and 200 epochs of pretraining,
1.28 million images about 5,000 clusters. The paper does not give the rest; 50,000 images give batches of 512 and 128, a
queue of 4,096 and 200 epochs of distillation. A CPU, which cannot train so long, has smaller batches and fewer epochs:
so few that a training of up to 300 images of 224 px takes minutes. There MoCo has settings for short trainings.
"""

import shlex
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from sssd_zoo.configs import ContrastiveConfig, FitArgs, MoCoConfig
from sssd_zoo.evaluation.meanings import TOO_FEW

STEPS = 16  # steps that an epoch has at least, where the images allow batches of `SMALLEST`
STEPS_BETWEEN = 50  # steps from one checkpoint to the next, about
SMALLEST = 16  # images in a batch, or all of them: the BatchNorm statistics of fewer are mostly noise
EPOCHS = 10  # of a training at least
# What a training may cost at most, all epochs together: MACs of the student's forward passes on a CPU (3,200 images of
# 224 px through a ResNet-18; measured on one core of an EPYC with bf16: 8 minutes of MoCo v2, 3 of the paper's self
# distillation), images on a GPU.
CPU_MACS = 5.8e12
GPU_IMAGES = 100_000_000
# MoCo on a CPU: in trainings that are so short, it learns far more by these settings than by those of `MoCoConfig` (see
# docs/own_images.md). The asymmetric loss costs half of the symmetric one, so there are twice as many epochs of it.
SHORT = MoCoConfig(optimizer="adamw", lr=0.001, weight_decay=0.05, temperature=0.2, queue_size=256, symmetric=False)
# Images, up to which other weights are advised: from 20,000 images of CIFAR-10 and minutes of a CPU, no network learned
# from scratch what bundled weights, of other images, had from the start (docs/own_images.md).
FEW = 20_000


DERIVED = (  # the settings that `derive` may choose whatever the method
    *("pretrain.epochs", "pretrain.batch_size", "pretrain.lr", "pretrain.queue_size", "pretrain.splits"),
    *("pretrain.optimizer", "pretrain.weight_decay", "pretrain.temperature", "pretrain.symmetric"),
    *("distill.epochs", "distill.batch_size", "distill.lr", "cluster.k", "checkpoint_epochs"),
)
EPOCH_SETTINGS = ("pretrain.epochs", "distill.epochs")  # what a budget chooses, and cannot be given beside one
BY_METHOD = (  # those that depend on the method, too
    *("distill.optimizer", "distill.weight_decay", "distill.crop", "distill.crop_scale", "distill.queue_size"),
    *("distill.splits", "warm_start"),
)


@dataclass(frozen=True)
class Scale:
    """What the settings depend on.

    Attributes:
        images: number of them, D_tar.
        pretrain_images: number of those that the pretext is trained on, D_pre; most often the same.
        macs: of the student's forward pass of one image.
        device: torch's name of the device type.
        processes: number of them.
    """

    images: int
    pretrain_images: int
    macs: int
    device: str
    processes: int


def power_of_two(value: float) -> int:
    """The largest power of two that is not above `value`, at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)


def batch_for(images: int, largest: int, processes: int) -> int:
    """A power of two, or all images of a very small set, that is a multiple of the number of processes."""
    batch = min(largest, max(SMALLEST, power_of_two(images / STEPS)), power_of_two(images))
    return max(2 * processes, batch - batch % processes)


def clusters_for(images: int) -> int:
    """50 images in a cluster as of CIFAR-10 in the paper, 250 as of ImageNet where there are very many."""
    return max(2, min(10, images // 2), min(1000, images // 50), images // 250)


def epochs_for(images: int, scale: Scale) -> int:
    """200, as in the paper's pretraining; 400 of few images, fewer where these would cost too much on the device."""
    affordable = CPU_MACS / scale.macs if scale.device == "cpu" else GPU_IMAGES
    return max(EPOCHS, min(200 if images >= 25_000 else 400, int(affordable / images)))


def splits_for(batch: int, processes: int, most: int = MoCoConfig.splits) -> int:
    """Equal parts that BatchNorm sees a batch in: up to `most`, of `SMALLEST` images at least."""
    fitting = (
        splits
        for splits in range(processes, most + 1, processes)
        if batch % splits == 0 and batch // splits >= SMALLEST
    )
    return max(fitting, default=processes)


def queue_for(images: int, batch: int, most: int) -> int:
    """Keys of a momentum contrast: `most`, or half of fewer images, and a batch at least."""
    return max(min(batch, images), min(most, power_of_two(images / 2)))


def derive(args: FitArgs, given: frozenset[str], scale: Scale) -> tuple[FitArgs, dict[str, Any]]:
    """Fills in the settings that depend on the images and on the device.

    Args:
        args: of the command.
        given: names of the arguments that were given, such as 'pretrain.batch_size': these are taken as they are.
        scale: what the others depend on.

    Returns:
        The arguments, and what was chosen, by the names of the settings.
    """
    chosen: dict[str, Any] = {}

    def choose(name: str, value: Any) -> Any:
        """The setting's value: as given, or else this one."""
        if name not in given:
            chosen[name] = value
            return value
        return attrgetter(name)(args)

    processes = scale.processes
    if args.features is None:
        images, on_cpu = scale.pretrain_images, scale.device == "cpu"
        symmetric = choose("pretrain.symmetric", SHORT.symmetric) if on_cpu else args.pretrain.symmetric
        if args.budget is None:  # which chooses them
            choose("pretrain.epochs", epochs_for(images, scale) * (2 if on_cpu and not symmetric else 1))
        batch = choose("pretrain.batch_size", batch_for(images, 128 if on_cpu else 512, processes))
        if on_cpu:
            choose("pretrain.temperature", SHORT.temperature)
            if "pretrain.optimizer" not in given or args.pretrain.optimizer == SHORT.optimizer:
                for name in ("optimizer", "lr", "weight_decay"):
                    choose(f"pretrain.{name}", getattr(SHORT, name))
        elif "pretrain.optimizer" not in given:
            choose("pretrain.lr", rounded(0.06 * batch / 512))
        choose("pretrain.queue_size", queue_for(images, batch, SHORT.queue_size if on_cpu else MoCoConfig.queue_size))
        choose("pretrain.splits", splits_for(batch // args.pretrain.accumulate, processes))
    if args.budget is None:
        choose("distill.epochs", epochs_for(scale.images, scale))
    batch = choose("distill.batch_size", batch_for(scale.images, 128, processes))
    if args.method == "contrastive":
        usual = ContrastiveConfig()
        if "distill.optimizer" not in given or args.distill.optimizer == usual.optimizer:
            for name in ("optimizer", "lr", "weight_decay"):
                choose(f"distill.{name}", getattr(usual, name))
        choose("distill.crop", usual.crop)
        choose("distill.crop_scale", usual.crop_scale)
        keys = 1024 if scale.device == "cpu" else usual.queue_size  # chosen as compare-cifar10-contrastive.yaml says
        choose("distill.queue_size", queue_for(scale.images, batch, keys))
        choose("distill.splits", splits_for(batch // args.distill.accumulate, processes, usual.splits))
    elif "distill.optimizer" not in given:
        choose("distill.lr", rounded(0.1 * batch / 128))
    choose("cluster.k", clusters_for(scale.images))
    # Checkpoints of epochs of a few steps would take longer than the steps.
    choose("checkpoint_epochs", max(1, round(STEPS_BETWEEN / max(1, scale.images // batch))))

    completed = args
    for name, value in chosen.items():
        part, _, field = name.rpartition(".")
        change = {part: replace(getattr(completed, part), **{field: value})} if part else {field: value}
        completed = replace(completed, **change)
    return completed, chosen


def describe_chosen(chosen: dict[str, Any], images: int) -> str:
    """What was chosen, each in a line that is the flag that changes it."""
    flags = [f"  --{name} {_written(value)}" for name, value in chosen.items()]
    return "\n".join([f"chosen for {images:,} images on this machine; give a flag to change it:", *flags])


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.quote(f"[{','.join(map(_written, value))}]")
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def advice(images: int, args: FitArgs) -> str | None:
    """What to do about few images, or None."""
    others = (args.features, args.init, args.pretrain.init, args.pretrain_data)
    if images > FEW or any(other is not None for other in others):
        return None
    few = f"{images:,} images are few to learn from scratch"
    if images < TOO_FEW:
        few += ", and the verdict will be 'weak'"
    if args.channels not in (None, 3):
        return (
            f"{few}: --init RUN --features RUN starts from a run on more images of {args.channels} channels, if you "
            "have one"
        )
    embed = "`sssd embed NAME --data DATA --out features.parquet` uses its weights as they are"
    distil = "--init NAME --features ENCODER starts from its weights, and distils any timm network or a run"
    first, second = (embed, distil) if images < TOO_FEW else (distil, embed)
    return (
        f"{few}. A trained network helps, such as the bundled sssd_resnet18.dist_tiny_imagenet_32 and "
        f"sssd_resnet18_cifar.dist_cifar10: {first}; {second}"
    )
