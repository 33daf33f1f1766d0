"""What every training step shares: run folders, loaders for the engine, and what tells runs apart."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from torch import Tensor, nn

from sssd_zoo.configs import OptimConfig, RuntimeConfig
from sssd_zoo.data.loaders import EpochLoader, StreamLoader
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed import barrier, rank
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.files import atomic_write_text
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import drop, kind_of, mark
from sssd_zoo.labels.online import OwnLabels
from sssd_zoo.labels.soft import SoftLabels
from sssd_zoo.models import SSSDResNet
from sssd_zoo.models.networks import check_sizes
from sssd_zoo.models.saving import save_network
from sssd_zoo.tasks import Task
from sssd_zoo.training.engine import train
from sssd_zoo.training.hardware import make_accelerator

Config = TypeVar("Config")

# Settings that came after the first release, with their defaults: runs from before it can go on and are not done again.
ADDED = {"exits": "plain", "init": None, "anchor": 0.0}


def part(config: Any, kind: type[Config]) -> Config:
    """The fields of the dataclass `kind` out of a configuration that inherits from it."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def begin(folder: Path, config: Any) -> None:
    """Drops what `--overwrite` is to drop, once nothing can be wrong with the arguments, and writes them resolved.

    Args:
        folder: of `open_out`.
        config: the arguments.
    """
    if rank() == 0:
        kind = kind_of(folder)
        if config.overwrite and kind is not None:
            drop(folder, kind)
        save_config(folder, config)
    barrier()


def save_config(folder: Path, config: Any) -> None:
    """Writes the resolved arguments as config.yaml, a recipe: what to do with an older run is no part of it."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("resume", "overwrite")}
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


def settings_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration, to tell runs apart: at its default, one of `ADDED` is as good as not there."""
    return {name: value for name, value in asdict(config).items() if name not in ADDED or value != ADDED[name]}


def method_settings(config: Any, kind: type[OptimConfig]) -> dict[str, Any]:
    """The fields that `kind` adds to `OptimConfig`: a method's own settings."""
    common = {field.name for field in fields(OptimConfig)}
    return {name: value for name, value in settings_of(part(config, kind)).items() if name not in common}


def digest(labels: np.ndarray[Any, np.dtype[np.int64]], soft: float | None = None) -> str:
    """A short fingerprint of labels; soft ones have their temperature added, for they come of the same centroids."""
    if soft is not None:
        return f"{digest(labels)}, soft {soft}"
    return hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()[:16]


def check_queue(queue_size: int, images: int | None) -> None:
    """Refuses a queue that would hold an image's own older embeddings; `images` is their number, where it is known."""
    if images is not None and queue_size > images:
        raise UserError(
            f"queue_size {queue_size} is larger than the data set of {images} images, so that an image's own old "
            f"embeddings would be among its negatives; give a queue_size of at most {max(1, images // 2)}"
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
    if isinstance(network, SSSDResNet):
        network.storage_size = loader.data.size
    if arguments is not None:
        begin(out, arguments)
    elif rank() == 0:
        mark(out, "training")
    data = loader.data
    if isinstance(data, ImageData):
        data.move(make_accelerator(runtime).device)
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
        figures.loss_curves({title: read_metrics(out / "metrics.jsonl")}, out / "curves.png")
        save_network(out, network, arch, input_size=size)
    return measured


def announce(out: Path, what: str, measured: dict[str, float]) -> None:
    """Tells what was trained and where it lies."""
    if rank() == 0:
        print(f"{what}: final loss {measured['loss']:.4f}, {measured['images_per_second']:.0f} img/s; in {out}")
