"""Measures how figures of quality without labels go with the accuracy of linear probes, over several networks.

    python eval/label_free.py --data uoft-cs/cifar10 --features FOLDER --out REPORT NAME=NETWORK NAME=NETWORK@SIZE ...

NETWORK is a run folder or a timm name, SIZE the side of its inputs in pixels. FOLDER keeps what the networks make of
the images: a network that is there is not run again.
"""

import argparse
import csv
import io
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from scipy.stats import spearmanr

from sssd_zoo.cli.guard import guarded
from sssd_zoo.configs import DataConfig, ForwardConfig, ProbeConfig
from sssd_zoo.data.inputs import storage_default
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.distributed.hardware import describe_machine, resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.features import feature_batches
from sssd_zoo.evaluation.label_free import cluster_stability, embedding_figures, exit_agreement, neighbour_accuracy
from sssd_zoo.evaluation.meanings import AGREEMENT, MEANINGS, Meaning
from sssd_zoo.evaluation.probe import linear_probe
from sssd_zoo.evaluation.reports.markdown import table
from sssd_zoo.evaluation.subset import Subset, draw_subset
from sssd_zoo.files import atomic_write_bytes, atomic_write_text
from sssd_zoo.models.networks import load_encoder, load_network, weights_digest


def features(model: Any, data: ImageData, forward: ForwardConfig, positions: torch.Tensor) -> torch.Tensor:
    """Pooled features of all exits, float32 [E, N, D]."""
    batches = feature_batches(model, data, forward, positions.split(forward.batch_size))
    return torch.cat([pooled for _, pooled in batches], dim=1)


def extract(source: str, train: ImageData, test: ImageData, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What a network makes of the images.

    Returns:
        Features float32 [E, N, D]: `plain` and of a `first` and a `second` view, for the figures; `train` and `test`,
        for the probe, with `train_labels` and `test_labels`. With class heads on all exits their `logits`.
    """
    name, _, size = source.partition("@")
    model = load_encoder(name, int(size)) if size else load_network(name)
    forward = ForwardConfig(precision=args.precision, device=args.device)
    began = time.perf_counter()
    subset = Subset(train, forward, args.seed, args.images)
    tensors = dict(zip(("plain", "first", "second"), subset.features(model), strict=True))
    tensors["seconds"] = torch.tensor(time.perf_counter() - began)
    if getattr(model, "output", None) == "ensemble" and model.num_classes > 1:
        tensors["logits"] = subset.logits(model)
    for part, data, most in (("train", train, args.probe), ("test", test, args.test)):
        positions = draw_subset(len(data), most, args.seed + 1)
        assert data.labels is not None
        tensors |= {part: features(model, data, forward, positions)}
        tensors |= {f"{part}_labels": torch.from_numpy(data.labels)[positions]}
    return tensors


def kept(
    file: Path, source: str, train: ImageData, test: ImageData, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """What `extract` gives: read from `file`, or computed and written there.

    Raises:
        UserError: if `file` is of another network, other images or other settings.
    """
    network = load_network(source.partition("@")[0])
    made_by = {
        "network": f"{source}, {weights_digest(network)}",
        "data": f"{train.fingerprint}, {test.fingerprint}",
        "settings": f"{args.images}, {args.probe}, {args.test}, seed {args.seed}",
        "precision": resolve_precision(args.precision, args.device),
    }
    if file.exists():
        with safe_open(file, "pt") as stored:
            if stored.metadata() != made_by:
                raise UserError(f"{file} is of another network, other images or other settings: move it away")
        return load_file(file)
    tensors = extract(source, train, test, args)
    atomic_write_bytes(file, save(tensors, made_by))
    return tensors


def measure(tensors: dict[str, torch.Tensor], classes: int, seed: int) -> dict[str, float]:
    """The figures of a network's last exit, and the accuracy in percent of a linear `probe` on it."""
    plain, first, second = (tensors[name][-1] for name in ("plain", "first", "second"))
    figures = {**embedding_figures(plain, first, second), **cluster_stability(plain, seed)}
    accuracy = neighbour_accuracy(tensors["train"][-1], tensors["train_labels"])
    figures |= {} if accuracy is None else {"knn": accuracy}
    if "logits" in tensors:
        figures |= exit_agreement(tensors["logits"])
    train, test = tensors["train"][-1:], tensors["test"][-1:]
    probe = linear_probe(
        train, tensors["train_labels"], test, tensors["test_labels"], classes, ProbeConfig(), seed=seed
    )
    return {"probe": probe.exits[0], "dim": float(plain.shape[1]), **figures}


def correlations(rows: dict[str, dict[str, float]], names: list[str]) -> dict[str, tuple[float, int]]:
    """Spearman's correlation of each figure with the probes' accuracy, and over how many networks."""
    found = {}
    for name in names:
        pairs = [(row[name], row["probe"]) for row in rows.values() if name in row]
        if len(pairs) > 2:
            found[name] = (float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs))
    return found


def report(
    rows: dict[str, dict[str, float]], sources: dict[str, str], args: argparse.Namespace, train: int, test: int
) -> str:
    """The figures of all networks, from the lowest accuracy to the highest, and the correlations, as Markdown.

    Args:
        rows: figures of each network.
        sources: where each network comes from.
        args: of the command line.
        train: number of training images that there are.
        test: number of test images that there are.
    """
    meanings = {
        "probe": Meaning("linear probe", "", "", 2),
        "dim": Meaning("width", "", "", 0),
        **MEANINGS,
        **AGREEMENT,
    }
    shown = [name for name in meanings if any(name in row for row in rows.values())]
    found = correlations(rows, [name for name in shown if name not in ("probe", "dim")])
    cells = [
        [code(name), *(f"{row[key]:.{meanings[key].digits}f}" if key in row else "" for key in shown)]
        for name, row in sorted(rows.items(), key=lambda pair: pair[1]["probe"])
    ]
    direction = [
        [meanings[key].title, f"{value:+.2f}", f"{networks}"]
        for key, (value, networks) in sorted(found.items(), key=lambda pair: -abs(pair[1][0]))
    ]
    return "\n".join(
        [
            "# Quality without labels against linear probes",
            "",
            f"- **Data**: {code(args.data)}; figures of {min(args.images, train):,} training images, probes trained on "
            f"{min(args.probe, train):,} training images and measured on {min(args.test, test):,} of the test split; "
            f"seed {args.seed}",
            f"- **Machine**: {markdown(describe_machine(resolve_precision(args.precision, args.device)))}",
            f"- **Networks**: {', '.join(f'{code(name)} is {code(source)}' for name, source in sources.items())}",
            "",
            "Figures are of the last exit's features, but for the agreement of exits. Accuracies are in percent.",
            "",
            *table(["network", *(meanings[key].title for key in shown)], cells),
            "",
            "## Spearman's correlation with the accuracy of the probes",
            "",
            *table(["figure", "correlation", "networks"], direction),
            "",
        ]
    )


def write_csv(path: Path, rows: dict[str, dict[str, float]]) -> None:
    """All numbers, a line for each network."""
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in rows.values() for key in row))
    writer = csv.DictWriter(text, ["network", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"network": name, **row} for name, row in rows.items())
    atomic_write_text(path, text.getvalue())


def named(pair: str) -> tuple[str, str]:
    """Name and network of NAME=NETWORK."""
    name, sign, network = pair.partition("=")
    if not (name and sign and network):
        raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=NETWORK")
    return name, network


def arguments() -> argparse.Namespace:
    """Of the command line.

    Raises:
        UserError: if two networks have one name.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NAME=NETWORK", type=named)
    parser.add_argument("--data", required=True)
    parser.add_argument("--features", required=True, type=Path, help="folder that keeps what networks make of images")
    parser.add_argument("--out", required=True, type=Path, help="folder of the report")
    parser.add_argument("--images", type=int, default=2000, help="that the figures are of")
    parser.add_argument("--probe", type=int, default=5000, help="images that probes are trained on")
    parser.add_argument("--test", type=int, default=2000, help="images of the test split that probes are measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    args = parser.parse_args()
    names = [name for name, _ in args.networks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two networks are called {', '.join(twice)}: give each a name of its own")
    return args


def main() -> None:
    """Measures all networks and writes report.md and results.csv."""
    args = arguments()
    tune_cpu()
    for folder in (args.out, args.features):
        folder.mkdir(parents=True, exist_ok=True)
    sources = dict(args.networks)
    train, test = (
        load_images(DataConfig(data=args.data, split=split), default_size=storage_default(32), require_labels=True)
        for split in ("train", "test")
    )
    rows = {}
    for name, source in sources.items():
        tensors = kept(args.features / f"{name}.safetensors", source, train, test, args)
        rows[name] = measure(tensors, len(train.class_names or []), args.seed)
        print(f"{name}: linear probe {rows[name]['probe']:.2f} percent", flush=True)
    write_csv(args.out / "results.csv", rows)
    atomic_write_text(args.out / "report.md", report(rows, sources, args, len(train), len(test)))


if __name__ == "__main__":
    with guarded():
        main()
