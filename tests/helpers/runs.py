"""A finished run of `sssd fit`, made up in a second of a tiny network and given clusters; the results of others."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

from helpers.commands import sssd
from helpers.data import load
from helpers.labels import pseudo_labels
from helpers.networks import save_tiny
from sssd_zoo.files import write_json
from sssd_zoo.files.run_folder import mark
from sssd_zoo.labels.kmeans import Clustering


def rows_of(out: Path) -> list[dict[str, str]]:
    """The rows of results.csv of `sssd compare` or `sssd finetune`."""
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def fitted(folder: Path, data: Path, *words: str) -> Path:
    """A run that `sssd fit` made, with all that it writes; seconds with few images and small settings."""
    assert sssd("fit", "--data", data, "--out", folder / "run", *words) == 0
    return folder / "run"


def made_run(out: Path, source: Path | str, clusters: int = 4, *, unlabelled: bool = True, **results) -> Path:
    """A run on these images, put into clusters in turn; the first image of a cluster is the nearest to its centre."""
    data = load(source, unlabelled=unlabelled)
    labels = np.arange(len(data)) % clusters
    distances = np.linspace(0.1, 0.9, len(data), dtype=np.float32)
    centroids = np.eye(clusters, 8, dtype=np.float32)
    clustering = Clustering(labels, centroids, distances, float(distances.sum()), clusters)
    mark(out, "fit")
    made = SimpleNamespace(name=data.name, split=data.split, fingerprint=data.fingerprint)
    pseudo_labels(clustering, data.rows, data.labels, **vars(made)).save(out / "labels")
    save_tiny(out / "model", clusters)
    config = {"data": str(source), "unlabelled": unlabelled, "out": str(out), "workers": 0}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    sizes = np.bincount(labels).tolist()
    facts = {"data": data.name, "split": data.split, "images": len(data), "model": "sssd_resnet18", "image_size": 32}
    macs = {"1": 1_000_000, "2": 2_000_000, "3": 3_000_000, "4": 4_000_000, "ensemble": 4_200_000}
    write_json(out / "metrics.json", {**facts, "sizes": sizes, "k_asked": clusters, "macs": macs, **results})
    for stage, terms in (("pretrain", {"contrast_top1": 0.5}), ("distill", {"kl": 0.1, "feature": 300.0})):
        (out / stage).mkdir()
        lines = [{"step": n, "epoch": n / 2, "loss": 9 / (n + 1), **terms, "lr": 0.1} for n in range(1, 9)]
        (out / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out
