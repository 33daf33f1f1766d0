"""Measures what the README and docs state about speed and memory: `python eval/benchmark.py SECTION`, see --help."""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from sssd_zoo.configs import (
    AnchoredConfig,
    ContrastiveConfig,
    DataConfig,
    EmbedArgs,
    MoCoConfig,
    SEEDConfig,
    SelfDistillationConfig,
)
from sssd_zoo.cpus import SPINS, WAITING, available_cpus
from sssd_zoo.data import loading
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec, input_channels, input_spec
from sssd_zoo.data.loading import open_images
from sssd_zoo.distributed.hardware import autocast_dtype, resolve_precision, tune_cpu
from sssd_zoo.distributed.threads import TrainingThreads
from sssd_zoo.labels.chunked_kmeans import kmeans_from_file
from sssd_zoo.labels.kmeans import FloatArray, import_faiss, kmeans, normalise
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.cpu_convolutions import cpu_convolutions
from sssd_zoo.pipeline.embed import embed, load_exits
from sssd_zoo.pipeline.export import onnx_bytes, run_onnx, session
from sssd_zoo.tasks import (
    SEED,
    AnchoredClusterFit,
    AnchoredSelfDistillation,
    ClusterFit,
    ContrastiveSelfDistillation,
    FrozenEncoder,
    MoCo,
    SelfDistillation,
    Task,
)
from sssd_zoo.training.engine import step_in_one_pass

OURS, BY_HAND, SAME_KERNELS = "sssd_zoo", "faiss by hand", "faiss by hand, same kernels"

SPEC = InputSpec(32, (0.5,) * 3, (0.25,) * 3)


def _features(n: int, d: int, k: int) -> FloatArray:
    """Unit vectors around 2 k centres, so loosely that k-means does not converge within 20 passes."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2 * k, d), dtype=np.float32)
    features = 0.3 * centres[random.integers(2 * k, size=n)] + random.standard_normal((n, d), dtype=np.float32)
    return normalise(features)


def _time_kmeans(ways: tuple[str, ...], n: int, d: int, k: int, iterations: int) -> dict[str, dict[str, float]]:
    """One k-means each of the `ways` in this process, as a BLAS chooses its kernels once per process."""
    if ways == (BY_HAND,):
        import faiss
    else:
        faiss = import_faiss()
    features = _features(n, d, k)
    faiss.Kmeans(d, 2, niter=1, min_points_per_centroid=1).train(features[:1000])  # starts the threads
    results = {}
    for way in ways:
        start, start_cpu = time.perf_counter(), time.process_time()
        if way == OURS:
            inertia = kmeans(features, k, seed=0, iterations=iterations).inertia
        else:
            by_hand = faiss.Kmeans(d, k, niter=iterations, seed=0, max_points_per_centroid=n)
            by_hand.train(features)
            inertia = float(by_hand.assign(features)[0].sum(dtype=np.float64))
        results[way] = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
            "inertia": inertia,
        }
    return results


def benchmark_kmeans(
    n: int = 50_000, d: int = 512, k: int = 1000, iterations: int = 20, runs: int = 3
) -> dict[str, Any]:
    """Times `sssd_zoo.labels.kmeans.kmeans` against faiss called by hand, training and assignment of all rows, in turn.

    By hand is measured as faiss comes, in a process of its own, and with the BLAS kernels that `sssd_zoo` chooses, in
    the same process as `sssd_zoo`, which tells what the rest of `kmeans` costs. Imports are not counted.

    Args:
        n: rows.
        d: dimensions.
        k: clusters.
        iterations: passes.
        runs: of each way.

    Returns:
        Medians of seconds and CPU seconds and the inertia by way; ``ratio`` and ``ratio_same_kernels`` (and the same of
        CPU seconds, which a busy machine disturbs less), sssd_zoo's time to that of faiss by hand, median over rounds.
    """
    rounds: list[dict[str, dict[str, float]]] = []
    # Each process starts afresh: neither faiss nor its threads are inherited.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for run in range(runs):
            pair = (OURS, SAME_KERNELS) if run % 2 == 0 else (SAME_KERNELS, OURS)
            measured: dict[str, dict[str, float]] = {}
            for ways in (pair, (BY_HAND,)):
                measured |= pool.apply(_time_kmeans, (ways, n, d, k, iterations))
            rounds.append(measured)

    def median(way: str, key: str) -> float:
        return statistics.median(measured[way][key] for measured in rounds)

    def ratio(way: str, key: str) -> float:
        return statistics.median(measured[OURS][key] / measured[way][key] for measured in rounds)

    return {
        "n": n,
        "d": d,
        "k": k,
        "iterations": iterations,
        "runs": runs,
        "cores": available_cpus(),
        **{way: {key: median(way, key) for key in rounds[0][way]} for way in (OURS, BY_HAND, SAME_KERNELS)},
        "ratio": ratio(BY_HAND, "seconds"),
        "ratio_cpu": ratio(BY_HAND, "cpu_seconds"),
        "ratio_same_kernels": ratio(SAME_KERNELS, "seconds"),
        "ratio_same_kernels_cpu": ratio(SAME_KERNELS, "cpu_seconds"),
    }


def _peak_mib() -> float:
    """The most memory that this process has had resident, in MiB; what it maps of files counts."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def _measure_kmeans(path: str, k: int, iterations: int, on_disk: bool) -> dict[str, float]:
    """One k-means of a file's features in this process: its time, and the memory that it adds."""
    np.save(f"{path}.few.npy", np.load(path, mmap_mode="r")[:2000])
    kmeans_from_file(f"{path}.few.npy", 20, seed=0, iterations=1)  # loads the libraries and starts the threads
    before, start, start_cpu = _peak_mib(), time.perf_counter(), time.process_time()
    if on_disk:
        found = kmeans_from_file(path, k, seed=0, iterations=iterations)
    else:
        found = kmeans(np.load(path), k, seed=0, iterations=iterations)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "peak_mib": _peak_mib(),
        "added_mib": _peak_mib() - before,
        "inertia": found.inertia,
    }


def benchmark_kmeans_disk(n: int = 100_000, d: int = 512, k: int = 1000, iterations: int = 20) -> dict[str, Any]:
    """Time and peak memory of k-means on features in a file, from there and in memory, once each; Linux only.

    The features are synthetic (unit vectors around 2 k centres): neither time nor memory depends on what they say,
    but for the passes, which are counted by `iterations` as they do not converge before.

    Args:
        n: rows.
        d: dimensions.
        k: clusters.
        iterations: passes.

    Returns:
        By way the seconds, those of the CPU (which a busy machine disturbs less), the peak of resident memory in MiB,
        what of it came after the libraries were loaded, and the inertia; and the size of the file in MiB.
    """
    ways = {"from the file": True, "in memory": False}
    with TemporaryDirectory() as folder:
        path = f"{folder}/features.npy"
        np.save(path, _features(n, d, k))
        size = Path(path).stat().st_size / 2**20
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            found = {way: pool.apply(_measure_kmeans, (path, k, iterations, disk)) for way, disk in ways.items()}
    return {
        "n": n,
        "d": d,
        "k": k,
        "iterations": iterations,
        "threads": torch.get_num_threads(),
        "file_mib": size,
        **found,
        "ratio_of_cpu_seconds": found["from the file"]["cpu_seconds"] / found["in memory"]["cpu_seconds"],
    }


def matmul_rate(dtype: torch.dtype, runs: int = 20) -> float:
    """Multiply-adds per second of a 2048-cubed `torch.matmul`, the median of some runs, as is the step's time."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2048**3 / statistics.median(times[1:])


def moco_step(
    batch_size: int, splits: int, size: int = 32, model: str = "sssd_resnet18_cifar"
) -> tuple[str, MoCo, Callable[[int], float]]:
    """MoCo training of random images from memory, as the engine trains.

    Returns:
        The precision that the engine takes on this machine, the task, and a function that makes a step of this number
        and gives its seconds.
    """
    tune_cpu()
    precision = resolve_precision("auto", "cpu")
    trunk: Any = timm.create_model(model, num_classes=0, output="final")
    config = MoCoConfig(symmetric=False, splits=splits)
    task = MoCo(trunk, config, SPEC._replace(size=size)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(task.query_encoder.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    step_in_one_pass(optimizer)
    images = torch.randint(0, 256, (10 * batch_size, 3, 32, 32), dtype=torch.uint8)

    def step(number: int) -> float:
        start = time.perf_counter()
        order = torch.randint(len(images), (batch_size,))
        batch = task.views(images[order], BatchRandom(0, number))
        task.before_step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = task(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return precision, task, step


def benchmark_moco(
    batch_size: int = 256,
    splits: int = 4,
    size: int = 32,
    model: str = "sssd_resnet18_cifar",
    steps: int = 5,
    rounds: int = 5,
) -> dict[str, Any]:
    """MoCo training against the machine's own rate of matrix products.

    A step is all of it: the batch gathered from memory, both views, both encoders, backward pass, optimiser, moving
    average and queue. Its multiply-adds are counted as four forward passes an image: query, its backward pass (twice
    the forward), and key; those with the padding are among them. Rates of the two are taken in turn, and each round's
    ratio is of its own two; so is the ratio of steps with torch's convolutions alone to those with the convolutions of
    `sssd_zoo.models.cpu_convolutions`, in seconds and in those of the CPU, which a busy machine disturbs less.

    Args:
        batch_size: images per step.
        splits: parts with BatchNorm statistics of their own.
        size: side of the views in pixels.
        model: timm name of the network.
        steps: timed per round; the median counts.
        rounds: of matrix products and steps.

    Returns:
        Multiply-adds per second of bf16 and fp32 products and of training, images per second, the precision that the
        engine takes on this machine, and the ratios of training to both products, medians over the rounds.
    """
    precision, task, step = moco_step(batch_size, splits, size, model)
    trunk: Any = task.query_encoder.trunk
    per_image = 4 * multiply_adds(trunk, (3, size, size))["4"]
    step(0)

    def timed_steps() -> NDArray[np.float64]:
        before = time.process_time()
        seconds = statistics.median(step(number) for number in range(steps))
        return np.array([seconds, (time.process_time() - before) / steps])

    measured = []
    for _ in range(rounds):
        products = {name: matmul_rate(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
        plain = timed_steps()
        with cpu_convolutions(task):
            ours = timed_steps()
        seconds, speedup = ours[0], plain / ours
        images_per_second = batch_size / seconds
        training = images_per_second * per_image
        measured.append(
            {
                "images_per_second": images_per_second,
                "speedup_by_cpu_convolutions": speedup[0],
                "speedup_in_cpu_seconds": speedup[1],
                "training_multiply_adds_per_second": training,
                **{f"{name}_product_multiply_adds_per_second": rate for name, rate in products.items()},
                **{f"ratio_to_{name}_product": training / rate for name, rate in products.items()},
            }
        )
    medians = {name: statistics.median(values[name] for values in measured) for name in measured[0]}
    return {"precision": precision, "threads": torch.get_num_threads(), "batch_size": batch_size, **medians}


SSSD, TWO, ONE = "as sssd trains", "all threads, OpenMP's own waiting", "one thread"
WAYS: dict[str, dict[str, str]] = {
    SSSD: {"GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": "1"},  # as `cpus.set_up_openmp` sets them
    TWO: {"OMP_NUM_THREADS": str(available_cpus())},
    ONE: {"OMP_NUM_THREADS": "1"},
}


def _train_on_demand(pipe: Any, batch_size: int) -> None:
    """Trains for as many seconds as each message says, and answers with images per second and the threads."""
    _, _, step = moco_step(batch_size, 4)
    step(0)
    pipe.send(None)
    number = 0
    while (seconds := pipe.recv()) is not None:
        with TrainingThreads(torch.device("cpu")) as threads:
            start, before = time.perf_counter(), number
            while time.perf_counter() - start < seconds:
                number += 1
                step(number)
                threads.adapt()
            rate = batch_size * (number - before) / (time.perf_counter() - start)
            pipe.send((rate, torch.get_num_threads()))


def _keep_busy(allowed: Any) -> None:
    """Computes whenever it is allowed to, until the benchmark has ended."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        if allowed.wait(1):
            sum(range(10**6))


def _start_ways(context: Any, batch_size: int) -> dict[str, Any]:
    """Starts a process that trains for each of the `WAYS`, and gives the pipes to them."""
    inherited, pipes = dict(os.environ), {}
    try:
        for way, environment in WAYS.items():
            for name in (*WAITING, "OMP_NUM_THREADS"):
                os.environ.pop(name, None)
            os.environ.update(environment)
            pipes[way], theirs = context.Pipe()
            context.Process(target=_train_on_demand, args=(theirs, batch_size), daemon=True).start()
            pipes[way].recv()  # it has trained a step
    finally:
        os.environ.clear()
        os.environ.update(inherited)
    return pipes


def benchmark_busy(batch_size: int = 64, seconds: int = 6, rounds: int = 3) -> dict[str, Any]:
    """MoCo training alone and beside a process that keeps one core busy, in turn, as sssd trains and otherwise.

    The fair share is max-min fair between the two processes: each is entitled to half of the CPUs, the busy one can
    use no more than one, and what it leaves is the training's. So on C > 1 CPUs it is (C - 1) / C of the rate alone,
    half of it on two.

    Args:
        batch_size: images per step.
        seconds: of training at a time.
        rounds: of all ways, alone and beside.

    Returns:
        By way, images per second alone and beside and the threads, medians over rounds; `kept`, the rate of `sssd`
        beside to its own alone; `of_fair_share`, the same to the fair share; medians over the rounds' own ratios.
    """
    context = multiprocessing.get_context("spawn")
    allowed = context.Event()
    busy = context.Process(target=_keep_busy, args=(allowed,), daemon=True)
    busy.start()
    pipes = _start_ways(context, batch_size)
    measured: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for _ in range(rounds):
        for beside in ("alone", "beside"):
            (allowed.set if beside == "beside" else allowed.clear)()
            for way, pipe in pipes.items():
                pipe.send(seconds)
                measured.setdefault((way, beside), []).append(pipe.recv())
    allowed.clear()
    for pipe in pipes.values():
        pipe.send(None)
    busy.terminate()
    cpus = available_cpus()
    kept = [
        beside[0] / alone[0] for alone, beside in zip(measured[SSSD, "alone"], measured[SSSD, "beside"], strict=True)
    ]
    return {
        "cpus": cpus,
        "batch_size": batch_size,
        "rounds": rounds,
        **{
            way: {
                beside: {"images_per_second": statistics.median(rates), "threads": statistics.median(threads)}
                for beside in ("alone", "beside")
                for rates, threads in [zip(*measured[way, beside], strict=True)]
            }
            for way in WAYS
        },
        "kept": statistics.median(kept),
        "of_fair_share": statistics.median(kept) * cpus / (cpus - min(1, cpus / 2)),
    }


def benchmark_byot(batch_size: int = 128, steps: int = 5, rounds: int = 5) -> dict[str, Any]:
    """A training step of `sssd_resnet18_cifar` with three exits and all losses against one of the plain trunk, in turn.

    A step is all of it: views, forward and backward pass, optimiser; 1,000 classes, images of 32 px.

    Args:
        batch_size: images per step.
        steps: timed per round; the median counts.
        rounds: of both.

    Returns:
        Images per second of both, and the ratio of the times of their steps, medians over the rounds.
    """
    tune_cpu()
    precision = resolve_precision("auto", "cpu")
    config = SelfDistillationConfig()
    tasks: dict[str, Task] = {
        "plain": ClusterFit(timm.create_model("sssd_resnet18_cifar", num_classes=1000, output="final"), config, SPEC),
        "byot": SelfDistillation(timm.create_model("sssd_resnet18_cifar", num_classes=1000), config, SPEC),
    }
    optimizers = {}
    for name, task in tasks.items():
        task.to(memory_format=torch.channels_last)
        optimizers[name] = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        step_in_one_pass(optimizers[name])
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(1000, (batch_size,))

    def step(name: str, number: int) -> float:
        start = time.perf_counter()
        batch = {**tasks[name].views(images, BatchRandom(0, number)), "labels": labels}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = tasks[name](batch)["loss"]
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return time.perf_counter() - start

    for name in tasks:
        step(name, 0)
    measured = []
    for _ in range(rounds):
        seconds = {name: statistics.median(step(name, number) for number in range(steps)) for name in tasks}
        rates = {f"{name}_images_per_second": batch_size / own for name, own in seconds.items()}
        measured.append({**rates, "ratio": seconds["byot"] / seconds["plain"]})
    medians = {name: statistics.median(values[name] for values in measured) for name in measured[0]}
    return {"precision": precision, "threads": torch.get_num_threads(), "batch_size": batch_size, **medians}


def benchmark_methods(batch_size: int = 64, steps: int = 5, rounds: int = 5) -> dict[str, Any]:
    """Training steps of the methods of `sssd compare` (`sssd_resnet18` at 32 px, K = 200), in turn.

    A step is all of it: views, forward and backward pass, optimiser. By these costs the epochs are chosen that give all
    methods the same training time.

    Args:
        batch_size: images per step, with 'contrastive' in 2 splits; 'pretext', a step of MoCo, has twice as many, in 4.
        steps: timed per round; the median counts.
        rounds: of all methods.

    Returns:
        The time of an image with each method as a multiple of that with 'sssd', medians over the rounds.
    """
    tune_cpu()
    precision = resolve_precision("auto", "cpu")
    config = AnchoredConfig(anchor=4.0)

    def encoder() -> FrozenEncoder:
        network = timm.create_model("sssd_resnet18", num_classes=0)
        return FrozenEncoder(network, SPEC, torch.zeros(512), torch.ones(512))

    def network(**kwargs: Any) -> Any:
        return timm.create_model("sssd_resnet18", **kwargs)

    moco = MoCoConfig(symmetric=False, splits=4, queue_size=256)
    contrastive = ContrastiveConfig(splits=2, queue_size=1024)
    tasks: dict[str, Task] = {
        "sssd": SelfDistillation(network(num_classes=200), config, SPEC),
        "anchored": AnchoredSelfDistillation(network(num_classes=200), encoder(), config, SPEC),
        "contrastive": ContrastiveSelfDistillation(network(num_classes=200), contrastive, SPEC),
        "clusterfit": ClusterFit(network(num_classes=200, output="final"), config, SPEC),
        "clusterfit-anchored": AnchoredClusterFit(network(num_classes=200, output="final"), encoder(), config, SPEC),
        "seed": SEED(network(num_classes=0), network(num_classes=0), SEEDConfig(queue_size=1024), SPEC, SPEC),
        "pretext": MoCo(network(num_classes=0), moco, SPEC),
    }
    by_adamw = ("contrastive", "seed", "pretext")
    sizes = {name: batch_size * (2 if name == "pretext" else 1) for name in tasks}
    optimizers = {}
    for name, task in tasks.items():
        task.to(memory_format=torch.channels_last).train()
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained) if name in by_adamw else torch.optim.SGD(trained, 0.01)
        step_in_one_pass(optimizers[name])

    def step(name: str, number: int) -> float:
        images = torch.randint(0, 256, (sizes[name], 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(200, (sizes[name],))
        start = time.perf_counter()
        tasks[name].before_step()
        batch = {**tasks[name].views(images, BatchRandom(0, number)), "labels": labels}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = tasks[name](batch)["loss"]
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return (time.perf_counter() - start) / sizes[name]

    measured = []
    with ExitStack() as stack:
        for name, task in tasks.items():
            stack.enter_context(cpu_convolutions(task))
            step(name, 0)
        for _ in range(rounds):
            seconds = {name: statistics.median(step(name, number) for number in range(steps)) for name in tasks}
            measured.append({name: value / seconds["sssd"] for name, value in seconds.items()})
    medians = {name: statistics.median(values[name] for values in measured) for name in tasks}
    return {"precision": precision, "threads": torch.get_num_threads(), "batch_size": batch_size, **medians}


def benchmark_optimizer(steps: int = 10, rounds: int = 5) -> dict[str, Any]:
    """An optimiser's step over the weights of `sssd_resnet18`: as torch does it by default, and fused as in training.

    Args:
        steps: timed per round; the median counts.
        rounds: of all.

    Returns:
        The time of a fused step as a fraction of the default's, medians over the rounds.
    """
    tune_cpu()
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    }
    optimizers: dict[tuple[str, bool], torch.optim.Optimizer] = {}
    for name, kind in kinds.items():
        for fused in (False, True):
            network: Any = timm.create_model("sssd_resnet18", num_classes=200)
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizers[name, fused] = kind(network.parameters())
            if fused:
                step_in_one_pass(optimizers[name, fused])

    def seconds(optimizer: torch.optim.Optimizer) -> float:
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    measured = []
    for _ in range(rounds + 1):
        times = {key: statistics.median(seconds(each) for _ in range(steps)) for key, each in optimizers.items()}
        measured.append({name: times[name, True] / times[name, False] for name in kinds})
    medians = {name: statistics.median(values[name] for values in measured[1:]) for name in kinds}
    return {"threads": torch.get_num_threads(), **medians}


EAGER, ONNX = "torch eager, full network", "onnxruntime, exit 2"


def _time_answers(way: str, graph: bytes, images: int) -> float:
    """Median seconds of one answer to one 32-px image, in this process."""
    image = torch.randn(1, 3, 32, 32)
    if way == ONNX:
        deployed, array = session(graph), image.numpy()
    else:
        model = timm.create_model("sssd_resnet18_cifar", pretrained=True).eval()
    times = []
    with torch.inference_mode():
        for number in range(images + 5):
            start = time.perf_counter()
            if way == ONNX:
                run_onnx(deployed, array)
            else:
                model(image)
            if number >= 5:
                times.append(time.perf_counter() - start)
    return statistics.median(times)


def benchmark_deploy(images: int = 50, rounds: int = 5) -> dict[str, Any]:
    """Exit 2 of `sssd_resnet18_cifar` in onnxruntime, fp32, against the full network in torch eager, both at batch 1.

    Each runs in a process of its own, in turn, with the same number of threads.

    Args:
        images: answered in each process; the median counts.
        rounds: of both.

    Returns:
        Seconds of both, medians over the rounds, and `ratio`, eager's time to onnxruntime's, median over rounds.
    """
    model = timm.create_model("sssd_resnet18_cifar", pretrained=True, output=2).eval()
    graph = onnx_bytes(model, torch.randn(2, 3, 32, 32), ["images", "logits"], {})
    measured = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(rounds):
            measured.append({way: pool.apply(_time_answers, (way, graph, images)) for way in (EAGER, ONNX)})
    return {
        "threads": torch.get_num_threads(),
        "images": images,
        "rounds": rounds,
        **{way: statistics.median(own[way] for own in measured) for way in (EAGER, ONNX)},
        "ratio": statistics.median(own[EAGER] / own[ONNX] for own in measured),
    }


def write_photos(folder: Path, count: int, width: int = 400, height: int = 300) -> None:
    """Writes JPEGs of smooth noise, each of about 30 kB."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:06}.jpg", quality=90)


def benchmark_embed(
    model: str = "sssd_resnet18",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    images: int = 4096,
    batch_size: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """`sssd embed` of JPEGs of 400 x 300 px into parquet, against the forward pass of its network alone, in turn.

    Of embed is timed all that each image costs: opening, hashing, decoding, the forward pass and writing. What it takes
    however many they are (loading the network and the like) is timed with one image, and subtracted. The forward
    pass alone runs over one batch of inputs again and again, in the same precision.

    Args:
        model: the network; of one with exits the last.
        precision: of the forward pass.
        images: number of them.
        batch_size: images of a forward pass.
        rounds: of both; the forward pass is timed before and after each embed, and its mean counts.

    Returns:
        Images per second of both; the ratio of embed's rate to the forward pass's; `ratio_of_the_thread`, the same by
        the CPU seconds of the thread that runs the network, which other work on the machine disturbs less: what the
        ratio is where the loader's workers have cores of their own; and `ratio_of_all_threads` by the CPU seconds of
        all threads and processes, decoding included: what the ratio is where all CPUs are busy all the time, so that
        embed can reach no more where the forward pass alone keeps them busy. Medians over the rounds.
    """
    tune_cpu()
    autocast = autocast_dtype(precision, "cpu")
    network = load_exits(model, "final")[0].eval().to(memory_format=torch.channels_last)
    size = input_spec(network).size
    batch = torch.randn(batch_size, input_channels(network), size, size).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            for _ in range(images // batch_size):
                network.forward_head(network.forward_features(batch), pre_logits=True)

    measured = []
    with TemporaryDirectory() as folder:
        embeds = []
        for name, count in (("few", 1), ("all", images // batch_size * batch_size + 1)):
            Path(folder, name).mkdir()
            write_photos(Path(folder, name), count)
            to = f"{folder}/{name}.parquet"
            args = EmbedArgs(model=model, data=f"{folder}/{name}", out=to, batch_size=batch_size, device="cpu")
            embeds.append(partial(embed, replace(args, precision=precision, overwrite=True)))
        forward()
        before = _timed(forward)
        for _ in range(rounds):
            few, whole, after = _timed(embeds[0]), _timed(embeds[1]), _timed(forward)
            alone, ours = (before + after) / 2, whole - few
            rates = images // batch_size * batch_size / np.stack([ours, alone])[:, 0]
            names = ("embed", "forward", "ratio", "ratio_of_the_thread", "ratio_of_all_threads")
            measured.append(dict(zip(names, [*rates, *(alone / ours)], strict=True)))
            before = after
    return {
        "model": model,
        "precision": resolve_precision(precision, "cpu"),
        "threads": torch.get_num_threads(),
        "images": images,
        "batch_size": batch_size,
        **{name: float(statistics.median(values[name] for values in measured)) for name in measured[0]},
    }


def benchmark_decode(photos: int = 2000, workers: int = 0, rounds: int = 3) -> dict[str, Any]:
    """Decoding all images of a split in processes against threads, in turn: small images, and photos stored at 256 px.

    Args:
        photos: JPEGs of 400 x 300 px; the small images are the sample's 10,000 JPEGs of 32 px.
        workers: threads, and processes; 0 for one for each CPU.
        rounds: of both.

    Returns:
        Images per second of both ways, their fingerprint included, and the processes' rate over that of the threads;
        medians over the rounds.
    """
    workers = workers or available_cpus()
    found: dict[str, Any] = {"workers": workers}
    with TemporaryDirectory() as folder:
        write_photos(Path(folder), photos)
        for name, data in (("small", "cifar10-sample"), ("photos", folder)):
            images = open_images(DataConfig(data=data, in_memory=True, workers=workers), default_size=256)
            images = replace(images, small=True)
            rates: dict[str, list[float]] = {"threads": [], "processes": []}
            for _ in range(rounds):
                for way, least in (("threads", len(images) + 1), ("processes", 0)):
                    loading.IN_PROCESSES = least
                    rates[way].append(len(images) / _timed(partial(images.load, progress=False))[0])
            ratios = [one / other for one, other in zip(rates["processes"], rates["threads"], strict=True)]
            found[name] = {way: statistics.median(values) for way, values in rates.items()}
            found[name]["ratio"] = statistics.median(ratios)
    return found


def _timed(function: Callable[[], Any]) -> NDArray[np.float64]:
    """The seconds that a function takes, those of the CPU in this thread, and in all threads and children, float64 [3].

    Children count once they have ended, as a loader's have at the end of its epoch.
    """

    def clocks() -> NDArray[np.float64]:
        ended = os.times()
        return np.array([time.perf_counter(), time.thread_time(), sum(ended[:4])])

    start = clocks()
    function()
    return clocks() - start


def benchmark_embed_memory(images: int = 100_000, side: int = 8) -> dict[str, Any]:
    """The most memory that `sssd embed` takes for so many tiny images in parquet, in a process of its own; Linux only.

    Args:
        images: number of them.
        side: of them, in pixels.

    Returns:
        Peaks of resident memory in MiB: with a hundredth of the images, and with all of them; and the size of the file
        of embeddings in MiB.
    """
    random = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
        for name, count in (("few", images // 100), ("all", images)):
            with pq.ParquetWriter(f"{folder}/{name}.parquet", schema) as file:
                for start in range(0, count, 1000):
                    rows = [{"image": {"bytes": _tiny(random, side)}} for _ in range(min(1000, count - start))]
                    file.write_table(pa.Table.from_pylist(rows, schema))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:  # may have children of its own
            few, whole = pool.map(_embed_peak, [folder] * 2, ["few", "all"])
        size = Path(folder, "all.out.parquet").stat().st_size / 2**20
    return {"images": images, "peak_mib_of_a_hundredth": few, "peak_mib": whole, "file_mib": size}


def _tiny(random: np.random.Generator, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _embed_peak(folder: str, name: str) -> float:
    args = EmbedArgs(
        model="sssd_resnet18_cifar",
        data=f"{folder}/{name}.parquet",
        out=f"{folder}/{name}.out.parquet",
        exits="1",
        image_size=8,
        device="cpu",
        precision="fp32",  # features of bf16 compress better, so the file would differ by machine
    )
    with redirect_stdout(sys.stderr):  # standard output has the figures alone
        embed(args)
    return _peak_mib()


def add_numbers(section: argparse.ArgumentParser, defaults: dict[str, int]) -> None:
    """Adds options that are whole numbers, by their names and defaults."""
    for name, default in defaults.items():
        section.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")


def main() -> None:
    """Runs one benchmark and prints what it gives, as JSON where it is no text."""
    parser = argparse.ArgumentParser(description=__doc__)
    sections = parser.add_subparsers(dest="section", required=True)
    section = sections.add_parser("kmeans", help="k-means against faiss called by hand")
    add_numbers(section, {"n": 50_000, "d": 512, "k": 1000, "iterations": 20, "runs": 3})
    section.set_defaults(benchmark=benchmark_kmeans)
    section = sections.add_parser("kmeans-disk", help="time and memory of k-means on features in a file")
    add_numbers(section, {"n": 100_000, "d": 512, "k": 1000, "iterations": 20})
    section.set_defaults(benchmark=benchmark_kmeans_disk)
    section = sections.add_parser("moco", help="MoCo training against the rate of matrix products")
    add_numbers(section, {"batch_size": 256, "splits": 4, "size": 32, "steps": 5, "rounds": 5})
    section.add_argument("--model", default="sssd_resnet18_cifar", help="default sssd_resnet18_cifar")
    section.set_defaults(benchmark=benchmark_moco)

    section = sections.add_parser("busy", help="training beside a process that keeps one core busy")
    add_numbers(section, {"batch_size": 64, "seconds": 6, "rounds": 3})
    section.set_defaults(benchmark=benchmark_busy)

    section = sections.add_parser("byot", help="a step with three exits and all losses against a plain one")
    add_numbers(section, {"batch_size": 128, "steps": 5, "rounds": 5})
    section.set_defaults(benchmark=benchmark_byot)

    section = sections.add_parser("methods", help="the cost of an image with each method of `sssd compare`")
    add_numbers(section, {"batch_size": 64, "steps": 5, "rounds": 5})
    section.set_defaults(benchmark=benchmark_methods)

    section = sections.add_parser(
        "optimizer", help="an optimiser's step, as torch does it by default and as in training"
    )
    add_numbers(section, {"steps": 10, "rounds": 5})
    section.set_defaults(benchmark=benchmark_optimizer)

    section = sections.add_parser("deploy", help="exit 2 in onnxruntime against the full network in torch eager")
    add_numbers(section, {"images": 50, "rounds": 5})
    section.set_defaults(benchmark=benchmark_deploy)

    section = sections.add_parser("embed", help="`sssd embed` against its network's forward pass alone")
    section.add_argument("--model", default="sssd_resnet18", help="default sssd_resnet18")
    section.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="default auto")
    add_numbers(section, {"images": 4096, "batch_size": 64, "rounds": 3})
    section.set_defaults(benchmark=benchmark_embed)

    section = sections.add_parser("decode", help="decoding a split in processes against threads")
    add_numbers(section, {"photos": 2000, "workers": 0, "rounds": 3})
    section.set_defaults(benchmark=benchmark_decode)

    section = sections.add_parser("embed-memory", help="the most memory that `sssd embed` takes for many images")
    add_numbers(section, {"images": 100_000, "side": 8})
    section.set_defaults(benchmark=benchmark_embed_memory)

    section = sections.add_parser("backbones", help="parameters, MACs and latency of networks with exits, as Markdown")
    section.add_argument("--names", nargs="+", help="timm names; by default all tested ones and the ResNet-18")
    add_numbers(section, {"size": 224, "rounds": 20})
    section.add_argument("--out", type=Path, help="JSON to write, too")
    section.set_defaults(benchmark=import_module("backbones").benchmark_backbones)  # a script's neighbour, no package's

    arguments = vars(parser.parse_args())
    del arguments["section"]
    benchmark = arguments.pop("benchmark")
    found = benchmark(**arguments)
    print(found if isinstance(found, str) else json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
