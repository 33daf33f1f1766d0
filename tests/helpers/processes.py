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


def run_together(code: str, folder: Path, world: int = 2) -> list[str]:
    """Runs code in `world` processes of one group, where it finds `dist`, `rank`, `world` and `torch`.

    Args:
        code: what each process does.
        folder: an empty one, for where the processes meet; it is their working folder, too.
        world: number of processes.

    Returns:
        What each printed.
    """
    words = [sys.executable, "-c", JOIN + code, str(folder / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [*words, str(rank), str(world)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, outputs
    return outputs
