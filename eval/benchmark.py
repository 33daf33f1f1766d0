"""Measures what the README states about speed: `python eval/benchmark.py kmeans`."""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from typing import Any

import numpy as np

from sssd_zoo.clustering import FloatArray, import_faiss, kmeans, normalise


def _features(n: int, d: int, k: int) -> FloatArray:
    """Unit vectors around 2 k centres: k-means has something to find and does not find it at once."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2 * k, d), dtype=np.float32)
    features = centres[random.integers(2 * k, size=n)] + random.standard_normal((n, d), dtype=np.float32)
    return normalise(features)


def _kmeans_once(way: str, n: int, d: int, k: int, iterations: int) -> dict[str, Any]:
    """One k-means in this process, the import of faiss not counted; a BLAS chooses its kernels once per process."""
    if way == "faiss by hand":
        import faiss
    else:
        faiss = import_faiss()
    features = _features(n, d, k)
    faiss.Kmeans(d, 2, niter=1, min_points_per_centroid=1).train(features[:1000])  # starts the threads
    start, start_cpu = time.perf_counter(), time.process_time()
    if way == "sssd_zoo":
        inertia = kmeans(features, k, seed=0, iterations=iterations).inertia
    else:
        by_hand = faiss.Kmeans(d, k, niter=iterations, seed=0, max_points_per_centroid=n)
        by_hand.train(features)
        inertia = float(by_hand.assign(features)[0].sum(dtype=np.float64))
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "inertia": inertia,
    }


def benchmark_kmeans(
    n: int = 50_000, d: int = 512, k: int = 1000, iterations: int = 20, runs: int = 3
) -> dict[str, Any]:
    """Times `sssd_zoo.clustering.kmeans` against faiss called by hand, training and assignment of all rows, in turn.

    Every run has a process of its own. By hand is measured twice: as faiss comes, and with the BLAS kernels that
    `sssd_zoo` chooses, which tells what the rest of `kmeans` costs.

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
    ways = ("sssd_zoo", "faiss by hand", "faiss by hand, same kernels")
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    # Each process starts afresh: neither faiss nor its threads are inherited.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for run in range(runs):
            for way in ways[run % 3 :] + ways[: run % 3]:
                results[way].append(pool.apply(_kmeans_once, (way, n, d, k, iterations)))

    def ratio(way: str, key: str = "seconds") -> float:
        pairs = zip(results["sssd_zoo"], results[way], strict=True)
        return float(statistics.median(ours[key] / theirs[key] for ours, theirs in pairs))

    median = {
        way: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for way, several in results.items()
    }
    return {
        "n": n,
        "d": d,
        "k": k,
        "iterations": iterations,
        "runs": runs,
        "cores": os.cpu_count(),
        **median,
        "ratio": ratio(ways[1]),
        "ratio_same_kernels": ratio(ways[2]),
        "ratio_cpu": ratio(ways[1], "cpu_seconds"),
        "ratio_same_kernels_cpu": ratio(ways[2], "cpu_seconds"),
    }


def main() -> None:
    """Runs one benchmark and prints what it gives as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    sections = parser.add_subparsers(dest="section", required=True)
    section = sections.add_parser("kmeans", help="k-means against faiss called by hand")
    for name, default in {"n": 50_000, "d": 512, "k": 1000, "iterations": 20, "runs": 3}.items():
        section.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    section.set_defaults(benchmark=benchmark_kmeans)

    arguments = vars(parser.parse_args())
    del arguments["section"]
    benchmark = arguments.pop("benchmark")
    print(json.dumps(benchmark(**arguments), indent=2))


if __name__ == "__main__":
    main()
