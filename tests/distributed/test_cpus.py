"""How many CPUs there are for a process, by affinity, quota and what others do, and what OpenMP is told."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from helpers.commands import command
from sssd_zoo import cpus
from sssd_zoo.distributed import hardware, threads
from sssd_zoo.distributed.threads import TrainingThreads

V2 = "30 24 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "33 30 0:29 {top} /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n"
    "34 30 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:6 - cgroup cgroup rw,cpu,cpuacct\n"
)


def machine(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    """Folders as Linux shows them to a process of these control groups."""
    texts = {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "quota"),
    [
        (V2.format(top="/"), "0::/\n", {}, None),
        (V2.format(top="/"), "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (V2.format(top="/"), "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        # The least of a group and those above.
        (
            V2.format(top="/"),
            "0::/a/b/c\n",
            {
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/b/c/cpu.max": "400000 100000\n",
            },
            0.5,
        ),
        # A container that sees its own group alone, by a mount and by a namespace.
        (V2.format(top="/docker/1f"), "0::/docker/1f\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (V2.format(top="/../.."), "0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            V1.format(top="/"),
            "5:memory:/m\n4:cpu,cpuacct:/a/b\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/m/cpu.cfs_quota_us": "1\n",
                "sys/fs/cgroup/memory/m/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ("", "", {}, None),
        ("nonsense\n", "1:2\nnonsense:x", {}, None),
        (V2.format(top="/"), "0::/a\n", {"sys/fs/cgroup/a/cpu.max": "1 2 3\n"}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path, mounts, groups, files, quota):
    assert cpus.cpu_quota(machine(tmp_path, mounts, groups, files)) == quota


@pytest.mark.parametrize(("limit", "available"), [("50000", 1), ("100000", 1), ("150000", 2), ("900000", 4)])
def test_a_quota_is_rounded_up_and_gives_no_more_than_there_is(tmp_path, monkeypatch, limit, available):
    monkeypatch.setattr(cpus, "own_cpus", lambda: [0, 1, 2, 3])
    root = machine(tmp_path, V2.format(top="/"), "0::/a\n", {"sys/fs/cgroup/a/cpu.max": f"{limit} 100000\n"})
    assert cpus.available_cpus(root) == available


def test_without_any_limit_all_cpus_are_available(tmp_path):
    assert cpus.available_cpus(tmp_path) == len(cpus.own_cpus())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_a_limit():
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{one}]); from sssd_zoo import cpus; print(cpus.available_cpus())"
    assert command("-c", program).stdout.strip() == "1"


GOMP = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib" / "libgomp.so.1"
LOADED = f"from sssd_zoo.cpus import set_up_openmp; set_up_openmp(); import ctypes; ctypes.CDLL({str(GOMP)!r})"


@pytest.mark.skipif(not GOMP.exists(), reason="this torch has another OpenMP library")
@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, str(cpus.SPINS)), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_torchs_openmp_waits_as_it_is_told(environment, spins, monkeypatch):
    for name in cpus.WAITING:  # a command that ran in this process before has set some
        monkeypatch.delenv(name, raising=False)
    said = command("-c", LOADED, environment={"OMP_DISPLAY_ENV": "verbose", **environment}).stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


@pytest.mark.parametrize(
    ("others", "count", "now", "threads"),
    [
        (0.0, 2, None, 2),
        (1.0, 2, None, 1),
        (0.67, 2, 2, 1),  # one busy process beside two threads of ours
        (0.3, 2, None, 2),
        (0.3, 2, 1, 1),  # not back and forth
        (0.2, 2, 1, 2),
        (5.0, 2, None, 1),
        (1.0, 16, None, 15),
        (0.0, 16, 8, 16),
    ],
)
def test_busy_cpus_are_left_to_others(others, count, now, threads):
    assert cpus.threads_beside(others, count, now) == threads


SPIN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


def test_what_others_compute_is_seen():
    look = cpus.OtherProcesses()
    shell = f'{sys.executable} -c "{SPIN.format(seconds=30)}" > {os.devnull} 2>&1 & echo $!'
    other = int(subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout)
    try:
        time.sleep(2)
        cores, seconds = look.cores()
    finally:
        os.kill(other, signal.SIGKILL)
    assert 2 <= seconds < 60
    assert cores > 0.1  # a busy machine may give it a part of a CPU


def test_what_this_process_started_is_its_own():
    look = cpus.OtherProcesses()
    before = look._times()[2]
    child = subprocess.Popen([sys.executable, "-c", SPIN.format(seconds=0.5) + "\ntime.sleep(60)"])
    deadline = time.monotonic() + 60
    while look._times()[2] - before < 0.5 and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = look._times()[2]
    child.kill()
    child.wait()
    assert alive - before >= 0.5
    assert look._times()[2] >= alive - 0.05  # counted when it has ended, too


class Looks:
    """`OtherProcesses` that says what it is told."""

    busy: ClassVar[list[float]] = []

    def cores(self) -> tuple[float, float]:
        return self.busy.pop(0), 5.0


@pytest.fixture
def four_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(cpus, "THREADS_GIVEN", False)
    monkeypatch.setattr(cpus, "own_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(cpus, "available_cpus", lambda: 4)
    monkeypatch.setattr(cpus, "OtherProcesses", Looks)
    monkeypatch.setattr(threads, "EVERY", 0.0)
    monkeypatch.setattr(threads, "FIRST", 0.0)
    monkeypatch.setattr(TrainingThreads, "said", "")
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
class TestTrainingThreads:
    def test_they_follow_what_others_do(self):
        Looks.busy = [1.0, 1.1, 3.9, 0.0]
        with TrainingThreads(torch.device("cpu")) as chosen:
            assert torch.get_num_threads() == 3
            line = "computing with 3 threads on 4 CPUs: other processes keep 1.0 of them busy"
            assert chosen.describe() == f"{line} (OMP_NUM_THREADS=4 takes all)"
            assert chosen.describe() is None  # said once
            assert not chosen.adapt()
            assert chosen.adapt()
            assert torch.get_num_threads() == 1
            assert chosen.adapt()
            assert torch.get_num_threads() == 4
            assert chosen.describe() == "computing with 4 threads on 4 CPUs"
        assert torch.get_num_threads() == 4

    def test_a_given_number_stays(self, monkeypatch):
        monkeypatch.setattr(cpus, "THREADS_GIVEN", True)
        Looks.busy = []  # never asked
        with TrainingThreads(torch.device("cpu")) as chosen:
            assert not chosen.adapt()
            assert torch.get_num_threads() == 4
            assert chosen.describe() == "computing with 4 threads on 4 CPUs, as OMP_NUM_THREADS says"

    def test_an_accelerator_needs_one(self):
        with TrainingThreads(torch.device("cuda")) as chosen:
            assert torch.get_num_threads() == 1
            assert not chosen.adapt()
            assert chosen.describe() is None
        assert torch.get_num_threads() == 4

    def test_a_quota_limits_them(self, monkeypatch):
        monkeypatch.setattr(cpus, "available_cpus", lambda: 2)
        threads.limit_threads()
        assert torch.get_num_threads() == 2
        Looks.busy = [0.0]
        with TrainingThreads(torch.device("cpu")) as chosen:
            assert chosen.describe() == "computing with 2 threads on 2 CPUs, the quota of this container (4 CPUs)"
        monkeypatch.setattr(cpus, "THREADS_GIVEN", True)
        torch.set_num_threads(3)
        threads.limit_threads()
        assert torch.get_num_threads() == 3


class TestDecodingWorkers:
    CPU, GPU = torch.device("cpu"), torch.device("cuda")

    @pytest.fixture(autouse=True)
    def cpus(self, monkeypatch):
        monkeypatch.setattr(hardware, "available_cpus", lambda: 24)
        monkeypatch.setattr(hardware, "_free_shared_memory", lambda: 2**40)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    @pytest.mark.parametrize("device", [CPU, GPU, None])
    def test_as_many_as_given(self, device):
        assert [hardware.decoding_workers(given, device) for given in (0, 1, 40)] == [0, 1, 40]

    def test_two_beside_a_network_on_the_cpus(self):
        assert hardware.decoding_workers(None, self.CPU) == 2
        assert hardware.decoding_workers(None, None) == 16

    @pytest.mark.parametrize(("processes", "workers"), [(1, 16), (2, 12), (8, 3), (32, 1)])
    def test_a_share_of_the_cpus_beside_a_gpu(self, monkeypatch, processes, workers):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert hardware.decoding_workers(None, self.GPU) == workers

    @pytest.mark.parametrize(("free", "workers"), [(2**26, 2), (2**30, 8), (2**33, 16)])  # 64 MiB: docker's default
    def test_no_more_than_the_shared_memory_holds(self, monkeypatch, free, workers):
        monkeypatch.setattr(hardware, "_free_shared_memory", lambda: free)
        assert hardware.decoding_workers(None, self.GPU) == workers
