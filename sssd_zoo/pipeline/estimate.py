"""Measures what the stages of `sssd fit` will take here: steps of the trainings, forward passes of the networks.

Nothing of it stays: the steps train networks that are thrown away, and random generators are put back as they were.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sssd_zoo.configs import AnchoredConfig, ContrastiveConfig, MoCoConfig, OptimConfig, SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom, draw_views
from sssd_zoo.data.inputs import InputSpec, input_spec
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.views import ViewBatch
from sssd_zoo.distributed import on_main, world_size
from sssd_zoo.distributed.progress import duration
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import run_network
from sssd_zoo.files import temporary_name
from sssd_zoo.labels.origin import labels_by_name
from sssd_zoo.models import feature_width
from sssd_zoo.models.maps import shared_map
from sssd_zoo.models.networks import new_network, new_trunk
from sssd_zoo.pipeline.distill import exits_task, new_student
from sssd_zoo.pipeline.pretext import Setup
from sssd_zoo.tasks import AnchoredSelfDistillation, FrozenEncoder, MoCo, Task
from sssd_zoo.training.trial import TIMED, WARM_UP, StepTime, measure_step, same_random_state

WORTH = 25  # a run is measured where it has so many times the steps that measuring takes
SCHEDULE = {"epochs", "warmup_epochs", "schedule", "milestones", "gamma", "lr"}  # they do not change a step's time
FORWARD = 32  # images of a forward pass that is measured
LONGEST = 800  # epochs that --budget chooses at most: MoCo v2's longest schedule


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        trainings: of each training, by the name of its stage.
        encoder: seconds of M_ssl's forward pass of one image, where all processes take a part of the images.
        student: seconds of the student's.
    """

    trainings: dict[str, StepTime]
    encoder: float
    student: float


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        trainings: the configuration of each training, by the name of its stage.
        images: number of images of each training.
        begun: of the stages that are not done, the optimiser steps that each resumes from.
        probed: images that the probes are trained and measured on, times the networks.
    """

    trainings: dict[str, OptimConfig]
    images: dict[str, int]
    begun: dict[str, int]
    probed: int

    def steps(self, name: str) -> int:
        """Steps of an epoch of a training."""
        return max(1, self.images[name] // self.trainings[name].batch_size)

    def steps_left(self, name: str) -> int:
        """Steps that a training still has to do, 0 where it is done."""
        if name not in self.begun:
            return 0
        return max(0, self.steps(name) * self.trainings[name].epochs - self.begun[name])

    def worth_measuring(self) -> bool:
        """Whether the trainings take so long that it is worth measuring a few steps of each."""
        return sum(map(self.steps_left, self.trainings)) >= WORTH * (WARM_UP + TIMED)


def expected(setup: Setup, work: Work, rates: Rates) -> dict[str, float]:
    """Seconds that the stages to come will take, by their names, less what was not measured (fits, figures)."""
    seconds = {}
    for name, measured in rates.trainings.items():
        steps = work.steps_left(name)
        checkpoints = steps / work.steps(name) / max(1, setup.runtime.checkpoint_epochs)
        seconds[name] = steps * measured.step + checkpoints * measured.checkpoint + once(setup, work, rates, name)
    if "labels" in work.begun:
        seconds["labels"] = len(setup.data) * rates.encoder
    if "probe" in work.begun:
        seconds["probe"] = work.probed * rates.student
    return seconds


def once(setup: Setup, work: Work, rates: Rates, name: str) -> float:
    """Seconds that a training takes before its first step."""
    views = getattr(work.trainings[name], "cached_views", 0)
    return float(views * len(setup.data) * rates.encoder)


def epochs_within(setup: Setup, work: Work, rates: Rates, seconds: float) -> int:
    """The epochs of all trainings, the same for each, that fit into so many seconds, with all other stages.

    Raises:
        UserError: if not even one fits.
    """
    empty = replace(work, begun=dict.fromkeys(work.begun, 10**12))  # nothing left to train
    fixed = sum(expected(setup, empty, rates).values())
    epoch = sum(
        work.steps(name) * measured.step + measured.checkpoint / max(1, setup.runtime.checkpoint_epochs)
        for name, measured in rates.trainings.items()
    )
    if (seconds - fixed) < epoch:
        raise UserError(
            f"--budget is too short: one epoch of each stage takes about {duration(fixed + epoch)} on this machine, "
            f"and {duration(max(0, seconds))} of it are left after reading and measuring; give more, or a smaller "
            "--image_size"
        )
    return min(LONGEST, int((seconds - fixed) / epoch))


def measure(setup: Setup, work: Work) -> Rates:
    """Measures what the stages that are to come take; every process calls it, and all get the main one's figures."""
    trainings: dict[str, StepTime] = {}
    with same_random_state():
        encoder, spec = setup.pretext.encoder_like()
        per_image = forward_seconds(encoder, setup, spec)
        student = new_network(setup.arch, setup.data)
        per_student = forward_seconds(student, setup, input_spec(student, setup.size))
        del student  # its memory is for the trainings
        for name, config in work.trainings.items():
            if not work.steps_left(name):
                continue
            done = next((done for done in trainings if alike(work.trainings[done], config)), None)
            if done is not None:
                trainings[name] = trainings[done]
            elif isinstance(config, SelfDistillationConfig):
                trainings[name] = distill_step(setup, config, encoder, spec)
            elif isinstance(config, MoCoConfig):
                trainings[name] = pretrain_step(setup, config)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return on_main(lambda: Rates(trainings, per_image, per_student))


def alike(one: OptimConfig, other: OptimConfig) -> bool:
    """Whether two trainings' steps take the same time."""
    if not isinstance(one, SelfDistillationConfig) or not isinstance(other, SelfDistillationConfig):
        return False
    kinds = {type(each) if _has_more(each) else SelfDistillationConfig for each in (one, other)}
    kind, *more = kinds
    return not more and _of_a_step(kind.of(one)) == _of_a_step(kind.of(other))


def _has_more(config: SelfDistillationConfig) -> bool:
    """Whether a step has more to do than the paper's."""
    return bool(getattr(config, "anchor", None)) or isinstance(config, ContrastiveConfig)


def _of_a_step(config: SelfDistillationConfig) -> dict[str, Any]:
    """The settings that a step's time may depend on."""
    return {name: value for name, value in asdict(config).items() if name not in SCHEDULE}


def forward_seconds(network: Any, setup: Setup, spec: InputSpec) -> float:
    """Wall time of a network's forward pass of one image, where all processes take a part of the images.

    Args:
        network: the network.
        setup: the images, and how to run it.
        spec: of its inputs.
    """
    positions = torch.arange(min(FORWARD, len(setup.data)))
    batches = setup.data.batches([positions] * 2, workers=0)
    passes = run_network(network, batches, setup.forward, spec=spec)
    next(passes)
    began = time.perf_counter()
    next(passes)
    return (time.perf_counter() - began) / len(positions) / world_size()


def _scratch(setup: Setup) -> Path:
    """A folder for a trial: named as what a killed command leaves, which the next one removes."""
    return on_main(lambda: temporary_name(setup.out / "trial"))


def pretrain_step(setup: Setup, config: MoCoConfig) -> StepTime:
    """Of MoCo v2, on a new trunk."""
    source = setup.pretext.source
    assert source is not None  # else nothing is pretrained
    trunk = new_trunk(setup.pretext.arch, data=source)
    task = MoCo(trunk, config, input_spec(trunk, setup.size))
    loader = EpochLoader(source, config.batch_size, setup.runtime.seed)
    return measure_step(task, loader, _scratch(setup), optim=OptimConfig.of(config), runtime=setup.runtime)


class _CachedViews(EpochLoader):
    """What `CachedViewLoader` yields, with features of no image.

    Args:
        setup: the images.
        config: of the views.
        width: of the features.
    """

    def __init__(self, setup: Setup, config: SelfDistillationConfig, width: int) -> None:
        super().__init__(setup.data, config.batch_size, setup.runtime.seed)
        self.config, self.width = config, width

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ViewBatch]]:  # type: ignore[override]
        """The batches of an epoch from its step `start` on."""
        for positions, images in super().epoch(epoch, start):
            config, count = self.config, len(positions)
            views = draw_views(
                BatchRandom(0, 0),
                count,
                images.shape[-1],
                crop=config.crop,
                scale=config.crop_scale,
                augment=config.augment.resolved(contrastive=False, channels=images.shape[1]),
            )
            yield positions, ViewBatch(images, views, torch.zeros(count, self.width, dtype=torch.float16))


def distill_step(setup: Setup, config: SelfDistillationConfig, encoder: Any, spec: InputSpec) -> StepTime:
    """Of self distillation on labels of no meaning.

    Args:
        setup: the images, and how to train.
        config: of the training.
        encoder: M_ssl, or a network of its kind, whose features the exits predict where `config` has an anchor.
        spec: of its inputs.
    """
    labels = labels_by_name("random", setup.data, setup.args.cluster.k, setup.runtime)
    model = new_student(setup.arch, labels.num_classes, "sssd", config.exits, setup.data)
    views = input_spec(model, setup.size)
    loader = EpochLoader(setup.data, config.batch_size, setup.runtime.seed)
    task: Task = exits_task(model, config, views)
    if isinstance(config, AnchoredConfig) and config.anchor:
        shape = shared_map(model, [setup.size, *config.sizes], encoder, spec.size) if config.dense else None
        width = feature_width(encoder) + (0 if shape is None else shape.numbers)
        frozen = FrozenEncoder(encoder, spec, torch.zeros(width), torch.ones(width), shape)
        if config.cached_views:
            loader = _CachedViews(setup, config, width)
            frozen = frozen._replace(network=None)
        task = AnchoredSelfDistillation(model, frozen, config, views)
    optim = OptimConfig.of(config)
    return measure_step(task, loader, _scratch(setup), optim=optim, runtime=setup.runtime, labels=labels)
