"""Early exit: temperatures, and thresholds for a budget."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from sssd_zoo.configs import EarlyExitArgs
from sssd_zoo.errors import UserError
from sssd_zoo.models import StageCosts, ensemble_logits

BINS = 15  # of the expected calibration error, as in Guo et al.

LEVELS = 48  # steps between the quantiles of its confidences tried as an exit's threshold: with 1, 50 x 50 x 50 rules

ASKED = tuple(itertools.product((True, False), repeat=3))  # which of the exits 1 to 3 are run at all

POINTS_LOST = 0.5  # the budget where none is given

MARGIN = 1.645  # standard errors added to the points lost on the calibrating images: a one-sided bound of 95 percent


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


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of answered classes, int64 [N]."""
    return float((answers == labels).double().mean() * 100)
