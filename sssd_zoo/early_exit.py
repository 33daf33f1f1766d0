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

import itertools
import statistics as numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from sssd_zoo import report
from sssd_zoo.config import EarlyExitArgs, ForwardConfig
from sssd_zoo.data.inputs import prepared as prepared  # callers find it here
from sssd_zoo.data.layout import composed
from sssd_zoo.data.loading import DataConfig, ImageData, load_images, split_names
from sssd_zoo.data.sources import short_name
from sssd_zoo.engine import tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.evaluate import network_features
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.hub import save_network
from sssd_zoo.models import SSSDResNet, StageCosts, ensemble_logits, stage_costs
from sssd_zoo.networks import channels, load_network, statistics, storage_default
from sssd_zoo.run_folder import atomic_dir, open_out
from sssd_zoo.runs import part
from sssd_zoo.stages import machine_words
from sssd_zoo.text import code, markdown

BINS = 15  # of the expected calibration error, as in Guo et al.
LEVELS = 48  # steps between the quantiles of its confidences tried as an exit's threshold: with 1, 50 x 50 x 50 rules
ASKED = tuple(itertools.product((True, False), repeat=3))  # which of the exits 1 to 3 are run at all
ONE_BY_ONE = 32  # images that a timed run at batch 1 goes through
POINTS_LOST = 0.5  # the budget where none is given
MARGIN = 1.645  # standard errors added to the points lost on the calibrating images: a one-sided bound of 95 percent
BATCH = 128  # the other batch size that is timed


def fit_temperatures(logits: Tensor, labels: Tensor) -> list[float]:
    """The temperature of each exit that makes its negative log-likelihood least, by L-BFGS on its logarithm.

    Args:
        logits: float [E, N, C].
        labels: int64 [N].
    """
    temperatures = []
    for own in logits.detach().double():
        log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

        def loss(own: Tensor = own, log_temperature: Tensor = log_temperature) -> float:
            log_temperature.grad = None
            value = F.cross_entropy(own / log_temperature.exp(), labels)
            value.backward()
            return value.item()

        optimiser.step(loss)
        temperatures.append(log_temperature.exp().item())
    return temperatures


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in 0..1: the mean distance of confidence and accuracy in 15 equal bins of confidence.

    Args:
        logits: float [N, C].
        labels: int64 [N].
    """
    return float(
        multiclass_calibration_error(logits.softmax(1), labels, num_classes=logits.shape[1], n_bins=BINS, norm="l1")
    )


def classifiers(model: Any) -> list[Any]:
    """The classifiers of a network with all exits, in order."""
    return [model.exit1.fc, model.exit2.fc, model.exit3.fc, model.fc]


@torch.no_grad()
def fold(model: Any, temperatures: Sequence[float]) -> None:
    """Divides each exit's classifier by its temperature, so that the network's logits are calibrated."""
    for head, temperature in zip(classifiers(model), temperatures, strict=True):
        head.weight.div_(temperature)
        head.bias.div_(temperature)


def exits_taken(confidences: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which exit each image leaves at, int64 [N] in 1..4; the rule of `forward_early`.

    Args:
        confidences: greatest softmax probabilities of the exits 1 to 3, or of all four, float [3 or 4, N].
        thresholds: of the exits 1 to 3.
    """
    leaves = confidences[:3] > torch.tensor(thresholds).unsqueeze(1)
    last = torch.ones_like(leaves[:1])
    return torch.cat([leaves, last]).to(torch.uint8).argmax(0) + 1


def last_answers(logits: Tensor, thresholds: Sequence[float]) -> Tensor:
    """What images are answered that no exit is sure of, int64 [N]: the ensemble of the exits that were asked.

    Args:
        logits: of all exits, float [4, N, C].
        thresholds: of the exits 1 to 3; one at 1 is not asked.
    """
    asked = [own for own, threshold in zip(logits, [*thresholds, 0], strict=True) if threshold < 1]
    return ensemble_logits(asked).argmax(1)


def early_answers(logits: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The classes that `forward_early` answers, and the exits taken, both int64 [N].

    Args:
        logits: of all exits, float [4, N, C].
        thresholds: of the exits 1 to 3.
    """
    taken = exits_taken(logits.softmax(2).amax(2), thresholds)
    answers = torch.stack([*logits[:3].argmax(2), last_answers(logits, thresholds)])
    return answers.gather(0, taken.unsqueeze(0) - 1)[0], taken


def average_cost(taken: Tensor, thresholds: Sequence[float], costs: StageCosts) -> float:
    """The mean cost of an image whose batch left at the exits `taken`; heads whose threshold is 1 are not run."""
    total = 0.0
    for number in range(1, 5):
        runs = number == 4 or thresholds[number - 1] < 1
        reach = float((taken >= number).double().mean())
        total += reach * (costs.stages[number - 1] + runs * costs.heads[number - 1])
    return total


@dataclass(frozen=True)
class Rules:
    """Every rule of early exit on a grid of thresholds, and what it does on the images it was made of.

    Attributes:
        candidates: float32 [3, L + 2], the thresholds of the exits 1 to 3: quantiles of the confidences from 0 to 1,
            of which the last lets no image leave, then 1, at which the exit is not asked.
        lost: float64 [L + 2, L + 2, L + 2], by the places of the three thresholds: points of accuracy lost against the
            full network, that is against the final classifier or the ensemble, whichever is more accurate.
        error: float64 of the same shape, the standard error of that difference, which is one of paired answers.
        cost: float64 of the same shape, the mean cost of an image.
    """

    candidates: Tensor
    lost: Tensor
    error: Tensor
    cost: Tensor

    def cheapest(self, lost: float) -> list[float] | None:
        """The thresholds of the least cost that lose at most so many points with 95 percent confidence, if any.

        Without that the cheapest of so many rules is one that the images happen to favour, and loses more on others.
        """
        return self._best(-self.cost, self.lost + MARGIN * self.error <= lost + 1e-9)

    def most_accurate(self, cost: float) -> list[float] | None:
        """The most accurate thresholds of at most this cost, if any."""
        return self._best(-self.lost, self.cost <= cost * (1 + 1e-9))

    def _best(self, value: Tensor, allowed: Tensor) -> list[float] | None:
        if not allowed.any():
            return None
        place = int(torch.where(allowed, value, -torch.inf).argmax())
        places = np.unravel_index(place, value.shape)
        return [float(own[where]) for own, where in zip(self.candidates, places, strict=True)]


def full_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """What the full network answers, int64 [N]: the final classifier or the ensemble, whichever is more accurate."""
    final, ensemble = logits[3].argmax(1), ensemble_logits(list(logits)).argmax(1)
    return max((final, ensemble), key=lambda answers: accuracy(answers, labels))


def all_rules(logits: Tensor, labels: Tensor, costs: StageCosts, levels: int = LEVELS) -> Rules:
    """Measures early exit at every triple of candidate thresholds, exactly, by cumulative histograms.

    Args:
        logits: calibrated, float32 [4, N, C].
        labels: int64 [N].
        costs: of the network's parts.
        levels: L, steps between the quantiles that are tried.
    """
    confidences = logits.softmax(2).amax(2)[:3].contiguous()
    quantiles = torch.quantile(confidences, torch.linspace(0, 1, levels + 1), dim=1).T
    quantiles = quantiles.clamp(max=1 - torch.finfo(torch.float32).eps)  # 1 itself means that the exit is not asked
    candidates = torch.cat([quantiles, torch.ones(3, 1)], dim=1)
    candidates[:, 0] = 0  # at which all leave
    # An image leaves at the candidates below its confidence: those at the places 0 to bucket - 1.
    buckets = torch.searchsorted(candidates, confidences)
    size, count = levels + 2, len(labels)
    cell = (buckets[0] * size + buckets[1]) * size + buckets[2]

    def staying(weights: Tensor) -> list[Tensor]:
        """The weight of the images still there before exit 1, and after the exits 1, 2 and 3, by the thresholds."""
        histogram = torch.bincount(cell, weights.double(), minlength=size**3).view(size, size, size)
        sums = histogram.cumsum(0).cumsum(1).cumsum(2)
        return [sums[-1:, -1:, -1:], sums[:, -1:, -1:], sums[:, :, -1:], sums]

    full = full_answers(logits, labels) == labels
    # What is left at the end is answered by the exits that were asked, so by which thresholds are 1: eight cases.
    cases = {asked: last_answers(logits, [0.0 if own else 1.0 for own in asked]) == labels for asked in ASKED}

    def answered(right: Tensor, last: Mapping[tuple[bool, ...], Tensor]) -> Tensor:
        """The share of images that are answered right, by the exit each leaves at or by those asked on the way."""
        parts = [staying(own) for own in right]
        total = sum(parts[i][i] - parts[i][i + 1] for i in range(3))
        left = torch.empty(size, size, size, dtype=torch.float64)
        for asked, own in last.items():
            place = tuple(slice(0, -1) if is_asked else slice(-1, None) for is_asked in asked)
            left[place] = staying(own)[3][place]
        return (total + left) / count

    right = logits[:3].argmax(2) == labels
    lost = full.double().mean() - answered(right, cases)
    gains = answered(right & ~full, {asked: own & ~full for asked, own in cases.items()})
    # The difference of an image is 1, 0 or -1; its mean square is the share of images that one of the two has right.
    error = ((2 * gains + lost - lost.square()).clamp(min=0) / count).sqrt()

    reached, cost = staying(torch.ones(count)), torch.zeros(size, size, size, dtype=torch.float64)
    for i, (stage, head) in enumerate(zip(costs.stages, costs.heads, strict=True)):
        heads = torch.full((size,), float(head), dtype=torch.float64)
        if i < 3:
            heads[-1] = 0  # at a threshold of 1 the head is not run
        own = heads.view([size if axis == i else 1 for axis in range(3)]) if i < 3 else heads[-1]
        cost = cost + reached[i] / count * (stage + own)
    return Rules(candidates, 100 * lost, 100 * error, cost)


def choose(rules: Rules, args: EarlyExitArgs) -> list[float]:
    """The thresholds for the budget asked for.

    Args:
        rules: with costs in what the budget is in: seconds for a latency, else multiply-adds.
        args: of the command.

    Raises:
        UserError: for a budget that no thresholds keep.
    """
    if args.multiply_adds is not None or args.latency is not None:
        scale, unit = (1e-6, "million multiply-adds") if args.latency is None else (1e3, "milliseconds")
        budget = args.multiply_adds if args.latency is None else args.latency
        assert budget is not None  # one of the two
        if (found := rules.most_accurate(budget / scale)) is None:
            least = scale * float(rules.cost.min())
            raise UserError(
                f"no thresholds keep to {budget} {unit} an image: exit 1 alone takes {least:.3g}; give more"
            )
        return found
    lost = POINTS_LOST if args.points_lost is None else args.points_lost
    if (found := rules.cheapest(lost)) is None:
        least = float((rules.lost + MARGIN * rules.error).min())
        raise UserError(
            f"no thresholds lose at most {lost} points with 95 percent confidence: the least is {least:.2f}; give more "
            "images to calibrate on (--holdout, --calibration_split), or more --points_lost"
        )
    return found


@torch.inference_mode()
def measure_stages(model: Any, images: Tensor, runs: int) -> StageCosts:
    """Seconds of every stage and head for one image, the medians over images.

    Args:
        model: with all exits, in eval mode.
        images: float [N, 3, S, S], on its device; each is run alone, `runs` times.
        runs: over the images.
    """
    heads = [
        nn.Sequential(model.exit1, model.global_pool, model.exit1.fc),
        nn.Sequential(model.exit2, model.global_pool, model.exit2.fc),
        nn.Sequential(model.exit3, model.global_pool, model.exit3.fc),
        nn.Sequential(model.global_pool, model.fc),
    ]
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    stages = [nn.Sequential(stem, model.layer1), model.layer2, model.layer3, model.layer4]
    times: list[list[float]] = [[] for _ in range(8)]
    for image in images.repeat(runs, 1, 1, 1).split(1):
        x = image
        for number, (stage, head) in enumerate(zip(stages, heads, strict=True)):
            seconds, x = timed(stage, x)
            times[number].append(seconds)
            times[4 + number].append(timed(head, x)[0])
    medians = [numbers.median(own) for own in times]
    return StageCosts(tuple(medians[:4]), tuple(medians[4:]))


def timed(function: Callable[[Tensor], Any], x: Tensor) -> tuple[float, Any]:
    """Seconds that a call takes, on the GPU too, and its result."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def interleaved(
    ways: Mapping[str, Callable[[Tensor], Any]], images: Tensor, *, batch: int, group: int, runs: int, seed: int
) -> dict[str, list[float]]:
    """Seconds of each way for one image, run by run: all ways in turn, in one process, on the same images.

    Args:
        ways: networks by name.
        images: float [N, 3, S, S].
        batch: images in a call.
        group: calls in a run, whose time is taken as one: single images differ by the exit they take.
        runs: of every way, after one that is not counted.
        seed: of the images of each run.
    """
    generator = torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        batches = images[torch.randint(len(images), (group * batch,), generator=generator)].split(batch)
        for name, way in ways.items():
            seconds = sum(timed(way, own)[0] for own in batches)
            if run:
                times[name].append(seconds / (group * batch))
    return times


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
    config = part(args, DataConfig)
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


def check_classes(data: ImageData, model: Any, name: str) -> None:
    """Refuses labelled images of other classes than a network's.

    Raises:
        UserError: naming both.
    """
    assert data.class_names is not None  # callers load with require_labels
    known = [composed(name) for name in model.pretrained_cfg.get("label_names") or data.class_names]
    if len(data.class_names) != model.num_classes or known != data.class_names:
        raise UserError(
            f"the {len(data.class_names)} classes of {data.name} ({data.split}) are not the {model.num_classes} of "
            f"'{name}': give the data that its classifiers were trained for"
        )


def exit_logits(model: Any, data: ImageData, args: EarlyExitArgs) -> Tensor:
    """The logits of all exits for all images in order, float32 [4, N, C], computed in fp32."""
    config = ForwardConfig(batch_size=args.batch_size, precision="fp32", device=args.device)
    features = network_features(model, data, config)
    with torch.no_grad():
        heads = [(head.weight.cpu(), head.bias.cpu()) for head in classifiers(model)]
        return torch.stack([F.linear(own, *head) for own, head in zip(features, heads, strict=True)])


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of answered classes, int64 [N]."""
    return float((answers == labels).double().mean() * 100)


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
        "machine": machine_words("fp32"),
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
        report.early_exit_costs(table, results["curve"], folder / "early_exit" / "figure.png")
        atomic_write_text(folder / "early_exit" / "report.md", words(results))
    print(words(results))
    print(f"the calibrated network is in {out}, its report in {out / 'early_exit'}")


def answer_cost(name: str, costs: StageCosts) -> float:
    """The cost of the answer of an exit '1' to '4' alone, or of the 'ensemble'."""
    if name == "ensemble":
        return sum(costs.stages) + sum(costs.heads)
    number = int(name)
    return sum(costs.stages[:number]) + costs.heads[number - 1]


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


def command(args: EarlyExitArgs) -> str:
    """The command line of these arguments, without those at their defaults; paths without the folders above them."""
    words_ = [f"sssd early-exit {Path(args.model).name if Path(args.model).exists() else args.model}"]
    words_ += [f"--data {short_name(args.data)}", "--out OUT"]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name not in ("model", "data", "out", "overwrite") and value != field.default:
            words_.append(f"--{field.name} {value}")
    return " ".join(words_)


def words(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    table, errors, speedup = results["answers"], results["calibration_error"], results["speedup"]
    ((budget, value),) = results["budget"].items()
    asked = {
        "points_lost": f"at most {value} points lost, with 95 percent confidence",
        "multiply_adds": f"at most {value} million multiply-adds an image",
        "latency": f"at most {value} ms an image, one by one",
    }[budget]
    best = max(table["4"]["accuracy"], table["ensemble"]["accuracy"])
    shares = ", ".join(f"{share:.1%}" for share in results["exits_taken"])
    cells = []
    for name in ("1", "2", "3", "4", "ensemble", "early exit"):
        row = table[name]
        error = [f"{100 * errors[name][when]:.2f}" for when in ("before", "after")] if name in errors else ["", ""]
        cells.append(
            [
                f"exit {name}" if name.isdigit() else name,
                f"{row['accuracy']:.2f}",
                f"{row['multiply_adds'] / 1e6:.1f}",
                *(
                    f"{row['milliseconds'][batch] / table['ensemble']['milliseconds'][batch]:.2f}"
                    for batch in ("1", "128")
                ),
                *error,
            ]
        )
    head = ["answer of", "accuracy (%)", "multiply-adds (million)", "time at batch 1", "time at batch 128"]
    head += ["ECE before (%)", "ECE after (%)"]
    lines = [
        "# Early exit",
        "",
        f"- **Network**: {code(results['model'])}",
        f"- **Calibrated on**: {markdown(results['data'])}, {markdown(results['calibrated_on'])}",
        f"- **Measured on**: {markdown(results['measured_on'])}, on which nothing was calibrated",
        f"- **Budget**: {asked}, on the calibrating images",
        f"- **Temperatures** of the exits, folded into the classifiers: "
        f"{', '.join(f'{value:.3f}' for value in results['temperatures'])}",
        f"- **Thresholds** of the exits 1 to 3: {', '.join(f'{value:.4f}' for value in results['thresholds'])}; images "
        f"that left at exits 1 to 4: {shares}",
        f"- **Accuracy lost** on the measured images against the more accurate of exit 4 and the ensemble: "
        f"{best - table['early exit']['accuracy']:.2f} points",
        *(
            f"- **Throughput at batch {batch}**: {speedup[batch]['ensemble']:.2f} times that of the whole network (all "
            f"exits, the ensemble), {speedup[batch]['4']:.2f} times that of the plain trunk (exit 4 alone)"
            for batch in ("1", "128")
        ),
        f"- **Machine**: {markdown(results['machine'])}; medians of {results['runs']} runs, all networks in turn in "
        "one process",
        f"- **Command**: {code(results['command'])}",
        "",
        "![Accuracy against multiply-adds and against time](figure.png)",
        "",
        *report.table(head, cells),
        "",
        "An image that no exit is sure of is answered by the ensemble of the exits that it was asked at. Time is for "
        "one image, as a share of the whole network's; exits 1 to 4 are networks of their own (`output=1`...). "
        f"ECE is the expected calibration error over {BINS} bins of confidence, before and after the temperatures; the "
        f"ensemble's accuracy was {results['ensemble_accuracy_before']:.2f} before.",
    ]
    return "\n".join(lines) + "\n"
