"""The report of `sssd compare`: its methods side by side, and its rows in the paper's tables 1, 2, 3 and 6."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.reports.markdown import exact_duration, table
from sssd_zoo.evaluation.reports.paper import TABLES
from sssd_zoo.files import csv_text

# Name on the command line: what it is called in reports. In the order of the reports.
METHODS = {
    "sssd": "SSSD",
    "sssd-warm": "SSSD from M_ssl's weights",
    "sssd-redos": "SSSD, best of several k-means",
    "sssd-soft": "SSSD, soft labels",
    "anchored": "SSSD, anchored",
    "anchored-warm": "SSSD, anchored, from M_ssl's weights",
    "contrastive": "SSSD, contrastive, from M_ssl's weights",
    "random": "BYOT, random labels",
    "true": "BYOT, true labels",
    "clusterfit": "ClusterFit",
    "clusterfit-anchored": "ClusterFit, anchored",
    "seed": "SEED",
    "dacsd": "DACSD",
    "pretext": "M_ssl itself",
}
VARIANTS = ("sssd-warm", "sssd-redos", "sssd-soft", "anchored", "anchored-warm")  # of SSSD, beyond the paper
PAPER = ("sssd", "random", "true", "clusterfit", "seed", "dacsd")  # a report says which of them were not run
COLUMNS = ("exit 1", "exit 2", "exit 3", "exit 4", "ensemble")
NOT_RUN = "not run"
TITLES = {
    1: "Table 1: SSSD by the pretext's network and epochs, and random labels",
    2: "Table 2: methods that learn from another network, the last exit",
    3: "Table 3: labels of a network pretrained before, and of one that learns along",
    6: "Table 6: the pretext on the same images and on others",
}
SHOWN = {1: ("random", "sssd"), 2: ("clusterfit", "seed", "sssd"), 3: ("dacsd", "sssd"), 6: ("sssd",)}
# The paper's data sets by the letters and digits of their usual names, and the images of their training splits.
PAPER_DATA = {
    ("cifar10", 50_000): "CIFAR-10",
    ("cifar100", 50_000): "CIFAR-100",
    ("imagenet1k", 1_281_167): "ImageNet-1K",
    ("imagenet", 1_281_167): "ImageNet-1K",
}


class Setting(NamedTuple):
    """What the rows of one comparison have in common.

    Attributes:
        data: D_tar.
        images: of it.
        model: timm name of the student.
        image_size: side of the views in pixels.
        k: clusters asked for.
        pretext: timm name of M_ssl, or the network whose features are taken.
        pretext_epochs: of MoCo v2; None where nothing is pretrained.
        pretext_data: D_pre, where it is not D_tar.
        pretext_images: of D_pre.
        epochs: of all that learn labels.
        seed_epochs: of SEED.
        machine: in words.
        pretrained: digest of all settings of M_ssl.
    """

    data: str
    images: int
    model: str
    image_size: int
    k: int
    pretext: str
    pretext_epochs: int | None
    pretext_data: str | None
    pretext_images: int | None
    epochs: int
    seed_epochs: int
    machine: str
    pretrained: str = ""  # of versions that did not record it

    @property
    def without_pretext(self) -> tuple[str, int, str, int, int, int]:
        """What two runs of equal `Result.trained` have in common that differ in the pretext, or the machine, alone."""
        return self.data, self.images, self.model, self.image_size, self.k, self.epochs


class Result(NamedTuple):
    """One method with one seed.

    Attributes:
        method: a key of `METHODS`.
        seed: of the run.
        exits: linear-probe accuracies in percent: four, or the one of a network without exits.
        ensemble: of four exits.
        seconds: of its training.
        seconds_before: of the pretext and the labels that it needs.
        macs: by exit; {} of a network without exits.
        setting: of the comparison.
        epochs: of its training.
        trained: digest of all settings of its training and of its labels; equal ones are seeds of one row.
    """

    method: str
    seed: int
    exits: list[float]
    ensemble: float | None
    seconds: float
    seconds_before: float
    macs: dict[str, int]
    setting: Setting
    epochs: int
    trained: str = ""  # of versions that did not record it

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return {**self._asdict(), "setting": self.setting._asdict()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Result":
        """From results.json; raises `KeyError` or `TypeError` for a file of another form."""
        return cls(**{**content, "setting": Setting(**content["setting"])})

    @property
    def cells(self) -> list[float | None]:
        """The five columns: a network without exits has only the fourth."""
        return [*self.exits, self.ensemble] if len(self.exits) > 1 else [None, None, None, self.exits[0], None]


def mean_and_range(values: list[Any]) -> str:
    """The mean in percent and, of several values, the lowest and the highest."""
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f}, {max(values):.2f})"


def mean_of(values: Iterable[float]) -> float:
    """The mean."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def accuracy_cells(runs: list[Result]) -> list[str]:
    """The five columns of runs that differ in the seed, mean (lowest, highest)."""
    columns = [[run.cells[place] for run in runs] for place in range(len(COLUMNS))]
    return [mean_and_range(column) if column[0] is not None else "" for column in columns]


def comparison_table(results: list[Result]) -> list[str]:
    """Lines of Markdown: a row for each method, mean (lowest, highest) over the seeds; the paper's not run say so.

    Variants of names of their own follow.
    """
    lines = []
    titles = {**METHODS, **{run.method: code(run.method) for run in results if run.method not in METHODS}}
    for method, title in titles.items():
        runs = [run for run in results if run.method == method]
        if not runs and method not in PAPER:
            continue
        cells = accuracy_cells(runs) if runs else [NOT_RUN, *[""] * (len(COLUMNS) - 1)]
        before = mean_of(run.seconds_before for run in runs) if runs else 0
        training = exact_duration(mean_of(run.seconds for run in runs)) if runs else ""
        epochs = str(runs[0].epochs or "") if runs else ""
        lines.append([title, *cells, str(len(runs)), exact_duration(before) if before else "", epochs, training])
    return table(["method", *COLUMNS, "seeds", "pretext and labels", "epochs", "training"], lines)


def changes_table(results: list[Result], others: list[Result]) -> list[str]:
    """Lines of Markdown: what changing one thing in SSSD gives, in points over plain SSSD with the same seed.

    A row for each variant among `results`, and for each run of SSSD among `others` that differs in the pretext alone.
    Empty without such rows, or without plain SSSD.

    Args:
        results: of this comparison.
        others: of other comparisons.
    """
    plain = {run.seed: run for run in results if run.method == "sssd"}
    if not plain:
        return []
    ours = next(iter(plain.values()))
    groups: dict[str, list[Result]] = {}
    for run in results:
        if run.method in VARIANTS:
            groups.setdefault(METHODS[run.method], []).append(run)
    for run in others:
        same = (run.epochs, run.trained) == (ours.epochs, ours.trained)
        if run.method == "sssd" and same and run.setting.without_pretext == ours.setting.without_pretext:
            where = "" if run.setting.pretext_data is None else f" on {code(run.setting.pretext_data)}"
            name = f"SSSD, labels from {code(run.setting.pretext)}, {_pretext_epochs(run.setting)}{where}"
            groups.setdefault(name, []).append(run)
    lines = []
    for title, runs in groups.items():
        paired = [differences(run, plain[run.seed]) for run in runs if run.seed in plain]
        if paired:
            lines.append([title, *(signed(list(column)) for column in zip(*paired, strict=True)), str(len(paired))])
    return table(["changed", *COLUMNS, "seeds"], lines) if lines else []


def differences(run: Result, base: Result) -> list[float]:
    """The points of accuracy of the four exits and the ensemble over another network's."""
    assert run.ensemble is not None
    assert base.ensemble is not None
    pairs = zip([*run.exits, run.ensemble], [*base.exits, base.ensemble], strict=True)
    return [ours - theirs for ours, theirs in pairs]


def signed(values: list[float]) -> str:
    """The mean difference in points and, of several, the lowest and the highest."""
    mean = sum(values) / len(values)
    return f"{mean:+.2f}" if len(values) == 1 else f"{mean:+.2f} ({min(values):+.2f}, {max(values):+.2f})"


def settings_table(settings: list[Setting]) -> list[str]:
    """Lines of Markdown: what the letters in the column 'run' of the paper's tables stand for."""
    lines = []
    for letter, setting in zip(_letters(), settings, strict=False):
        epochs = f"{setting.epochs} epochs (SEED {setting.seed_epochs})"
        other = setting.pretext_data
        lines.append(
            [
                letter,
                f"{code(setting.data)}, {setting.images:,} images",
                f"{code(setting.model)} at {setting.image_size} px, {epochs}",
                f"{code(setting.pretext)}, {_pretext_epochs(setting)}",
                "the same" if other is None else f"{code(other)}, {setting.pretext_images:,}",
                f"{setting.k:,}",
                markdown(setting.machine),
            ]
        )
    return table(["run", "data", "student", "M_ssl", "D_pre", "K", "device"], lines)


def paper_tables(results: list[Result]) -> list[str]:
    """Lines of Markdown: the paper's tables, with our rows beside its own.

    Ours stand below a row of the paper if the data set (all of it), the method, the pretext's network, its epochs and
    its data are the same; where we have none, the row says that it was not run. Our other runs follow: on other data,
    on a part of them, or for other epochs.
    """
    settings = list(dict.fromkeys(run.setting for run in results))
    lines = [
        "## In the paper's tables",
        "",
        "The paper's rows are on the original images with its own training. Our row stands below one of the paper's if "
        f"everything that the table names is the same, and says '{NOT_RUN}' where we have none; our other runs follow. "
        "Mean and, in brackets, lowest and highest over the seeds; times are for training alone.",
        "",
        *settings_table(settings),
        "",
    ]
    for number, title in TITLES.items():
        lines += [f"### {title}", "", *_paper_table(number, results, settings), ""]
    return lines


def _paper_table(number: int, results: list[Result], settings: list[Setting]) -> list[str]:
    single = number == 2
    columns = ["exit 4"] if single else list(COLUMNS)
    lines, shown = [], set()

    def ours(runs: list[Result]) -> list[str]:
        cells = accuracy_cells(runs)
        letter = dict(zip(settings, _letters(), strict=False))[runs[0].setting]
        time = exact_duration(mean_of(run.seconds for run in runs))
        return [*(cells[3:4] if single else cells), str(len(runs)), str(runs[0].epochs), time, letter]

    groups = _groups(run for run in results if run.method in SHOWN[number])
    for row in TABLES[number]:
        key = [row.data, METHODS[row.method], row.network or "", str(row.epochs or ""), row.pretext_data or "the same"]
        lines.append(["paper", *key, *(f"{value:.2f}" for value in row.values), "", "", "", ""])
        same = [(group, runs) for group, runs in groups.items() if paper_row(runs[0]) == row[:5]]
        for group, runs in same:
            shown.add(group)
            lines.append(["ours", *key, *ours(runs)])
        if not same:
            lines.append(["ours", *key, NOT_RUN, *[""] * (len(columns) - 1), "", "", "", ""])
    for group, runs in groups.items():
        setting = runs[0].setting
        if group in shown or (number in (1, 2, 3) and setting.pretext_data is not None):
            continue
        pretext = [markdown(setting.pretext), _pretext_epochs(setting)]
        if runs[0].method in ("random", "dacsd"):
            pretext = ["", ""]
        pre = markdown(setting.pretext_data or "the same")
        lines.append(["ours", code(setting.data), METHODS[runs[0].method], *pretext, pre, *ours(runs)])
    head = ["", "data", "method", "M_ssl", "its epochs", "D_pre", *columns, "seeds", "epochs", "time", "run"]
    return table(head, lines)


def _groups(results: Iterable[Result]) -> dict[tuple[Setting, str, int, str], list[Result]]:
    """Runs that differ in the seed alone."""
    groups: dict[tuple[Setting, str, int, str], list[Result]] = {}
    for run in results:
        groups.setdefault((run.setting, run.method, run.epochs, run.trained), []).append(run)
    return groups


def paper_row(run: Result) -> tuple[str | None, str, str | None, int | None, str | None] | None:
    """What identifies a `Row` of the paper, of one of our runs; the data are None where they are not the paper's."""
    setting = run.setting
    network = re.search(r"resnet(\d+)(?![a-z])", setting.pretext)  # timm's resnet50d is another network
    data, student = paper_data(setting.data, setting.images), re.search(r"resnet18(?![a-z])", setting.model)
    if not student:  # the paper distils into a ResNet-18 throughout
        return None
    if run.method in ("random", "dacsd"):
        return data, run.method, None, None, None
    name = f"ResNet-{network[1]}" if network and setting.pretext_epochs is not None else None
    other = setting.pretext_data
    pretext_data = None if other is None else paper_data(other, setting.pretext_images or 0) or other
    return data, run.method, name, setting.pretext_epochs, pretext_data


def paper_data(name: str, images: int) -> str | None:
    """The paper's name for a data set, or None if it is another or a part of one."""
    letters = re.sub(r"[^a-z0-9]", "", name.partition(":")[0].rsplit("/", 1)[-1].lower())
    return PAPER_DATA.get((letters, images))


def _pretext_epochs(setting: Setting) -> str:
    return "as it is" if setting.pretext_epochs is None else f"{setting.pretext_epochs} epochs"


def _letters() -> Iterable[str]:
    return (f"r{number}" for number in range(1, 1000))


def results_csv(results: list[Result]) -> str:
    """A line for each run, with its setting."""
    lines = ([run.method, run.seed, *run.cells, run.seconds, run.seconds_before, *run.setting] for run in results)
    return csv_text(["method", "seed", *COLUMNS, "seconds", "seconds_before", *Setting._fields], lines)
