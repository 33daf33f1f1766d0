"""A few processes of torch.distributed, without a launcher."""

import os
import subprocess
import sys
from pathlib import Path

from helpers.commands import ROOT

JOIN = """
import os, sys, torch, torch.distributed as dist
store, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
"""
LEAVE = """
dist.barrier()
dist.destroy_process_group()  # without this a process may abort as it ends
"""


def run_together(code: str, folder: Path, world: int = 2) -> list[str]:
    """Runs code in `world` processes of one group, where it finds `dist`, `rank`, `world` and `torch`.

    Args:
        code: what each process does.
        folder: an empty one, for where the processes meet; it is their working folder, too.
        world: number of processes.

    Returns:
        What each printed.
    """
    words = [sys.executable, "-c", JOIN + code + LEAVE, str(folder / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": str(world)}
    errors = [(folder / f"{rank}.stderr").open("w+") for rank in range(world)]
    start = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*words, str(rank), str(world)], stderr=error, **start) for rank, error in enumerate(errors)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    said = "".join(Path(error.name).read_text() for error in errors)
    assert [process.returncode for process in processes] == [0] * world, said
    return outputs
