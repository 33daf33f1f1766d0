"""Communication between the processes of a run, of which there may be only one."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import fitted

T = TypeVar("T")


def world_size() -> int:
    """The number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Waits until all processes arrive here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Ends the communication of a process that is done with it; nothing for one process.

    Gloo's threads may still hold tensors; one that frees them while Python shuts down aborts the process, though all of
    its work is done (pytorch/pytorch#179291).
    """
    if world_size() > 1:
        dist.destroy_process_group()


def on_main(action: Callable[[], T]) -> T:
    """Runs `action` in the main process, and returns its result, or raises its `UserError`, in every process."""
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = type(error), str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        kind, message = outcome[1]
        problem: UserError = kind(message)
        problem.told = rank() != 0
        raise problem
    result: T = outcome[0]
    return result


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """Concatenates [b, ...] of all processes to [b * world, ...], without gradients; unchanged for one process."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def gather_lists(items: list[T]) -> list[T]:
    """The items of all processes, those of the first one first; every process calls it."""
    if world_size() == 1:
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def print_main(text: str) -> None:
    """Prints on the main process; on a terminal, lines are broken between words."""
    if rank() == 0:
        print(fitted(text, sys.stdout), flush=True)
