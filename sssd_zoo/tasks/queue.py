"""The ring of embeddings that MoCo and SEED compare with."""

from contextlib import nullcontext

import torch
from torch import Tensor


def similarities(rows: Tensor, queue: Tensor) -> Tensor:
    """Cosines of embeddings with those of a queue, computed in float32 under autocast, too.

    bfloat16 would round a cosine near 1 by up to 0.004, which a low temperature makes a large change of the logits.

    Args:
        rows: float32 [B, dim], unit length.
        queue: float32 [K, dim], unit length.

    Returns:
        Float32 [B, K].
    """
    kind = rows.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return rows @ queue.T


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, rows: Tensor) -> None:
    """Writes rows over the oldest of a queue, around its end where their number does not divide its length.

    Args:
        queue: [K, dim], changed in place.
        pointer: int64 scalar, the place of the oldest row; moved on.
        rows: [n, dim]; of more than K the last count.
    """
    rows = rows[-len(queue) :]
    queue[(pointer + torch.arange(len(rows), device=rows.device)) % len(queue)] = rows
    pointer.copy_((pointer + len(rows)) % len(queue))
