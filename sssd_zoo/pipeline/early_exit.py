"""Early exit: temperatures, thresholds for a budget, and what they save: `sssd early-exit`.

OUT/
    model.safetensors   the network, each exit's classifier divided by its temperature
    config.json         thresholds, which timm hands to the network, and under `early_exit` how they were found
    early_exit/         report.json, report.md, figure.png: accuracy against cost, on images that calibrated nothing

A temperature divides an exit's logits (Guo et al. 2017, "On Calibration of Modern Neural Networks"). Dividing the
weights and biases of its classifier does the same, so a calibrated network has no state of its own: an exit's answers
stay as they are, its confidences become comparable with the others', and the ensemble averages calibrated
probabilities.
"""

import statistics as numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.configs import DataConfig, EarlyExitArgs, ForwardConfig
from sssd_zoo.data.inputs import prepared, storage_default
from sssd_zoo.data.loading import ImageData, load_images, split_names
from sssd_zoo.distributed.hardware import describe_machine, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.calibration import (
    POINTS_LOST,
    accuracy,
    all_rules,
    average_cost,
    calibration_error,
    choose,
    classifiers,
    early_answers,
    fit_temperatures,
    fold,
)
from sssd_zoo.evaluation.features import network_features
from sssd_zoo.evaluation.protocol import check_classes
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.early_exit import answer_cost, command, words
from sssd_zoo.evaluation.timing import BATCH, ONE_BY_ONE, interleaved, measure_stages
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.models import SSSDResNet, StageCosts, ensemble_logits, stage_costs
from sssd_zoo.models.networks import channels, load_network, statistics
from sssd_zoo.models.saving import save_network


def load_calibrated(args: EarlyExitArgs) -> Any:
    """The network to calibrate, with all its exits and their classifiers.

    Raises:
        UserError: if it is another network.
    """
    model = load_network(args.model)
    if not isinstance(model, SSSDResNet) or not model.ensemble or model.num_classes < 2:
        raise UserError(
            f"'{args.model}' has no four exits that classify: give one of this package with trained heads, as "
            "RUN/model of `sssd fit` on labelled images, or what `sssd linear --out` wrote"
        )
    return model.eval()


@dataclass(frozen=True)
class Part:
    """Images to calibrate on, or to measure on.

    Attributes:
        data: where they lie.
        positions: int64 [N], which of them.
        words: where they come from, for people.
    """

    data: ImageData
    positions: Tensor
    words: str

    @property
    def labels(self) -> Tensor:
        """Their classes, int64 [N]."""
        assert self.data.labels is not None  # required when they were loaded
        return torch.from_numpy(self.data.labels)[self.positions]


def calibration_data(args: EarlyExitArgs, model: Any) -> tuple[Part, Part]:
    """What to calibrate on, and what to measure on.

    Raises:
        UserError: for data without labels, or with other classes than the network's.
    """
    config = DataConfig.of(args)
    if args.split is None:
        names = split_names(config)
        held = next((name for name in ("test", "validation") if name in names), None)
        if held is None:
            raise UserError(
                f"{args.data} has no split 'test' or 'validation' (it has {', '.join(names)}): give labelled images "
                "that the classifiers were not trained on, and name them by --split"
            )
        config = replace(config, split=held)
    config = replace(config, storage_size=config.storage_size or model.storage_size)
    size = storage_default(statistics(model)[2])
    test = load_images(config, default_size=size, require_labels=True)
    check_classes(test, model, args.model)
    if args.calibration_split is not None:
        other = replace(config, split=args.calibration_split, storage_size=test.size)
        held_out = load_images(other, default_size=size, require_labels=True)
        check_classes(held_out, model, args.model)
        return (
            Part(held_out, torch.arange(len(held_out)), f"{len(held_out):,} images, split {held_out.split}"),
            Part(test, torch.arange(len(test)), f"{len(test):,} images, split {test.split}"),
        )
    from sklearn.model_selection import train_test_split

    try:
        rest, drawn = train_test_split(
            np.arange(len(test)), test_size=args.holdout, stratify=test.labels, random_state=args.seed % 2**32
        )
    except ValueError as error:
        raise UserError(f"cannot hold images of every class out of {test.name} to calibrate on: {error}") from error
    return (
        Part(test, torch.from_numpy(np.sort(drawn)), f"{len(drawn):,} images drawn by class from split {test.split}"),
        Part(test, torch.from_numpy(np.sort(rest)), f"the other {len(rest):,} images of split {test.split}"),
    )


def exit_logits(model: Any, data: ImageData, args: EarlyExitArgs) -> Tensor:
    """The logits of all exits for all images in order, float32 [4, N, C], computed in fp32."""
    config = ForwardConfig(batch_size=args.batch_size, precision="fp32", device=args.device)
    features = network_features(model, data, config)
    with torch.no_grad():
        heads = [(head.weight.cpu(), head.bias.cpu()) for head in classifiers(model)]
        return torch.stack([F.linear(own, *head) for own, head in zip(features, heads, strict=True)])


@torch.inference_mode()
def run_early(model: Any, data: Part, thresholds: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """The classes that `forward_early` itself answers in batches of 128, and the exits taken, both int64 [N]."""
    answers, taken = [], []
    for _, stored in data.data.batches(data.positions.split(BATCH)):
        early = model.forward_early(prepared(stored, model).to(device), thresholds)
        answers.append(early.logits.argmax(1).cpu())
        taken.append(early.exit.cpu())
    return torch.cat(answers), torch.cat(taken)


def early_exit(args: EarlyExitArgs) -> None:
    """`sssd early-exit`."""
    tune_cpu()
    budgets = {name: getattr(args, name) for name in ("points_lost", "multiply_adds", "latency")}
    if sum(value is not None for value in budgets.values()) > 1:
        raise UserError("give one budget: --points_lost, --multiply_adds or --latency")
    out = open_out(args, "early-exit")
    model = load_calibrated(args)
    held_out, measured = calibration_data(args, model)
    logits = exit_logits(model, held_out.data, args)
    held_logits = logits[:, held_out.positions]
    test_logits = (logits if measured.data is held_out.data else exit_logits(model, measured.data, args))[
        :, measured.positions
    ]
    temperatures = fit_temperatures(held_logits, held_out.labels)
    fold(model, temperatures)
    scale = torch.tensor(temperatures).view(4, 1, 1)
    calibrated, test_calibrated = held_logits / scale, test_logits / scale

    device = next(model.parameters()).device
    size = statistics(model)[2]
    macs = stage_costs(model, (channels(model), size, size))
    sample = prepared(held_out.data.gather(held_out.positions[: 2 * ONE_BY_ONE]), model).to(device)
    costs = macs if args.latency is None else measure_stages(model, sample, args.runs)
    thresholds = choose(all_rules(calibrated, held_out.labels, costs), args)
    model.thresholds = thresholds
    answers, taken = run_early(model, measured, thresholds, device)

    labels = measured.labels
    exits = {str(number): own for number, own in enumerate(test_calibrated, start=1)}
    by_name = {**exits, "ensemble": ensemble_logits(list(test_calibrated))}
    before = {str(number): own for number, own in enumerate(test_logits, start=1)}
    before["ensemble"] = ensemble_logits(list(test_logits))
    table = {
        name: {"accuracy": accuracy(own.argmax(1), labels), "multiply_adds": answer_cost(name, macs)}
        for name, own in by_name.items()
    }
    table["early exit"] = {
        "accuracy": accuracy(answers, labels),
        "multiply_adds": average_cost(taken, thresholds, macs),
    }
    results: dict[str, Any] = {
        "model": args.model if not Path(args.model).exists() else Path(args.model).resolve().name,
        "command": command(args),
        "data": held_out.data.name,
        "calibrated_on": held_out.words,
        "measured_on": measured.words,
        "seed": args.seed,
        "machine": describe_machine("fp32"),
        "budget": {name: value for name, value in budgets.items() if value is not None} or {"points_lost": POINTS_LOST},
        "temperatures": temperatures,
        "calibration_error": {
            name: {"before": calibration_error(before[name], labels), "after": calibration_error(own, labels)}
            for name, own in by_name.items()
        },
        "ensemble_accuracy_before": accuracy(before["ensemble"].argmax(1), labels),
        "thresholds": thresholds,
        "exits_taken": [float((taken == number).double().mean()) for number in range(1, 5)],
        "answers": table,
        "curve": curve(calibrated, held_out.labels, test_calibrated, labels, macs),
    }
    arch = str(model.pretrained_cfg["architecture"])
    with atomic_dir(out, "early-exit") as folder:
        save_network(folder, model, arch, label_names=model.pretrained_cfg.get("label_names"))
        images = measured.data.gather(measured.positions[torch.randperm(len(labels))[: 20 * BATCH]])
        results |= measure(model, str(folder), prepared(images, model).to(device), table, args)
        config = read_json(folder / "config.json")
        kept = ("budget", "data", "calibrated_on", "temperatures")
        write_json(folder / "config.json", {**config, "early_exit": {name: results[name] for name in kept}})
        write_json(folder / "early_exit" / "report.json", results)
        figures.early_exit_costs(table, results["curve"], folder / "early_exit" / "figure.png")
        atomic_write_text(folder / "early_exit" / "report.md", words(results))
    print(words(results))
    print(f"the calibrated network is in {out}, its report in {out / 'early_exit'}")


def curve(
    calibrated: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, costs: StageCosts, points: int = 25
) -> list[dict[str, Any]]:
    """The dynamic rule at budgets between exit 1 and the whole network, thresholds from one part, measured on another.

    Args:
        calibrated: logits of the calibrating images, [4, N, C].
        labels: theirs, int64 [N].
        test: logits of the images to measure, [4, M, C].
        test_labels: theirs, int64 [M].
        costs: multiply-adds.
        points: of the curve.
    """
    rules = all_rules(calibrated, labels, costs)
    found: list[dict[str, Any]] = []
    for budget in np.linspace(answer_cost("1", costs), answer_cost("ensemble", costs), points):
        thresholds = rules.most_accurate(float(budget))
        assert thresholds is not None  # exit 1 alone keeps every one of these
        answers, taken = early_answers(test, thresholds)
        entry = {"thresholds": thresholds, "accuracy": accuracy(answers, test_labels)}
        entry["multiply_adds"] = average_cost(taken, thresholds, costs)
        if not found or found[-1]["thresholds"] != thresholds:
            found.append(entry)
    return found


def measure(
    model: Any, folder: str, images: Tensor, table: dict[str, dict[str, Any]], args: EarlyExitArgs
) -> dict[str, Any]:
    """Times early exit, the whole network and each exit's own network, and notes milliseconds in their rows of `table`.

    Args:
        model: calibrated, with thresholds.
        folder: where it was saved, from which the exits' networks are made.
        images: the network's inputs, float [N, 3, S, S].
        table: by name.
        args: of the command.

    Returns:
        `speedup`: of early exit over the 'ensemble' and over '4', the plain trunk, at batch '1' and '128', medians over
        runs of the ratio of times.
    """
    ways: dict[str, Callable[[Tensor], Any]] = {"early exit": model.forward_early, "ensemble": model}
    for name in ("1", "2", "3", "4"):
        own = load_network(folder, output=name).eval()
        ways[name] = own.to(images.device, memory_format=torch.channels_last)
    speedup = {}
    for batch, group in ((1, ONE_BY_ONE), (BATCH, 1)):
        times = interleaved(ways, images, batch=batch, group=group, runs=args.runs, seed=args.seed)
        for name, own_times in times.items():
            table[name].setdefault("milliseconds", {})[str(batch)] = 1e3 * numbers.median(own_times)
        speedup[str(batch)] = {
            name: numbers.median(theirs / ours for theirs, ours in zip(times[name], times["early exit"], strict=True))
            for name in ("ensemble", "4")
        }
    return {"speedup": speedup, "runs": args.runs}
