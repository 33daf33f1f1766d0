"""The one training loop: schedule, precision, processes, checkpoints, resume, log and progress. It knows no method.

Every random number of a step depends on (seed, step) alone and every epoch's order on (seed, epoch), so a run killed at
any moment and resumed from its last checkpoint continues to the same weights: bit for bit, on one process and with the
same number of threads. Several processes see the samples and the views that one process with the same global batch
would, unless batches are accumulated (`accumulate`) or images mixed (`mix`), which is done within a process.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from sssd_zoo.configs import OptimConfig, RuntimeConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.distributed import on_main, rank, world_size
from sssd_zoo.distributed.batchnorm import average_batchnorm, synchronise_batchnorm
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.distributed.threads import TrainingThreads
from sssd_zoo.errors import UserError
from sssd_zoo.errors.memory import full_memory, full_shared_memory, lost_worker
from sssd_zoo.labels.protocol import Labels, Targets
from sssd_zoo.models.cpu_convolutions import cpu_convolutions
from sssd_zoo.tasks import Task
from sssd_zoo.training.checkpoints import Checkpoints, Progress
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.log import Log
from sssd_zoo.training.schedule import make_scheduler


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

        The images are uint8 or uint16 [b, C, S, S], or of a kind of their own that the task's `views` takes.
        """
        ...


class OutOfMemory(UserError):
    """The memory of the GPU, or of the machine, is not enough for a training's batch."""


def is_finite(module: nn.Module, optimizer: Any) -> bool:
    """Whether everything a resumed training starts from is finite: weights, buffers and the optimiser's state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors = [value for value in (*module.state_dict().values(), *states) if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all().to(tensors[0].device) for value in tensors]).all())


def check_trainable(config: OptimConfig, processes: int, images: int | None) -> None:
    """Refuses a batch size that cannot be trained with.

    Args:
        config: how to train.
        processes: number of them.
        images: in the data set, where it is known.

    Raises:
        UserError: saying which value and what to do.
    """
    if config.batch_size % (processes * config.accumulate):
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {processes} processes x accumulate "
            f"{config.accumulate}; choose a multiple"
        )
    if config.batch_size // (processes * config.accumulate) < 2:
        raise UserError(f"batch_size {config.batch_size} leaves single images; BatchNorm needs at least 2 in each part")
    if images is not None and config.batch_size > images:
        raise UserError(
            f"batch_size {config.batch_size} is larger than the data set of {images} images; give a smaller one"
        )


def check_schedule(config: OptimConfig) -> None:
    """Raises `UserError` for a step schedule that was asked for and would never lower the learning rate."""
    if config.schedule == "step" and config.milestones and min(config.milestones) >= config.epochs:
        raise UserError(
            f"schedule step lowers the learning rate at epochs {', '.join(map(str, config.milestones))}, and there are "
            f"{config.epochs}: give earlier milestones, or schedule cosine"
        )


def step_in_one_pass(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimiser of torch use its fused form: one pass over the weights in memory, where a CPU makes several.

    Other optimisers, such as timm's own, stay as they are.
    """
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True


def uses_cuda_graphs(runtime: RuntimeConfig, optim: OptimConfig, device: torch.device, processes: int) -> bool:
    """Whether a compiled training replays CUDA graphs: on a GPU, by one process, and with one pass for each step.

    Gradients that accumulate, or are reduced over processes, live on from one replay to the next.

    Args:
        runtime: says whether graphs are wanted.
        optim: says how many passes a step takes.
        device: that the training runs on.
        processes: number of them.
    """
    return runtime.cuda_graphs and device.type == "cuda" and processes == 1 and optim.accumulate == 1


class Trainer:
    """A training of one task; `run` leaves the trained weights in it.

    Args:
        task: the method with its network; moved to the device.
        loader: the data.
        optim: how to train.
        runtime: where and how to run.
        out: the run folder: checkpoints/ and metrics.jsonl are written there. If its newest checkpoint is of the same
            identity, the run is resumed from it.
        identity: what else decides the numbers (data, architecture, the method's settings), for the check on resume.
        labels: for tasks that need them; those that come of the network have been attached to it.
        title: for the progress bar.

    Raises:
        UserError: for a checkpoint of another run.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        *,
        optim: OptimConfig,
        runtime: RuntimeConfig,
        out: Path,
        identity: dict[str, Any],
        labels: Labels | None = None,
        title: str = "train",
    ) -> None:
        self.loader, self.labels, self.optim, self.runtime = loader, labels, optim, runtime
        self.total_steps = optim.epochs * loader.steps_per_epoch
        self.accelerator = make_accelerator(runtime)
        self._prepare(task)
        full_identity = self._full_identity(identity)
        self.checkpoints = Checkpoints(out / "checkpoints", full_identity)
        self.progress = self._resume()
        self.log = Log(out, runtime, self.progress.step, self.accelerator.is_main_process, full_identity)
        self.bar = self._progress_bar(title)
        self.threads = TrainingThreads(self.accelerator.device)
        self.unlogged: list[dict[str, Tensor]] = []  # what the steps since the last line of the log returned
        self.figures: dict[str, float] = {}  # what the task's monitor measured at this step
        self.saved_at = self.logged_at = time.perf_counter()
        self.started_at = self.logged_at - self.progress.seconds  # as if the run had never been interrupted

    def _prepare(self, task: Task) -> None:
        """Moves the task to the device, makes optimiser and scheduler, and wraps for the processes."""
        device, optim = self.accelerator.device, self.optim
        self.task = task.to(device).to(memory_format=torch.channels_last)
        self.task.compiled = self.runtime.compile
        torch.backends.cudnn.benchmark = task.fixed_shapes
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
        if device.type == "cpu":
            step_in_one_pass(optimizer)
        self.scheduler = make_scheduler(optim, optimizer, self.loader.steps_per_epoch)
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        self.forward = self._compiled() if self.runtime.compile else self.model

    def _compiled(self) -> Any:
        """The model compiled for fixed shapes: progressive resizing has a few, and kernels for any shape are slower."""
        accelerator = self.accelerator
        graphs = uses_cuda_graphs(self.runtime, self.optim, accelerator.device, accelerator.num_processes)
        return torch.compile(self.model, dynamic=False, mode="reduce-overhead" if graphs else "default")

    def _full_identity(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides the run's numbers."""
        return {
            **identity,
            **{f"optim.{name}": value for name, value in asdict(self.optim).items()},
            "seed": self.runtime.seed,
            "precision": self.accelerator.mixed_precision,
            "processes": self.accelerator.num_processes,
        }

    def _resume(self) -> Progress:
        """Loads the newest good checkpoint, if there is one."""
        newest = on_main(self.checkpoints.newest)
        if newest is None:
            return Progress()
        path, record = newest
        self.checkpoints.load(self.accelerator, path)
        return Progress.of(record)

    def _progress_bar(self, title: str) -> Any:
        return progress_bar(
            self.total_steps * self.optim.batch_size,
            title,
            "img",
            disable=not self.accelerator.is_main_process,
            initial=self.progress.step * self.optim.batch_size,
            step_size=self.optim.batch_size,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the last step, that of the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def seconds(self) -> float:
        """Of training so far, those before a resume included."""
        return time.perf_counter() - self.started_at

    def run(self) -> dict[str, float]:
        """Trains to the end.

        Returns:
            `seconds` of training, `images_per_second` over them, both including the time before a resume, and the last
            epoch's mean `loss`.

        Raises:
            UserError: for a full disk, for a full memory, and for a loss that is not finite.
        """
        self.task.train()
        try:
            with self.computing():
                self._say_threads()
                while self.progress.step < self.total_steps:
                    self.run_epoch()
        finally:
            self.bar.close()
            self.log.close()
        self.accelerator.free_memory()
        seconds = self.seconds
        return {
            "seconds": round(seconds, 1),
            "images_per_second": round(self.total_steps * self.optim.batch_size / seconds, 1),
            "loss": self.progress.epoch_loss,
        }

    @contextmanager
    def computing(self) -> Iterator[None]:
        """How steps are computed: on as many threads as are free, and on a CPU with convolutions made for it.

        Raises:
            OutOfMemory: if the memory is not enough for the batch.
            UserError: if the shared memory is not enough for the workers, or the system ended one.
        """
        on_cpu = self.accelerator.device.type == "cpu" and not self.runtime.compile
        with self.threads, cpu_convolutions(self.task) if on_cpu else nullcontext():
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                # A worker that ends is reported wherever this process is, not only where it waits for a batch.
                if (problem := full_shared_memory(error) or lost_worker(error)) is not None:
                    raise problem from error
                if (reason := full_memory(error)) is None:
                    raise
                raise self._out_of_memory(reason) from error

    def _out_of_memory(self, reason: str) -> OutOfMemory:
        """What to raise where there is less memory than a step or a checkpoint needs."""
        device, optim = self.accelerator.device, self.optim
        where = "this machine"
        if device.type == "cuda":
            gpu = torch.cuda.get_device_properties(device)
            where = f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB"
        parts = self.accelerator.num_processes * optim.accumulate
        return OutOfMemory(
            f"{where} does not have enough memory for {optim.batch_size // parts} images of {self.task.size} px at a "
            f"time (batch_size {optim.batch_size}, accumulate {optim.accumulate}): double accumulate, which computes "
            f"the batch in parts, give a smaller batch_size, or stop other programs that use this memory ({reason})"
        )

    def run_epoch(self) -> None:
        """Trains to the end of the current epoch, with the log's lines and the checkpoints that are due."""
        steps_per_epoch, every = self.loader.steps_per_epoch, self.runtime.checkpoint_every
        epoch, start = divmod(self.progress.step, steps_per_epoch)
        if start == 0:
            self.progress.epoch_sum, self.progress.epoch_count = 0.0, 0
        targets = None if self.labels is None else self.labels.for_epoch(epoch, start)
        for positions, images in self.loader.epoch(epoch, start):
            self.step(positions, images, targets)
            step = self.progress.step
            within = step % steps_per_epoch != 0
            logged = within and step % self.runtime.log_every == 0
            if logged:
                self.flush()
            if (every and within and step % every == 0) or (logged and self._long_since_saved()):
                self.save()
        self.flush(ended=epoch)
        self.bar.refresh()
        if (epoch + 1) % max(1, self.runtime.checkpoint_epochs) == 0 or self.progress.step == self.total_steps:
            self.save()

    def _long_since_saved(self) -> bool:
        """Whether so much would be lost by a kill that a checkpoint is due; the main process decides for all."""
        seconds = 60 * self.runtime.checkpoint_minutes
        return bool(seconds) and on_main(lambda: time.perf_counter() - self.saved_at > seconds)

    def step(self, positions: Tensor, images: Batch, targets: Targets | None) -> None:
        """One optimiser step.

        Args:
            positions: of the images in the data set, int64 [b].
            images: this process's part of the global batch.
            targets: the labels of all images, if the task needs any.
        """
        step, chunks = self.progress.step, self.optim.accumulate
        self.scheduler.step_update(step)
        if self.optim.sizes:
            self.task.size = self.optim.sizes[step * len(self.optim.sizes) // self.total_steps]
        self.task.before_step()
        parts = list(zip(positions.chunk(chunks), images.chunk(chunks), strict=True))
        means: dict[str, Tensor] = {}
        for number, (part_positions, part_images) in enumerate(parts):
            random = BatchRandom(self.runtime.seed, step * chunks + number, rank(), world_size())
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                views = self._views(part_positions, part_images, targets, random)
                if step == number == 0:
                    self.log.write_views(views, self.task.mean, self.task.std, step)
                values = self.forward(views)
                self.accelerator.backward(values["loss"] / len(parts))
            for name, value in values.items():
                means[name] = means.get(name, 0) + value.detach() / len(parts)
        if self.optim.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.optim.clip_grad)
        self.optimizer.step()
        self.task.after_step()
        self.optimizer.zero_grad()
        self.unlogged.append(means)
        self.figures = {}
        self.progress.step += 1
        self.bar.update(self.optim.batch_size)
        if self.threads.adapt():
            self._say_threads()

    def _say_threads(self) -> None:
        line = self.threads.describe()
        if line is not None and self.accelerator.is_main_process:
            self.bar.write(line)

    def _views(self, positions: Tensor, images: Any, targets: Targets | None, random: BatchRandom) -> dict[str, Any]:
        """What the task's `forward` takes, on the device."""
        device = self.accelerator.device
        batch = self.task.views(images.to(device, non_blocking=True), random)
        if targets is not None:
            batch["labels"] = targets[positions].to(device, non_blocking=True)
        return batch

    def flush(self, ended: int | None = None) -> None:
        """Logs the mean of the steps since the last line, over all processes; refuses a loss that is not finite.

        Args:
            ended: the epoch that has just ended, whose line also has the figures of the task's monitor.
        """
        if not self.unlogged:
            return
        names = list(self.unlogged[0])
        table = torch.stack([torch.stack([values[name].float() for name in names]) for values in self.unlogged])
        table = self.accelerator.reduce(table, reduction="mean").cpu()  # [steps, names]
        self.unlogged.clear()
        losses = table[:, names.index("loss")]
        self._check_losses(losses)
        self.progress.epoch_sum += float(losses.sum())
        self.progress.epoch_count += len(losses)
        self._look(ended)
        self._write_line(dict(zip(names, table.mean(0).tolist(), strict=True)), len(losses))

    def _look(self, ended: int | None) -> None:
        """Lets the task's monitor measure, in the main process, where it is due; that time is not the steps'."""
        monitor = self.task.monitor
        if ended is None or monitor is None or not monitor.due(ended, self.optim.epochs) or rank():
            return
        began = time.perf_counter()
        self.figures = monitor.measure()
        self.logged_at += time.perf_counter() - began

    def _check_losses(self, losses: Tensor) -> None:
        """Raises `UserError` if the loss of one of the last steps, float32 [steps], is not finite."""
        not_finite = (~losses.isfinite()).nonzero()
        if len(not_finite):
            first = int(not_finite[0])
            step = self.progress.step - len(losses) + first
            problem = f"the loss became {losses[first].item()} at step {step} of {self.total_steps} (lr {self.lr:.3g})"
            raise self.checkpoints.record_divergence(problem, step)

    def _write_line(self, means: dict[str, float], steps: int) -> None:
        """Writes the means over some steps into the log, and the loss beside the progress bar."""
        now, step = time.perf_counter(), self.progress.step
        rate = steps * self.optim.batch_size / (now - self.logged_at)
        self.logged_at = now
        epoch = step / self.loader.steps_per_epoch
        line = {"step": step, "epoch": round(epoch, 4), **means, "lr": self.lr, "images_per_second": round(rate, 1)}
        self.log.write({**line, **self.figures})
        epochs = f"{math.ceil(epoch)}/{self.optim.epochs}"
        self.bar.set_postfix(epoch=epochs, loss=f"{means['loss']:.3f}", refresh=False)

    def save(self) -> None:
        """Writes a checkpoint; refuses weights that are not finite."""
        self.flush()
        average_batchnorm(self.task)
        step = self.progress.step
        if not is_finite(self.task, self.optimizer):
            problem = f"the weights became infinite or NaN before step {step} of {self.total_steps} (lr {self.lr:.3g})"
            raise self.checkpoints.record_divergence(problem, step)
        self.progress.seconds = self.seconds
        self.checkpoints.save(
            self.accelerator,
            self.progress,
            self.runtime.keep_last,
            self.runtime.keep_best,
            figures=self.figures,
            best_by="loss" if self.task.monitor is None else self.task.monitor.best_by,
        )
        self.saved_at = time.perf_counter()
