"""The one training loop: schedule, precision, processes, checkpoints, resume, log and progress. It knows no method.

Every random number of a step depends on (seed, step) alone and every epoch's order on (seed, epoch), so a run killed at
any moment and resumed from its last checkpoint continues to the same weights, bit for bit, on one process; and several
processes see the samples and the views that one process with the same global batch would.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

from sssd_zoo.configs import OptimConfig, RuntimeConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.distributed import on_main, rank, world_size
from sssd_zoo.distributed.batchnorm import average_batchnorm, synchronise_batchnorm
from sssd_zoo.errors import UserError
from sssd_zoo.labels.soft import SoftLabels
from sssd_zoo.tasks import Task
from sssd_zoo.training.checkpoints import Checkpoints
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.log import Log
from sssd_zoo.training.schedule import schedule


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
