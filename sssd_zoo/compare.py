"""`sssd compare`: several methods on the same images, with the same probes, side by side with the paper's figures.

OUT/seed-S/ holds, for each seed, the steps of every method (see `METHODS`), each done once and reused by later calls;
OUT/report.md, results.csv and accuracy.png what they gave.
"""

import csv
import io
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sssd_zoo import report
from sssd_zoo.clustering import PseudoLabels, random_labels
from sssd_zoo.config import CompareArgs, ForwardConfig
from sssd_zoo.data.loading import DataConfig, load_images
from sssd_zoo.distributed import barrier, rank
from sssd_zoo.engine import OptimConfig, RuntimeConfig, check, make_accelerator, resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.files import atomic_write_text, write_json
from sssd_zoo.models import multiply_adds
from sssd_zoo.paper import TABLE_1, TABLE_2
from sssd_zoo.stages import Stages, machine_words, say
from sssd_zoo.steps import (
    check_queue,
    check_sizes,
    choose_model,
    choose_size,
    cluster_features,
    digest,
    distill_network,
    evaluation_data,
    evaluation_features,
    load_network,
    network_features,
    part,
    pretrain_network,
    probe_features,
    save_config,
    seed_network,
    storage_default,
)

# Name on the command line: what it is called in reports. In the order of the reports.
METHODS = {
    "sssd": "SSSD",
    "random": "BYOT, random labels",
    "true": "BYOT, true labels",
    "clusterfit": "ClusterFit",
    "seed": "SEED",
    "dacsd": "DACSD",
}
COLUMNS = ("exit 1", "exit 2", "exit 3", "exit 4", "ensemble")
# The steps that a method's training reads, the last first; the others start from nothing.
AFTER = {"sssd": ("labels", "pretrain"), "clusterfit": ("labels", "pretrain"), "seed": ("pretrain",)}


def compare(args: CompareArgs) -> None:
    """`sssd compare`."""
    tune_cpu()
    began = time.perf_counter()
    runtime = part(args, RuntimeConfig)
    processes = make_accelerator(runtime).num_processes
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not args.methods or not args.seeds:
        raise UserError("give at least one of --methods and of --seeds")
    config = part(args, DataConfig)
    data = load_images(config, default_size=storage_default(args.image_size), require_labels=True, progress=rank() == 0)
    size = choose_size(data, args.image_size)
    arch = choose_model(args.model, size)
    # Everything that would fail an hour in fails now.
    trained: list[OptimConfig] = [args.pretrain, args.distill]
    trained += [args.seed_method] if "seed" in args.methods else []
    for optim in trained:
        check(optim, processes, len(data))
        check_sizes(arch, [size, *optim.sizes])
    check_queue(args.pretrain.queue_size, len(data))
    if "seed" in args.methods:
        check_queue(args.seed_method.queue_size, len(data))
    if not 2 <= args.cluster.k <= len(data):
        raise UserError(
            f"K = {args.cluster.k} clusters of {len(data)} images; give --cluster.k from 2 to the number of images"
        )
    evaluation = evaluation_data(
        data, config, test_split=args.test_split, holdout=args.probe.holdout, seed=args.seeds[0]
    )
    assert data.labels is not None  # they are required above
    if rank() == 0:
        save_config(out, args)
    precision = resolve_precision(runtime.precision, runtime.device)
    forward = ForwardConfig(precision=runtime.precision, device=runtime.device)
    common = {
        "data": data.fingerprint,
        "images": len(data),
        "storage_size": data.size,
        "arch": arch,
        "image_size": size,
        "precision": precision,
        "processes": processes,
    }
    say(f"{len(data)} images of {data.name}; {arch} at {size} px, {machine_words(precision)}")

    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        runtime.seed = seed
        stages = Stages(out / f"seed-{seed}", {**common, "seed": seed})
        folder = stages.out

        def label(target: Path, folder: Path = folder, seed: int = seed) -> dict[str, Any]:
            trunk = load_network(str(folder / "pretrain"), num_classes=0)
            features = network_features(trunk, data, forward)[-1].numpy()
            found = cluster_features(
                features, data, args.cluster, model=str(folder / "pretrain"), seed=seed, out=target
            )
            return {"k": found.meta["k"], "quality": found.meta["quality"]}

        if {"sssd", "clusterfit", "seed"} & set(args.methods):
            stages.run(
                "pretrain",
                lambda target: pretrain_network(data, args.pretrain, runtime, arch=arch, size=size, out=target),
                asdict(args.pretrain),
                all_processes=True,
            )
        if {"sssd", "clusterfit"} & set(args.methods):
            stages.run("labels", label, asdict(args.cluster), after=("pretrain",))

        for method in METHODS:
            if method not in args.methods:
                continue
            train, settings = _training(args, method, data, folder, runtime, arch, size)
            stages.run(method, train, settings, after=AFTER.get(method, ())[:1], all_processes=True)

            def measure(target: Path, method: str = method, folder: Path = folder, seed: int = seed) -> dict[str, Any]:
                network = load_network(str(folder / method))
                probe = probe_features(evaluation_features(network, evaluation, forward), args.probe, seed)
                macs = multiply_adds(network, (3, size, size)) if len(probe.exits) > 1 else {}
                found = {"exits": probe.exits, "ensemble": probe.ensemble if macs else None, "macs": macs}
                write_json(target / "metrics.json", found)
                return found

            probed = stages.run(
                f"{method}-probe", measure, {**asdict(args.probe), "test": evaluation.test.fingerprint}, after=(method,)
            )
            seconds = stages.results[method]["seconds"]
            before = sum(stages.results[step]["seconds"] for step in AFTER.get(method, ()))
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "exits": probed["exits"],
                    "ensemble": probed["ensemble"],
                    "seconds": seconds,
                    "seconds_before": before,
                    "macs": probed["macs"],
                }
            )
    if rank() == 0:
        test = evaluation.describe()
        _write(args, rows, out, data_name=data.name, images=len(data), arch=arch, size=size, test=test)
        say(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes. Report: {out / 'report.md'}")
    barrier()


def _training(
    args: CompareArgs, method: str, data: Any, folder: Path, runtime: RuntimeConfig, arch: str, size: int
) -> tuple[Callable[[Path], dict[str, Any]], dict[str, Any]]:
    """What trains a method's network into a folder, and the settings that decide its numbers."""
    if method == "seed":
        teacher = str(folder / "pretrain")
        return (
            lambda target: seed_network(data, teacher, args.seed_method, runtime, arch=arch, size=size, out=target),
            asdict(args.seed_method),
        )
    labels: Any
    if method in ("sssd", "clusterfit"):
        pseudo = PseudoLabels.load(folder / "labels")
        pseudo.check(data.fingerprint)
        labels = pseudo.labels_of(data.rows)
    elif method == "random":
        labels = random_labels(len(data), args.cluster.k, runtime.seed)
    elif method == "true":
        labels = data.labels
    else:
        labels = args.cluster.k
    own = isinstance(labels, int)
    identity = f"own, K = {labels}" if own else digest(labels)
    return (
        lambda target: distill_network(
            data,
            labels,
            args.distill,
            runtime,
            arch=arch,
            size=size,
            out=target,
            labels_digest=identity,
            title=METHODS[method],
            method="clusterfit" if method == "clusterfit" else "sssd",
        ),
        {**asdict(args.distill), "labels": identity},
    )


def _cells(row: dict[str, Any]) -> list[float | None]:
    """The five columns of a result: a network without exits has only the fourth."""
    exits, ensemble = row["exits"], row["ensemble"]
    return [*exits, ensemble] if len(exits) > 1 else [None, None, None, exits[0], None]


def spread(values: list[Any]) -> str:
    """The mean in percent and, of several values, the lowest and the highest."""
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f}, {max(values):.2f})"


def comparison_table(rows: list[dict[str, Any]], methods: dict[str, str]) -> list[str]:
    """Lines of Markdown: a row for each method, mean (lowest, highest) over the seeds; those not run say so."""
    lines = []
    for method, title in methods.items():
        runs = [row for row in rows if row["method"] == method]
        columns = [[_cells(run)[place] for run in runs] for place in range(len(COLUMNS))]
        cells = [spread(column) if column and column[0] is not None else "" for column in columns]
        if not runs:
            cells = ["not run", *[""] * (len(COLUMNS) - 1)]
        seconds = [run["seconds"] for run in runs]
        before = [run["seconds_before"] for run in runs]
        own = report.duration(sum(seconds) / len(seconds)) if runs else ""
        earlier = report.duration(sum(before) / len(before)) if runs and any(before) else ""
        lines.append([title, *cells, str(len(runs)), earlier, own])
    return report.table(["method", *COLUMNS, "seeds", "pretext and labels", "training"], lines)


def _write(
    args: CompareArgs,
    rows: list[dict[str, Any]],
    out: Path,
    *,
    data_name: str,
    images: int,
    arch: str,
    size: int,
    test: str,
) -> None:
    lines = [
        "# Methods compared",
        "",
        f"- **Data**: `{data_name}`, {images:,} images, without labels but for the probes and for true labels",
        f"- **Measured on**: {test}",
        f"- **Network**: `{arch}` at {size} px; the pretext's is the same",
        f"- **Pretext**: MoCo v2, {args.pretrain.epochs} epochs; K = {args.cluster.k:,}",
        f"- **Training**: {args.distill.epochs} epochs of all that learn labels"
        + (f", {args.seed_method.epochs} of SEED" if "seed" in args.methods else ""),
        f"- **Seeds**: {', '.join(map(str, args.seeds))}",
        f"- **Machine**: {machine_words(resolve_precision(args.precision, args.device))}",
        "",
        "Linear-probe accuracy in percent: a linear layer per exit on the frozen network; the ensemble is the mean of "
        "the exits' softmax outputs. Networks without exits answer at the place of exit 4. Of several seeds the mean "
        "and, in brackets, the lowest and the highest. Times are those of this machine, means over the seeds.",
        "",
        *comparison_table(rows, METHODS),
        "",
    ]
    drawn = [row for row in rows if row["macs"]]
    if drawn:
        means: list[report.AccuracyRow] = []
        for method, title in METHODS.items():
            runs = [row for row in drawn if row["method"] == method]
            if runs:
                columns = [sum(values) / len(runs) for values in zip(*(run["exits"] for run in runs), strict=True)]
                ensemble = sum(run["ensemble"] for run in runs) / len(runs)
                means.append({"name": title, "exits": columns, "ensemble": ensemble})
        plain = {METHODS[row["method"]]: mean_plain(rows, row["method"]) for row in rows if len(row["exits"]) == 1}
        report.accuracy_cost(means, drawn[0]["macs"], out / "accuracy.png", plain=plain)
        lines += ["![Accuracy against multiply-adds](accuracy.png)", ""]
    lines += [
        "## The paper's figures",
        "",
        "On the original images, with the paper's training (200 or 800 epochs of the pretext): not ours, and not to be "
        "reached by shorter runs.",
        "",
    ]
    for data_set, table in TABLE_1.items():
        cells = [[row, *(f"{value:.2f}" for value in values)] for row, values in table.items()]
        lines += [f"{data_set}, tables 1, 3 and 6:", "", *report.table(["SSSD by pretext", *COLUMNS], cells), ""]
    names = list(next(iter(TABLE_2.values())))
    cells = [[pretext, *(f"{table[name]:.2f}" for name in names)] for pretext, table in TABLE_2.items()]
    lines += ["ImageNet-1K, table 2, a ResNet-18:", "", *report.table(["pretext", *names], cells), ""]
    atomic_write_text(out / "report.md", "\n".join(lines))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *COLUMNS, "seconds", "seconds_before"])
    for row in rows:
        writer.writerow([row["method"], row["seed"], *_cells(row), row["seconds"], row["seconds_before"]])
    atomic_write_text(out / "results.csv", text.getvalue())
    write_json(out / "results.json", rows)


def mean_plain(rows: list[dict[str, Any]], method: str) -> float:
    """The mean accuracy of a network without exits over its seeds."""
    values: list[float] = [row["exits"][0] for row in rows if row["method"] == method]
    return sum(values) / len(values)
