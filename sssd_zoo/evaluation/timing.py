"""What the stages and exits of a network cost here."""

import statistics as numbers
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sssd_zoo.models import StageCosts

ONE_BY_ONE = 32  # images that a timed run at batch 1 goes through

BATCH = 128  # the other batch size that is timed


@torch.inference_mode()
def measure_stages(model: Any, images: Tensor, runs: int) -> StageCosts:
    """Seconds of every stage and head for one image, the medians over images.

    Args:
        model: with all exits, in eval mode.
        images: float [N, 3, S, S], on its device; each is run alone, `runs` times.
        runs: over the images.
    """
    heads = [
        nn.Sequential(model.exit1, model.global_pool, model.exit1.fc),
        nn.Sequential(model.exit2, model.global_pool, model.exit2.fc),
        nn.Sequential(model.exit3, model.global_pool, model.exit3.fc),
        nn.Sequential(model.global_pool, model.fc),
    ]
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    stages = [nn.Sequential(stem, model.layer1), model.layer2, model.layer3, model.layer4]
    times: list[list[float]] = [[] for _ in range(8)]
    for image in images.repeat(runs, 1, 1, 1).split(1):
        x = image
        for number, (stage, head) in enumerate(zip(stages, heads, strict=True)):
            seconds, x = timed(stage, x)
            times[number].append(seconds)
            times[4 + number].append(timed(head, x)[0])
    medians = [numbers.median(own) for own in times]
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
    ways: Mapping[str, Callable[[Tensor], Any]], images: Tensor, *, batch: int, group: int, runs: int, seed: int
) -> dict[str, list[float]]:
    """Seconds of each way for one image, run by run: all ways in turn, in one process, on the same images.

    Args:
        ways: networks by name.
        images: float [N, 3, S, S].
        batch: images in a call.
        group: calls in a run, whose time is taken as one: single images differ by the exit they take.
        runs: of every way, after one that is not counted.
        seed: of the images of each run.
    """
    generator = torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        batches = images[torch.randint(len(images), (group * batch,), generator=generator)].split(batch)
        for name, way in ways.items():
            seconds = sum(timed(way, own)[0] for own in batches)
            if run:
                times[name].append(seconds / (group * batch))
    return times
