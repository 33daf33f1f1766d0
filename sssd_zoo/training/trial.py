"""Measures how long a training step takes, on the real network and batch, and leaves nothing behind."""

import itertools
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sssd_zoo.configs import OptimConfig, RuntimeConfig
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.distributed import on_main, rank
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.labels.protocol import Labels
from sssd_zoo.tasks import Task
from sssd_zoo.training.engine import Trainer

WARM_UP, TIMED = 1, 3  # steps: the first one allocates, chooses kernels and compiles


class Trial(Trainer):
    """A trainer without a progress bar, whose steps count for nothing."""

    def _progress_bar(self, title: str) -> Any:
        return progress_bar(None, title, "img", disable=True)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Restores the states of all global random generators after the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


class StepTime(NamedTuple):
    """Seconds of an optimiser step, and of writing a checkpoint."""

    step: float
    checkpoint: float


def measure_step(
    task: Task,
    loader: EpochLoader,
    scratch: Path,
    *,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    labels: Labels | None = None,
) -> StepTime:
    """Measures a few steps, reading the images included, and one checkpoint; every process calls it.

    Args:
        task: the method with its network, which is trained and then of no use.
        loader: the images.
        scratch: a folder that does not exist, on the disk of the run, the same in all processes; it is removed.
        optim: how to train.
        runtime: where and how.
        labels: for tasks that need them.

    Raises:
        OutOfMemory: if the memory is not enough for the batch.
    """
    # The largest views of progressive resizing decide how much memory it takes; smaller ones cost as much less as they
    # have fewer pixels.
    sizes = optim.sizes or [task.size]
    task.size = max(sizes)
    scale = float(np.mean([(size / task.size) ** 2 for size in sizes]))
    try:
        on_main(scratch.mkdir)
        trainer = Trial(
            task,
            loader,
            optim=replace(optim, sizes=[]),
            runtime=replace(runtime, trackers=[]),
            out=scratch,
            identity={},
            labels=labels,
        )
        try:
            with trainer.computing():
                loader.data.move(trainer.accelerator.device)
                seconds = scale * _step_seconds(trainer)
            began = time.perf_counter()
            trainer.checkpoints.save(trainer.accelerator, trainer.progress, 1, 0)
            return StepTime(seconds, time.perf_counter() - began)
        finally:
            trainer.log.close()
            trainer.accelerator.free_memory()
    finally:
        if rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _step_seconds(trainer: Trainer) -> float:
    loader, device = trainer.loader, trainer.accelerator.device
    targets = None if trainer.labels is None else trainer.labels.for_epoch(0)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
    trainer.task.train()
    times = []
    for positions, images in itertools.islice(batches, WARM_UP + TIMED):
        trainer.step(positions, images, targets)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    return (times[-1] - times[WARM_UP - 1]) / TIMED
