"""Compares networks with exits at the same training time: accuracy without labels against MACs.

    python eval/families.py --data uoft-cs/cifar10 --runs RUNS --out REPORT --minutes 10

First it measures training steps of all networks and chooses the epochs of each, so that MoCo v2 and self distillation
take so many minutes in all, two thirds of them MoCo v2. RUNS/epochs.json keeps what was measured;
RUNS/NAME is a run folder of `sssd fit`; REPORT gets report.md, metrics.json and accuracy.png, anew after each network.
The same command resumes a killed run.
"""

import argparse
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sssd_zoo.cli import run
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.cli.guard import guarded
from sssd_zoo.cpus import set_up_openmp
from sssd_zoo.distributed.progress import duration
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.reports.families import Comparison, Family, families_report
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.files.run_folder import release_all

RECIPE = Path(__file__).parents[1] / "train" / "recipes" / "backbones-cifar10.yaml"
MOCO = 2 / 3  # of the training time
CLOSE = 0.1  # what a network's training may take more or less than asked for, as a fraction
# With timm's own stem and with that for small images. Without tf_efficientnet_lite0, which differs from
# efficientnet_lite0 in its padding alone.
FAMILIES = (
    *("resnet18", "mobilenetv4_conv_small", "mobilenetv3_small_100", "efficientnet_lite0", "regnety_004"),
    *("edgenext_xx_small", "convnextv2_atto", "fastvit_t8", "vit_tiny_patch16_224", "resnet50d"),
)
NAMES = tuple(f"sssd_{name}{stem}" for name in FAMILIES for stem in ("", "_cifar"))


class Epochs(NamedTuple):
    """How long a network is trained, and the seconds that are expected of both trainings."""

    pretrain: int
    distill: int
    seconds: float


def choose_epochs(pretrain: float, distill: float, seconds: float) -> Epochs | None:
    """The epochs of MoCo v2 and of self distillation that together take about so long.

    Of those within `CLOSE` of it the ones whose division is nearest to `MOCO`, else the nearest that are not longer.

    Args:
        pretrain: seconds of an epoch of MoCo v2.
        distill: seconds of an epoch of self distillation.
        seconds: of both trainings.

    Returns:
        The epochs, or None where one epoch of each takes longer.
    """

    def distance(epochs: Epochs) -> tuple[float, float]:
        off = abs(epochs.seconds / seconds - 1)
        return max(0.0, off - CLOSE), abs(epochs.pretrain * pretrain / epochs.seconds - MOCO)

    most = max(1, round(seconds / distill))
    near = [(max(1, round((seconds - count * distill) / pretrain)), count) for count in range(1, most + 1)]
    for pairs in (near, [(1, 1)]):
        chosen = [Epochs(first, second, first * pretrain + second * distill) for first, second in pairs]
        if fits := [epochs for epochs in chosen if epochs.seconds < (1 + CLOSE) * seconds]:
            return min(fits, key=distance)
    return None


def fit_words(args: argparse.Namespace, name: str, epochs: Epochs | None = None) -> list[str]:
    """The arguments of `sssd fit` for a network; by default with the epochs of the recipe."""
    words = ["--config", str(args.config), "--model", name, "--out", str(args.runs / name)]
    if args.data is not None:
        words += ["--data", args.data]
    if epochs is not None:
        words += ["--pretrain.epochs", str(epochs.pretrain), "--distill.epochs", str(epochs.distill)]
    return words


def measure_epochs(args: argparse.Namespace, name: str) -> dict[str, list[float]]:
    """Seconds of an epoch of MoCo v2 and of self distillation of a network, as measured `args.rounds` times."""
    from sssd_zoo.pipeline.estimate import measure
    from sssd_zoo.pipeline.fit import Plan, set_up_fit, with_method

    fit_args, given = read_arguments("fit", fit_words(args, name), "sssd fit")
    setup, _ = set_up_fit(with_method(fit_args, given), given)
    try:
        work = Plan(setup.args, setup, None, {}).work({"pretrain": 0, "distill": 0})
        seconds: dict[str, list[float]] = {"pretrain": [], "distill": []}
        for _ in range(args.rounds):
            trainings = measure(setup, work).trainings
            for stage, measured in seconds.items():
                measured.append(work.steps(stage) * trainings[stage].step + trainings[stage].checkpoint)
    finally:
        release_all()
    return seconds


def schedule(args: argparse.Namespace) -> dict[str, Epochs | float]:
    """The epochs of each network, or the seconds of one epoch of each training where the network is too slow.

    Raises:
        UserError: if the runs are of other images or another recipe, or no network can be trained in that time.
    """
    path = args.runs / "epochs.json"
    measured_for = {"data": args.data, "recipe": yaml.safe_load(args.config.read_text())}
    kept: dict[str, Any] = {"measured_for": measured_for, "seconds_of_an_epoch": {}}
    if path.exists():
        kept = read_json(path, dict[str, Any])
        if kept.get("measured_for") != measured_for:
            raise UserError(f"{path} was measured for other --data or another --config: give another --runs")
    chosen: dict[str, Epochs | float] = {}
    for name in args.names:
        if name not in kept["seconds_of_an_epoch"]:
            kept["seconds_of_an_epoch"][name] = measure_epochs(args, name)
            write_json(path, kept)
        measured = kept["seconds_of_an_epoch"][name]
        pretrain, distill = (statistics.median(measured[stage]) for stage in ("pretrain", "distill"))
        epochs = choose_epochs(pretrain, distill, 60 * args.minutes)
        chosen[name] = pretrain + distill if epochs is None else epochs
        each = f"an epoch of MoCo v2 takes {duration(pretrain)}, of self distillation {duration(distill)}"
        print(f"{name}: {each}: {'left out' if epochs is None else f'{epochs.pretrain} and {epochs.distill}'}")
    if not any(isinstance(epochs, Epochs) for epochs in chosen.values()):
        raise UserError(f"--minutes {args.minutes:g} is too short for one epoch of each training of any network")
    return chosen


def family(folder: Path, epochs: Epochs) -> Family:
    """What a finished run found."""
    from sssd_zoo.evaluation.reports.markdown import read_results
    from sssd_zoo.models.networks import load_network

    results = read_results(folder)
    seconds = {timing["step"]: timing["seconds"] for timing in results["times"]}
    network: Any = load_network(str(folder / "model"))
    accuracy = results["accuracy"][0]
    return {
        "name": results["model"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": dict(results["macs"]),
        "exits": list(accuracy["exits"]),
        "ensemble": accuracy["ensemble"],
        "epochs": {"pretrain": epochs.pretrain, "distill": epochs.distill},
        "planned": epochs.seconds,
        "seconds": {stage: seconds[stage] for stage in ("pretrain", "distill")},
    }


def write_report(args: argparse.Namespace, chosen: dict[str, Epochs | float], done: list[str]) -> None:
    """Writes report.md, metrics.json and accuracy.png about the networks that are done."""
    from sssd_zoo.evaluation.reports.figures import families_cost
    from sssd_zoo.evaluation.reports.markdown import read_results

    every = [read_results(args.runs / name) for name in done]
    results, machines = every[0], dict.fromkeys(each["machine"] for each in every)
    trained = {name: epochs for name, epochs in chosen.items() if isinstance(epochs, Epochs)}
    comparison: Comparison = {
        "data": f"{results['data']}, split {results['split']}",
        "images": results["images"],
        "image_size": results["image_size"],
        "k": results["k_asked"],
        "seed": results["seed"],
        "minutes": args.minutes,
        "moco": MOCO,
        "test": f"{results['test_images']:,} images, {results['test']}",
        "machine": "; ".join(machines),
        "families": [family(args.runs / name, trained[name]) for name in done],
        "left_out": {name: seconds for name, seconds in chosen.items() if not isinstance(seconds, Epochs)},
        "to_come": [name for name in trained if name not in done],
    }
    families_cost(comparison["families"], args.out / "accuracy.png")
    atomic_write_text(args.out / "report.md", families_report(comparison))
    write_json(args.out / "metrics.json", comparison)


def check_report(out: Path) -> None:
    """Raises `UserError` for a folder with a report of something else."""
    there = [name for name in ("report.md", "metrics.json", "accuracy.png") if (out / name).exists()]
    if there and not ((out / "metrics.json").is_file() and "families" in read_json(out / "metrics.json", dict)):
        raise UserError(f"--out {out} holds {there[0]}, which this script did not write: give another folder")


def network_name(text: str) -> str:
    """A timm name, which is a folder's name, too."""
    if not re.fullmatch(r"\w[\w.]*", text):
        raise argparse.ArgumentTypeError(f"'{plain(text, 80)}' is not a timm name such as {NAMES[0]}")
    return text


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"'{plain(text, 80)}' is not a number of minutes above 0")
    return number


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10, as for sssd fit; by default that of the recipe")
    parser.add_argument("--runs", required=True, type=Path, help="folder for the run folders")
    parser.add_argument("--out", required=True, type=Path, help="folder of the report")
    parser.add_argument("--minutes", type=positive, default=10.0, help="of training of each network, default 10")
    parser.add_argument("--names", nargs="+", type=network_name, default=NAMES, help=f"default {' '.join(NAMES)}")
    parser.add_argument("--config", type=Path, default=RECIPE, help=f"recipe of sssd fit, default {RECIPE.name}")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, whose median counts; default 3")
    return parser.parse_args()


def main() -> None:
    """Measures, trains and reports."""
    args = arguments()
    with guarded():
        set_up_openmp()
        check_report(args.out)
        if not args.config.is_file():
            raise UserError(f"--config {args.config} is not a file")
        chosen = schedule(args)
    done: list[str] = []
    for name, epochs in chosen.items():
        if isinstance(epochs, Epochs):
            print(f"\n{name}: {epochs.pretrain} epochs of MoCo v2, {epochs.distill} of self distillation", flush=True)
            run("fit", fit_words(args, name, epochs), prog="eval/families.py")
            done.append(name)
            with guarded():
                write_report(args, chosen, done)


if __name__ == "__main__":
    main()
