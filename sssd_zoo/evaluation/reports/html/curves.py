"""Curves as SVG that takes its colours from the page, so that they are legible in light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from sssd_zoo.errors.text import html, plain
from sssd_zoo.evaluation.meanings import MEANINGS as FIGURES
from sssd_zoo.evaluation.reports.figures import OWN_SCALE

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 38  # margins
POINTS = 240  # of a curve; longer ones are averaged
COLOURS = 6  # that page.css has
SKIPPED = ("step", "epoch", "images_per_second")

# What the names in metrics.jsonl mean.
MEANINGS = {
    "loss": "what training minimises: the sum of its terms",
    "ce_teacher": "cross-entropy of exit 4 with the clusters",
    "ce_students": "the same of exits 1 to 3, added up",
    "kl": "how much the answers of exits 1 to 3 differ from exit 4's",
    "anchor": "how much the exits' features differ from the pretrained network's",
    "dense": "the same of the last feature maps, position by position",
    "feature": "squared distance of the features of exits 1 to 3 to exit 4's; its weight in the loss is small",
    "contrast_top1": "augmented images whose other view is found first among all in the queue",
    "label_top1": "augmented training images that exit 4 puts into their own cluster",
    "lr": "how far one step moves the weights",
}
TITLES = {
    "kl": "KL",
    "lr": "learning rate",
    "ce_teacher": "CE, exit 4",
    "ce_students": "CE, exits 1-3",
    "feature": "feature distance, unweighted",
}


@dataclass(frozen=True)
class Series:
    """A curve: its name, its points, whether they are marked, and a point of its own behind its end."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False
    star: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """A drawn panel: its title, the SVG, the legend as (colour, name, meaning), and what its axes are, in words."""

    title: str
    svg: Markup
    legend: list[tuple[int, str, str]]
    axes: str


def stage_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The curves of a training: the loss with its terms, terms on a scale of their own, accuracies, the learning rate.

    Args:
        lines: of its metrics.jsonl. A name that only some lines have is drawn where it is, in a panel of its own.
    """
    names = dict.fromkeys(name for line in lines for name, value in line.items() if _number(value))
    drawn = [name for name in names if name not in SKIPPED]
    everywhere = [name for name in drawn if all(_number(line.get(name)) for line in lines)]
    top1 = [name for name in everywhere if name.endswith("_top1")]
    terms = [name for name in everywhere if name not in (*top1, *OWN_SCALE, "lr")]
    groups = [("Loss and its terms", terms), *((_title(name), [name]) for name in drawn if name in OWN_SCALE)]
    groups += [("Accuracy while training", top1)]
    groups += [(_title(name), [name]) for name in drawn if name not in everywhere]
    groups += [("Learning rate", ["lr"] if "lr" in everywhere else [])]
    charts = []
    for title, group in groups:
        if group:
            percent = group == top1
            series = [_series(name, lines, 100 if percent else 1) for name in group]
            charts.append(chart(title, series, percent=percent, whole=True))
    return charts


def chart(
    title: str,
    series: Sequence[Series],
    *,
    axes: str = "",
    percent: bool = False,
    zero: bool = True,
    whole: bool = False,
) -> Chart:
    """Draws curves in one panel; on a logarithmic scale where their medians differ by more than ten times.

    Args:
        title: of the panel.
        series: its curves, each with at least one point.
        axes: what the axes are, in words, where the page does not say so for all.
        percent: the values are percentages.
        zero: the vertical axis begins at 0 where it is linear.
        whole: the horizontal axis has whole numbers only.
    """
    everything = [value for each in series for value in each.y] + [each.star[1] for each in series if each.star]
    across = [value for each in series for value in each.x] + [each.star[0] for each in series if each.star]
    medians = [float(np.median(each.y)) for each in series]
    log = min(everything) > 0 and max(medians) > 10 * min(medians)
    across_range = (0.0, max(across) or 1.0)
    low, high = min(everything), max(everything)
    if not log:
        low, high = (min(0.0, low) if zero else low), high + (0.04 * (high - low) or abs(high) * 0.1 or 1.0)
        if not zero:
            low -= 0.1 * (high - low)
    if percent and zero:
        high = 100.0 if high > 80 else high
    frame = _Frame(across_range, (low, high if high > low else low + 1), log)
    parts = [frame.grid(percent, whole)]
    parts += [frame.curve(each, number % COLOURS) for number, each in enumerate(series)]
    label = html(f"{title}: " + "; ".join(f"{_words(each.name)} ends at {_short(each.y[-1])}" for each in series))
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    legend = [
        (number % COLOURS, plain(_words(each.name)), MEANINGS.get(each.name, "")) for number, each in enumerate(series)
    ]
    # All text in it is numbers, or escaped by `html`.
    return Chart(title, Markup(svg), legend, axes)


class _Frame:
    """The axes of a panel: from values to places.

    Args:
        across: the range of the horizontal axis.
        up: the range of the vertical axis.
        log: whether the vertical axis is logarithmic.
    """

    def __init__(self, across: tuple[float, float], up: tuple[float, float], log: bool) -> None:
        self.across, self.up, self.log = across, up, log

    def x(self, value: float) -> float:
        first, last = self.across
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        first, last = map(self._scaled, self.up)
        return HEIGHT - BOTTOM - (self._scaled(value) - first) / (last - first) * (HEIGHT - TOP - BOTTOM)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def grid(self, percent: bool, whole: bool) -> str:
        """Grid lines with their numbers."""
        lines = []
        for tick in self._ticks():
            y, number = self.y(tick), _short(tick) + ("%" if percent else "")
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number}</text>')
        for tick in _inside(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole).tick_values(*self.across), self.across):
            x = self.x(tick)
            lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{_short(tick)}</text>')
        return "".join(lines)

    def _ticks(self) -> list[float]:
        if not self.log:
            return _inside(MaxNLocator(5).tick_values(*self.up), self.up)
        decades = range(math.floor(math.log10(self.up[0])), math.ceil(math.log10(self.up[1])) + 1)
        steps = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 3 else (1, 2, 5)
        return _inside([step * 10.0**decade for decade in decades for step in steps], self.up)

    def curve(self, series: Series, colour: int) -> str:
        """A curve with its marks."""
        points = [(self.x(x), self.y(y)) for x, y in zip(series.x, series.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks = points if series.marked or len(points) == 1 else []
        drawn = f'<polyline class="c{colour}" points="{path}"/>'
        drawn += "".join(f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in marks)
        if series.star is not None:
            x, y = self.x(series.star[0]), self.y(series.star[1])
            drawn += f'<rect class="c{colour}" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
        return drawn


def _series(name: str, lines: Sequence[Mapping[str, Any]], scale: float) -> Series:
    points = [(line["epoch"], scale * line[name]) for line in lines if _number(line.get(name))]
    parts = [part for part in np.array_split(np.array(points, float), min(len(points), POINTS)) if len(part)]
    means = np.array([part.mean(0) for part in parts])
    return Series(name, means[:, 0].tolist(), means[:, 1].tolist())


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _words(name: str) -> str:
    if name in FIGURES:
        return FIGURES[name].title
    return TITLES.get(name, name.replace("_top1", " top-1").replace("_", " "))


def _title(name: str) -> str:
    words = _words(name)
    return words[:1].upper() + words[1:]


def _inside(ticks: Any, limits: tuple[float, float]) -> list[float]:
    return [float(tick) for tick in ticks if limits[0] <= tick <= limits[1]]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
