"""Tells errors of a full memory from others: torch has one type for those of GPUs, but not for all."""

import sys
from typing import Any

from sssd_zoo.errors import UserError, causes

# Of the host's allocator, of cuBLAS, and of CUDA outside torch's allocator: all are a plain RuntimeError.
_SIGNS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")

# Of torch's files in /dev/shm, through which the workers of a DataLoader hand over their batches.
_SHARED_SIGNS = (
    "out of shared memory",
    "shared memory(shm)",
    *(f"unable to {do} file </torch_" for do in ("write to", "resize")),
)


def full_memory(error: BaseException) -> str | None:
    """What an error says about memory that was not enough, in at most 200 characters; None for all other errors."""
    torch: Any = sys.modules.get("torch")  # not imported for this
    types = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    words = str(error)
    if isinstance(error, types) or (isinstance(error, RuntimeError) and any(sign in words for sign in _SIGNS)):
        return words.splitlines()[0][:200] if words else "out of memory"
    return None


def lost_worker(error: BaseException) -> UserError | None:
    """What to raise for an error of a worker that the system ended; None for all others."""
    for cause in causes(error):
        words = str(cause)
        if words.startswith("DataLoader worker (pid") and (
            "killed by signal" in words or "exited unexpectedly" in words
        ):
            return UserError(
                "a process that decodes images was ended by the system, most likely for lack of memory: give fewer "
                "--workers, or --workers 0"
            )
    return None


def full_shared_memory(error: BaseException) -> UserError | None:
    """What to raise for an error of workers whose shared memory is full, as in a container; None for all others."""
    words = [str(cause) for cause in causes(error) if isinstance(cause, RuntimeError)]
    if any(sign in each for each in words for sign in _SHARED_SIGNS):
        return UserError(
            "the workers that read the images do not have enough shared memory (/dev/shm): give --workers 0, or the "
            "container more of it, such as `docker run --shm-size 8g`"
        )
    return None
