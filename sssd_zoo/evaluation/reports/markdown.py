"""The results of a run as Markdown: report.md and the facts of a card."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from sssd_zoo.configs import DataConfig
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown, plain
from sssd_zoo.evaluation.meanings import AGREEMENT, MEANINGS
from sssd_zoo.evaluation.verdict import TRUST, Verdict
from sssd_zoo.files import atomic_write_text, read_json
from sssd_zoo.files.untrusted import read_yaml

RANDOM = "random labels"  # the name of the row of the baseline


class AccuracyRow(TypedDict):
    """Accuracies in percent of one network: of its four exits in order, and of their ensemble."""

    name: str
    exits: Sequence[float]
    ensemble: float


class Timing(TypedDict):
    """Seconds that one step took; `note` says what came of it, or that the step was skipped."""

    step: str
    seconds: float
    note: NotRequired[str]


class Results(TypedDict, total=False):
    """The results of a run; every key may be missing, and what is missing is not reported.

    Attributes:
        model: timm name of the network.
        image_size: side of its images in pixels.
        data: name of the training data.
        split: of it.
        pretrain_data: name of the images that were pretrained on, where they are others.
        images: number of training images.
        corrupt: number of images skipped because they could not be read.
        fingerprint: of the training data.
        test: what the accuracies were measured on, in words.
        test_images: number of those.
        classes: number of true classes.
        seed: of the run.
        machine: what it ran on, in words.
        encoder: name of the network whose features were distilled as they are; missing for a pretext of the run's own.
        k_asked: clusters asked for.
        sizes: images per cluster.
        quality: of the pseudo labels against the true ones: 'nmi' and 'ari' and 'purity', in 0..1.
        accuracy: linear-probe accuracies; the first row is the network itself, the second what it is compared with.
        label_free: figures of quality without labels, see `pipeline.quality.run_figures`.
        verdict: what they say, and what to do next.
        from_scratch: whether all was learned from these images, without weights or features of another network.
        clustered: accuracy in percent of the features that were clustered, the pretext's, by how it was measured.
        macs: MACs per image at the exits '1' to '4' and for the 'ensemble'.
        activations: numbers that their layers put out for an image, by the same names.
        times: of the steps.
        steps: of a run's trainings and pseudo labels, what it was made of, see `files.run_steps.digests`.
        figures: file names beside the report and their captions.
        notes: more facts, each a line of Markdown.
        finetuned: of a network that was trained on true labels: from what and how, in Markdown.
    """

    model: str
    image_size: int
    data: str
    split: str
    pretrain_data: str
    images: int
    corrupt: int
    fingerprint: str
    test: str
    test_images: int
    classes: int
    seed: int
    machine: str
    encoder: str
    k_asked: int
    sizes: Sequence[int]
    quality: Mapping[str, float] | None
    accuracy: Sequence[AccuracyRow]
    clustered: Mapping[str, float]
    label_free: Mapping[str, float]
    verdict: Verdict
    from_scratch: bool
    macs: Mapping[str, int]
    activations: Mapping[str, int]
    times: Sequence[Timing]
    steps: Mapping[str, str]
    figures: Mapping[str, str]
    notes: Sequence[str]
    finetuned: str


def read_results(run: str | Path) -> Results:
    """The results of a finished run; `data` is among them.

    Raises:
        UserError: if its metrics.json is missing or of another shape.
    """
    path = Path(run) / "metrics.json"
    try:
        results: Results = read_json(path, Results)
    except UserError as error:
        raise UserError(f"{error}; run the command that made {run} again, which repairs it") from error
    if "data" not in results:
        raise UserError(f"{path} is not that of a finished run: it does not say what `data` it was of")
    return results


def config_of(run: Path) -> tuple[dict[str, Any], DataConfig]:
    """A run's arguments, and those of its data among them.

    Raises:
        UserError: if they cannot be read.
    """
    recipe: dict[str, Any] = read_yaml(run / "config.yaml")
    try:
        config = DataConfig(**{field.name: recipe[field.name] for field in fields(DataConfig) if field.name in recipe})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {run / 'config.yaml'}: {error}") from error
    return recipe, config


def write_report(path: str | Path, results: Results) -> None:
    """Writes the report of a run as Markdown.

    Args:
        path: file to write; the figures that `results` names lie beside it.
        results: what was measured.
    """
    head = ["# Self-supervised self distillation: report", "", *_verdict(results)]
    head += [*(f"- {fact}" for fact in describe(results)), ""]
    sections = [_accuracy(results), _label_free(results), _clusters(results), _times(results)]
    atomic_write_text(path, "\n".join([*head, *(line for section in sections for line in section)]))


def describe(results: Results) -> list[str]:
    """Facts of a run other than its figures, each a line of Markdown."""
    facts = []
    if "data" in results:
        fact = f"**Data**: {code(results['data'])}"
        fact += f", split {code(results['split'])}" if "split" in results else ""
        fact += f", {results['images']:,} images" if "images" in results else ""
        fact += f" ({results['corrupt']:,} more were corrupt and left out)" if results.get("corrupt") else ""
        facts.append(fact)
    if "test" in results:
        fact = f"**Measured on**: {markdown(results['test'])}"
        fact += f", {results['test_images']:,} images" if "test_images" in results else ""
        fact += f" of {results['classes']:,} classes" if "classes" in results else ""
        facts.append(fact)
    if "model" in results:
        size = f" at {results['image_size']} px" if "image_size" in results else ""
        facts.append(f"**Network**: {code(results['model'])}{size}")
    if "sizes" in results:
        asked = f" (K = {results['k_asked']:,} asked for)" if "k_asked" in results else ""
        facts.append(f"**Pseudo labels**: {len(results['sizes']):,} clusters{asked}")
        names = {"nmi": "NMI", "ari": "ARI", "purity": "purity"}
        quality = results.get("quality") or {}
        measured = [f"{name} {quality[key]:.3f}" for key, name in names.items() if key in quality]
        facts[-1] += f"; against the true labels: {', '.join(measured)}" if measured else ""
    if clustered := results.get("clustered"):
        measured = [f"{markdown(name)} {accuracy:.2f}" for name, accuracy in clustered.items()]
        facts.append(f"**Features that were clustered**: accuracy in percent by a {', '.join(measured)}")
    if "seed" in results:
        facts.append(f"**Seed**: {markdown(results['seed'])}")
    if "machine" in results:
        facts.append(f"**Machine**: {markdown(results['machine'])}")
    if "fingerprint" in results:
        facts.append(f"**Data fingerprint**: {code(results['fingerprint'][:16])}")
    return [*facts, *results.get("notes", [])]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right of the first column; cells are Markdown."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _accuracy(results: Results) -> list[str]:
    lines = ["## Accuracy", ""]
    if rows := results.get("accuracy"):
        on = f" on {results['test_images']:,} images" if "test_images" in results else ""
        words = (
            f"Linear-probe accuracy in percent{on}: a linear layer per exit, trained on the true labels with the "
            "network frozen; the ensemble is the mean of the exits' softmax outputs."
        )
        if RANDOM in {row["name"] for row in rows}:
            words += (
                f" *{RANDOM}*: the same network from new weights, trained by self distillation on labels drawn at "
                "random."
            )
        lines += [words, ""]
        numbers = [[*row["exits"], row["ensemble"]] for row in rows]
        names = [markdown(row["name"]) for row in rows]
        cells = [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, numbers, strict=True)]
        for name, row in list(zip(names, numbers, strict=True))[1:]:
            leads = [f"{ours - other:+.2f}" for ours, other in zip(numbers[0], row, strict=True)]
            cells.append([f"{names[0]} over {name}", *leads])
        lines += [*table(["", "exit 1", "exit 2", "exit 3", "exit 4", "ensemble"], cells), ""]
    else:
        lines += ["Not measured: that needs true labels, and the data have none.", ""]
    if macs := results.get("macs"):
        cells = [
            [name if name == "ensemble" else f"exit {name}", f"{cost / 1e6:,.1f} M", f"{cost / macs['4']:.0%}"]
            for name, cost in macs.items()
        ]
        lines += [*table(["answer of", "MACs per image", "of exit 4's"], cells), ""]
    return [*lines, *_figures(results, "accuracy")]


def can_be_pasted(line: str) -> bool:
    """Whether a line is safe to show as it is in a block of code: it has no backticks or invisible characters."""
    return "`" not in line and plain(line, len(line)) == line


def _verdict(results: Results) -> list[str]:
    if (verdict := results.get("verdict")) is None:
        return []
    lines = [f"**Verdict: {verdict['level']}.** {markdown(verdict['sentence'], 1000)}", ""]
    # A name of a file could end the block and go on as Markdown.
    commands = [line for line in verdict["next"] if can_be_pasted(line)]
    return [*lines, "Next:", "", "```sh", *commands, "```", ""] if commands else lines


def _label_free(results: Results) -> list[str]:
    """The figures, a column for each network and exit that has them, and what each means."""
    if not (figures := results.get("label_free")):
        return []
    exits = sorted({key[-1] for key in figures if "_exit_" in key})
    columns = {
        "clustered": "clustered_{}",
        **{f"exit {number}": f"{{}}_exit_{number}" for number in exits},
        "last exit": "{}",
    }
    cells = [
        [
            meaning.title,
            *(
                f"{figures[key]:.{meaning.digits}f}" if (key := form.format(name)) in figures else ""
                for form in columns.values()
            ),
        ]
        for name, meaning in MEANINGS.items()
        if name in figures
    ]
    lines = ["## Quality without labels", "", TRUST, ""]
    if "images" in figures:
        lines[2] = f"Measured on {figures['images']:,.0f} of the training images. {TRUST}"
    lines += [*table(["", *columns], cells), ""]
    agreement = {name: meaning for name, meaning in AGREEMENT.items() if name in figures}
    if agreement:
        rows = [[meaning.title, f"{figures[name]:.{meaning.digits}f}"] for name, meaning in agreement.items()]
        lines += [*table(["", "fraction of images"], rows), ""]
    said = {meaning.title: meaning for name, meaning in MEANINGS.items() if name in figures}
    said |= {"agreement of an exit": AGREEMENT["exit_agreement_1"]} if agreement else {}
    said |= {AGREEMENT["exits_unanimous"].title: AGREEMENT["exits_unanimous"]} if agreement else {}
    return [*lines, *(f"- {title}: {meaning.words}; {meaning.better}." for title, meaning in said.items()), ""]


def _clusters(results: Results) -> list[str]:
    if "sizes" not in results:
        return []
    sizes = np.asarray(results["sizes"])
    cells = [["clusters asked for (K)", f"{results['k_asked']:,}"]] if "k_asked" in results else []
    cells.append(["clusters with images", f"{len(sizes):,}"])
    cells.append(["smallest, median, largest", f"{sizes.min():,}, {np.median(sizes):,.0f}, {sizes.max():,}"])
    names = {"nmi": "normalised mutual information", "ari": "adjusted Rand index", "purity": "purity"}
    quality = results.get("quality") or {}
    cells += [[f"{name} with the true labels", f"{quality[key]:.3f}"] for key, name in names.items() if key in quality]
    return ["## Pseudo labels", "", *table(["", ""], cells), "", *_figures(results, "cluster")]


def _times(results: Results) -> list[str]:
    lines = _figures(results, "")
    if times := results.get("times"):
        cells = [
            [markdown(entry["step"]), exact_duration(entry["seconds"]), markdown(entry.get("note", ""))]
            for entry in times
        ]
        cells.append(["all", exact_duration(sum(entry["seconds"] for entry in times)), ""])
        lines += [*table(["step", "time", ""], cells), ""]
    return ["## Training", "", *lines] if lines else []


def _figures(results: Results, kind: str) -> list[str]:
    """The figures whose file's name begins with `kind`; '' takes those of no other section."""
    lines = []
    for path, caption in results.get("figures", {}).items():
        name = Path(path).name
        if name.startswith(kind) if kind else not name.startswith(("accuracy", "cluster")):
            lines += [f"![{markdown(caption)}]({path})", "", f"*{markdown(caption)}*", ""]
    return lines


def exact_duration(seconds: float) -> str:
    """A time in words: hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
