"""The network that `sssd finetune` leaves to be used: OUT/model, with all exits as classifiers, and its card.

It starts from what did best on the images to measure on, at the largest number of labels, and has the first seed, which
was not chosen by its result. `--method final` trains no exits, so for it one more network is trained, as
`--method exits` would: by self distillation on the same labels.
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from sssd_zoo.data.inputs import input_channels
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import describe_machine
from sssd_zoo.errors.text import code
from sssd_zoo.evaluation.calibration import calibration_error, fit_temperatures, fold, useful_temperatures
from sssd_zoo.evaluation.reports.markdown import Results
from sssd_zoo.files.run_folder import atomic_dir
from sssd_zoo.hub.model_card import EXITS, save_model_folder
from sssd_zoo.models import MultiExit, multiply_adds
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.stages import Stages

if TYPE_CHECKING:
    from sssd_zoo.pipeline.finetune import Plan

FEWEST = 20  # images to calibrate on


def choose(rows: list[dict[str, Any]], with_exits: list[str]) -> tuple[str, float, int]:
    """What to deploy: the start with the best mean accuracy at the most labels, that number, and the first seed.

    Args:
        rows: of all runs, see `Plan.run`.
        with_exits: the starts that are networks of this package; others are chosen only where there is none.
    """
    most = max(row["amount"] for row in rows)
    runs: dict[str, list[float]] = {}
    for row in rows:
        if row["amount"] == most and (not with_exits or row["model"] in with_exits):
            runs.setdefault(row["model"], []).append(row["accuracy"])
    best = max(runs, key=lambda name: mean(runs[name]))  # of equal ones the first
    return best, most, next(row["seed"] for row in rows if row["model"] == best)


def deploy(plan: "Plan", rows: list[dict[str, Any]]) -> list[str]:
    """Trains the network to deploy, where it is not among the runs, and writes it; every process calls it.

    Returns:
        Lines of Markdown about it, for the report; [] in the other processes.
    """
    with_exits = [name for name in plan.args.models if plan.has_exits(name)]
    name, amount, seed = choose(rows, with_exits)
    folder = plan.folder(name, amount)
    stage = plan.stage(name, amount, seed)
    result = next(row for row in rows if (row["model"], row["amount"], row["seed"]) == (name, amount, seed))
    if with_exits and plan.args.method == "final":
        plan = replace(plan, args=replace(plan.args, method="exits"))
        stage = replace(plan.stage(name, amount, seed), name=f"seed-{seed}-exits")
        stages = Stages(
            folder, plan.inputs(name), overwrite=plan.args.overwrite, keep_checkpoints=plan.args.keep_checkpoints
        )
        result = stages.run(stage)
    if rank() != 0:
        return []
    labels = len(plan.positions(amount, seed))
    return write_network(plan, folder / stage.name, name, labels, result)


def write_network(plan: "Plan", folder: Path, name: str, labels: int, result: dict[str, Any]) -> list[str]:
    """Writes OUT/model from a run's folder; gives lines of Markdown about it.

    Args:
        plan: of the command.
        folder: of the run.
        name: what it started from.
        labels: images that it was trained on.
        result: what it reached.
    """
    network, out, names = load_network(str(folder)), plan.out / "model", plan.evaluation.train.class_names
    arch = architecture_of(network)
    start = "random weights" if name == "scratch" else code(short_name(name))
    if not isinstance(network, MultiExit):
        with atomic_dir(out, "network") as temporary:
            save_network(temporary, network, arch, input_size=plan.size, label_names=names)
        reached = f"accuracy {result['exits'][-1]:.2f} percent"
        return [f"`model/`: {code(arch)}, fine-tuned from {start} on {labels:,} labels, without exits; {reached}"]
    calibrated = calibrate(plan, network, folder)
    data = plan.evaluation.train
    context: Results = {
        "model": arch,
        "image_size": plan.size,
        "data": data.name,
        "split": data.split,
        "images": labels,
        "test": plan.evaluation.words,
        "test_images": len(plan.evaluation.test_positions),
        "classes": plan.num_classes,
        "machine": result.get("machine") or describe_machine(plan.precision),  # earlier versions did not record it
        "macs": multiply_adds(network, (input_channels(network), plan.size, plan.size)),
        "finetuned": f"from {start} by self distillation of all exits on {labels:,} labelled images",
        "notes": [calibrated],
    }
    accuracies = dict(zip(EXITS, [*result["exits"], result["ensemble"]], strict=True))
    save_model_folder(
        out, network, arch=arch, input_size=plan.size, label_names=names, metrics=accuracies, card_context=context
    )
    titles = {**{number: f"exit {number}" for number in "1234"}, "ensemble": "ensemble"}
    measured = ", ".join(f"{titles[key]} {value:.2f}" for key, value in accuracies.items())
    return [
        f"`model/`: {code(arch)}, fine-tuned {context['finetuned']}; accuracy in percent: {measured}. Where several "
        "networks were compared, it is the one that did best on these images, which flatters it a little. "
        "`timm.create_model('local-dir:OUT/model', pretrained=True)` loads it",
        calibrated,
    ]


def calibrate(plan: "Plan", network: Any, folder: Path) -> str:
    """Divides each exit's classifier by a temperature, where that makes its confidences truer; tells it in Markdown.

    Half of the images to measure on find the temperatures, the other half decides.
    """
    labels = plan.evaluation.test_labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    calibrating, deciding = order[: len(order) // 2], order[len(order) // 2 :]
    if len(calibrating) < FEWEST:
        return f"**Calibration**: none, as {len(labels)} images to measure on are too few"
    logits = plan.logits(folder)
    fitted = fit_temperatures(logits[:, calibrating], labels[calibrating])
    kept = useful_temperatures(fitted, logits[:, deciding], labels[deciding])
    errors = []
    for values, temperature in zip(logits[:, deciding], kept, strict=True):
        before, after = (calibration_error(scaled, labels[deciding]) for scaled in (values, values / temperature))
        errors.append(f"{before:.3f} to {after:.3f}")
    fold(network, kept)
    temperatures = ", ".join(f"{value:.3g}" for value in kept)
    return (
        f"**Calibration**: the classifiers of the exits 1 to 4 are divided by the temperatures {temperatures}; "
        f"calibration error on images that these were not fitted to: {'; '.join(errors)}. No exit's answers change by "
        "it; the ensemble's accuracy was measured before"
    )
