"""How long the stages and exits of a network take on this machine."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sssd_zoo.models import StageCosts, stages_and_heads

ONE_BY_ONE = 32  # images in a timed run at batch size 1

BATCH = 128  # the other batch size that is timed


@torch.inference_mode()
def measure_stages(model: Any, images: Tensor, runs: int) -> StageCosts:
    """Seconds that every stage and head takes for one image, medians over images.

    Args:
        model: with all exits, in eval mode.
        images: float [N, 3, S, S], on its device; each is run alone, `runs` times.
        runs: over the images.
    """
    parts = stages_and_heads(model)
    times: list[list[float]] = [[] for _ in range(8)]
    for image in images.repeat(runs, 1, 1, 1).split(1):
        x = image
        for number, (stage, head) in enumerate(parts):
            seconds, x = timed(stage, x)
            times[number].append(seconds)
            times[4 + number].append(timed(head, x)[0])
    medians = [median(seconds) for seconds in times]
    return StageCosts(tuple(medians[:4]), tuple(medians[4:]))


def timed(function: Callable[[Tensor], Any], x: Tensor) -> tuple[float, Any]:
    """Seconds that a call takes, on the GPU too, and its result."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def interleaved(
    networks: Mapping[str, Callable[[Tensor], Any]], images: Tensor, *, batch: int, group: int, runs: int, seed: int
) -> dict[str, list[float]]:
    """Seconds that each network takes for one image, run by run: all in turn, in one process, on the same images.

    Args:
        networks: by name.
        images: float [N, 3, S, S].
        batch: images in a call.
        group: calls in a run, which are timed as one: single images differ by the exit they take.
        runs: of every network, after one that is not counted.
        seed: of the draw of each run's images.
    """
    generator = torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for run in range(runs + 1):
        batches = images[torch.randint(len(images), (group * batch,), generator=generator)].split(batch)
        for name, network in networks.items():
            seconds = sum(timed(network, inputs)[0] for inputs in batches)
            if run:
                times[name].append(seconds / (group * batch))
    return times
