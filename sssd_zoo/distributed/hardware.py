"""Chooses the device and precision, tunes the CPU, and describes the machine for records."""

import ctypes
import os
import platform
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from sssd_zoo.cpus import available_cpus
from sssd_zoo.distributed import world_size
from sssd_zoo.distributed.threads import limit_threads

MOST_WORKERS = 16  # by default
SHARED = 2**27  # bytes of shared memory for each of them: two batches of 256 images at 256 px, and some more


def tune_cpu() -> None:
    """Speeds up this process on a CPU; call it before creating the first tensor.

    glibc returns large activations to the system at every step and has to fault them in again: letting its malloc keep
    them saves up to 40 percent of a training step. fp32 matrix products at 'medium' precision avoid MKL's slow path on
    AMD CPUs and remain fp32 there; GPUs, and CPUs with AMX, would compute them in bf16, so there it stays as it is. A
    container's quota of CPUs limits the threads, see `limit_threads`.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    if not torch.cuda.is_available() and not torch.cpu.get_capabilities().get("amx_bf16"):
        torch.set_float32_matmul_precision("medium")
    limit_threads()


def decoding_workers(given: int | None, device: torch.device | None) -> int:
    """How many threads or processes decode images: as many as given, or one for each CPU of this process's share.

    Args:
        given: the number that was asked for, or None.
        device: that a network runs on at the same time, if any. Beside one on the CPUs, 2 decode.
    """
    if given is not None:
        return given
    if device is not None and device.type == "cpu":
        return 2
    share = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share, MOST_WORKERS, max(2, _free_shared_memory() // SHARED)))


def _free_shared_memory() -> int:
    """Free bytes of /dev/shm, through which DataLoader workers hand over batches; without it as many as they need."""
    shared = Path("/dev/shm")
    return shutil.disk_usage(shared).free if shared.is_dir() else MOST_WORKERS * SHARED


def resolve_precision(precision: str, device: Literal["auto", "cpu"] = "auto") -> str:
    """Resolves 'auto' to 'bf16' if the hardware supports it, 'fp16' on older GPUs, and 'fp32' otherwise."""
    if precision != "auto":
        return precision
    if device == "auto" and torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    # On other CPUs oneDNN emulates bf16 at a third of the speed of fp32.
    native = {"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"}
    return "bf16" if any(torch.cpu.get_capabilities().get(name) for name in native) else "fp32"


def autocast_dtype(precision: str, device: Literal["auto", "cpu"] = "auto") -> torch.dtype | None:
    """What autocast computes in for a precision, resolved by `resolve_precision`; None for fp32, without autocast."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[resolve_precision(precision, device)]


def machine() -> dict[str, Any]:
    """Describes the hardware and software of the run, for its records."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def compute_device(device: Literal["auto", "cpu"]) -> torch.device:
    """The current GPU, if there is one of torch's type 'cuda' and `device` is 'auto', otherwise the CPU."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")


def describe_machine(precision: str) -> str:
    """What computes, in words: device, processes, threads, torch, and precision."""
    parts = machine()
    processes = f"{parts['processes']} x " if parts["processes"] > 1 else ""
    threads = f"{parts['threads']} thread{'s' if parts['threads'] > 1 else ''}"
    return f"{parts['device']}, {processes}{threads}, torch {parts['torch']}, {precision}"
