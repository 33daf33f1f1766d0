"""The exact test of a budget of early exit: could a rule that breaks it have lost so few of these images by luck?

An image is lost where early exit has an answer wrong that the ensemble has right, and won the other way round.
"""

import numpy as np
from numpy.typing import NDArray

NUISANCE = 0.001  # the chance that the rate of wins lies outside the interval that is searched
POINTS = 64  # of that interval


def p_value(lost: int, won: int, count: int, budget: float, *, one_way: bool) -> float:
    """The chance that a rule whose net loss is the budget does as well as this one, or better, on other images.

    Where no image can be won, that is the binomial chance of so few losses. Else losses and wins are multinomial, and
    "better" is a greater distance between budget and net loss in standard errors, by the estimate of Agresti and Min
    (2005, "Simple improved confidence intervals for comparing matched proportions"), which adds half an image to each
    of the four cases. That chance depends on the unknown rate of wins: it is the greatest over a Clopper-Pearson
    interval of the rate, plus the chance that the rate lies outside (Berger and Boos 1994, "P values maximized over a
    confidence set for the nuisance parameter"). So it is never too low, however few images differ, as the normal
    distribution is.

    Args:
        lost: images that are lost.
        won: images that are won; 0 with `one_way`.
        count: N, images in all.
        budget: net loss, as a fraction of the images, from 0 to 1.
        one_way: no image can be won, as where only the ensemble's answers are right.
    """
    from scipy.stats import binom  # takes a second to import

    if budget >= 1:  # no rule breaks it
        return 0.0
    if one_way:
        return float(binom.cdf(lost, count, budget))
    padded = count + 2
    mean, changed = (lost - won) / padded, (lost + won + 1) / padded
    if mean >= budget:
        return 1.0
    square = (budget - mean) ** 2 * padded / (changed - mean**2)  # of the distance in standard errors
    rates = _rates_of_wins(won, count, budget)
    if not len(rates):
        return NUISANCE
    # Given that D images differ, the wins among them are binomial: as good are all outcomes from `fewest` wins on.
    differ = np.clip(budget + 2 * rates, np.finfo(float).tiny, 1)
    low, high = (int(binom.ppf(tail, count, rate)) for tail, rate in ((1e-9, differ[0]), (1 - 1e-9, differ[-1])))
    totals = np.arange(low, high + 1)
    fewest = _fewest_wins(totals, padded, budget, square)
    as_good = binom.pmf(totals, count, differ[:, None]) * binom.sf(fewest - 1, totals, (rates / differ)[:, None])
    return min(1.0, float(as_good.sum(1).max()) + NUISANCE)


def _rates_of_wins(won: int, count: int, budget: float) -> NDArray[np.float64]:
    """Rates in a Clopper-Pearson interval that are possible beside a net loss, float64 [POINTS]; [0] where none is."""
    from scipy.stats import binomtest

    interval = binomtest(won, count).proportion_ci(1 - NUISANCE)
    low, high = float(interval.low), min(float(interval.high), (1 - budget) / 2)
    return np.linspace(low**0.5, high**0.5, POINTS) ** 2 if low <= high else np.empty(0)


def _fewest_wins(totals: NDArray[np.int64], padded: int, budget: float, square: float) -> NDArray[np.float64]:
    """The wins from which on an outcome is as good, for each number of images that differ.

    Solves (budget - mean)^2 padded = square (changed - mean^2) for the mean below the budget; without a solution any
    number of wins is as good.
    """
    scale, changed = padded + square, (totals + 1) / padded
    root = (budget * padded) ** 2 - scale * (budget**2 * padded - square * changed)
    mean = (budget * padded - np.maximum(root, 0) ** 0.5) / scale
    wins: NDArray[np.float64] = np.where(root < 0, 0, np.ceil((totals - mean * padded) / 2 - 1e-9))
    return wins
