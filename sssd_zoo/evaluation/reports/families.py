"""The report of `python eval/families.py`: networks trained for the same time, side by side."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.reports.markdown import exact_duration, table
from sssd_zoo.models.cost import ANSWERS


class Family(TypedDict):
    """One network, trained and measured.

    Attributes:
        name: timm name.
        parameters: number of them, with all exits and heads.
        macs: MACs per image at the exits '1' to '4' and for the 'ensemble'.
        exits: accuracies of linear probes in percent, four.
        ensemble: of the four.
        epochs: of MoCo v2 ('pretrain') and of self distillation ('distill').
        planned: seconds of both, by the measured steps.
        seconds: that each of these took.
    """

    name: str
    parameters: int
    macs: dict[str, int]
    exits: list[float]
    ensemble: float
    epochs: dict[str, int]
    planned: float
    seconds: dict[str, float]


class Point(NamedTuple):
    """One answer of one network: of an exit '1' to '4', or of the 'ensemble'; its MACs and its accuracy in percent."""

    name: str
    answer: str
    macs: int
    accuracy: float

    @property
    def words(self) -> str:
        """What gives the answer."""
        return self.answer if self.answer == "ensemble" else f"exit {self.answer}"


class Comparison(TypedDict):
    """What was compared, and how; the content of metrics.json.

    Attributes:
        data: name of the images, with their split.
        images: number of training images.
        image_size: side of the views in pixels.
        k: clusters asked for.
        seed: of all runs.
        minutes: of training that each network was to have.
        moco: the fraction of it for MoCo v2.
        test: what the accuracies were measured on, in words.
        machine: in words.
        families: the networks, in the order of the report.
        left_out: names of networks too slow for one epoch of each training, and the seconds that these would take.
        to_come: names of the networks that are not trained yet.
    """

    data: str
    images: int
    image_size: int
    k: int
    seed: int
    minutes: float
    moco: float
    test: str
    machine: str
    families: list[Family]
    left_out: dict[str, float]
    to_come: list[str]


def points_of(family: Family) -> list[Point]:
    """The five answers of a network."""
    accuracies = [*family["exits"], family["ensemble"]]
    pairs = zip(ANSWERS, accuracies, strict=True)
    return [Point(family["name"], answer, family["macs"][answer], accuracy) for answer, accuracy in pairs]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none is as accurate at fewer MACs, or more accurate at as many.

    Returns:
        The cheapest first. Of points that are equal in both, the first alone.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.macs, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def families_report(comparison: Comparison) -> str:
    """The report as Markdown; accuracy.png lies beside it."""
    families = comparison["families"]
    front = pareto_front([point for family in families for point in points_of(family)])
    epochs = f"{comparison['moco']:.0%} of it MoCo v2"
    lines = [
        "# Networks at the same training time",
        "",
        f"- **Data**: {markdown(comparison['data'])}, {comparison['images']:,} images at {comparison['image_size']} "
        "px, whose labels serve the probes only",
        f"- **Measured on**: {markdown(comparison['test'])}",
        f"- **Training**: {comparison['minutes']:g} minutes of each network, about {epochs} and the rest self "
        f"distillation on {comparison['k']:,} clusters, in whole epochs chosen from measured steps; the clustering, "
        "probes and figures are not counted. A training took longer than planned where other programs ran beside it",
        f"- **Seed**: {comparison['seed']}, one run of each network: small differences may be chance",
        f"- **Machine**: {markdown(comparison['machine'])}",
        "",
        *_verdict(front),
        "Accuracy in percent of a linear layer per exit, fitted on the frozen network until it converges; the ensemble "
        "is the mean of the exits' softmax outputs. MACs are of convolutions and linear layers, in millions per image; "
        "those of the ensemble are of the whole network.",
        "",
        *_accuracies(families, front),
        "",
        "![Accuracy against MACs](accuracy.png)",
        "",
        "## MACs of the exits",
        "",
        *_macs(families),
        "",
    ]
    if comparison["left_out"]:
        slow = [f"{code(name)} ({exact_duration(seconds)})" for name, seconds in comparison["left_out"].items()]
        lines += [f"Left out, as one epoch of each training takes longer than that time: {', '.join(slow)}.", ""]
    if comparison["to_come"]:
        lines += [f"Not trained yet: {', '.join(map(code, comparison['to_come']))}.", ""]
    return "\n".join(lines)


def _verdict(front: Sequence[Point]) -> list[str]:
    """The Pareto front, a row for each point."""
    cells = [[f"{point.macs / 1e6:,.1f} M", f"{point.accuracy:.2f}", code(point.name), point.words] for point in front]
    best = front[-1]
    return [
        f"**Verdict.** The most accurate is {code(best.name)} ({best.words}), {best.accuracy:.2f} percent for "
        f"{best.macs / 1e6:,.1f} million MACs. The best for its cost is, at each budget of MACs, the last row that "
        "fits (the Pareto front: nothing measured here is as accurate for less):",
        "",
        *table(["MACs", "accuracy", "network", "answer of"], cells),
        "",
    ]


def _accuracies(families: Sequence[Family], front: Sequence[Point]) -> list[str]:
    head = ["network", "parameters", "MACs", "exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    head += ["epochs of MoCo", "of distillation", "planned", "took", "on the front"]
    cells = []
    for family in families:
        best = [point.words for point in front if point.name == family["name"]]
        cells.append(
            [
                code(family["name"]),
                f"{family['parameters'] / 1e6:.1f} M",
                f"{family['macs']['ensemble'] / 1e6:,.1f}",
                *(f"{point.accuracy:.2f}" for point in points_of(family)),
                str(family["epochs"]["pretrain"]),
                str(family["epochs"]["distill"]),
                exact_duration(family["planned"]),
                exact_duration(sum(family["seconds"].values())),
                ", ".join(best),
            ]
        )
    return table(head, cells)


def _macs(families: Sequence[Family]) -> list[str]:
    head = ["network", "exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    cells = [
        [code(family["name"]), *(f"{family['macs'][answer] / 1e6:,.1f}" for answer in ANSWERS)] for family in families
    ]
    return table(head, cells)
