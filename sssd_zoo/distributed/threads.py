"""The number of threads that a training computes with."""

import os
import time
from typing import Self

import torch

from sssd_zoo import cpus
from sssd_zoo.distributed import world_size
from sssd_zoo.errors.text import plural

EVERY = 5.0  # seconds between looks at what other processes do
FIRST = 0.5  # seconds of the look before the first step


def set_threads(count: int) -> None:
    """`torch.set_num_threads`, which also changes how MKL computes, where it is another number."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def limit_threads() -> None:
    """Takes no more threads than the CPUs that this process may use, unless OMP_NUM_THREADS gives their number."""
    if not cpus.THREADS_GIVEN:
        share = cpus.available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        set_threads(max(1, min(torch.get_num_threads(), share)))


class TrainingThreads:
    """Within the block, torch computes on as many threads as other processes leave CPUs for.

    Every operation is cut into one part per thread, and ends with the last: where two threads share their CPUs with
    another process, both advance at the pace of the one that waits for its turn. So CPUs that others keep busy are left
    to them, and taken again when they are free. It changes no result but by rounding.

    The number stays as it is where OMP_NUM_THREADS gives it and with several processes, each of which would take the
    others for such. With an accelerator it is 1, as the CPU there draws random numbers and launches kernels. Seen on a
    machine with 16 cores and an H200: waking 16 threads for operations of a few thousand numbers left the GPU idle nine
    tenths of the time (two trainings at once: 4,700 and 7,000 images a second with 16 threads each, 17,000 each with
    3).

    Args:
        device: of the training.
    """

    said = ""  # the last line of `describe`, by any training of this process

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, torch.get_num_threads()
        self.adapts = device.type == "cpu" and self.before > 1 and not cpus.THREADS_GIVEN and world_size() == 1
        self.busy, self.looked = 0.0, time.perf_counter()

    def __enter__(self) -> Self:
        """Chooses the number."""
        if self.device.type != "cpu":
            set_threads(1)
        elif self.adapts:
            self.others = cpus.OtherProcesses()
            time.sleep(FIRST)
            self.busy, _ = self.others.cores()
            set_threads(self._fitting(None))
        self.looked = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Back to the number before."""
        set_threads(self.before)

    def adapt(self) -> bool:
        """Looks, every few seconds, at what other processes do; whether the number of threads changed."""
        if not self.adapts or time.perf_counter() - self.looked < EVERY:
            return False
        self.looked = time.perf_counter()
        self.busy, _ = self.others.cores()
        threads = torch.get_num_threads()
        fitting = self._fitting(threads)
        set_threads(fitting)
        return fitting != threads

    def _fitting(self, now: int | None) -> int:
        return min(self.before, cpus.threads_beside(self.busy, len(cpus.own_cpus()), now))

    def describe(self) -> str | None:
        """A line on what was chosen and why, unless the last one of this process said the same."""
        if self.device.type != "cpu":
            return None
        threads, allowed = torch.get_num_threads(), cpus.available_cpus()
        line = f"computing with {plural(threads, 'thread')} on {plural(allowed, 'CPU')}"
        if cpus.THREADS_GIVEN:
            line += ", as OMP_NUM_THREADS says"
        elif threads < self.before:
            line += f": other processes keep {self.busy:.1f} of them busy (OMP_NUM_THREADS={self.before} takes all)"
        elif allowed < len(cpus.own_cpus()):
            line += f", the quota of this container ({len(cpus.own_cpus())} CPUs)"
        key = line.partition(":")[0]
        if key == TrainingThreads.said:
            return None
        TrainingThreads.said = key
        return line
