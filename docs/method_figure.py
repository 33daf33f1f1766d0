"""Draws docs/method.svg, the method in one figure: `python docs/method_figure.py`."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT = "#1f2937", "#6b7280"
BLUE, GREEN, ORANGE, PURPLE, LIGHT = "#2563eb", "#059669", "#d97706", "#9333ea", "#60a5fa"
CLUSTERS = ("#0891b2", "#be185d", "#65a30d", "#7c3aed", "#b45309")


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, *, solid: bool = True
) -> None:
    """A rounded box about the centre (x, y), filled or outlined."""
    face, ink = (colour, "white") if solid else ("white", colour)
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.12",
        fc=face,
        ec=colour,
        lw=1.4,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=10.5, linespacing=1.3)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, **style: object) -> None:
    """An arrow from `start` to `end`."""
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.3, "shrinkA": 0, "shrinkB": 0, **style}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **look))


def step(axes: Axes, x: float, y: float, width: float, height: float, number: int, title: str) -> None:
    """The frame of one of the three steps, its lower left corner at (x, y)."""
    style = "round,pad=0,rounding_size=0.2"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc="#f9fafb", ec="#d1d5db", lw=1))
    top = y + height - 0.45
    axes.plot(x + 0.45, top, "o", ms=20, color=INK)
    axes.text(x + 0.45, top, str(number), ha="center", va="center_baseline", color="white", fontsize=12, weight="bold")
    axes.text(x + 0.9, top, title, va="center_baseline", color=INK, fontsize=13)


def pretraining(axes: Axes, x: float, y: float) -> None:
    """Step 1: MoCo v2."""
    step(axes, x, y, 7.0, 4.7, 1, "MoCo v2 pretraining, without labels")
    query, key, middle = y + 3.35, y + 1.45, y + 2.4
    box(axes, x + 0.85, middle, 1.05, 0.9, "image", FAINT)
    for level, encoder, colour, name in (
        (query, "query\nencoder", BLUE, "query"),
        (key, "key\nencoder", LIGHT, "key"),
    ):
        side = np.sign(level - middle)
        box(axes, x + 2.35, level, 0.85, 0.6, "view", FAINT, solid=False)
        box(axes, x + 4.05, level, 1.4, 0.9, encoder, colour)
        arrow(axes, (x + 1.38, middle + 0.3 * side), (x + 1.92, level - 0.15 * side))
        arrow(axes, (x + 2.78, level), (x + 3.35, level))
        arrow(axes, (x + 4.75, level), (x + 5.4, level))
        axes.text(x + 5.85, level, name, ha="center", va="center", fontsize=12, style="italic", color=INK)
    arrow(axes, (x + 4.05, query - 0.45), (x + 4.05, key + 0.45), FAINT, linestyle="--")
    axes.text(x + 3.95, middle, "moving\naverage", ha="right", va="center", fontsize=10, color=FAINT)
    arrow(axes, (x + 5.85, query - 0.3), (x + 5.85, key + 0.3), PURPLE, arrowstyle="<|-|>")
    axes.text(x + 5.75, middle, "InfoNCE", ha="right", va="center", fontsize=10, color=PURPLE)
    arrow(axes, (x + 5.85, key - 0.25), (x + 5.85, y + 0.66))
    for i in range(7):
        box(axes, x + 3.33 + 0.42 * i, y + 0.45, 0.36, 0.36, "", LIGHT)
    axes.text(x + 2.95, y + 0.45, "queue of old keys", ha="right", va="center", fontsize=10, color=FAINT)


def pseudo_labels(axes: Axes, x: float, y: float) -> None:
    """Step 2: k-means on the features."""
    step(axes, x, y, 5.6, 4.7, 2, "Pseudo labels by k-means")
    random = np.random.default_rng(4)
    centres = np.array([(0.95, 3.25), (2.75, 3.4), (4.5, 2.95), (1.55, 1.95), (3.35, 2.1)])
    for centre, colour in zip(centres, CLUSTERS, strict=True):
        points = centre + random.normal(0, (0.26, 0.18), (24, 2))
        axes.plot(x + points[:, 0], y + points[:, 1], "o", ms=4, color=colour, alpha=0.5, mec="none")
        axes.plot(x + centre[0], y + centre[1], "X", ms=10, color=colour, mec="white", mew=1)
    arrow(axes, (x + 2.8, y + 1.5), (x + 2.8, y + 0.98))
    for i, colour in enumerate(CLUSTERS):
        box(axes, x + 1.36 + 0.72 * i, y + 0.6, 0.58, 0.58, ("1", "2", "3", "…", "K")[i], colour)


def distillation(axes: Axes, x: float, y: float) -> None:
    """Step 3: four exits, of which the deepest teaches the others."""
    step(axes, x, y, 13.0, 5.9, 3, "Self distillation: one network, four exits, the deepest is the teacher")
    columns = [x + 3.6 + 2.45 * i for i in range(4)]
    stage, bottleneck, head, answer, bus = y + 0.85, y + 2.1, y + 3.35, y + 4.25, y + 4.8
    box(axes, x + 1.15, stage, 1.05, 0.9, "image", FAINT)
    arrow(axes, (x + 1.68, stage), (columns[0] - 0.75, stage))
    for i, column in enumerate(columns):
        deepest = i == 3
        colour = ORANGE if deepest else GREEN
        name = "C" if deepest else str(i + 1)
        box(axes, column, stage, 1.5, 0.9, f"stage {i + 1}", INK)
        if not deepest:
            arrow(axes, (column + 0.75, stage), (columns[i + 1] - 0.75, stage))
            box(axes, column, bottleneck, 1.5, 0.62, "bottleneck", colour, solid=False)
            arrow(axes, (column, stage + 0.45), (column, bottleneck - 0.31))
        arrow(axes, (column, (stage + 0.45) if deepest else (bottleneck + 0.31)), (column, head - 0.31))
        box(axes, column, head, 1.5, 0.62, f"features $F_{name}$", colour)
        arrow(axes, (column, head + 0.31), (column, answer - 0.22), colour)
        axes.text(column, answer, f"$q_{name}$", ha="center", va="center", fontsize=14, color=INK)
        arrow(axes, (column + 0.25, answer), (column + 0.62, answer), CLUSTERS[1], arrowstyle="<|-|>", mutation_scale=8)
        box(axes, column + 0.86, answer, 0.42, 0.42, "2", CLUSTERS[1])
        # The teacher's answer and features go to every other exit.
        for level, end in ((bus, answer + 0.25), (head - 0.62, head - 0.31)):
            place = column - (0.0 if level == bus else 0.45)
            style = {"arrowstyle": "-"} if deepest else {}
            arrow(axes, (place, level), (place, end), ORANGE, **style)
    axes.plot([columns[0], columns[3]], [bus, bus], color=ORANGE, lw=1.3)
    axes.plot([columns[0] - 0.45, columns[3] - 0.45], [head - 0.62] * 2, color=ORANGE, lw=1.3)
    for level, text, colour in (
        (bus, "KL to the teacher", ORANGE),
        (answer, "cross-entropy with\nthe pseudo label", CLUSTERS[1]),
        (head - 0.62, "distance to the\nteacher's features", ORANGE),
    ):
        axes.text(x + 0.4, level, text, va="center", fontsize=10, color=colour)


def main() -> None:
    """Draws the figure and writes it beside this script."""
    mpl.rcParams.update({"svg.hashsalt": "sssd-zoo", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    width, height = 13.5, 11.3
    figure = Figure(figsize=(0.8 * width, 0.8 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    # A card of its own colour, so that it reads the same on a light and on a dark page.
    card = FancyBboxPatch((0, 0), width, height, boxstyle="round,pad=0,rounding_size=0.3", fc="white", ec="none")
    axes.add_patch(card)
    pretraining(axes, 0.25, 6.35)
    arrow(axes, (7.27, 8.7), (7.63, 8.7), lw=2.5, mutation_scale=18)
    pseudo_labels(axes, 7.65, 6.35)
    arrow(axes, (10.45, 6.33), (10.45, 6.17), lw=2.5, mutation_scale=18)
    distillation(axes, 0.25, 0.25)
    figure.savefig(Path(__file__).with_name("method.svg"), transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
