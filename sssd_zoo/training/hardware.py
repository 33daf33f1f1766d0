"""The Accelerator of a run."""

import time
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.distributed import world_size
from sssd_zoo.distributed.hardware import compute_device, resolve_precision
from sssd_zoo.errors import UserError
from sssd_zoo.training.trackers import check_trackers


def make_accelerator(config: RuntimeConfig) -> Accelerator:
    """An Accelerator with the run's device and precision; each process keeps BatchNorm buffers of its own.

    `distributed.batchnorm` averages those before every checkpoint.

    Raises:
        UserError: for settings that do not work here: fp16 on a CPU, `compile` without a compiler, or trackers that
            are not installed.
    """
    check_trackers(config.trackers)
    precision = resolve_precision(config.precision, config.device)
    wanted, kept = compute_device(config.device), PartialState._shared_state.get("device")
    # Accelerate keeps the first precision and device of a process for good; a later run of the same process may want
    # others. Of several processes each has its device from the launcher.
    AcceleratorState._reset_state(
        reset_partial_state=kept is not None and kept.type != wanted.type and world_size() == 1
    )
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=wanted.type == "cpu",  # Accelerate's own choice may be one that only it would use
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The main process clusters and measures alone, and longer than the ten minutes that NCCL would wait.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ],
    )
    # Accelerate (seen in 1.15) would compute in fp32 and call it fp16.
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision fp16 trains on GPUs only: on a CPU use bf16, fp32 or auto")
    if config.compile:
        check_compiler(accelerator.device.type)
    return accelerator


@cache
def check_compiler(device: str) -> None:
    """Compiles a function of one line, so that a missing compiler shows before the data are loaded.

    Args:
        device: torch's name of the device type.

    Raises:
        UserError: if `torch.compile` does not work here.
    """
    uncached = time.time()  # a constant that is in no cache of compiled functions
    try:
        torch.compile(lambda value: value * uncached)(torch.ones(8, device=device))
    except Exception as error:  # of any of its layers
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--compile does not work here ({reason}): install a C++ compiler, such as g++, or drop --compile"
        ) from error
