"""Early exit: temperatures, thresholds for a budget, and what they save: `sssd early-exit`.

With labels, temperatures and thresholds are those of the accuracy. Without, there are no temperatures, and the
thresholds are those of the agreement with the ensemble.

OUT/
    model.safetensors   the network, each exit's classifier divided by its temperature
    config.json         thresholds, which timm hands to the network, and under `early_exit` how they were found
    early_exit/         report.json, report.md, figure.png: accuracy against cost, on images that nothing was fitted to;
                        they only decide which temperatures are kept

A temperature divides an exit's logits (Guo et al. 2017, "On Calibration of Modern Neural Networks"). Dividing the
weights and biases of its classifier does the same, so a calibrated network has no state of its own: an exit's answers
stay as they are, its confidences become comparable with the others', and the ensemble averages calibrated
probabilities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.configs import DataConfig, EarlyExitArgs, ForwardConfig
from sssd_zoo.data.inputs import input_channels, input_spec, prepared, storage_default
from sssd_zoo.data.loading import ImageData, has_labels, load_images, other_split, split_names
from sssd_zoo.data.several import open_data
from sssd_zoo.distributed.hardware import describe_machine, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.calibration import (
    ANSWERS_CHANGED,
    POINTS_LOST,
    Rules,
    accuracy,
    all_rules,
    average_cost,
    calibration_error,
    choose,
    early_answers,
    ensemble_answers,
    fit_temperatures,
    fold,
    useful_temperatures,
)
from sssd_zoo.evaluation.features import check_finite, network_features
from sssd_zoo.evaluation.protocol import check_classes, hold_out, record_reading, shared_rows
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.early_exit import command_line, network_source, report
from sssd_zoo.evaluation.timing import BATCH, ONE_BY_ONE, interleaved, measure_stages
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.models import MultiExit, StageCosts, classifiers, ensemble_logits, stage_costs
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.networks import config_for, load_network
from sssd_zoo.models.saving import save_network

EXITS = ("1", "2", "3", "4")
POINTS = 25  # of the curve of accuracy over multiply-adds


def load_classifier(args: EarlyExitArgs) -> Any:
    """The network to calibrate, with all its exits and their classifiers.

    Raises:
        UserError: if it lacks exits or classes.
    """
    model = load_network(args.model)
    if not isinstance(model, MultiExit) or not model.ensemble or model.num_classes < 2:
        raise UserError(
            f"'{args.model}' does not have four exits with classifiers: give a network of this package with trained "
            "heads, such as RUN/model of `sssd fit` on labelled images, or what `sssd linear --out` wrote"
        )
    return model.eval()


@dataclass(frozen=True)
class Sample:
    """Images to calibrate on, or to measure on.

    Attributes:
        data: where they lie.
        positions: int64 [N], which of them.
        origin: where they come from, for people.
    """

    data: ImageData
    positions: Tensor
    origin: str

    @classmethod
    def whole(cls, data: ImageData) -> "Sample":
        """All images of a split."""
        return cls(data, torch.arange(len(data)), f"{len(data):,} images, split {data.split}")

    @property
    def labels(self) -> Tensor | None:
        """Their classes, int64 [N], or None without labels."""
        return None if self.data.labels is None else torch.from_numpy(self.data.labels)[self.positions]


def choose_split(args: EarlyExitArgs) -> DataConfig:
    """The data with the split to read: as asked, else 'test' or 'validation', else without labels the only one.

    Raises:
        UserError: for labelled data with neither: the classifiers may have been trained on them.
    """
    config = DataConfig.of(args)
    if args.split is not None:
        return config
    names = split_names(config)
    split = next((name for name in ("test", "validation") if name in names), None)
    if split is None and has_labels(config):
        raise UserError(
            f"{args.data} has no split 'test' or 'validation' (it has {', '.join(names)}): give labelled images that "
            "the classifiers were not trained on, and name them by --split; or --unlabelled to leave the labels aside"
        )
    return replace(config, split=split)


def load_samples(args: EarlyExitArgs, model: Any) -> tuple[Sample, Sample]:
    """What to calibrate on, and what to measure on; both with labels, or both without.

    Raises:
        UserError: for labels of other classes than the network's, of one of the two only, or missing ones where the
            budget needs them; for images in both splits.
    """
    if args.unlabelled and args.points_lost is not None:
        raise UserError("--points_lost needs labels: drop --unlabelled, or give --answers_changed instead")
    config = config_for(args.model, model, choose_split(args))
    config = replace(config, storage_size=config.storage_size or model.storage_size)
    size = storage_default(input_spec(model).size)
    splits = [config.split] if args.calibration_split is None else [config.split, args.calibration_split]
    loaded: list[ImageData] = []
    for split in splits:
        config = other_split(config, loaded[0], split) if loaded else replace(config, split=split)
        data = load_images(config, default_size=size, require_labels=args.points_lost is not None)
        if data.labels is not None:
            check_classes(data, model, args.model)
        loaded.append(data)
    test, calibrating = loaded[0], loaded[-1]
    if args.calibration_split is not None:
        check_apart(test, calibrating, config)
    if (test.labels is None) != (calibrating.labels is None):
        raise UserError(
            f"of the splits {test.split} and {calibrating.split} only one has labels: give --unlabelled to calibrate "
            "without"
        )
    if args.calibration_split is not None:
        return Sample.whole(calibrating), Sample.whole(test)
    advice = "add images, or give others by --calibration_split"
    rest, drawn = hold_out(test, args.holdout, args.seed, purpose="calibrate on", advice=advice)
    how = "at random" if test.labels is None else "by class"
    return (
        Sample(test, drawn, f"{len(drawn):,} images drawn {how} from split {test.split}"),
        Sample(test, rest, f"the other {len(rest):,} images of split {test.split}"),
    )


def check_apart(test: ImageData, calibrating: ImageData, config: DataConfig) -> None:
    """Refuses to measure on images that calibrate: a figure from those is too good.

    Args:
        test: the images of --split.
        calibrating: the images of --calibration_split.
        config: which data; its split does not matter.

    Raises:
        UserError: if the two share rows of a split, or have the same images.
    """
    shared = shared_rows(open_data(config, progress=False), test.split, calibrating.split, test.name)
    if test.fingerprint == calibrating.fingerprint:
        shared = len(test)
    if shared:
        raise UserError(
            f"{shared} images of --split {test.split} of {test.name} are in --calibration_split {calibrating.split} "
            "too: give another --calibration_split, or none to calibrate on a part of --split"
        )


def all_logits(model: Any, data: ImageData, args: EarlyExitArgs) -> Tensor:
    """The logits of all exits for all images in order, float32 [4, N, C], computed in fp32.

    Raises:
        UserError: if some are not finite.
    """
    config = ForwardConfig(batch_size=args.batch_size, precision="fp32", device=args.device)
    features = network_features(model, data, config)
    with torch.no_grad():
        heads = [(head.weight.cpu(), head.bias.cpu()) for head in classifiers(model)]
        logits = torch.stack([F.linear(pooled, *head) for pooled, head in zip(features, heads, strict=True)])
    check_finite(logits)
    return logits


def sample_logits(model: Any, calibrating: Sample, measured: Sample, args: EarlyExitArgs) -> tuple[Tensor, Tensor]:
    """`all_logits` of both samples, of images in the same data from one pass over them."""
    logits = all_logits(model, calibrating.data, args)
    others = logits if measured.data is calibrating.data else all_logits(model, measured.data, args)
    return logits[:, calibrating.positions], others[:, measured.positions]


@torch.inference_mode()
def run_early(model: Any, sample: Sample, device: torch.device) -> tuple[Tensor, Tensor]:
    """The classes that `forward_early` itself answers in batches of 128, and the exits taken, both int64 [N]."""
    answers, taken = [], []
    for _, stored in sample.data.batches(sample.positions.split(BATCH)):
        early = model.forward_early(prepared(stored, model).to(device))
        answers.append(early.logits.argmax(1).cpu())
        taken.append(early.exit.cpu())
    return torch.cat(answers), torch.cat(taken)


def by_answer(logits: Tensor) -> dict[str, Tensor]:
    """Logits [N, C] of the exits '1' to '4' and of the 'ensemble', from those of all exits, [4, N, C]."""
    return {**dict(zip(EXITS, logits, strict=True)), "ensemble": ensemble_logits(list(logits))}


def early_exit(args: EarlyExitArgs) -> None:
    """`sssd early-exit`."""
    tune_cpu()
    check_budget(args)
    out = open_out(args, "early-exit")
    model = load_classifier(args)
    calibrating, measured = load_samples(args, model)
    labels = calibrating.labels
    by_agreement = labels is None or args.answers_changed is not None
    logits, test_logits = sample_logits(model, calibrating, measured, args)
    temperatures, calibration = calibrate(logits, labels, test_logits, measured.labels)
    fold(model, temperatures)
    scale = torch.tensor(temperatures).view(4, 1, 1)
    calibrated, test_calibrated = logits / scale, test_logits / scale

    device = next(model.parameters()).device
    size = input_spec(model).size
    macs = stage_costs(model, (input_channels(model), size, size))
    costs = macs
    if args.latency is not None:
        images = prepared(calibrating.data.gather(calibrating.positions[: 2 * ONE_BY_ONE]), model)
        costs = measure_stages(model, images.to(device), args.runs)
    target = ensemble_answers(calibrated) if labels is None or by_agreement else labels
    model.thresholds = choose(calibrated, target, costs, args, by_agreement=by_agreement)
    answers, taken = run_early(model, measured, device)

    results: dict[str, Any] = {
        **describe_run(args, model, calibrating, measured),
        "budget": asked_budget(args, by_agreement=by_agreement),
        "temperatures": temperatures,
        **calibration,
        "thresholds": model.thresholds,
        "exits_taken": [float((taken == number).double().mean()) for number in range(1, 5)],
        "answers": answer_table(test_calibrated, answers, taken, measured.labels, model.thresholds, macs),
        "curve": curve(all_rules(calibrated, target, macs), test_calibrated, measured.labels, macs),
    }
    write(out, model, measured, results, args)
    print(report(results))
    print(f"the calibrated network is in {out}, its report in {out / 'early_exit'}")


def given_budgets(args: EarlyExitArgs) -> dict[str, float]:
    """The budgets that the command was given, by their names."""
    values = {name: getattr(args, name) for name in ("points_lost", "answers_changed", "multiply_adds", "latency")}
    return {name: value for name, value in values.items() if value is not None}


def check_budget(args: EarlyExitArgs) -> None:
    """Refuses more than one budget."""
    if len(given_budgets(args)) > 1:
        raise UserError("give one budget: --points_lost, --answers_changed, --multiply_adds or --latency")


def asked_budget(args: EarlyExitArgs, *, by_agreement: bool) -> dict[str, float]:
    """The budget by its name, for the report."""
    default = {"answers_changed": ANSWERS_CHANGED} if by_agreement else {"points_lost": POINTS_LOST}
    return given_budgets(args) or default


def calibrate(
    logits: Tensor, labels: Tensor | None, test: Tensor, test_labels: Tensor | None
) -> tuple[list[float], dict[str, Any]]:
    """The exits' temperatures, and what the report says of them; 1 and nothing without labels.

    Args:
        logits: of the images to fit them on, float32 [4, N, C].
        labels: theirs, int64 [N].
        test: logits of the images that decide which temperatures stay, float32 [4, M, C].
        test_labels: theirs, int64 [M].
    """
    if labels is None or test_labels is None:
        return [1.0] * 4, {}
    fitted = fit_temperatures(logits, labels)
    temperatures = useful_temperatures(fitted, test, test_labels)
    calibrated = test / torch.tensor(temperatures).view(4, 1, 1)
    return temperatures, {"temperatures_fitted": fitted, **calibration_results(test, calibrated, test_labels)}


def describe_run(args: EarlyExitArgs, model: Any, calibrating: Sample, measured: Sample) -> dict[str, Any]:
    """What was calibrated, on what and by which command, for the report."""
    return {
        "model": architecture_of(model),
        "source": network_source(args.model),
        "command": command_line(args),
        "data": calibrating.data.name,
        "calibrated_on": calibrating.origin,
        "measured_on": measured.origin,
        "labelled": measured.labels is not None,
        "held_out": measured.data.split.split("[")[0] in ("test", "validation"),
        "seed": args.seed,
        "machine": describe_machine("fp32"),
    }


def calibration_results(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Any]:
    """Expected calibration errors, and the ensemble's accuracy before the temperatures, for the report.

    Args:
        before: logits as they were, float32 [4, N, C].
        after: the same, divided by the temperatures.
        labels: int64 [N].
    """
    uncalibrated = by_answer(before)
    errors = {
        name: {
            "before": calibration_error(uncalibrated[name], labels),
            "after": calibration_error(logits, labels),
        }
        for name, logits in by_answer(after).items()
    }
    return {
        "calibration_error": errors,
        "ensemble_accuracy_before": accuracy(uncalibrated["ensemble"].argmax(1), labels),
    }


def answer_table(
    logits: Tensor, early: Tensor, taken: Tensor, labels: Tensor | None, thresholds: Sequence[float], macs: StageCosts
) -> dict[str, dict[str, Any]]:
    """Accuracy, agreement with the ensemble and MACs of every exit, the ensemble and early exit, for the report.

    Args:
        logits: calibrated, of all exits, float32 [4, N, C].
        early: classes that early exit answers, int64 [N].
        taken: exits that it took for them, int64 [N].
        labels: int64 [N]; without them there are no accuracies.
        thresholds: of the exits 1 to 3.
        macs: of the network's parts.
    """
    table = {
        name: {**measured_answers(answer.argmax(1), logits, labels), "multiply_adds": macs.answer(name)}
        for name, answer in by_answer(logits).items()
    }
    table["early exit"] = {
        **measured_answers(early, logits, labels),
        "multiply_adds": average_cost(taken, thresholds, macs),
    }
    return table


def measured_answers(answers: Tensor, logits: Tensor, labels: Tensor | None) -> dict[str, float]:
    """In percent, how many answered classes, int64 [N], are right, where there are labels, and are the ensemble's."""
    agreement = {"agreement": accuracy(answers, ensemble_answers(logits))}
    return agreement if labels is None else {"accuracy": accuracy(answers, labels), **agreement}


def write(out: Path, model: Any, measured: Sample, results: dict[str, Any], args: EarlyExitArgs) -> None:
    """Writes the calibrated network, times it from there, and writes the report, which `results` then holds."""
    with atomic_dir(out, "early-exit") as folder:
        arch = architecture_of(model)
        record_reading(model, measured.data)
        save_network(folder, model, arch, label_names=model.pretrained_cfg.get("label_names"))
        images = measured.data.gather(measured.positions[torch.randperm(len(measured.positions))[: 20 * BATCH]])
        inputs = prepared(images, model).to(next(model.parameters()).device)
        results |= time_answers(model, str(folder), inputs, results["answers"], args)
        config = read_json(folder / "config.json")
        kept = ("budget", "data", "calibrated_on", "temperatures")
        write_json(folder / "config.json", {**config, "early_exit": {name: results[name] for name in kept}})
        write_json(folder / "early_exit" / "report.json", results)
        figures.early_exit_costs(results["answers"], results["curve"], folder / "early_exit" / "figure.png")
        atomic_write_text(folder / "early_exit" / "report.md", report(results))


def curve(rules: Rules, test: Tensor, test_labels: Tensor | None, macs: StageCosts) -> list[dict[str, Any]]:
    """Early exit at budgets between exit 1 and the whole network, the thresholds from one sample, measured on another.

    Args:
        rules: of the calibrating images, with costs in MACs.
        test: logits of the images to measure, [4, M, C].
        test_labels: theirs, int64 [M], if they have labels.
        macs: of the network's parts.
    """
    entries: list[dict[str, Any]] = []
    for budget in np.linspace(macs.answer("1"), macs.answer("ensemble"), POINTS):
        thresholds = rules.most_accurate(float(budget))
        assert thresholds is not None  # exit 1 alone keeps every one of these
        answers, taken = early_answers(test, thresholds)
        entry = {"thresholds": thresholds, **measured_answers(answers, test, test_labels)}
        entry["multiply_adds"] = average_cost(taken, thresholds, macs)
        if not entries or entries[-1]["thresholds"] != thresholds:
            entries.append(entry)
    return entries


def time_answers(
    model: Any, folder: str, images: Tensor, table: dict[str, dict[str, Any]], args: EarlyExitArgs
) -> dict[str, Any]:
    """Times early exit, the whole network and each exit's own network, and adds milliseconds to their rows of `table`.

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
    networks: dict[str, Callable[[Tensor], Any]] = {"early exit": model.forward_early, "ensemble": model}
    for name in EXITS:
        alone = load_network(folder, output=name).eval()
        networks[name] = alone.to(images.device, memory_format=torch.channels_last)
    speedup = {}
    for batch, group in ((1, ONE_BY_ONE), (BATCH, 1)):
        times = interleaved(networks, images, batch=batch, group=group, runs=args.runs, seed=args.seed)
        for name, seconds in times.items():
            table[name].setdefault("milliseconds", {})[str(batch)] = 1e3 * median(seconds)
        speedup[str(batch)] = {
            name: median(other / early for other, early in zip(times[name], times["early exit"], strict=True))
            for name in ("ensemble", "4")
        }
    return {"speedup": speedup, "runs": args.runs}
