"""What the functions of `sssd_zoo.api` return: where the results lie, and their numbers, read from the files."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sssd_zoo.evaluation.prediction import Prediction
from sssd_zoo.files import read_json
from sssd_zoo.files.json_lines import read_metrics

__all__ = [
    "Accuracy",
    "EarlyExit",
    "Embeddings",
    "Export",
    "FineTuning",
    "Prediction",
    "PseudoLabels",
    "Result",
    "Run",
    "Training",
]


@dataclass(frozen=True)
class Result:
    """Something that was written. It stands for its path wherever one is asked for (`os.fspath`).

    Attributes:
        path: the file or folder.
    """

    path: Path

    def __fspath__(self) -> str:
        """The path as text."""
        return str(self.path)


def load(folder: Path, **options: Any) -> Any:
    """A network in a folder, in evaluation mode; `options` are those of `timm.create_model`, such as `output=2`."""
    import timm

    import sssd_zoo.models  # noqa: F401  registers the networks

    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


@dataclass(frozen=True)
class Run(Result):
    """A run of `fit`.

    Attributes:
        path: the run folder.
        model: folder of the network.
        report: report.md.
        page: report.html: the results, and the clusters to look at and name.
        clusters: number of clusters, that is of classes of the pseudo labels.
        accuracy: in percent of linear probes on the exits '1' to '4' and of the 'ensemble'; None without labels.
        verdict: whether the network is any good ('level', 'sentence', and commands to go on with, 'next'); None if the
            run has none.
        results: all of metrics.json; its keys are those of `sssd_zoo.evaluation.reports.markdown.Results`.
    """

    model: Path
    report: Path
    page: Path
    clusters: int
    accuracy: dict[str, float] | None
    verdict: dict[str, Any] | None
    results: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "Run":
        """A finished run in this folder."""
        results = read_json(path / "metrics.json", dict[str, Any])
        measured = results.get("accuracy")
        return cls(
            path=path,
            model=path / "model",
            report=path / "report.md",
            page=path / "report.html",
            clusters=len(results["sizes"]),
            accuracy=by_exit(measured[0]["exits"], measured[0]["ensemble"]) if measured else None,
            verdict=results.get("verdict"),
            results=results,
        )

    def load(self, **options: Any) -> Any:
        """The network, in evaluation mode; `options` are those of `timm.create_model`, such as `output=2`."""
        return load(self.model, **options)


@dataclass(frozen=True)
class Training(Result):
    """A training of `pretrain` or `distill`.

    Attributes:
        path: the run folder, which has the network, too.
        loss: of the last line of the log; None if it has no line.
        log: the lines of metrics.jsonl.
    """

    loss: float | None
    log: list[dict[str, Any]] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "Training":
        """A finished training in this folder."""
        log = read_metrics(path / "metrics.jsonl")
        return cls(path=path, loss=log[-1].get("loss") if log else None, log=log)

    def load(self, **options: Any) -> Any:
        """The network, in evaluation mode; see `Run.load`."""
        return load(self.path, **options)


@dataclass(frozen=True)
class PseudoLabels(Result):
    """The labels of `pseudo_label`; `sssd_zoo.labels.pseudo_labels.PseudoLabels.load(path)` has those of each image.

    Attributes:
        path: the folder.
        sizes: number of images of each cluster.
        quality: 'nmi', 'ari' and 'purity' against true labels, 0 to 1; None without these.
        meta: all of pseudo_labels.json.
    """

    sizes: list[int] = field(repr=False)
    quality: dict[str, float] | None
    meta: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "PseudoLabels":
        """The labels in this folder."""
        meta = read_json(path / "pseudo_labels.json", dict[str, Any])
        return cls(path=path, sizes=meta["sizes"], quality=meta["quality"], meta=meta)


@dataclass(frozen=True)
class Embeddings(Result):
    """A file of `embed`.

    Attributes:
        path: the file.
        count: N, images in it.
        dimension: D, numbers per image and exit.
        exits: names of the exits, see `sssd_zoo.evaluation.embeddings.Meta`.
        left_out: images that could not be read, with 'image' and 'reason'.
    """

    count: int
    dimension: int
    exits: list[str]
    left_out: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Embeddings":
        """A file in this place."""
        from sssd_zoo.evaluation.embeddings import read_meta

        meta = read_meta(path)
        left_out = [dict(one) for one in meta.get("left_out", [])]
        return cls(path=path, count=meta["count"], dimension=meta["dimension"], exits=meta["exits"], left_out=left_out)

    def array(self, exit_name: str | int | None = None) -> Any:
        """The embeddings, float32 [N, D].

        Args:
            exit_name: of `exits`, or its number; by default the last.
        """
        import numpy as np

        from sssd_zoo.evaluation.embeddings import EmbeddingFile

        chosen = self.exits[-1] if exit_name is None else str(exit_name)
        return np.concatenate(list(EmbeddingFile(self.path).chunks(chosen)))

    def images(self) -> tuple[Any, list[str | None]]:
        """Row numbers in the data, int64 [N], and the paths of those that are files, else None, in the same order."""
        from sssd_zoo.evaluation.embeddings import EmbeddingFile

        return EmbeddingFile(self.path).images()


@dataclass(frozen=True)
class Accuracy:
    """The accuracies of `linear` and `knn` in percent.

    Attributes:
        exits: by the exits '1' to '4' and, of `linear`, 'ensemble'; of a network without exits 'final' alone.
        data: name of the data.
        test: what was measured on, in words.
        path: folder of the network with the probes as its heads, if `linear` was to write one.
    """

    exits: dict[str, float]
    data: str
    test: str
    path: Path | None = None

    def __fspath__(self) -> str:
        """The folder as text.

        Raises:
            TypeError: if none was written.
        """
        if self.path is None:
            raise TypeError("nothing was written: give `linear` an `out`")
        return str(self.path)


@dataclass(frozen=True)
class EarlyExit(Result):
    """A network that `early_exit` calibrated.

    Attributes:
        path: folder of the network.
        thresholds: of the exits 1 to 3, 0 to 1.
        answers: of the exits '1' to '4', the 'ensemble' and 'early exit': accuracy where there are labels and agreement
            with the ensemble in percent, MACs, milliseconds.
        report: the report, early_exit/report.md.
        results: all of early_exit/report.json.
    """

    thresholds: list[float]
    answers: dict[str, dict[str, Any]] = field(repr=False)
    report: Path
    results: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "EarlyExit":
        """A calibrated network in this folder."""
        results = read_json(path / "early_exit" / "report.json", dict[str, Any])
        report = path / "early_exit" / "report.md"
        thresholds, answers = results["thresholds"], results["answers"]
        return cls(path=path, thresholds=thresholds, answers=answers, report=report, results=results)

    def load(self, **options: Any) -> Any:
        """The network, in evaluation mode; see `Run.load`."""
        return load(self.path, **options)


@dataclass(frozen=True)
class Export(Result):
    """What `export` wrote.

    Attributes:
        path: the file, or the folder of several.
        files: all of them.
    """

    files: list[Path]

    @classmethod
    def read(cls, path: Path, *, int8: bool = False) -> "Export":
        """What it wrote there."""
        from sssd_zoo.files import int8_beside
        from sssd_zoo.files.run_folder import files_of, kind_of  # imports torch, which naming a function must not

        if path.is_dir():
            return cls(path, sorted(files_of(path, kind_of(path) or "network")))
        return cls(path, [path, *([int8_beside(path)] if int8 else [])])


@dataclass(frozen=True)
class FineTuning(Result):
    """The runs of `finetune`.

    Attributes:
        path: the folder.
        model: folder of the network to deploy; None where none was asked for.
        report: report.md.
        rows: a row for every network, amount of labels and seed, with 'model', 'amount' (percent, or labels per class),
            'labels', 'seed' and 'accuracy' in percent.
    """

    model: Path | None
    report: Path
    rows: list[dict[str, Any]] = field(repr=False)

    @classmethod
    def read(cls, path: Path, *, deployed: bool) -> "FineTuning":
        """Finished runs in this folder."""
        kinds = {"model": str, "amount": float, "labels": int, "seed": int, "accuracy": float}
        with (path / "results.csv").open(encoding="utf-8", newline="") as file:
            rows = [{name: kind(row[name]) for name, kind in kinds.items()} for row in csv.DictReader(file)]
        return cls(path=path, model=path / "model" if deployed else None, report=path / "report.md", rows=rows)


def by_exit(exits: list[float], ensemble: float | None = None) -> dict[str, float]:
    """Accuracies by the names of the exits, and of the ensemble where there is one."""
    if len(exits) == 1:
        return {"final": exits[0]}
    named = {str(number): value for number, value in enumerate(exits, start=1)}
    return named if ensemble is None else {**named, "ensemble": ensemble}
