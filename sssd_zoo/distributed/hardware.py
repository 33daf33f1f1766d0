"""The device and the precision that this machine computes in, and what it is called in records."""

import ctypes
import platform
from typing import Any, Literal

import torch

from sssd_zoo.distributed import world_size


def tune_cpu() -> None:
    """Makes this process fast on a CPU; call it before the first tensor.

    glibc gives large activations back to the system at every step and has to fault them in again: telling its malloc
    to keep them is worth up to 40 percent of a training step. fp32 products at 'medium' precision leave MKL's slow
    path on AMD CPUs and stay exact to fp32 there; on GPUs it would lower the precision, so it is for CPU runs only.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    if not torch.cuda.is_available():
        torch.set_float32_matmul_precision("medium")


def resolve_precision(precision: str, device: Literal["auto", "cpu"] = "auto") -> str:
    """'auto' to 'bf16' where the hardware multiplies it natively, else to 'fp32'; other names pass."""
    if precision != "auto":
        return precision
    if device == "auto" and torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    # oneDNN emulates bf16 elsewhere, at a third of fp32's speed.
    native = {"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"}
    return "bf16" if any(torch.cpu.get_capabilities().get(name) for name in native) else "fp32"


def machine() -> dict[str, Any]:
    """What the run is computed on, for its records."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_device(wanted: Literal["auto", "cpu"]) -> torch.device:
    """The current GPU where there is one and it is `wanted`, else the CPU."""
    return torch.device("cuda" if wanted == "auto" and torch.cuda.is_available() else "cpu")


def describe_machine(precision: str) -> str:
    """What computes, in words."""
    parts = machine()
    processes = f"{parts['processes']} x " if parts["processes"] > 1 else ""
    return f"{parts['device']}, {processes}{parts['threads']} threads, torch {parts['torch']}, {precision}"
