"""`sssd fit` on a GPU: batches are computed in as many parts as its memory makes necessary."""

import gc
from dataclasses import replace
from typing import Any

import torch

from sssd_zoo.configs import ContrastiveConfig, MoCoConfig, SelfDistillationConfig
from sssd_zoo.distributed.hardware import compute_device
from sssd_zoo.files.untrusted import flat, read_yaml
from sssd_zoo.pipeline.defaults import SMALLEST, splits_for
from sssd_zoo.pipeline.estimate import distill_step, pretrain_step
from sssd_zoo.pipeline.pretext import Setup
from sssd_zoo.pipeline.pretrain import check_splits
from sssd_zoo.training.engine import OutOfMemory
from sssd_zoo.training.trial import same_random_state


def within_memory(setup: Setup, given: frozenset[str] | None) -> tuple[Setup, dict[str, Any]]:
    """Raises `accumulate` of the trainings until a step of each fits into the memory of the GPU.

    A run that is resumed keeps what it began with. Nothing is tried on a CPU, which would swap, nor with several
    processes: one that fails leaves the others waiting.

    Args:
        setup: of the run.
        given: names of the arguments that were given, which are taken as they are; None for all.

    Returns:
        The setup, and what was chosen, by the names of the settings.

    Raises:
        UserError: if not even the smallest parts fit.
    """
    single = setup.inputs["processes"] == 1
    if given is None or not single or compute_device(setup.runtime.device).type != "cuda":
        return setup, {}
    chosen = _earlier(setup, given)
    if chosen is None:
        chosen = {}
        for name in ("pretrain", "distill") if setup.pretext.source is not None else ("distill",):
            if f"{name}.accumulate" not in given:
                chosen |= _fitting(setup, name, keep_splits=f"{name}.splits" in given)
    args = setup.args
    for name, value in chosen.items():
        training, field = name.split(".")
        args = replace(args, **{training: replace(getattr(args, training), **{field: value})})
    return setup.with_args(args), chosen


def _earlier(setup: Setup, given: frozenset[str]) -> dict[str, Any] | None:
    """What the run in the folder began with, where that is micro-batches and not given now; None for a new run."""
    path = setup.out / "config.yaml"
    if setup.args.overwrite or not path.is_file():
        return None
    content = read_yaml(path)
    settings = flat(content) if isinstance(content, dict) else {}
    names = [
        f"{name}.accumulate" for name in ("pretrain", "distill") if settings.get(f"{name}.accumulate") not in (None, 1)
    ]
    names += ["pretrain.splits"] if "pretrain.accumulate" in names else []
    names += ["distill.splits"] if "distill.accumulate" in names and setup.args.method == "contrastive" else []
    return {name: settings[name] for name in names if name in settings and name not in given}


def _fitting(setup: Setup, name: str, *, keep_splits: bool) -> dict[str, Any]:
    """What to change of a training, by the names of the settings, so that a step of it fits."""
    config, chosen = setup.args.student if name == "distill" else setup.args.pretrain, {}
    while problem := _problem(setup, config):
        accumulate = 2 * config.accumulate
        part, left = divmod(config.batch_size, accumulate)
        if left or part < SMALLEST:
            raise problem
        chosen[f"{name}.accumulate"] = accumulate
        config = replace(config, accumulate=accumulate)
        if isinstance(config, MoCoConfig | ContrastiveConfig):
            if not keep_splits:
                chosen[f"{name}.splits"] = splits_for(part, 1, most=config.splits)
                config = replace(config, splits=chosen[f"{name}.splits"])
            check_splits(config, 1)
    return chosen


def _problem(setup: Setup, config: MoCoConfig | SelfDistillationConfig) -> OutOfMemory | None:
    """Tries a few steps of a training; gives what memory was not enough for, if it was not."""
    uncompiled = replace(setup, runtime=replace(setup.runtime, compile=False))  # compiling for each try takes minutes
    try:
        with same_random_state():
            if isinstance(config, MoCoConfig):
                pretrain_step(uncompiled, config)
            else:
                distill_step(uncompiled, config, *uncompiled.pretext.encoder_like())
        return None
    except OutOfMemory as error:
        return OutOfMemory(str(error))  # another one: the traceback of this holds the tensors of the step
    finally:
        gc.collect()
        torch.cuda.empty_cache()
