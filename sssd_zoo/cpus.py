"""The CPUs that this process may use, and how many of them other processes leave to it. Imports no torch.

What decides how OpenMP's threads wait is read by the OpenMP library when torch loads it: so the `sssd` command calls
`set_up_openmp` before it imports torch.
"""

import math
import os
import time
from pathlib import Path, PurePosixPath

import psutil

THREADS_GIVEN = "OMP_NUM_THREADS" in os.environ  # by the user, a launcher or a cluster's scheduler: then it is obeyed

# Turns of a waiting thread before it sleeps. libgomp, which torch's wheels for Linux bring, makes 300,000 by default:
# milliseconds, in which the thread keeps the CPU from the one that it waits for wherever the two share it. None at all
# costs a system call at every small operation.
SPINS = 10_000
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # one of these given: left as it is
LAUNCHED = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_PORT")  # one of several processes: their launcher shares out CPUs


def set_up_openmp() -> None:
    """Sets how OpenMP's threads wait and, in a container with a quota, how many there are, where nobody has said.

    It takes effect in OpenMP libraries that are loaded later, those of processes started from here included.
    """
    if not os.environ.keys() & set(WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        os.environ["KMP_BLOCKTIME"] = "1"  # milliseconds, of LLVM's and Intel's libraries: by default 200
    if not THREADS_GIVEN and not os.environ.keys() & set(LAUNCHED) and available_cpus() < len(own_cpus()):
        os.environ["OMP_NUM_THREADS"] = str(available_cpus())


def own_cpus() -> list[int]:
    """The numbers of the CPUs that this process may run on (its affinity, a container's cpuset included)."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cpus(root: Path = Path("/")) -> int:
    """How many threads can compute at once: the CPUs of `own_cpus`, or a container's quota rounded up if it is less.

    Args:
        root: where /proc and /sys lie.
    """
    quota = cpu_quota(root)
    return len(own_cpus()) if quota is None else max(1, min(len(own_cpus()), math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPUs that the control groups of this process allow it on average: the least of its group and all above.

    Args:
        root: where /proc and /sys lie.

    Returns:
        A number of CPUs above 0, or None where there is no limit (and no Linux).
    """
    quotas = [
        quota
        for folder, mount in _groups(root)
        for level in (folder, *folder.parents)
        if level.is_relative_to(mount) and (quota := _quota_of(level)) is not None
    ]
    return min(quotas, default=None)


def _groups(root: Path) -> list[tuple[Path, Path]]:
    """The folders of this process's control groups that may limit its CPUs, and where each hierarchy is mounted."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {}  # by version: the group's path in its hierarchy
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    found = []
    for line in mounts:
        before, _, after = line.partition(" - ")
        top, mount = (*before.split(), *[""] * 5)[3:5]
        kind, _, options = (*after.split(), "", "", "")[:3]
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        folder = root / mount.lstrip("/")
        # A container may see its own group alone, mounted as the top of the hierarchy.
        group = PurePosixPath(paths[kind])
        inner = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        found.append((folder / inner, folder))
    return found


def _quota_of(group: Path) -> float | None:
    """The CPUs that one control group allows on average, in either version's files; None for no limit."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # 'max', or no such files
        return None


class OtherProcesses:
    """How much of this process's CPUs others take, those that would leave theirs to it (`nice`) not counted."""

    def __init__(self) -> None:
        self._before = self._times()

    def cores(self) -> tuple[float, float]:
        """CPUs that other processes kept busy since the last call, on average, and the seconds since it."""
        before, self._before = self._before, self._times()
        seconds = self._before[0] - before[0]
        busy = (self._before[1] - before[1]) - (self._before[2] - before[2])
        return max(0.0, busy / max(seconds, 1e-6)), seconds

    def _times(self) -> tuple[float, float, float]:
        """Now, the seconds that CPUs have computed for anybody, and those for this process and what it started."""
        of_all = psutil.cpu_times(percpu=True)
        me = psutil.Process()
        is_nice = os.name == "posix" and me.nice() > 0
        busy = 0.0
        for number in own_cpus():
            if number < len(of_all):  # not where CPUs are switched off
                times = of_all[number]
                names = ("user", "system", "irq", "softirq", *(("nice",) if is_nice else ()))
                busy += sum(getattr(times, name, 0.0) for name in names)
        own = 0.0
        for process in (me, *me.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.Error:  # it has ended: its parent's times have its own
                continue
            own += times.user + times.system + getattr(times, "children_user", 0) + getattr(times, "children_system", 0)
        return time.perf_counter(), busy, own


def threads_beside(others: float, cpus: int, now: int | None = None) -> int:
    """How many threads to compute with, so that each has a CPU of its own: they all wait for the slowest.

    Args:
        others: CPUs that other processes keep busy, of `OtherProcesses`.
        cpus: that this process may run on.
        now: threads at present, if there are: a CPU is taken from 0.4 on, and given back below 0.25.
    """
    threads = math.floor(cpus - others + 0.4)
    if now is not None and threads > now:
        threads = max(now, math.floor(cpus - others + 0.25))
    return max(1, threads)
