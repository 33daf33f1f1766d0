"""The Accelerator of a run."""

import time
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from sssd_zoo.configs import RuntimeConfig
from sssd_zoo.distributed.hardware import resolve_precision
from sssd_zoo.errors import UserError


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
