"""`sssd finetune`: semi-supervised fine-tuning on a few labels (table 4 of the paper), from several initialisations.

OUT/MODEL/LABELS/seed-S/ holds each trained network, done once and reused by later calls; OUT/report.md, results.csv and
accuracy.png what they gave; OUT/model the network to use, see `deploy`.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sssd_zoo.configs import DataConfig, FinetuneArgs, OptimConfig, RuntimeConfig
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import barrier, print_main, rank
from sssd_zoo.distributed.hardware import describe_machine, resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.features import accuracies, exit_logits, float32_classifiers, network_features
from sssd_zoo.evaluation.protocol import Evaluation, evaluation_data
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.comparison import mean_and_range
from sssd_zoo.evaluation.reports.markdown import table
from sssd_zoo.evaluation.reports.paper import TABLE_4
from sssd_zoo.files import atomic_write_text, csv_text
from sssd_zoo.files.run_folder import discard, kind_of, open_out
from sssd_zoo.labels.fixed import FixedLabels
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.multi_exit import MultiExit
from sssd_zoo.models.networks import (
    check_channels,
    check_sizes,
    choose_model,
    choose_size,
    config_for,
    load_network,
    load_trunk,
    weights_digest,
)
from sssd_zoo.pipeline.deploy import deploy
from sssd_zoo.pipeline.stages import Stage, Stages
from sssd_zoo.tasks import ClusterFit, SelfDistillation
from sssd_zoo.training.engine import check_trainable
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import RunSpec, augment_settings, begin_config, regularisation, run_training, save_config

SCRATCH = "scratch"


def labelled_subset(
    labels: NDArray[np.int64],
    seed: int,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    names: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """Positions of a class-balanced subset, sorted: the first of each class in an order that depends on the seed.

    Args:
        labels: int64 [N] in 0..C-1.
        seed: of the order; smaller subsets of a seed are parts of its larger ones.
        fraction: of each class to take, rounded, but at least one label.
        per_class: labels of each class to take, in the place of a fraction.
        names: of the classes, for the error.

    Raises:
        UserError: if a class has fewer than `per_class`.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = per_class if per_class is not None else max(1, round((fraction or 0) * len(members)))
        if count > len(members):
            name = label if names is None else f"'{names[label]}'"
            raise UserError(f"class {name} has {len(members)} labels to train on, fewer than {count} per class")
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


def starting_network(name: str, like: str, method: str, classes: int) -> tuple[Any, str]:
    """A network to fine-tune, with new classifiers, and its timm name.

    Its old classifiers are dropped: those of a probed network have seen all labels.

    Args:
        name: run folder or timm name, or 'scratch'.
        like: what a network from scratch is built like.
        method: 'final' builds the trunk and its FC alone, 'exits' all exits.
        classes: number of them.

    Raises:
        UserError: if it cannot be loaded, or has no exits to train.
    """
    source = like if name == SCRATCH else name
    untrained = load_network(source, pretrained=False, num_classes=0)
    arch = architecture_of(untrained)
    if method == "final":
        output = {"output": "final"} if isinstance(untrained, MultiExit) else {}
        model = load_network(source, pretrained=name != SCRATCH, num_classes=classes, **output)
    else:
        if not isinstance(untrained, MultiExit):
            raise UserError(f"'{source}' has no exits; use --method final, or a network of this package")
        model = load_network(source, pretrained=False, num_classes=classes, output="ensemble")
        if name != SCRATCH:
            load_trunk(model, load_network(name, num_classes=0))
    model.reset_classifier(classes)
    return model, arch


def step_plan(args: FinetuneArgs, name: str, images: int, processes: int) -> OptimConfig:
    """How to train a network on so many labelled images: batches that they fill, and epochs enough for `min_steps`.

    Args:
        args: of the command.
        name: the network to start from.
        images: number of them.
        processes: number of them.

    Raises:
        UserError: if they are too few for a batch.
    """
    parts = processes * args.accumulate
    batch = min(args.batch_size, images // parts * parts)
    if args.batch_size < 2 * parts:
        raise UserError(
            f"batch_size {args.batch_size} leaves single images; BatchNorm needs at least 2 in each of {parts} parts: "
            "raise it, or lower accumulate"
        )
    if batch < 2 * parts:
        raise UserError(f"{images} labelled images are too few for a batch; give more labels")
    epochs = max(args.epochs, math.ceil(args.min_steps / (images // batch)))
    lr = args.scratch_lr if name == SCRATCH else args.lr
    return replace(OptimConfig.of(args), batch_size=batch, epochs=epochs, lr=lr)


def first_model(args: FinetuneArgs, size: int) -> str:
    """The network that one from scratch is built like: the first that is asked for, else the default for the size."""
    return next((name for name in args.models if name != SCRATCH), None) or choose_model(None, size)


def finetune(args: FinetuneArgs) -> None:
    """`sssd finetune`."""
    tune_cpu()
    runtime = RuntimeConfig.of(args)
    processes = make_accelerator(runtime).num_processes
    out = open_out(args, "finetune")
    check_models(args)
    config = shared_config(args)
    data = load_images(config, default_size=storage_default(args.image_size), require_labels=True, progress=rank() == 0)
    evaluation = evaluation_data(
        data,
        config,
        test_split=args.test_split,
        holdout=args.holdout,
        seed=args.seeds[0],
        advice="add images, or raise --holdout",
    )
    if evaluation.test is data:
        evaluation = replace(evaluation, words=f"a part of split {data.split} whose labels are kept from training")
    plan = Plan(args, runtime, evaluation, choose_size(data, args.image_size), processes, out)
    plan.check()
    plan.check_earlier()
    begin_config(out, args)
    print_main(plan.describe())
    rows = [row for name in args.models for row in plan.run(name)]
    deployed = deploy(plan, rows) if args.deploy else []
    if rank() == 0:
        if args.overwrite and not args.deploy and kind_of(out / "model") == "network":
            discard(out / "model", "network")  # of another run
        write_results(plan, rows, deployed)
        save_config(out, args)
        print(f"report: {out / 'report.md'}")
        if deployed:
            print(f"network: {out / 'model'}, for timm.create_model('local-dir:{out / 'model'}', pretrained=True)")
    barrier()


def shared_config(args: FinetuneArgs) -> DataConfig:
    """How to read images that all networks take: with the channels and bits of those that were trained with some.

    Raises:
        UserError: if they take different images.
    """
    config = DataConfig.of(args)
    for name in args.models:
        if name != SCRATCH:
            config = config_for(name, load_network(name, pretrained=False, num_classes=0), config)
    return config


def check_models(args: FinetuneArgs) -> None:
    """Raises `UserError` where no labels or other exits are asked for, or two networks would share a folder."""
    if not args.fractions and not args.per_class:
        raise UserError("give --fractions or --per_class")
    if args.exits != "plain":
        raise UserError(f"fine-tuning keeps the exits that the network has: remove --exits {args.exits}")
    if len({folder_name(name) for name in args.models}) < len(args.models):
        raise UserError(f"--models must have different names: {', '.join(args.models)}")
    if unnamed := [name for name in args.models if folder_name(name) in ("", ".", "..")]:
        raise UserError(f"--models {unnamed[0]} cannot name a folder: give its absolute path")
    if args.deploy and (taken := [name for name in args.models if folder_name(name) == "model"]):
        raise UserError(
            f"--models {taken[0]} would share OUT/model with the network to deploy: give its absolute path, or "
            "--deploy false"
        )


def folder_name(model: str) -> str:
    """The folder of a network's runs."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-")


@dataclass(frozen=True)
class Plan:
    """What is trained, on how many labels, and what it is measured on.

    Attributes:
        args: of the command.
        runtime: where and how to run.
        evaluation: the images to train on and those to measure on.
        size: side of the views in pixels.
        processes: number of them.
        out: the run folder.
    """

    args: FinetuneArgs
    runtime: RuntimeConfig
    evaluation: Evaluation
    size: int
    processes: int
    out: Path

    @property
    def precision(self) -> str:
        """Of the training and the measurement."""
        return resolve_precision(self.runtime.precision, self.runtime.device)

    @property
    def amounts(self) -> dict[float, dict[str, Any]]:
        """Labels of each class or their percentage, and how `labelled_subset` is asked for them."""
        if self.args.per_class:
            return {number: {"per_class": number} for number in self.args.per_class}
        return {100 * fraction: {"fraction": fraction} for fraction in self.args.fractions}

    @property
    def num_classes(self) -> int:
        """Number of classes of the images."""
        assert self.evaluation.train.class_names is not None  # labels are required
        return len(self.evaluation.train.class_names)

    def positions(self, amount: float, seed: int) -> NDArray[np.int64]:
        """Positions of the labelled images of a run."""
        known, labels = self.evaluation.train_positions.numpy(), self.evaluation.train.labels
        assert labels is not None  # they are required
        positions: NDArray[np.int64] = known[
            labelled_subset(labels[known], seed, names=self.evaluation.train.class_names, **self.amounts[amount])
        ]
        return positions

    def check(self) -> None:
        """Raises `UserError` for everything that would fail an hour in."""
        args = self.args
        args.augment.resolved(contrastive=False, channels=self.evaluation.train.channels)
        for name in args.models:
            network, arch = starting_network(name, first_model(args, self.size), args.method, self.num_classes)
            check_channels(name, network, self.evaluation.train)
            check_sizes(arch, [self.size, *args.sizes])
        for amount in self.amounts:
            count = len(self.positions(amount, args.seeds[0]))
            check_trainable(step_plan(args, args.models[0], count, self.processes), self.processes, count)

    def has_exits(self, name: str) -> bool:
        """Whether a network to fine-tune is one of this package."""
        source = first_model(self.args, self.size) if name == SCRATCH else name
        return isinstance(load_network(source, pretrained=False, num_classes=0), MultiExit)

    def folder(self, name: str, amount: float) -> Path:
        """Where the runs of a network on so many labels lie."""
        return self.out / folder_name(name) / f"{amount:g}{'-per-class' if self.args.per_class else '%'}"

    def describe(self) -> str:
        """What is about to run, in a line."""
        evaluation = self.evaluation
        return (
            f"{len(evaluation.train_positions)} images of {evaluation.train.name} at {self.size} px, measured on "
            f"{evaluation.describe()}; {describe_machine(self.precision)}"
        )

    def inputs(self, name: str) -> dict[str, Any]:
        """What all runs of a network depend on."""
        args, evaluation = self.args, self.evaluation
        return {
            "data": evaluation.train.fingerprint,
            "test": evaluation.test.fingerprint,
            "test_positions": hashlib.sha256(evaluation.test_positions.numpy().tobytes()).hexdigest()[:16],
            "true_labels": evaluation.digest(),
            "storage_size": evaluation.train.size,
            **({} if evaluation.train.pixels is None else evaluation.train.pixels.identity),
            "image_size": self.size,
            "method": args.method,
            "precision": self.precision,
            "processes": self.processes,
            "trunk_lr": args.trunk_lr,
            "self_distillation": [args.alpha, args.lam, args.temperature],
            "views": [args.crop, *args.crop_scale],
            **regularisation(args),
            **augment_settings(args.augment),
            "model": name,
            "start": self.start(name),
        }

    def start(self, name: str) -> str:
        """What tells the weights that a network starts from, wherever they lie: from scratch, its architecture."""
        if name == SCRATCH:
            return architecture_of(load_network(first_model(self.args, self.size), pretrained=False, num_classes=0))
        return weights_digest(load_network(name, num_classes=0))

    def run(self, name: str) -> list[dict[str, Any]]:
        """Fine-tunes one network on every amount of labels with every seed; gives a row for each."""
        inputs, rows = self.inputs(name), []
        for amount in self.amounts:
            stages = self.stages(name, amount, inputs)
            for seed in self.args.seeds:
                result = stages.run(self.stage(name, amount, seed))
                labels = len(self.positions(amount, seed))
                row = {"model": name, "amount": amount, "labels": labels, "seed": seed, **result}
                row.setdefault("machine", describe_machine(self.precision))  # earlier versions did not record it
                row["accuracy"] = result["ensemble"] if self.args.method == "exits" else result["exits"][-1]
                rows.append(row)
        return rows

    def stages(self, name: str, amount: float, inputs: dict[str, Any]) -> Stages:
        """The runs of a network on so many labels; `inputs` are what they depend on."""
        return Stages(
            self.folder(name, amount),
            inputs,
            overwrite=self.args.overwrite,
            keep_checkpoints=self.args.keep_checkpoints,
        )

    def check_earlier(self) -> None:
        """Raises `UserError` for a run that was made with other settings or data, before any other is trained."""
        for name in self.args.models:
            inputs = self.inputs(name)
            for amount in self.amounts:
                stages = self.stages(name, amount, inputs)
                stages.refuse_others([self.stage(name, amount, seed) for seed in self.args.seeds])

    def stage(self, name: str, amount: float, seed: int) -> Stage:
        """One run."""
        positions = self.positions(amount, seed)
        optim = step_plan(self.args, name, len(positions), self.processes)
        return Stage(
            name=f"seed-{seed}",
            action=lambda folder: self.train_and_measure(name, positions, optim, seed, folder),
            settings={**asdict(optim), "seed": seed, "labels": len(positions)},
            all_processes=True,
        )

    def train_and_measure(
        self, name: str, positions: NDArray[np.int64], optim: OptimConfig, seed: int, folder: Path
    ) -> dict[str, Any]:
        """Fine-tunes one network on the labels at `positions`; gives its accuracies in percent."""
        args, data = self.args, self.evaluation.train
        assert data.labels is not None  # they are required
        torch.manual_seed(seed)
        model, arch = starting_network(name, first_model(args, self.size), args.method, self.num_classes)
        # ClusterFit's loss is what fine-tuning is: cross-entropy of one classifier.
        make = SelfDistillation if args.method == "exits" else ClusterFit
        trunk_scale = 1.0 if name == SCRATCH else args.trunk_lr / args.lr
        task = make(model, args, input_spec(model, self.size), trunk_scale=trunk_scale)
        measured = run_training(
            task,
            EpochLoader(data, optim.batch_size, seed, torch.from_numpy(positions)),
            task.trained,
            RunSpec(arch=arch, size=self.size, out=folder, title=f"{name}, {len(positions)} labels"),
            optim=optim,
            runtime=replace(self.runtime, seed=seed, checkpoint_epochs=max(1, optim.epochs // 10)),
            settings={
                "start": self.start(name),
                "method": args.method,
                "labels": hashlib.sha256(positions.tobytes()).hexdigest(),
                **regularisation(args),
            },
            labels=FixedLabels(data.labels),
        )
        if rank() != 0:
            return {}
        exits, ensemble = accuracies(self.logits(folder), self.evaluation.test_labels)
        steps = optim.epochs * (len(positions) // optim.batch_size)
        return {"exits": exits, "ensemble": ensemble, "loss": measured["loss"], "steps": steps}

    def logits(self, folder: Path) -> Tensor:
        """What the exits of a trained network answer, as `sssd predict` computes it.

        Args:
            folder: of the run.

        Returns:
            Float32 [E, M, C], for the M images to measure on.
        """
        network = float32_classifiers(load_network(str(folder)))
        logits = network_features(network, self.evaluation.test, self.runtime.forward(), read=exit_logits)
        return logits[:, self.evaluation.test_positions]


def write_results(plan: Plan, rows: list[dict[str, Any]], deployed: list[str]) -> None:
    """Writes report.md, results.csv and accuracy.png.

    Args:
        plan: of the command.
        rows: of all runs.
        deployed: lines of Markdown about the network to deploy, if there is one.
    """
    args, out = plan.args, plan.out
    short = {name: short_name(name) for name in args.models}
    titles = short if len(set(short.values())) == len(short) else {name: name for name in short}
    curves: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        curves.setdefault(titles[row["model"]], {}).setdefault(row["amount"], []).append(row["accuracy"])
    unit = "labels of each class" if args.per_class else "labels (%)"
    figures.label_curves(curves, TABLE_4, out / "accuracy.png", axis=unit)
    chapter = ["## The network to deploy", "", *(f"- {line}" for line in deployed), ""] if deployed else []
    atomic_write_text(out / "report.md", "\n".join([*report_lines(plan, rows, curves), *chapter]))
    atomic_write_text(out / "results.csv", results_csv(rows))
    print("\n".join(accuracy_table("accuracy (%) from", args, curves)))


def accuracy_table(corner: str, args: FinetuneArgs, curves: dict[str, dict[float, list[float]]]) -> list[str]:
    """A Markdown table of accuracies against labels, and of the first network's lead over the others, seed by seed."""
    amounts = sorted({amount for curve in curves.values() for amount in curve})
    heads = [f"{amount:g}" if args.per_class else f"{amount:g} %" for amount in amounts]
    rows = [[markdown(name), *(mean_and_range(curve[amount]) for amount in amounts)] for name, curve in curves.items()]
    first = next(iter(curves))
    for name, curve in curves.items():
        if name != first:
            pairs = [zip(curves[first][amount], curve[amount], strict=True) for amount in amounts]
            leads = [mean_and_range([ours - theirs for ours, theirs in pair]) for pair in pairs]
            rows.append([f"{markdown(first)} over {markdown(name)}", *leads])
    return table([corner, *heads], rows)


def report_lines(plan: Plan, rows: list[dict[str, Any]], curves: dict[str, dict[float, list[float]]]) -> list[str]:
    """The lines of report.md."""
    args, evaluation = plan.args, plan.evaluation
    machines = dict.fromkeys(row["machine"] for row in rows)
    counts: dict[float, set[int]] = {}
    for row in rows:
        counts.setdefault(row["amount"], set()).add(row["labels"])
    fractions = sorted({fraction for line in TABLE_4.values() for fraction in line})
    paper = [[name, *(f"{line[fraction]:.2f}" for fraction in fractions)] for name, line in TABLE_4.items()]
    trained = {
        "final": "the trunk and a new FC, by cross-entropy; accuracy of the FC",
        "exits": "all exits, by self distillation on the labelled images; accuracy of their ensemble",
    }[args.method]
    return [
        "# Fine-tuning on a few labels",
        "",
        f"- **Data**: {code(evaluation.train.name)} at {plan.size} px; subsets balanced over the classes, of "
        + ", ".join("/".join(map(str, sorted(counts[amount]))) for amount in sorted(counts))
        + " labels",
        f"- **Measured on**: {markdown(evaluation.describe())}",
        f"- **Trained**: {trained}",
        f"- **Seeds**: {', '.join(map(str, args.seeds))}, of subset, classifiers and training",
        f"- **Machine**: {markdown('; '.join(machines))}",
        "",
        f"Accuracy in percent after the last epoch by {'labels of each class' if args.per_class else 'labels (%)'}; of "
        "several seeds the mean and, in brackets, the lowest and the highest, and so of the differences seed by seed.",
        "",
        *accuracy_table("from", args, curves),
        "",
        "![Accuracy against labels](accuracy.png)",
        "",
        "The paper's table 4, on ImageNet-1K, not ours:",
        "",
        *table(["SSSD by pretext, 200 epochs", *(f"{fraction} %" for fraction in fractions)], paper),
        "",
    ]


def results_csv(rows: list[dict[str, Any]]) -> str:
    """All rows as CSV; those of networks with exits also have the accuracy of each."""
    keys = ("model", "amount", "labels", "seed", "accuracy")
    count = max(len(row["exits"]) for row in rows)
    exits = [f"exit {number}" for number in range(1, count + 1)] if count > 1 else []
    blank = [""] * len(exits)
    lines = (
        [*(row[key] for key in keys), *(row["exits"] if len(row["exits"]) > 1 else blank), row["steps"], row["seconds"]]
        for row in rows
    )
    return csv_text([*keys, *exits, "steps", "seconds"], lines)
