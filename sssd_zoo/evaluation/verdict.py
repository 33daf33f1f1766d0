"""A verdict on a network from figures that need no labels, and what to do next.

The thresholds come from networks of known accuracy: see hub_cards/reports/label-free-cifar10.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from sssd_zoo.evaluation.label_free import AMONG, COLLAPSED
from sssd_zoo.evaluation.meanings import TOO_FEW

# Of two-view consistency. Networks with 68 to 75 percent by linear probes on CIFAR-10 had 0.43 to 0.90, those with 16
# to 48 percent at most 0.07; none of those measured lay between.
FAIR, GOOD = 0.1, 0.4


class Verdict(TypedDict):
    """What figures without labels say.

    Attributes:
        level: 'good', 'fair' or 'weak'.
        sentence: why, in one or two sentences.
        next: commands to run next, the most promising first, ready to paste.
    """

    level: Literal["good", "fair", "weak"]
    sentence: str
    next: list[str]


@dataclass(frozen=True, kw_only=True)
class Commands:
    """What a verdict proposes, as commands to paste.

    Attributes:
        improve: for a network that is not good yet.
        use: for one that is.
    """

    improve: list[str]
    use: list[str]


def judge(figures: Mapping[str, float], *, images: int, from_scratch: bool, commands: Commands) -> Verdict:
    """A verdict on a network.

    Args:
        figures: of it, see `subset.network_figures`: `std` and `two_view_consistency` are read.
        images: that it was trained on.
        from_scratch: whether it learned from these images alone, without weights or features of another network.
        commands: to propose.
    """
    consistency = figures["two_view_consistency"]
    among = min(AMONG, round(figures.get("images", AMONG)))
    level: Literal["good", "fair", "weak"]
    if figures["std"] < COLLAPSED:
        level = "weak"
        sentence = f"The network has collapsed: all images look nearly the same to it (std {figures['std']:.3f})."
    elif images < TOO_FEW and from_scratch:
        level = "weak"
        sentence = (
            f"The network learned from {images:,} images alone, which are too few without the weights of another "
            f"network. Its two-view consistency, {consistency:.0%}, is of the same images and says little about others."
        )
    else:
        level = "good" if consistency >= GOOD else "fair" if consistency >= FAIR else "weak"
        sentence = (
            f"The nearest neighbour of a view is the other view of the same image, among {among:,} images, in "
            f"{consistency:.0%} of cases (good from {GOOD:.0%}, weak below {FAIR:.0%})."
        )
    proposals = commands.use + commands.improve[:1] if level == "good" else commands.improve[:2] + commands.use[:1]
    return {"level": level, "sentence": sentence, "next": proposals}


def command(*words: str) -> str:
    """Words as a line for a shell."""
    return shlex.join(words)


TRUST = (
    "The verdict is based on two-view consistency, on the std where the network has collapsed, and on the number of "
    f"images where a network learned from fewer than {TOO_FEW:,} alone. How far to trust it: over 15 networks "
    "measured on CIFAR-10, two-view consistency ranked them as linear probes did with a Spearman correlation of 0.90. "
    "It tells poor networks from good ones; among good ones, of other sizes or trained in other ways, it does not say "
    "which is best, and on other images it has not been measured."
)
