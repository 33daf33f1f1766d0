"""`sssd finetune`: semi-supervised fine-tuning on a few labels (table 4 of the paper), from several beginnings.

OUT/MODEL/LABELS/seed-S/ holds each trained network, done once and reused by later calls; OUT/report.md, results.csv and
accuracy.png what they gave.
"""

import csv
import hashlib
import io
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_zoo.configs import DataConfig, FinetuneArgs, ForwardConfig, OptimConfig, RuntimeConfig
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import barrier, rank
from sssd_zoo.distributed.hardware import resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.features import accuracies, exit_logits, float32_classifiers, network_features
from sssd_zoo.evaluation.protocol import Evaluation, evaluation_data
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.comparison import mean_and_range
from sssd_zoo.evaluation.reports.markdown import table
from sssd_zoo.evaluation.reports.paper import TABLE_4
from sssd_zoo.files import atomic_write_text
from sssd_zoo.files.run_folder import open_out, remove
from sssd_zoo.models.networks import (
    check_sizes,
    choose_model,
    choose_size,
    load_network,
    load_trunk,
    statistics,
    weights_digest,
)
from sssd_zoo.models.resnet import SSSDResNet
from sssd_zoo.pipeline.stages import Stages, machine_words, say
from sssd_zoo.tasks import ClusterFit, SelfDistillation, Task
from sssd_zoo.training.engine import check
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import part, run_training, save_config

SCRATCH = "scratch"


def labelled_subset(
    labels: NDArray[np.int64], seed: int, *, fraction: float | None = None, per_class: int | None = None
) -> NDArray[np.int64]:
    """Positions of a class-balanced subset, sorted: the first of each class in an order that depends on the seed.

    Args:
        labels: int64 [N] in 0..C-1.
        seed: of the order; subsets of one seed lie in one another.
        fraction: share of each class to take, rounded, but at least one label.
        per_class: labels of each class to take, in the place of a share.

    Raises:
        UserError: if a class has fewer than `per_class`.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        own = order[labels[order] == label]
        count = per_class if per_class is not None else max(1, round((fraction or 0) * len(own)))
        if count > len(own):
            raise UserError(f"class {label} has {len(own)} labels to train on, fewer than {count} per class")
        chosen.append(own[:count])
    return np.sort(np.concatenate(chosen))


def starting_network(name: str, like: str, method: str, classes: int) -> tuple[Any, str]:
    """A network to fine-tune, with new classifiers, and its timm name.

    Whatever classifiers it had are dropped: those of a probed network have seen all labels.

    Args:
        name: run folder or timm name, or 'scratch'.
        like: what a network from scratch is built like.
        method: 'final' builds the trunk and its FC alone, 'exits' all exits.
        classes: number of them.

    Raises:
        UserError: if it cannot be loaded, or has no exits to train.
    """
    source = like if name == SCRATCH else name
    looked_at = load_network(source, pretrained=False, num_classes=0)
    arch = str(looked_at.pretrained_cfg["architecture"])
    if method == "final":
        own = {"output": "final"} if isinstance(looked_at, SSSDResNet) else {}
        model = load_network(source, pretrained=name != SCRATCH, num_classes=classes, **own)
    else:
        if not isinstance(looked_at, SSSDResNet):
            raise UserError(f"'{source}' has no exits; use --method final, or a network of this package")
        model = load_network(source, pretrained=False, num_classes=classes, output="ensemble")
        if name != SCRATCH:
            load_trunk(model, load_network(name, num_classes=0))
    model.reset_classifier(classes)
    return model, arch


def step_plan(args: FinetuneArgs, name: str, images: int, processes: int) -> OptimConfig:
    """How to train a network on so many labelled images: batches that they fill, and epochs enough for `min_steps`.

    Raises:
        UserError: if they are too few for a batch.
    """
    parts = processes * args.accumulate
    batch = min(args.batch_size, images // parts * parts)
    if batch < 2 * parts:
        raise UserError(f"{images} labelled images are too few for a batch; give more labels")
    epochs = max(args.epochs, math.ceil(args.min_steps / (images // batch)))
    lr = args.scratch_lr if name == SCRATCH else args.lr
    return replace(part(args, OptimConfig), batch_size=batch, epochs=epochs, lr=lr)


def train_and_measure(
    args: FinetuneArgs,
    name: str,
    evaluation: Evaluation,
    positions: NDArray[np.int64],
    runtime: RuntimeConfig,
    optim: OptimConfig,
    size: int,
    out: Path,
) -> dict[str, Any]:
    """Fine-tunes one network on the labels at `positions`; gives its accuracies in percent."""
    data, test = evaluation.train, evaluation.test
    assert data.labels is not None
    assert data.class_names is not None
    torch.manual_seed(runtime.seed)
    model, arch = starting_network(name, first_model(args, size), args.method, len(data.class_names))
    mean, std, _ = statistics(model)
    views: dict[str, Any] = {"size": size, "mean": mean, "std": std, "crop": args.crop, "scale": args.crop_scale}
    views["trunk_scale"] = 1.0 if name == SCRATCH else args.trunk_lr / args.lr
    if args.method == "exits":
        task: Task = SelfDistillation(model, alpha=args.alpha, lam=args.lam, temperature=args.temperature, **views)
    else:
        task = ClusterFit(model, **views)  # its loss is what fine-tuning is: cross-entropy of one classifier
    trained = run_training(
        task,
        EpochLoader(data, optim.batch_size, runtime.seed, torch.from_numpy(positions)),
        network=model,
        arch=arch,
        size=size,
        optim=optim,
        runtime=replace(runtime, checkpoint_epochs=max(1, optim.epochs // 10)),
        out=out,
        settings={"start": name, "method": args.method, "labels": hashlib.sha256(positions.tobytes()).hexdigest()},
        labels=torch.from_numpy(data.labels),
        title=f"{name}, {len(positions)} labels",
    )
    if rank() != 0:
        return {}
    forward = ForwardConfig(precision=runtime.precision, device=runtime.device)
    trained_network = float32_classifiers(load_network(str(out)))  # measured as `sssd predict` answers
    logits = network_features(trained_network, test, forward, read=exit_logits)[:, evaluation.test_positions]
    exits, ensemble = accuracies(logits, evaluation.test_labels)
    remove(out, ("checkpoints/step-*",))  # it is done, and they are many times its size
    return {"exits": exits, "ensemble": ensemble, "loss": trained["loss"], "steps": trained_steps(optim, positions)}


def trained_steps(optim: OptimConfig, positions: NDArray[np.int64]) -> int:
    """Optimiser steps of a training."""
    return optim.epochs * (len(positions) // optim.batch_size)


def first_model(args: FinetuneArgs, size: int) -> str:
    """The network that one from scratch is built like: the first that is asked for, else the default for the size."""
    return next((name for name in args.models if name != SCRATCH), None) or choose_model(None, size)


def finetune(args: FinetuneArgs) -> None:
    """`sssd finetune`."""
    tune_cpu()
    runtime = part(args, RuntimeConfig)
    processes = make_accelerator(runtime).num_processes
    out = open_out(args, "finetune")
    amounts: list[tuple[float, dict[str, Any]]] = [(n, {"per_class": n}) for n in args.per_class]
    amounts = amounts or [(100 * share, {"fraction": share}) for share in args.fractions]
    if not amounts:
        raise UserError("give --fractions or --per_class")
    places = {name: re.sub(r"[^\w.-]+", "-", name).strip("-") for name in args.models}
    if len(set(places.values())) < len(args.models):
        raise UserError(f"--models must have different names: {', '.join(args.models)}")
    config = part(args, DataConfig)
    data = load_images(config, default_size=storage_default(args.image_size), require_labels=True, progress=rank() == 0)
    assert data.labels is not None  # they are required above
    assert data.class_names is not None
    size = choose_size(data, args.image_size)
    evaluation = evaluation_data(data, config, test_split=args.test_split, holdout=args.holdout, seed=args.seeds[0])
    if evaluation.test is data:
        evaluation = replace(evaluation, words=f"a part of split {data.split} whose labels are kept from training")
    known = evaluation.train_positions.numpy()
    # Everything that would fail an hour in fails now.
    for name in args.models:
        _, arch = starting_network(name, first_model(args, size), args.method, len(data.class_names))
        check_sizes(arch, [size, *args.sizes])
    for _, how in amounts:
        count = len(labelled_subset(data.labels[known], args.seeds[0], **how))
        check(step_plan(args, args.models[0], count, processes), processes, count)
    if rank() == 0 and not (out / "config.yaml").exists():  # an older one describes what is there until the end
        save_config(out, args)
    precision = resolve_precision(runtime.precision, runtime.device)
    say(
        f"{len(known)} images of {data.name} at {size} px, measured on {evaluation.describe()}; "
        f"{machine_words(precision)}"
    )

    rows: list[dict[str, Any]] = []
    common = {
        "data": data.fingerprint,
        "test": evaluation.test.fingerprint,
        "test_positions": hashlib.sha256(evaluation.test_positions.numpy().tobytes()).hexdigest()[:16],
        "true_labels": evaluation.digest(),
        "storage_size": data.size,
        "image_size": size,
        "method": args.method,
        "precision": precision,
        "processes": processes,
        "trunk_lr": args.trunk_lr,
        "self_distillation": [args.alpha, args.lam, args.temperature],
        "views": [args.crop, *args.crop_scale],
    }
    for name in args.models:
        start = first_model(args, size) if name == SCRATCH else weights_digest(load_network(name, num_classes=0))
        for amount, how in amounts:
            folder = out / places[name] / f"{amount:g}{'-per-class' if args.per_class else '%'}"
            stages = Stages(folder, {**common, "model": name, "start": start}, overwrite=args.overwrite)
            for seed in args.seeds:
                positions = known[labelled_subset(data.labels[known], seed, **how)]
                optim = step_plan(args, name, len(positions), processes)
                own = replace(runtime, seed=seed)

                def step(
                    target: Path,
                    name: str = name,
                    positions: NDArray[np.int64] = positions,
                    own: RuntimeConfig = own,
                    optim: OptimConfig = optim,
                ) -> dict[str, Any]:
                    return train_and_measure(args, name, evaluation, positions, own, optim, size, target)

                settings = {**asdict(optim), "seed": seed, "labels": len(positions)}
                found = stages.run(f"seed-{seed}", step, settings, all_processes=True)
                row = {"model": name, "amount": amount, "labels": len(positions), "seed": seed, **found}
                row["accuracy"] = found["ensemble"] if args.method == "exits" else found["exits"][-1]
                rows.append(row)
    if rank() == 0:
        write(args, rows, out, data_name=data.name, test=evaluation.describe(), size=size)
        save_config(out, args)
        say(f"report: {out / 'report.md'}")
    barrier()


def write(args: FinetuneArgs, rows: list[dict[str, Any]], out: Path, *, data_name: str, test: str, size: int) -> None:
    """Writes report.md, results.csv and accuracy.png."""
    short = {name: short_name(name) for name in args.models}
    titles = short if len(set(short.values())) == len(short) else {name: name for name in short}
    curves: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        curves.setdefault(titles[row["model"]], {}).setdefault(row["amount"], []).append(row["accuracy"])
    amounts = sorted({row["amount"] for row in rows})
    unit = "labels of each class" if args.per_class else "labels (%)"
    figures.label_curves(curves, TABLE_4, out / "accuracy.png", axis=unit)
    heads = [f"{amount:g}" if args.per_class else f"{amount:g} %" for amount in amounts]
    means = [[markdown(name), *(mean_and_range(curve[amount]) for amount in amounts)] for name, curve in curves.items()]
    first = next(iter(curves))
    for name, curve in curves.items():
        if name != first:
            leads = [
                mean_and_range([a - b for a, b in zip(curves[first][amount], curve[amount], strict=True)])
                for amount in amounts
            ]
            means.append([f"{markdown(first)} over {markdown(name)}", *leads])
    counts = {amount: sorted({row["labels"] for row in rows if row["amount"] == amount}) for amount in amounts}
    shares = sorted({share for line in TABLE_4.values() for share in line})
    theirs = [[name, *(f"{line[share]:.2f}" for share in shares)] for name, line in TABLE_4.items()]
    how = {
        "final": "the trunk and a new FC, by cross-entropy; accuracy of the FC",
        "exits": "all exits, by self distillation on the labelled images; accuracy of their ensemble",
    }[args.method]
    lines = [
        "# Fine-tuning on a few labels",
        "",
        f"- **Data**: {code(data_name)} at {size} px; subsets balanced over the classes, of "
        + ", ".join("/".join(map(str, counts[amount])) for amount in amounts)
        + " labels",
        f"- **Measured on**: {markdown(test)}",
        f"- **Trained**: {how}",
        f"- **Seeds**: {', '.join(map(str, args.seeds))}, of subset, classifiers and training",
        f"- **Machine**: {markdown(machine_words(resolve_precision(args.precision, args.device)))}",
        "",
        f"Accuracy in percent after the last epoch by {unit}; of several seeds the mean and, in brackets, the lowest "
        "and the highest, and so of the differences seed by seed.",
        "",
        *table(["from", *heads], means),
        "",
        "![Accuracy against labels](accuracy.png)",
        "",
        "The paper's table 4, on ImageNet-1K, not ours:",
        "",
        *table(["SSSD by pretext, 200 epochs", *(f"{share} %" for share in shares)], theirs),
        "",
    ]
    atomic_write_text(out / "report.md", "\n".join(lines))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    exits = max(len(row["exits"]) for row in rows)
    writer.writerow(
        ["model", "amount", "labels", "seed", "accuracy", *(f"exit {i + 1}" for i in range(exits)), "steps", "seconds"]
    )
    for row in rows:
        keys = ("model", "amount", "labels", "seed", "accuracy")
        writer.writerow([*(row[key] for key in keys), *row["exits"], row["steps"], row["seconds"]])
    atomic_write_text(out / "results.csv", text.getvalue())
    print("\n".join(table(["accuracy (%) from", *heads], means)))
