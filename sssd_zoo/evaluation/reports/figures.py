"""The figures of reports and cards."""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.meanings import MEANINGS
from sssd_zoo.evaluation.reports.families import Family, pareto_front, points_of
from sssd_zoo.evaluation.reports.markdown import AccuracyRow
from sssd_zoo.files import atomic_write_bytes

INK, FAINT = "#1f2937", "#6b7280"
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")

STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "text.parse_math": False,  # "$5_$10" is the name of a class, not a formula
}

EXITS = ("1", "2", "3", "4")

FRACTIONS = ("two_view_consistency", "cluster_stability", "knn")  # figures of quality that are drawn on one scale

NUMBERED = 3  # networks in one figure whose points have room for their numbers

# Terms that are logged without their small weight in the loss, far above the others, and what their axes are called.
OWN_SCALE = {"feature": "feature\n(unweighted)"}

LONGEST_LABEL = 40  # characters of a name

LEAST_SPAN = 10  # points of accuracy that the axis covers at least


@mpl.rc_context(STYLE)
def loss_curves(metrics: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> None:
    """Draws each stage's loss with its terms, top-1 accuracies and learning rate, over the epochs.

    Args:
        metrics: by the stage's title, the lines of its metrics.jsonl: `epoch`, `loss`, `lr`; any `*_top1`, a fraction,
            is drawn in percent, those of `OWN_SCALE` in a panel of their own where a stage has them, and the other
            names but `step` and `images_per_second` as terms of the loss. Figures of quality without labels, which only
            some lines have, are drawn below.
        path: PNG to write.
    """
    stages = {title: lines for title, lines in metrics.items() if lines}
    columns = max(1, len(stages))
    rows = {"loss": 4.0}
    if any(OWN_SCALE.keys() & lines[0].keys() for lines in stages.values()):
        rows["unweighted"] = 1.4
    rows["top-1"] = 1.4
    if any(name in line for lines in stages.values() for line in lines for name in MEANINGS):
        rows |= {"quality": 1.6, "rank": 1.2}
    rows["lr"] = 1.0
    figure = Figure(figsize=(max(5.2, 4.0 * columns), 5.8 * sum(rows.values()) / 6.4), layout="constrained")
    panels = figure.subplots(len(rows), columns, sharex="col", squeeze=False, height_ratios=list(rows.values()))
    for column, (title, lines) in zip(panels.T, stages.items(), strict=False):
        panel_of = dict(zip(rows, column, strict=True))
        losses, accuracies, rates = (panel_of[name] for name in ("loss", "top-1", "lr"))
        unweighted = [panel_of["unweighted"]] if "unweighted" in rows else []
        quality = [panel_of[name] for name in ("quality", "rank") if name in rows]
        epochs = [line["epoch"] for line in lines]
        values = {name: np.array([line[name] for line in lines]) for name in lines[0] if name not in MEANINGS}
        drawn = [name for name in values if name not in ("step", "epoch", "lr", "images_per_second")]
        for panel, names in zip(quality, (FRACTIONS, ("rank_me",)), strict=False):
            _figures_of_quality(panel, lines, names)
        top1 = [name for name in drawn if name.endswith("_top1")]
        own_scale = [name for name in drawn if name in OWN_SCALE]
        terms = [name for name in drawn if name not in (*top1, *own_scale)]

        for name, colour in zip(terms, _colours(), strict=False):
            _curve(losses, epochs, values[name], colour, name, width=2 if name == "loss" else 1.3)
        medians = [abs(np.median(values[name])) for name in terms]
        if max(medians) > 10 * min(medians) > 0:
            losses.set_yscale("log")
            for axis_part in ("major", "minor"):  # by default in mathematical notation
                getattr(losses.yaxis, f"set_{axis_part}_formatter")(LogFormatter())
        losses.set_title(_label(title))
        _legend_below(losses)

        for panel in unweighted:
            for name, colour in zip(own_scale, _colours(start=4), strict=False):
                _curve(panel, epochs, values[name], colour, name, width=1.3)
            panel.set_visible(bool(own_scale))
            panel.set(ylim=(0, None), ylabel=", ".join(OWN_SCALE[name] for name in own_scale))

        for name, colour in zip(top1, _colours(start=5), strict=False):
            _curve(accuracies, epochs, 100 * values[name], colour, name, width=2)
        if top1:
            _legend_below(accuracies)
            accuracies.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            accuracies.set_ylim(bottom=0)
        else:
            accuracies.set_visible(False)

        _curve(rates, epochs, values["lr"], FAINT, "lr", width=1.4)
        rates.set(xlabel="epoch", xlim=(0, None), ylim=(0, None))
        rates.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for row, name in enumerate(rows):
        if name != "unweighted":  # its axis names the term
            panels[row, 0].set_ylabel(name)
    _save(figure, path)


@mpl.rc_context(STYLE)
def cluster_sizes(sizes: Sequence[int], path: str | Path) -> None:
    """Draws how many images each cluster holds, largest first, and the histogram of that.

    Args:
        sizes: images per cluster, K numbers.
        path: PNG to write.
    """
    ordered = np.sort(np.asarray(sizes))[::-1]
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    bars, histogram = figure.subplots(1, 2, width_ratios=(1.6, 1))
    bars.fill_between(np.arange(len(ordered) + 1), [*ordered, ordered[-1]], step="post", color=COLOURS[0], lw=0)
    bars.axhline(ordered.mean(), color=INK, lw=1, ls="--")
    label = f"mean {ordered.mean():.1f}"
    bars.annotate(label, (1, ordered.mean()), (0, 3), ("axes fraction", "data"), "offset points", ha="right")
    each = f"{ordered[-1]:,} to {ordered[0]:,} each, median {np.median(ordered):,.0f}"
    bars.set(title=f"{ordered.sum():,} images in {len(ordered):,} clusters: {each}")
    bars.set(xlabel="clusters, largest first", ylabel="images", xlim=(0, len(ordered)), ylim=(0, None))
    bins = np.linspace(ordered[-1] - 0.5, ordered[0] + 0.5, min(30, ordered[0] - ordered[-1] + 1) + 1)
    histogram.hist(ordered, bins=bins, color=COLOURS[0], edgecolor="white", lw=0.5)
    histogram.set(xlabel="images in a cluster", ylabel="clusters")
    for axis in (bars.xaxis, bars.yaxis, histogram.xaxis, histogram.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _save(figure, path)


@mpl.rc_context(STYLE)
def accuracy_cost(
    rows: Sequence[AccuracyRow], macs: Mapping[str, int], path: str | Path, *, plain: Mapping[str, float] | None = None
) -> None:
    """Draws each network's accuracy against its cost: a point per exit, a star for the ensemble.

    Args:
        rows: at least one network's accuracies in percent.
        macs: MACs per image at the exits '1' to '4' and for the 'ensemble', the same for all rows.
        path: PNG to write.
        plain: accuracies of networks without exits, by their names, drawn at the cost of exit 4.
    """
    unit, scale = ("billion", 1e9) if macs["ensemble"] >= 1e9 else ("million", 1e6)
    costs, full = [macs[exit_name] / scale for exit_name in EXITS], macs["ensemble"] / scale
    crowded = len(rows) > NUMBERED
    figure = Figure(figsize=(8 if crowded else 6, 3.8), layout="constrained")
    axes = figure.subplots()
    best = max(rows, key=lambda row: row["ensemble"])["name"]
    for row, colour in zip(rows, cycle([COLOURS[0], FAINT, *COLOURS[1:]]), strict=False):
        label: dict[str, Any] = {"textcoords": "offset points", "color": colour, "fontsize": 8, "va": "center"}
        offset = 10 if row["name"] == best else -10
        axes.plot(costs, row["exits"], color=colour, marker="o", label=_label(row["name"]))
        axes.plot(full, row["ensemble"], color=colour, marker="*", ms=11, ls="none")
        if crowded:
            continue
        for x, value in zip(costs, row["exits"], strict=True):
            axes.annotate(f"{value:.1f}", (x, value), (0, offset), ha="center", **label)
        axes.annotate(f"{row['ensemble']:.1f}", (full, row["ensemble"]), (9, 0), ha="left", **label)
    for (name, value), marker in zip((plain or {}).items(), cycle("sD^v"), strict=False):
        axes.plot(costs[-1], value, color=INK, marker=marker, ls="none", mfc="none", label=_label(name))
    for x, name in zip([*costs, full], [*(f"exit {name}" for name in EXITS), "ensemble"], strict=True):
        # The ensemble stands just right of exit 4.
        side = {"exit 4": "right", "ensemble": "left"}.get(name, "center")
        axes.axvline(x, color=FAINT, lw=0.7, ls=":", zorder=0)
        axes.annotate(name, (x, 1), (0, 2), ("data", "axes fraction"), "offset points", ha=side, fontsize=8)
    axes.set_xlabel(f"MACs per image ({unit})")
    axes.set_ylabel("accuracy (%)")
    axes.margins(y=0.15)
    _widen(axes)
    axes.set_xlim(0, 1.13 * full)
    axes.grid(axis="x", visible=False)
    # Outside the axes: inside it may cover points.
    if crowded:
        figure.legend(loc="outside right upper")
    else:
        figure.legend(loc="outside lower center", ncols=2)
    _save(figure, path)


@mpl.rc_context(STYLE)
def families_cost(families: Sequence[Family], path: str | Path) -> None:
    """Draws accuracy against MACs of several networks: a line through each one's exits, a star for its ensemble.

    Args:
        families: at least one network.
        path: PNG to write.
    """
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    front = pareto_front([point for family in families for point in points_of(family)])
    costs, heights = [point.macs / 1e6 for point in front], [point.accuracy for point in front]
    axes.step(costs, heights, where="post", color=INK, lw=5, alpha=0.12, solid_joinstyle="miter", label="Pareto front")
    axes.plot(costs, heights, color=INK, marker="o", ms=12, mfc="none", mew=0.9, ls="none", label="on the front")
    for number, family in enumerate(families):
        *exits, ensemble = points_of(family)
        colour, second = COLOURS[number % len(COLOURS)], number // len(COLOURS)
        style: Any = {"color": colour, "ls": ("-", "--", ":")[second % 3], "marker": "osD"[second % 3], "ms": 4.5}
        x, y = [point.macs / 1e6 for point in exits], [point.accuracy for point in exits]
        axes.plot(x, y, label=_label(family["name"].removeprefix("sssd_")), **style)
        star = ensemble.macs / 1e6, ensemble.accuracy
        axes.plot([x[-1], star[0]], [y[-1], star[1]], color=colour, lw=0.7, alpha=0.6)
        axes.plot(*star, color=colour, marker="*", ms=10, ls="none")
    axes.plot([], [], color=FAINT, marker="*", ms=10, ls="none", label="ensemble")
    axes.set(xscale="log", xlabel="million MACs per image", ylabel="accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.06, y=0.08)
    _widen(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


@mpl.rc_context(STYLE)
def early_exit_costs(
    answers: Mapping[str, Mapping[str, Any]], curve: Sequence[Mapping[str, Any]], path: str | Path
) -> None:
    """Draws accuracy against MACs and against measured time, of every exit, the ensemble and early exit.

    Args:
        answers: by '1' to '4', 'ensemble' and 'early exit': `accuracy` in percent, without labels `agreement` with the
            ensemble in its place; `multiply_adds`, and `milliseconds` for an image by batch size.
        curve: of early exit at other thresholds: the same but the time.
        path: PNG to write.
    """
    measure = "accuracy" if "accuracy" in answers["ensemble"] else "agreement"
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    costs: list[dict[str, float]] = [{name: row["multiply_adds"] / 1e6 for name, row in answers.items()}]
    titles, batches = ["million MACs per image"], list(answers["ensemble"]["milliseconds"])
    for batch in batches:
        costs.append({name: row["milliseconds"][batch] for name, row in answers.items()})
        titles.append(f"ms per image at batch size {batch}")
    line = [point["multiply_adds"] / 1e6 for point in curve]
    panels[0].plot(line, [p[measure] for p in curve], color=COLOURS[1], label="early exit, other budgets")
    for panel, cost, title in zip(panels, costs, titles, strict=True):
        height = {name: row[measure] for name, row in answers.items()}
        panel.plot(
            [cost[name] for name in EXITS],
            [height[name] for name in EXITS],
            color=COLOURS[0],
            marker="o",
            label="exits 1-4",
        )
        for name in EXITS:
            panel.annotate(
                name, (cost[name], height[name]), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        for name, colour, marker in (("ensemble", COLOURS[0], "*"), ("early exit", COLOURS[1], "D")):
            size = 11 if marker == "*" else 7
            panel.plot(cost[name], height[name], color=colour, marker=marker, ms=size, ls="none", label=name)
        panel.set(xlabel=title, xlim=(0, 1.08 * max(cost.values())))
    panels[0].set_ylabel("accuracy (%)" if measure == "accuracy" else "agreement with the ensemble (%)")
    _widen(panels[0])
    figure.legend(handles=panels[0].get_lines(), loc="outside upper center", ncols=4, fontsize=8)
    _save(figure, path)


@mpl.rc_context(STYLE)
def cluster_sheet(images: np.ndarray[Any, np.dtype[np.uint8]], titles: Sequence[str], path: str | Path) -> None:
    """Draws images cluster by cluster, a row each.

    Args:
        images: uint8 [R, C, 3, S, S], C images of each of R clusters; fill a small cluster up with white.
        titles: of the R rows.
        path: PNG to write.
    """
    rows, columns, _, side, _ = images.shape
    gap = max(1, side // 16)
    sheet = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (side + gap), column * (side + gap)
            sheet[top : top + side, left : left + side] = images[row, column].transpose(1, 2, 0)
    tile = 0.5  # inches
    figure = Figure(figsize=(tile * columns + 1.7, tile * rows + 0.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest" if side < 75 else "antialiased")
    axes.set_yticks([row * (side + gap) + side / 2 for row in range(rows)], map(_label, titles), fontsize=8, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    _save(figure, path)


@mpl.rc_context(STYLE)
def label_curves(
    ours: Mapping[str, Mapping[float, Sequence[float]]],
    paper: Mapping[str, Mapping[float, float]],
    path: str | Path,
    *,
    axis: str,
) -> None:
    """Draws accuracy against the number of labels: ours with the range over seeds, and the paper's beside it.

    Args:
        ours: by a network's name and the labels, the accuracies of its seeds in percent.
        paper: by a network's name and the labels in percent, its accuracy in percent.
        path: PNG to write.
        axis: what our labels are counted in.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), colour in zip(ours.items(), cycle(COLOURS), strict=False):
        x = sorted(curve)
        means = [sum(curve[labels]) / len(curve[labels]) for labels in x]
        below = [mean - min(curve[labels]) for labels, mean in zip(x, means, strict=True)]
        above = [max(curve[labels]) - mean for labels, mean in zip(x, means, strict=True)]
        left.errorbar(x, means, [below, above], color=colour, marker="o", ms=4, capsize=3, label=_label(name))
    for (name, points), colour in zip(paper.items(), (INK, FAINT), strict=False):
        right.plot(list(points), list(points.values()), color=colour, marker="s", ms=4, label=_label(name))
    left.set(title="here: mean, lowest and highest", xlabel=axis, ylabel="accuracy (%)", xscale="log")
    right.set(title="the paper: ImageNet-1K, table 4", xlabel="labels (%)", xscale="log")
    for axes, ticks in ((left, sorted({x for curve in ours.values() for x in curve})), (right, [1, 10, 20, 30, 50])):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        # Below the panel: inside, the legend's markers with their bars could be taken for points.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
    _save(figure, path)


@mpl.rc_context(STYLE)
def detections(
    images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
    truths: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    path: str | Path,
) -> None:
    """Draws images twice, side by side: with their true boxes, difficult ones dashed, and with those detected.

    Args:
        images: uint8 [3, H, W] each.
        truths: for each image `boxes` [n, 4] xyxy in pixels, `labels` [n] in 1..C, `difficult` [n].
        answers: for each image `boxes` [m, 4], `labels` [m], `scores` [m] in 0..1.
        class_names: the C names.
        path: PNG to write.
    """
    figure = Figure(figsize=(8, 3.2 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 2, squeeze=False)
    for row, image, truth, answer in zip(grid, images, truths, answers, strict=True):
        for axes, boxes, title in zip(row, (truth, answer), ("truth", "detected"), strict=True):
            axes.imshow(image.transpose(1, 2, 0))
            axes.set_axis_off()
            axes.set_title(f"{title}: {len(boxes['boxes'])}")
            for number, (left, top, right, bottom) in enumerate(boxes["boxes"].tolist()):
                label = int(boxes["labels"][number])
                colour = COLOURS[(label - 1) % len(COLOURS)]
                dashed = "difficult" in boxes and bool(boxes["difficult"][number])
                style: Any = {"fill": False, "edgecolor": colour, "lw": 1.2, "ls": "--" if dashed else "-"}
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))
                score = f" {float(boxes['scores'][number]):.2f}" if "scores" in boxes else ""
                text = f"{_label(class_names[label - 1])}{score}"
                axes.text(left, top, text, color="white", fontsize=5, va="top", bbox={"color": colour, "pad": 0.6})
    _save(figure, path)


def _colours(start: int = 0) -> Iterator[str]:
    return islice(cycle(COLOURS), start, None)


def _curve(
    axes: Axes, x: Sequence[float], y: np.ndarray[Any, np.dtype[np.float64]], colour: str, name: str, *, width: float
) -> None:
    """A line; a long and noisy one as its running mean over a fiftieth, faintly on itself."""
    window = len(y) // 50
    smooth = y
    if window > 1 and name != "lr":
        axes.plot(x, y, color=colour, alpha=0.2, lw=0.8)
        padded = np.pad(y, (window // 2, window - 1 - window // 2), mode="edge")
        smooth = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    dot = "o" if len(y) == 1 else None
    axes.plot(x, smooth, color=colour, label=name.replace("_", " "), lw=width, zorder=1 + width, marker=dot)


def _figures_of_quality(axes: Axes, lines: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    """Draws figures of quality without labels over the epochs that have them; percents as fractions."""
    for name, colour in zip(names, _colours(start=1), strict=False):
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        if points:
            epochs, values = zip(*points, strict=True)
            scale = 100 if name == "knn" else 1
            axes.plot(epochs, np.array(values) / scale, color=colour, marker=".", label=MEANINGS[name].title)
    if axes.lines:
        _legend_below(axes)
        highest = axes.dataLim.y1
        axes.set_ylim(0, 1.08 * highest if highest > 0 else None)  # no line that hardly moves may lie on the frame
    else:
        axes.set_visible(False)


def _label(name: str) -> str:
    """A name in a figure. matplotlib leaves names that begin with an underscore out of legends."""
    label = plain(name, LONGEST_LABEL)
    return f" {label}" if label[:1] in ("_", "") else label


def _legend_below(axes: Axes) -> None:
    """Puts the legend of a panel without tick labels right below it: inside, it may cover a line."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8, ncols=3)


def _widen(axes: Axes) -> None:
    """Makes the axis of accuracies span LEAST_SPAN points at least: exits that are alike should look so."""
    low, high = axes.get_ylim()
    if high - low < LEAST_SPAN:
        middle = (low + high) / 2
        axes.set_ylim(middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2)


def _save(figure: Figure, path: str | Path) -> None:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=STYLE["figure.dpi"], bbox_inches="tight", pad_inches=0.08)
    atomic_write_bytes(path, file.getvalue())
