"""The ring of embeddings that MoCo and SEED compare with."""

import torch
from torch import Tensor


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
