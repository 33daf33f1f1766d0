"""The settings of `sssd fit` that depend on the number of images: what is not given is chosen here, and said.

At the paper's sizes the choices are the paper's: 50,000 images give batches of 512 and 128, a queue of 4,096, 1,000
clusters and 200 epochs, 1.28 million images about 5,000 clusters; a CPU, which cannot train so long, has fewer epochs
and smaller batches.
"""

from dataclasses import replace
from typing import Any

from sssd_zoo.configs import AnchoredConfig, ClusterConfig, FitArgs, MoCoConfig

STEPS = 16  # steps that an epoch has at least, where the images allow batches of `SMALLEST`
SMALLEST = 16  # images in a batch, or all of them
VIEWS = {"cpu": 2_000_000, "cuda": 100_000_000}  # of a training at most, all epochs together
FEW = 5_000  # images, below which a start from other weights is advised


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


def epochs_for(images: int, device: str) -> int:
    """The paper's 200, twice as many of few images, fewer where these would come to more than `VIEWS`."""
    return max(10, min(200 if images >= 25_000 else 400, VIEWS[device] // images))


def derive(
    args: FitArgs, given: frozenset[str], images: int, *, device: str, processes: int
) -> tuple[FitArgs, list[str]]:
    """Fills in the settings that depend on the number of images and on the device.

    Args:
        args: of the command.
        given: names of the arguments that were given, such as 'pretrain.batch_size': these are taken as they are.
        images: number of them.
        device: torch's name of the device type.
        processes: number of them.

    Returns:
        The arguments, and what was chosen, such as 'cluster.k 100', where it is not what it would be at the paper's
        sizes.
    """
    device = device if device in VIEWS else "cuda"
    chosen: dict[str, Any] = {}

    def choose(name: str, value: Any) -> Any:
        """The setting's value: as given, or else this one."""
        if name not in given:
            chosen[name] = value
            return value
        part, field = name.split(".")
        return getattr(getattr(args, part), field)

    if args.features is None:
        choose("pretrain.epochs", epochs_for(images, device))
        batch = choose("pretrain.batch_size", batch_for(images, 512 if device == "cuda" else 128, processes))
        if "pretrain.optimizer" not in given:
            choose("pretrain.lr", rounded(0.06 * batch / 512))
        choose("pretrain.queue_size", max(min(batch, images), min(4096, power_of_two(images / 2))))
        # Parts of 16 images at least: the statistics of fewer are mostly noise.
        choose("pretrain.splits", processes * max(1, min(8 // processes, batch // (16 * processes))))
    choose("distill.epochs", epochs_for(images, device))
    batch = choose("distill.batch_size", batch_for(images, 128, processes))
    if "distill.optimizer" not in given:
        choose("distill.lr", rounded(0.1 * batch / 128))
    choose("cluster.k", clusters_for(images))

    parts: dict[str, dict[str, Any]] = {}
    for name, value in chosen.items():
        part, field = name.split(".")
        parts.setdefault(part, {})[field] = value
    completed = replace(args, **{part: replace(getattr(args, part), **values) for part, values in parts.items()})
    usual = {"pretrain": MoCoConfig(), "cluster": ClusterConfig(), "distill": AnchoredConfig()}
    lines = [
        f"{part}.{field} {value:,}" if isinstance(value, int) else f"{part}.{field} {value:g}"
        for part, values in parts.items()
        for field, value in values.items()
        if value != getattr(usual[part], field)
    ]
    return completed, lines


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def advice(images: int, args: FitArgs) -> str | None:
    """What to do about few images, or None."""
    if images >= FEW or args.features is not None or args.pretrain.init is not None:
        return None
    return (
        f"{images:,} images are few to learn from scratch: --pretrain.init NAME starts from other weights (of a run, "
        "of timm, or the bundled sssd_resnet18.dist_tiny_imagenet_32 and sssd_resnet18_cifar.cifar10), --features NAME "
        "distils a public encoder instead"
    )
