"""What every training step shares: run folders, loaders for the engine, and what tells runs apart."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from sssd_zoo.configs import AugmentConfig, OptimConfig, RuntimeConfig, SelfDistillationConfig
from sssd_zoo.data.images import Corrupt
from sssd_zoo.data.inputs import input_spec
from sssd_zoo.data.loaders import EpochLoader, StreamLoader
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.streaming import StreamingImages
from sssd_zoo.distributed import barrier, on_main, rank
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.distributed.progress import speed
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.protocol import record_reading
from sssd_zoo.files import atomic_write_text
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import (
    CORRUPT,
    VIEW_CACHE,
    checkpoints_in,
    drop,
    kind_of,
    mark,
    open_out,
    remove,
)
from sssd_zoo.labels.protocol import Labels
from sssd_zoo.models.networks import check_sizes, choose_model, choose_size
from sssd_zoo.models.saving import save_network
from sssd_zoo.tasks import Task
from sssd_zoo.training.engine import Loader, Trainer
from sssd_zoo.training.hardware import make_accelerator

# Settings that came after the first release, with what they were before: earlier runs can be resumed, and are not
# repeated.
ADDED: dict[str, tuple[Any, ...]] = {
    "exits": ("plain",),
    "init": (None,),
    "anchor": (None, 0.0),
    "cached_views": (0,),
    "clusters": (True,),
    "dense": (False,),
    "mix": ("none",),
    "ema": (0.0,),
    "augment": (asdict(AugmentConfig()),),
}


def prepare_run_folder(folder: Path, config: Any) -> None:
    """Drops what `--overwrite` is to drop, once nothing can be wrong with the arguments, and writes them resolved.

    Those of a run that is to be resumed stay as they are until it is known to be the same: the caller saves the new.

    Args:
        folder: of `open_out`.
        config: the arguments.

    Raises:
        UserError: if nothing is left to resume.
    """
    if getattr(config, "resume", False):
        on_main(lambda: check_resumable(folder))
    if rank() == 0:
        kind = kind_of(folder)
        if config.overwrite and kind is not None:
            drop(folder, kind)
        write = begin_config if getattr(config, "resume", False) else save_config
        write(folder, config)
    barrier()


def check_resumable(folder: Path) -> None:
    """Refuses to resume what is complete and has no checkpoints: it would be trained again, from the beginning.

    Raises:
        UserError: that says what to do.
    """
    if (folder / "model.safetensors").exists() and not checkpoints_in(folder / "checkpoints"):
        raise UserError(
            f"{folder} holds a complete network and no checkpoint to resume from, so nothing is done: to train it "
            "again, give --overwrite in place of --resume"
        )


def save_corrupt(folder: Path, corrupt: list[Corrupt], *, resumed: bool = False) -> None:
    """Writes all images that were skipped, and why, as corrupt.tsv; where there are none, an older file goes.

    Args:
        folder: of the run.
        corrupt: the images.
        resumed: the images are those of the last part of a run: the older file's, of the parts before, stay.
    """
    path = folder / CORRUPT
    rows = [f"{plain(name, longest=4096)}\t{plain(reason, longest=4096)}" for name, reason in corrupt]
    if resumed and path.exists():
        rows = list(dict.fromkeys([*path.read_text(encoding="utf-8", errors="replace").splitlines()[1:], *rows]))
    if rows:
        atomic_write_text(path, "\n".join(["image\treason", *rows, ""]))
    else:
        path.unlink(missing_ok=True)


def save_config(folder: Path, config: Any) -> None:
    """Writes the resolved arguments as config.yaml, a recipe: --resume and --overwrite are no part of it.

    The main process alone writes.

    Args:
        folder: of the run.
        config: the arguments, a dataclass.
    """
    if rank() != 0:
        return
    settings = {name: value for name, value in asdict(config).items() if name not in ("resume", "overwrite")}
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


def begin_config(folder: Path, config: Any) -> None:
    """`save_config` at a run's beginning: an older config.yaml describes what the folder holds until the run's end."""
    if rank() == 0 and not (folder / "config.yaml").exists():
        save_config(folder, config)


def settings_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration, to tell runs apart: at its default, one of `ADDED` is as good as not there."""
    return {name: value for name, value in asdict(config).items() if value not in ADDED.get(name, ())}


def augment_settings(augment: AugmentConfig) -> dict[str, Any]:
    """What tells runs with these augmentations from earlier ones, which had the default."""
    return {} if augment == AugmentConfig() else {"augment": asdict(augment)}


def method_settings(config: Any, kind: type[OptimConfig]) -> dict[str, Any]:
    """The fields that `kind` adds to `OptimConfig`: a method's own settings."""
    common = {field.name for field in fields(OptimConfig)}
    return {name: value for name, value in settings_of(kind.of(config)).items() if name not in common}


def regularisation(config: SelfDistillationConfig) -> dict[str, Any]:
    """The settings that were added to all methods that learn labels, where they are not at their defaults."""
    return {name: value for name, value in settings_of(config).items() if name in ("mix", "ema")}


def check_queue(queue_size: int, images: int | None) -> None:
    """Refuses a queue that would hold an image's own older embeddings; `images` is their number, where it is known."""
    if images is not None and queue_size > images:
        raise UserError(
            f"queue_size {queue_size} is larger than the data set of {images} images, so that an image's own old "
            f"embeddings would be among its negatives; give a queue_size of at most {max(1, images // 2)}"
        )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is trained, and where it is kept.

    Attributes:
        arch: timm name of the network.
        size: side of the views in pixels.
        out: the run folder.
        title: of the progress bar and the curves.
        arguments: of the command, where the training is one of its own; they are written as config.yaml.
        continues: folder of a network of the same kind and classes whose weights it starts from, all of them.
    """

    arch: str
    size: int
    out: Path
    title: str = "train"
    arguments: Any = None
    continues: Path | None = None


def start_training(args: Any) -> tuple[RuntimeConfig, Path]:
    """How a command that trains begins: where and how to run, and its run folder.

    Raises:
        UserError: for settings that cannot run here, and a folder that is not to be written.
    """
    tune_cpu()
    runtime = RuntimeConfig.of(args)
    make_accelerator(runtime)
    return runtime, open_out(args, "training")


def command_spec(
    args: Any, data: ImageData | StreamingImages, out: Path, title: str, *, exits: bool = False
) -> RunSpec:
    """The network that a command trains: as asked for, else the default for the size of the images.

    Args:
        args: of the command.
        data: the images.
        out: run folder.
        title: of the training, for its log.
        exits: whether the network must have exits.
    """
    size = choose_size(data, args.image_size)
    arch = choose_model(args.model, size, exits=exits)
    return RunSpec(arch=arch, size=size, out=out, title=title, arguments=args)


def recorded_trainer(task: Task, loader: Loader, *, arguments: Any, out: Path, **kwargs: Any) -> Trainer:
    """A trainer whose run folder is ready, with the arguments as config.yaml.

    Args:
        task: the method with its network.
        loader: the data.
        arguments: of the command, where the training is one of its own.
        out: the run folder.
        kwargs: what else `Trainer` takes.

    Raises:
        UserError: for a checkpoint of another run, whose config.yaml stays.
    """
    if arguments is not None:
        prepare_run_folder(out, arguments)
    elif rank() == 0:
        mark(out, "training")
    trainer = Trainer(task, loader, out=out, **kwargs)
    if arguments is not None:
        save_config(out, arguments)  # a resume with other settings has been refused by now
    return trainer


def run_training(
    task: Task,
    loader: EpochLoader | StreamLoader,
    network: nn.Module,
    spec: RunSpec,
    *,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    settings: dict[str, Any],
    labels: Labels | None = None,
) -> dict[str, float]:
    """Trains a task and writes the network it is about, its log and its curves into the run folder.

    Args:
        task: the method.
        loader: the images.
        network: the part of the task to keep.
        spec: what is trained, and where it is kept.
        optim: how to train.
        runtime: where and how.
        settings: what else decides the numbers, for the check on resume.
        labels: for tasks that need them.

    Returns:
        What `Trainer.run` measured.
    """
    out = spec.out
    check_sizes(spec.arch, [spec.size, *optim.sizes])
    record_reading(network, loader.data)
    loader.data.move(make_accelerator(runtime).device)
    if labels is not None:
        settings = {"labels": labels.identity, **settings}
        labels.attach(network, out, input_spec(network, spec.size), loader.steps_per_epoch)
    identity = {"arch": spec.arch, "image_size": spec.size, **loader.data.identity, **settings}
    trainer = recorded_trainer(
        task,
        loader,
        arguments=spec.arguments,
        optim=optim,
        runtime=runtime,
        out=out,
        identity=identity,
        labels=labels,
        title=spec.title,
    )
    resumed = trainer.progress.step > 0
    try:
        measured = trainer.run()
    finally:
        if spec.arguments is not None and rank() == 0 and out.exists():  # a run folder that was removed stays so
            save_corrupt(out, loader.data.corrupt, resumed=resumed)
    if rank() == 0:
        from sssd_zoo.evaluation.reports import figures  # matplotlib: commands that only measure start without it

        remove(out, VIEW_CACHE)
        figures.loss_curves({spec.title: read_metrics(out / "metrics.jsonl")}, out / "curves.png")
        save_network(out, network, spec.arch, input_size=spec.size)
    return measured


def announce(out: Path, what: str, measured: dict[str, float]) -> None:
    """Tells what was trained and where it lies."""
    if rank() == 0:
        print(f"{what}: final loss {measured['loss']:.4f}, {speed(measured['images_per_second'], 'img')}; in {out}")
