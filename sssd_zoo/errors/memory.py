"""Tells errors of a full memory from others: torch has one type for those of GPUs, but not for all."""

import sys
from typing import Any

# Of the host's allocator, of cuBLAS, and of CUDA outside torch's allocator: all are a plain RuntimeError.
_SIGNS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


def full_memory(error: BaseException) -> str | None:
    """What an error says about memory that was not enough, in at most 200 characters; None for all other errors."""
    torch: Any = sys.modules.get("torch")  # not imported for this
    types = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    words = str(error)
    if isinstance(error, types) or (isinstance(error, RuntimeError) and any(sign in words for sign in _SIGNS)):
        return words.splitlines()[0][:200] if words else "out of memory"
    return None
