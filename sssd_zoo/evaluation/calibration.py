"""Early exit: temperatures, and thresholds for a budget."""

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.configs import EarlyExitArgs
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.paired_test import p_value
from sssd_zoo.models import (
    StageCosts,
    classifiers,
    confidence,
    early_logits,
    ensemble_logits,
    exits_asked,
    exits_taken,
)

BINS = 15  # of the expected calibration error, as in Guo et al.

LEVELS = (
    48  # steps between the quantiles of its confidences that an exit's threshold is tried at; with 1, 50 to the 3rd
)

POINTS_LOST = 0.5  # the budget where none is given, in points of accuracy

ANSWERS_CHANGED = 0.5  # the same without labels, in percent of the ensemble's answers

SHARED: list[float] = (1 - np.logspace(-4, 0, 161)).tolist()  # thresholds, tested in this order

CONFIDENCE = 0.95  # that a budget of lost points or changed answers is kept on other images of the same kind


def fit_temperatures(logits: Tensor, labels: Tensor) -> list[float]:
    """The temperature of each exit that minimises its negative log-likelihood, found by L-BFGS on its logarithm.

    Args:
        logits: float [E, N, C].
        labels: int64 [N].
    """
    temperatures = []
    for exit_logits in logits.detach().double():
        log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")
        optimiser.step(partial(_likelihood_step, log_temperature, exit_logits, labels))
        temperatures.append(log_temperature.exp().item())
    return temperatures


def _likelihood_step(log_temperature: Tensor, logits: Tensor, labels: Tensor) -> float:
    """The negative log-likelihood of one exit, and its gradient in `log_temperature.grad`."""
    log_temperature.grad = None
    loss = F.cross_entropy(logits / log_temperature.exp(), labels)
    loss.backward()
    return loss.item()


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in 0..1: the mean distance of confidence and accuracy in 15 equal bins of confidence.

    Args:
        logits: float [N, C].
        labels: int64 [N].
    """
    # Imported here, as it brings in transformers where that is installed, which takes seconds.
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(
        multiclass_calibration_error(logits.softmax(1), labels, num_classes=logits.shape[1], n_bins=BINS, norm="l1")
    )


def useful_temperatures(temperatures: Sequence[float], logits: Tensor, labels: Tensor) -> list[float]:
    """The temperatures that lower the calibration error, 1 in place of the others.

    Taken exit by exit: one stays if it lowers the error of its exit, and does not raise that of the ensemble with the
    temperatures that stayed before it. So none of the five errors rises.

    Args:
        temperatures: of the four exits.
        logits: of images that the temperatures were not fitted on, float [4, N, C].
        labels: theirs, int64 [N].
    """
    kept = [1.0] * len(temperatures)
    scaled = list(logits)
    for number, temperature in enumerate(temperatures):
        tried = [*scaled]
        tried[number] = logits[number] / temperature
        lowers = calibration_error(tried[number], labels) < calibration_error(logits[number], labels)
        before, after = (calibration_error(ensemble_logits(exits), labels) for exits in (scaled, tried))
        if lowers and after <= before:
            kept[number], scaled = temperature, tried
    return kept


@torch.no_grad()
def fold(model: Any, temperatures: Sequence[float]) -> None:
    """Divides each exit's classifier by its temperature, so that the network's logits are calibrated."""
    for head, temperature in zip(classifiers(model), temperatures, strict=True):
        head.weight.div_(temperature)
        head.bias.div_(temperature)


def early_answers(logits: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The classes that `forward_early` answers, and the exits taken, both int64 [N]; see `early_logits`."""
    early = early_logits(logits, thresholds)
    return early.logits.argmax(1), early.exit


def average_cost(taken: Tensor, thresholds: Sequence[float], costs: StageCosts) -> float:
    """The mean cost of images that left at the exits `taken`, int64 [N]; heads whose threshold is 1 are not run."""
    total, asked = 0.0, exits_asked(thresholds)
    for number in range(1, 5):
        reach = float((taken >= number).double().mean())
        total += reach * (costs.stages[number - 1] + (number in asked) * costs.heads[number - 1])
    return total


@dataclass(frozen=True)
class Rules:
    """What every triple of candidate thresholds does on the calibrating images.

    Attributes:
        candidates: float32 [3, L + 2], the thresholds of the exits 1 to 3: quantiles of the confidences from 0 to 1,
            the last of which lets no image leave, then 1, at which the exit is not asked.
        lost: float64 [L + 2, L + 2, L + 2], by the indices of the three thresholds: points of accuracy lost against
            the ensemble of all exits.
        cost: float64 of the same shape, the mean cost of an image.
    """

    candidates: Tensor
    lost: Tensor
    cost: Tensor

    def most_accurate(self, cost: float) -> list[float] | None:
        """The most accurate thresholds of at most this cost, if any."""
        return self._best(-self.lost, self.cost <= cost * (1 + 1e-9))

    def _best(self, value: Tensor, allowed: Tensor) -> list[float] | None:
        if not allowed.any():
            return None
        places = np.unravel_index(int(torch.where(allowed, value, -torch.inf).argmax()), value.shape)
        return [float(thresholds[i]) for thresholds, i in zip(self.candidates, places, strict=True)]


class ThresholdGrid:
    """Sums over the images that are still in the network, for every triple of candidate thresholds at once.

    An image leaves an exit at all candidates below its confidence, so what stays is a cumulative histogram over the
    three exits: exact, and one pass for all S x S x S triples, where S is the number of candidates.

    Attributes:
        candidates: float32 [3, S], thresholds of the exits 1 to 3, rising; at the last, 1, an exit is not asked.
        count: N, the number of images.

    Example:
        Two images, and the candidates 0, 0.5 and 1 for each exit. Exit 1 is 40 and 90 percent sure of them:

        >>> candidates = torch.tensor([[0.0, 0.5, 1.0]] * 3)
        >>> grid = ThresholdGrid(candidates, torch.tensor([[0.4, 0.9], [0.7, 0.9], [0.8, 0.9]]))

        Of two images, both leave exit 1 at a threshold of 0, the second at 0.5, and none at 1:

        >>> before1, after1, after2, after3 = grid.staying(torch.ones(2))
        >>> before1.flatten().tolist(), after1.flatten().tolist()
        ([2.0], [0.0, 1.0, 2.0])

        The first, which stays at exit 1's 0.5, leaves exit 2 at a threshold of 0.5, so nothing is left; both stay at
        thresholds of 1:

        >>> after2[1].flatten().tolist(), after2[2].flatten().tolist()
        ([0.0, 0.0, 1.0], [0.0, 0.0, 2.0])

        Stages cost 10 here and heads 1. At thresholds of 0 both images run one of each; at 0.5 the first runs two of
        each; thresholds of 1 run all stages, and the last head alone:

        >>> cost = grid.cost(StageCosts((10, 10, 10, 10), (1, 1, 1, 1)))
        >>> float(cost[0, 0, 0]), float(cost[1, 0, 0]), float(cost[2, 2, 2])
        (11.0, 16.5, 41.0)
    """

    def __init__(self, candidates: Tensor, confidences: Tensor) -> None:
        """Sorts images by the candidates that they leave at.

        Args:
            candidates: see the class.
            confidences: of the exits 1 to 3, float32 [3, N].
        """
        self.candidates, self.count = candidates, confidences.shape[1]
        self._size = candidates.shape[1]
        # An image leaves at the candidates below its confidence: those with the indices 0 to bucket - 1.
        buckets = torch.searchsorted(candidates, confidences)
        self._cells = (buckets[0] * self._size + buckets[1]) * self._size + buckets[2]

    @classmethod
    def of_quantiles(cls, confidences: Tensor, levels: int) -> "ThresholdGrid":
        """A grid of `levels` + 1 quantiles of each exit's confidences, and 1."""
        quantiles = torch.quantile(confidences, torch.linspace(0, 1, levels + 1), dim=1).T
        quantiles = quantiles.clamp(max=1 - torch.finfo(torch.float32).eps)  # 1 itself means that the exit is not asked
        candidates = torch.cat([quantiles, torch.ones(3, 1)], dim=1)
        candidates[:, 0] = 0  # at which all leave
        return cls(candidates, confidences)

    def staying(self, weights: Tensor) -> list[Tensor]:
        """Sums of weights, [N], over the images still there before exit 1, and after the exits 1, 2 and 3.

        Returns:
            Float64 [1, 1, 1], [S, 1, 1], [S, S, 1] and [S, S, S], by the thresholds of the exits passed.
        """
        size = self._size
        histogram = torch.bincount(self._cells, weights.double(), minlength=size**3).view(size, size, size)
        sums = histogram.cumsum(0).cumsum(1).cumsum(2)
        return [sums[-1:, -1:, -1:], sums[:, -1:, -1:], sums[:, :, -1:], sums]

    def fraction(self, at_exits: Tensor, at_end: Mapping[tuple[bool, ...], Tensor]) -> Tensor:
        """The fraction of the images whose answer has a property, float64 [S, S, S].

        Args:
            at_exits: whether it has it where it is the exit's, bool [3, N].
            at_end: whether it has it where no exit is sure, bool [N], by which of the exits 1 to 3 are asked.
        """
        stays = [self.staying(column) for column in at_exits]
        left = sum(stays[i][i] - stays[i][i + 1] for i in range(3))
        ended = torch.empty((self._size,) * 3, dtype=torch.float64)
        for asked, column in at_end.items():
            region = tuple(slice(0, -1) if is_asked else slice(-1, None) for is_asked in asked)
            ended[region] = self.staying(column)[3][region]
        return (left + ended) / self.count

    def cost(self, costs: StageCosts) -> Tensor:
        """The mean cost of an image, float64 [S, S, S]; the head of an exit at the threshold 1 is not run."""
        reached = self.staying(torch.ones(self.count))
        cost = torch.zeros((self._size,) * 3, dtype=torch.float64)
        for i, (stage, head) in enumerate(zip(costs.stages, costs.heads, strict=True)):
            heads = torch.full((self._size,), float(head), dtype=torch.float64)
            if i < 3:
                heads[-1] = 0
                heads = heads.view([self._size if axis == i else 1 for axis in range(3)])
            else:
                heads = heads[-1]
            cost = cost + reached[i] / self.count * (stage + heads)
        return cost


def ensemble_answers(logits: Tensor) -> Tensor:
    """The classes that the ensemble answers, int64 [N], from the logits of all exits, [E, N, C]."""
    return ensemble_logits(list(logits)).argmax(1)


def all_rules(logits: Tensor, labels: Tensor, costs: StageCosts, levels: int = LEVELS) -> Rules:
    """Measures early exit at every triple of candidate thresholds, exactly.

    Args:
        logits: calibrated, float32 [4, N, C].
        labels: int64 [N].
        costs: of the network's parts.
        levels: L, steps between the quantiles that are tried.
    """
    grid = ThresholdGrid.of_quantiles(confidence(logits)[:3].contiguous(), levels)
    right = logits[:3].argmax(2) == labels
    # What no exit is sure of is answered by those that were asked: eight cases, by which thresholds are 1.
    right_at_end = {}
    for asked in itertools.product((True, False), repeat=3):
        right_at_end[asked] = ensemble_answers(logits[torch.tensor([*asked, True])]) == labels

    lost = right_at_end[True, True, True].double().mean() - grid.fraction(right, right_at_end)
    return Rules(grid.candidates, 100 * lost, grid.cost(costs))


def choose(
    logits: Tensor, target: Tensor, costs: StageCosts, args: EarlyExitArgs, *, by_agreement: bool
) -> list[float]:
    """The thresholds of exits 1 to 3 for the budget asked for.

    Args:
        logits: calibrated, of the calibrating images, float32 [4, N, C].
        target: their classes, int64 [N]; the ensemble's answers where `by_agreement`.
        costs: of the network's parts in what the budget is in: seconds for a latency, else MACs.
        args: of the command.
        by_agreement: no answers are right but the ensemble's.

    Raises:
        UserError: for a budget that no thresholds keep.
    """
    if args.latency is not None:
        return _within(all_rules(logits, target, costs), args.latency, 1e3, "milliseconds")
    if args.multiply_adds is not None:
        return _within(all_rules(logits, target, costs), args.multiply_adds, 1e-6, "million MACs")
    asked, default = (args.answers_changed, ANSWERS_CHANGED) if by_agreement else (args.points_lost, POINTS_LOST)
    return [shared_threshold(logits, target, default if asked is None else asked, by_agreement=by_agreement)] * 3


def shared_threshold(logits: Tensor, target: Tensor, budget: float, *, by_agreement: bool) -> float:
    """The lowest threshold, for the exits 1 to 3 alike, that keeps a budget of lost points with 95 percent confidence.

    A threshold that is best on these images is partly so by chance, the more so the more are tried, and loses more on
    others. So the thresholds stand in an order that does not depend on the images, from sure to unsure, and are tested
    one after the other until the first fails: then the chance that one which passed breaks the budget is 5 percent
    however many were tested (fixed sequence testing: Angelopoulos et al. 2021, "Learn then Test").
    Thresholds of their own for each exit would be too many for such an order.

    Args:
        logits: calibrated, float32 [4, N, C].
        target: int64 [N].
        budget: in percentage points of accuracy, or in percent of changed answers.
        by_agreement: `target` are the ensemble's answers.

    Raises:
        UserError: if no threshold passes.
    """
    confidences = confidence(logits)
    # What exit 1, 2, 3 and, where none of them is sure, the ensemble has right.
    right = torch.cat([logits[:3].argmax(2), ensemble_answers(logits)[None]]) == target

    def keeps(threshold: float, percent: float) -> bool:
        answered = right.gather(0, exits_taken(confidences, [threshold] * 3)[None] - 1)[0]
        lost, won = int((right[3] & ~answered).sum()), int((answered & ~right[3]).sum())
        return p_value(lost, won, len(target), percent / 100, one_way=by_agreement) <= 1 - CONFIDENCE

    passed: float | None = None
    for threshold in SHARED:
        if not keeps(threshold, budget):
            break
        passed = threshold
    if passed is not None:
        return passed
    what, unit = ("change", "percent of the answers") if by_agreement else ("lose", "points of accuracy")
    failing = bisect_left(range(1, 1000), True, key=lambda tenths: keeps(SHARED[0], tenths / 10))
    possible = f"{(failing + 1) / 10:g}"  # the least in tenths that passes as a budget, as 100 does
    raise UserError(
        f"{len(target):,} images do not show that early exit would {what} at most {budget:g} {unit}: even at its "
        f"highest threshold it may {what} up to {possible}; calibrate on more images (--holdout, --calibration_split), "
        f"or give {'--answers_changed' if by_agreement else '--points_lost'} {possible} or more"
    )


def _within(rules: Rules, budget: float, scale: float, unit: str) -> list[float]:
    """The most accurate thresholds of at most this cost, in a unit of which `scale` make one of the rules'."""
    if (thresholds := rules.most_accurate(budget / scale)) is None:
        least = scale * float(rules.cost.min())
        raise UserError(
            f"no thresholds stay within {budget} {unit} per image: exit 1 alone takes {least:.3g}; give more"
        )
    return thresholds


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of answered classes, int64 [N]."""
    return float((answers == labels).double().mean() * 100)
