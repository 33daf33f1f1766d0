"""The one training loop: schedule, precision, processes, checkpoints, resume, log and progress. It knows no method.

Every random number of a step depends on (seed, step) alone and every epoch's order on (seed, epoch), so a run killed at
any moment and resumed from its last checkpoint continues to the same weights, bit for bit, on one process; and several
processes see the samples and the views that one process with the same global batch would.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.distributed import average_batchnorm, on_main, rank, synchronise_batchnorm, world_size
from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_write_text, damage, disk_errors, publish_dir, read_json, sha256_of, write_json
from sssd_zoo.ranges import (
    Checked,
    Count,
    CountOrZero,
    Epochs,
    Fraction,
    FractionBelowOne,
    LearningRate,
    Milestones,
    Pixels,
    Positive,
    Seed,
    Weight,
)
from sssd_zoo.soft_labels import SoftLabels
from sssd_zoo.tasks import Task


@dataclass(kw_only=True)
class OptimConfig(Checked):
    """How one network is trained.

    Args:
        epochs: passes over the data.
        batch_size: images per optimiser step, over all processes.
        accumulate: parts that a process cuts its share of the batch into, to save memory.
        optimizer: timm's name of it; 'momentum' is plain SGD with momentum, 'sgd' that of Nesterov.
        lr: learning rate at its height.
        momentum: of the optimiser.
        weight_decay: of all parameters, BatchNorm's and biases too, as the reference codes do.
        schedule: 'cosine' falls to 0, 'step' is multiplied by `gamma` at each of `milestones`.
        warmup_epochs: of linear growth from 0.
        milestones: epochs, for 'step'.
        gamma: factor, for 'step'.
        clip_grad: largest norm of the gradient; none by default.
        sizes: sides of the views in pixels over equal parts of the training, such as [16, 24, 32]: small views first
            cost less; by default all are of the run's image size.
    """

    epochs: Count = 200
    batch_size: Count = 512
    accumulate: Count = 1
    optimizer: str = "momentum"
    lr: LearningRate = 0.06
    momentum: FractionBelowOne = 0.9
    weight_decay: Weight = 5e-4
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: Epochs = 0.0
    milestones: Milestones = field(default_factory=lambda: [120, 160])
    gamma: Fraction = 0.1
    clip_grad: Positive | None = None
    sizes: list[Pixels] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises `UserError` for values that no data could be trained with, and an optimizer that timm cannot make."""
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}")
        try:
            trial = create_optimizer_v2(
                [{"params": [torch.nn.Parameter(torch.zeros(1))]}],
                opt=self.optimizer,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
            )
        except Exception as error:  # each of timm's hundred optimizers has its own
            raise UserError(
                f"optimizer '{self.optimizer}': {error}; choose another, such as momentum, sgd, adamw or lamb"
            ) from error
        if getattr(trial, "is_second_order", False):
            raise UserError(f"optimizer '{self.optimizer}' needs second derivatives, which are not computed here")


@dataclass(kw_only=True)
class RuntimeConfig(Checked):
    """Where and how a run executes; nothing here but `seed` and `precision` changes its numbers.

    Args:
        seed: of weights, order, views, clusters and probes.
        precision: 'auto' takes bf16 where the hardware has it, else fp32.
        compile: torch.compile the network: pays on GPUs, not on CPUs.
        device: 'auto' takes the GPU if there is one; 'cpu' does not.
        checkpoint_every: steps between checkpoints, beside those at the ends of epochs; 0: none.
        checkpoint_epochs: epochs between checkpoints, for epochs of few steps.
        keep_last: checkpoints kept, the newest.
        keep_best: checkpoints kept, those of the lowest training loss.
        log_every: steps between lines of metrics.jsonl.
        trackers: any of 'tensorboard' and 'trackio', beside metrics.jsonl.
    """

    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_every: CountOrZero = 0
    checkpoint_epochs: CountOrZero = 1
    keep_last: CountOrZero = 2
    keep_best: CountOrZero = 1
    log_every: Count = 10
    trackers: list[Literal["tensorboard", "trackio"]] = field(default_factory=list)


class Batch(Protocol):
    """What the loop does with images before `Task.views`: a tensor can, and so can lists of images of any sizes."""

    def chunk(self, chunks: int, /) -> Sequence[Any]:
        """The batch in parts, cut as `Tensor.chunk` cuts the positions."""
        ...

    def to(self, device: torch.device, *, non_blocking: bool) -> Any:
        """The batch on a device."""
        ...


class Loader(Protocol):
    """What feeds the loop: equal steps per epoch, the same samples for the same (seed, epoch), resumable at a step."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Batch]]:
        """Yields positions, int64 [b], and their images, this process's part of each global batch.

        The images are uint8 [b, 3, S, S], or of a kind of their own that the task's `views` takes.
        """
        ...


def tune_cpu() -> None:
    """Makes this process fast on a CPU; call it before the first tensor.

    glibc gives large activations back to the system at every step and has to fault them in again: telling its malloc
    to keep them is worth up to 40 percent of a training step. fp32 products at 'medium' precision leave MKL's slow
    path on AMD CPUs and stay exact to fp32 there; on GPUs it would lower the precision, so it is for CPU runs only.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    if not torch.cuda.is_available():
        torch.set_float32_matmul_precision("medium")


def resolve_precision(precision: str, device: Literal["auto", "cpu"] = "auto") -> str:
    """'auto' to 'bf16' where the hardware multiplies it natively, else to 'fp32'; other names pass."""
    if precision != "auto":
        return precision
    if device == "auto" and torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    # oneDNN emulates bf16 elsewhere, at a third of fp32's speed.
    native = {"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"}
    return "bf16" if any(torch.cpu.get_capabilities().get(name) for name in native) else "fp32"


def make_accelerator(config: RuntimeConfig) -> Accelerator:
    """An Accelerator of the run's precision; BatchNorm's buffers stay each process's own until they are averaged.

    Raises:
        UserError: for what cannot be had here: training in fp16 on a CPU, and `compile` without a compiler.
    """
    precision = resolve_precision(config.precision, config.device)
    # Accelerate keeps the first precision of a process for good; a later run of the same process may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=config.device == "cpu",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The main process clusters and measures alone, and longer than the ten minutes that NCCL would wait.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ],
    )
    # Accelerate (seen in 1.15) would compute in fp32 and call it fp16.
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision fp16 trains on GPUs only: on a CPU give bf16, fp32 or auto")
    if config.compile:
        check_compiler(accelerator.device.type)
    return accelerator


@cache
def check_compiler(device: str) -> None:
    """Compiles a function of one line, to find out now and not after the data whether `torch.compile` works here.

    Args:
        device: torch's name of it.

    Raises:
        UserError: if it does not.
    """
    new = time.time()  # a constant that no cache knows
    try:
        torch.compile(lambda value: value * new)(torch.ones(8, device=device))
    except Exception as error:  # of any of its layers
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--compile does not work here ({reason}): install a C++ compiler, such as g++, or drop --compile"
        ) from error


def machine() -> dict[str, Any]:
    """What the run is computed on, for its records."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# What a run may go on with otherwise after a loss that was not finite, and what its message says to try.
CURES = ("optim.lr", "optim.warmup_epochs", "optim.clip_grad", "precision")


class Checkpoints:
    """The checkpoints of a run: folders `step-00000123`, complete or absent.

    Each holds what the accelerator saves and checkpoint.json: the record that `save` was given, the run's identity, the
    sha256 of the other files, in `not_finite_at` the step whose loss was not finite in a run that came from it, and in
    `seal` the sha256 of all this.

    Args:
        folder: that holds them.
        identity: everything that decides the run's numbers; a resume with another is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def saved(self) -> list[tuple[Path, dict[str, Any]]]:
        """All complete checkpoints whose records can be read, with those, oldest first."""
        found = [(path, _record(path)) for path in sorted(self.folder.glob("step-*"))]
        return sorted(((path, record) for path, record in found if record), key=lambda item: item[1]["step"])

    def save(self, accelerator: Accelerator, record: dict[str, Any], keep_last: int, keep_best: int) -> None:
        """Writes a checkpoint of all that the accelerator prepared and drops those no longer wanted.

        Raises:
            UserError: in every process if one of them cannot write its part; nothing is left of it.
        """
        target = self.folder / f"step-{record['step']:08d}"
        # All processes write into one folder (each its own random state), so it cannot be a temporary of one of them.
        partial = self.folder / f".{target.name}.partial"
        try:
            with disk_errors(self.folder):
                if accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                    self.folder.mkdir(exist_ok=True)  # not its parent: a run folder that was removed stays so
                    partial.mkdir()
            accelerator.wait_for_everyone()
            errors: list[UserError] = []
            try:
                with disk_errors(self.folder):
                    accelerator.save_state(str(partial))
            except UserError as error:
                errors = [error]
            for first in gather_object(errors):
                raise first
            if accelerator.is_main_process:
                with disk_errors(self.folder):
                    sums = sha256_of(partial, partial.iterdir())
                    _write_record(partial, {**record, "identity": self.identity, "sha256": sums})
                    publish_dir(partial, target)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            # Later ones are damaged, or of a course that the run has left: it came from an earlier one.
            saved = [item for item in self.saved() if item[1]["step"] <= record["step"]]
            by_loss = sorted(saved, key=lambda item: item[1].get("epoch_loss", math.inf))
            wanted = {path for path, _ in saved[-max(1, keep_last) :]} | {path for path, _ in by_loss[:keep_best]}
            for path in self.folder.glob("step-*"):
                if path not in wanted:
                    shutil.rmtree(path)
        accelerator.wait_for_everyone()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole and led to a finite loss, or none; those passed over are named.

        Raises:
            UserError: if it was written by a run of other settings, data or architecture, or all are damaged.
        """
        for litter in self.folder.glob(".step-*.partial"):  # of a run killed while it wrote a checkpoint
            shutil.rmtree(litter, ignore_errors=True)
        cures: tuple[str, ...] = ()
        damaged = False
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            record = _record(path)
            wrong = damage(path, record.get("sha256", {})) if record else "checkpoint.json cannot be read"
            if wrong or not record:
                damaged = True
                print(f"warning: the checkpoint {path} is damaged and passed over: {wrong}", file=sys.stderr)
                continue
            if "not_finite_at" in record:
                cures = CURES
                if record["not_finite_at"] == record["step"]:
                    print(f"the checkpoint {path} led to a loss that is not finite: it is passed over", file=sys.stderr)
                    continue
            self._check_identity(path, record["identity"], cures)
            return path, record
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole, so the run cannot be resumed: remove that folder to train "
                "from the beginning"
            )
        return None

    def _check_identity(self, path: Path, theirs: dict[str, Any], cures: tuple[str, ...]) -> None:
        keys = (theirs.keys() | self.identity.keys()) - set(cures)
        different = sorted(key for key in keys if theirs.get(key) != self.identity.get(key))
        if different:
            changes = "; ".join(
                f"{key}: {theirs.get(key)!r} there, {self.identity.get(key)!r} now" for key in different[:4]
            )
            raise UserError(
                f"cannot resume from {path}: it is of another run ({changes}); use a new --out, or --overwrite"
            )

    def load(self, accelerator: Accelerator, path: Path) -> None:
        """Reads a checkpoint into all that the accelerator prepared.

        Raises:
            UserError: if it cannot be read, as one from before there was a sha256 to tell that it is damaged.
        """
        try:
            accelerator.load_state(str(path))
        except Exception as error:  # whatever the formats' readers make of bytes that they did not write
            raise UserError(
                f"cannot read the checkpoint {path} ({str(error)[:200]}): remove it to resume from the one before it"
            ) from error

    def not_finite(self, what: str, step: int) -> UserError:
        """Notes in the newest checkpoint that training from it failed, and gives the error that says how to go on.

        Args:
            what: is not finite, and where.
            step: whose loss it is, counted from 0, so that of a checkpoint of that step it was the first.
        """
        # A later one is damaged: the run did not come from it.
        saved = [item for item in self.saved() if item[1]["step"] <= step]
        good = [path for path, record in saved if record["step"] < step]
        if saved and rank() == 0:
            path, record = saved[-1]
            _write_record(path, {**record, "not_finite_at": step})
        kept = f"the last good checkpoint is {good[-1]}" if good else "without a good checkpoint it starts anew"
        return UserError(f"{what}; resume the run with a lower lr, warmup_epochs, clip_grad or precision fp32 ({kept})")


def diverged(checkpoints: Path) -> bool:
    """Whether a training with this folder of checkpoints ended in a loss that is not finite, by its newest record."""
    records = [_record(path) for path in sorted(checkpoints.glob("step-*"))]
    return bool(records) and "not_finite_at" in (records[-1] or {})


def _record(checkpoint: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's record, None if it is damaged."""
    try:
        content = read_json(checkpoint / "checkpoint.json")
    except UserError:
        return None
    whole = isinstance(content, dict) and {"step", "epoch_sum", "epoch_count", "seconds", "identity"} <= content.keys()
    if whole and content.pop("seal", None) in (None, _seal(content)):  # none in those of earlier versions
        return dict(content)
    return None


def _write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    write_json(checkpoint / "checkpoint.json", {**record, "seal": _seal(record)})


def _seal(record: dict[str, Any]) -> str:
    """The sha256 of a record, which is in it, as it tells those of the other files."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class Log:
    """metrics.jsonl and the trackers; only the main process writes.

    A line is written at every `log_every` steps. The file is appended to; a resume first drops the lines after its
    checkpoint, and a half line that a kill may have left, so it ends as that of a run never killed.
    """

    def __init__(self, out: Path, config: RuntimeConfig, step: int, main: bool) -> None:
        self.path, self.main = out / "metrics.jsonl", main
        self.trackers: list[Any] = []
        if not main:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if "tensorboard" in config.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self.trackers.append(SummaryWriter(out / "tensorboard", purge_step=step + 1))
        self.trackio = None
        if "trackio" in config.trackers:
            os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
            import trackio

            self.trackio = trackio
            trackio.init(project="sssd-zoo", name=out.name, embed=False)

    def write(self, values: dict[str, float]) -> None:
        """Appends one line; `values` holds `step` and numbers."""
        if not self.main:
            return
        with disk_errors(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            for writer in self.trackers:
                for name, value in values.items():
                    writer.add_scalar(name, value, int(values["step"]))
        if self.trackio is not None:
            self.trackio.log(
                {name: value for name, value in values.items() if name != "step"}, step=int(values["step"])
            )

    def close(self) -> None:
        """Flushes the trackers."""
        with disk_errors(self.path):
            for writer in self.trackers:
                writer.close()
        if self.main and self.trackio is not None:
            self.trackio.finish()


def read_metrics(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] if there is none; a half line at its end, left by a kill, is ignored.

    A line that is damaged, or tells no `key`, is named on stderr and left out: it is worth less than the run.
    """
    if not path.exists():
        return []
    metrics = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        values = None
        with suppress(ValueError):
            values = json.loads(line)
        if isinstance(values, dict) and key in values:
            metrics.append(values)
        elif line:
            print(f"warning: line {number} of {path} is damaged and left out", file=sys.stderr)
    return metrics


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Timm's scheduler, counted in optimiser steps; it has no state but the step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    common: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False}
    if config.schedule == "step":
        # timm's step scheduler decays one step early (it asks for the rate after the step): one more makes it exact.
        milestones = [epoch * steps_per_epoch - warmup + 1 for epoch in config.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=config.gamma, **common)
    total = config.epochs * steps_per_epoch - warmup
    return CosineLRScheduler(optimizer, t_initial=max(1, total), **common)


def is_finite(module: nn.Module, optimizer: Any) -> bool:
    """Whether all that training goes on from is finite: weights, buffers and the optimiser's state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors = [value for value in (*module.state_dict().values(), *states) if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all().to(tensors[0].device) for value in tensors]).all())


def check(config: OptimConfig, processes: int, images: int | None) -> None:
    """Refuses what cannot train.

    Args:
        config: how to train.
        processes: number of them.
        images: in the data set, where it is known.

    Raises:
        UserError: saying which value and what to do.
    """
    if config.batch_size % (processes * config.accumulate):
        raise UserError(
            f"batch_size {config.batch_size} does not divide by {processes} processes x accumulate "
            f"{config.accumulate}; choose a multiple"
        )
    if config.batch_size // (processes * config.accumulate) < 2:
        raise UserError(f"batch_size {config.batch_size} leaves single images; BatchNorm needs at least 2 in each part")
    if images is not None and config.batch_size > images:
        raise UserError(
            f"batch_size {config.batch_size} is larger than the data set of {images} images; give a smaller one"
        )


def train(
    task: Task,
    loader: Loader,
    *,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    out: Path,
    identity: dict[str, Any],
    labels: Tensor | SoftLabels | None = None,
    relabel: Callable[[int, int], Tensor] | None = None,
    title: str = "train",
) -> dict[str, float]:
    """Trains `task` and leaves its trained weights in it.

    Args:
        task: the method with its network; moved to the device.
        loader: the data.
        optim: how to train.
        runtime: where and how to run.
        out: the run folder: checkpoints/ and metrics.jsonl are written there.
        identity: what else decides the numbers (data, architecture, the method's settings), for the check on resume.
            A newest checkpoint of the same identity in `out` is gone on from.
        labels: int64 [N] by position, or soft ones, for tasks that need them.
        relabel: gives such labels anew before each epoch, and where a run is resumed in one, from the epoch's number
            and the step in it.
        title: for the progress bar.

    Returns:
        `seconds` of training, `images_per_second` over them, both with the slices before a resume, and the last
        epoch's mean `loss`.

    Raises:
        UserError: for settings that cannot train, a checkpoint of another run, a full disk, a loss that is not finite.
    """
    accelerator = make_accelerator(runtime)
    device = accelerator.device
    task = task.to(device).to(memory_format=torch.channels_last)
    task.compiled = runtime.compile
    torch.backends.cudnn.benchmark = True  # the shapes are the same at every step
    if task.global_batchnorm:
        synchronise_batchnorm(task, device)
    optimizer = create_optimizer_v2(
        task.parameter_groups(),
        opt=optim.optimizer,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=False,
    )
    scheduler = schedule(optim, optimizer, loader.steps_per_epoch)
    model, optimizer = accelerator.prepare(task, optimizer)
    forward = torch.compile(model) if runtime.compile else model

    identity = {
        **identity,
        **{f"optim.{name}": value for name, value in asdict(optim).items()},
        "seed": runtime.seed,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }
    checkpoints = Checkpoints(out / "checkpoints", identity)
    step, epoch_loss, epoch_count, earlier_seconds = 0, 0.0, 0, 0.0
    found = on_main(checkpoints.newest)
    if found:
        checkpoints.load(accelerator, found[0])
        step, epoch_loss, epoch_count = (found[1][name] for name in ("step", "epoch_sum", "epoch_count"))
        earlier_seconds = found[1]["seconds"]
    log = Log(out, runtime, step, accelerator.is_main_process)

    total = optim.epochs * loader.steps_per_epoch
    bar = tqdm(
        total=total * optim.batch_size,
        initial=step * optim.batch_size,
        desc=title,
        unit="img",
        unit_scale=True,
        disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    pending: list[dict[str, Tensor]] = []
    began = waited = time.perf_counter()

    def flush() -> None:
        """Averages the pending steps over the processes, refuses what is not finite, and logs their mean."""
        nonlocal waited, epoch_loss, epoch_count
        if not pending:
            return
        names = list(pending[0])
        table = torch.stack([torch.stack([parts[name].float() for name in names]) for parts in pending])
        table = accelerator.reduce(table, reduction="mean").cpu()
        losses = table[:, names.index("loss")]
        bad = (~losses.isfinite()).nonzero()
        lr = optimizer.param_groups[0]["lr"]
        if len(bad):
            at = step - len(pending) + int(bad[0])
            what = f"the loss became {losses[int(bad[0])].item()} at step {at} of {total} (lr {lr:.3g})"
            raise checkpoints.not_finite(what, at)
        now = time.perf_counter()
        rate = len(pending) * optim.batch_size / (now - waited)
        waited = now
        epoch_loss += float(losses.sum())
        epoch_count += len(pending)
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        epoch = step / loader.steps_per_epoch
        log.write({"step": step, "epoch": round(epoch, 4), **means, "lr": lr, "images_per_second": round(rate, 1)})
        bar.set_postfix(epoch=f"{math.ceil(epoch)}/{optim.epochs}", loss=f"{means['loss']:.3f}", refresh=False)
        pending.clear()

    def save() -> None:
        flush()
        average_batchnorm(task)
        if not is_finite(task, optimizer):
            lr = optimizer.param_groups[0]["lr"]
            what = f"the weights became infinite or NaN before step {step} of {total} (lr {lr:.3g})"
            raise checkpoints.not_finite(what, step)
        seconds = earlier_seconds + time.perf_counter() - began
        record = {"step": step, "epoch_sum": epoch_loss, "epoch_count": epoch_count, "seconds": seconds}
        if epoch_count:
            record["epoch_loss"] = epoch_loss / epoch_count
        checkpoints.save(accelerator, record, runtime.keep_last, runtime.keep_best)

    task.train()
    try:
        while step < total:
            epoch, start = divmod(step, loader.steps_per_epoch)
            if start == 0:
                epoch_loss, epoch_count = 0.0, 0
            if relabel is not None:
                labels = relabel(epoch, start)
            for positions, images in loader.epoch(epoch, start):
                parts = list(zip(positions.chunk(optim.accumulate), images.chunk(optim.accumulate), strict=True))
                scheduler.step_update(step)
                if optim.sizes:
                    task.size = optim.sizes[step * len(optim.sizes) // total]
                task.before_step()
                sums: dict[str, Tensor] = {}
                for number, (some, some_images) in enumerate(parts):
                    last = number == len(parts) - 1
                    random = BatchRandom(runtime.seed, step * optim.accumulate + number, rank(), world_size())
                    batch = task.views(some_images.to(device, non_blocking=True), random)
                    if labels is not None:
                        batch["labels"] = labels[some].to(device, non_blocking=True)
                    with nullcontext() if last else accelerator.no_sync(model):
                        parts_of_loss = forward(batch)
                        accelerator.backward(parts_of_loss["loss"] / len(parts))
                    for name, value in parts_of_loss.items():
                        sums[name] = sums.get(name, 0) + value.detach() / len(parts)
                if optim.clip_grad is not None:
                    accelerator.clip_grad_norm_(model.parameters(), optim.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                pending.append(sums)
                bar.update(optim.batch_size)
                if step % runtime.log_every == 0:
                    flush()
                if runtime.checkpoint_every and step % runtime.checkpoint_every == 0 and step % loader.steps_per_epoch:
                    save()
            flush()
            if (epoch + 1) % max(1, runtime.checkpoint_epochs) == 0 or step == total:
                save()
    finally:
        bar.close()
        log.close()
    accelerator.free_memory()
    seconds = earlier_seconds + time.perf_counter() - began
    return {
        "seconds": round(seconds, 1),
        "images_per_second": round(total * optim.batch_size / seconds, 1),
        "loss": epoch_loss / max(1, epoch_count),
    }
