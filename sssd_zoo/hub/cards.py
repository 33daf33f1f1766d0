"""The folder about a trained network that lies in hub_cards/ and is published on the Hub: `sssd card`.

FOLDER/
    README.md       the card
    .eval_results/  its accuracies in the Hub's format, if the data set is on the Hub
    config.json     what timm and transformers read
    metrics.json    everything that the run measured, the weights' sha256, and a check of the weights on bundled images
    recipe.yaml     the run's arguments as resolved
    pretrain.jsonl, distill.jsonl   the training logs
    figures/        PNG
    early_exit/     the report of `sssd early-exit`, with --calibrated
    model.safetensors               half precision, unless it is written elsewhere
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import torch
import yaml
from safetensors import SafetensorError, safe_open

from sssd_zoo.configs import DataConfig, KNNConfig
from sssd_zoo.data.inputs import input_spec
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.sources import short_name
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.features import read_batches, stack_features
from sssd_zoo.evaluation.knn import knn
from sssd_zoo.evaluation.reports.early_exit import network_source
from sssd_zoo.evaluation.reports.markdown import AccuracyRow, Results, exact_duration, read_results
from sssd_zoo.evaluation.reports.paper import named_rows
from sssd_zoo.files import (
    atomic_write_text,
    check_content,
    disk_errors,
    read_json,
    sha256,
    write_json,
)
from sssd_zoo.files.run_folder import EARLY_EXIT, KINDS, NETWORK, check_replaceable, kind_of
from sssd_zoo.files.run_steps import check_of_one_piece
from sssd_zoo.files.untrusted import copy_files, read_yaml
from sssd_zoo.hub.model_card import EXITS, eval_result_files, model_card, with_costs
from sssd_zoo.hub.publish import PICTURES, Metrics
from sssd_zoo.models import classifier_names, classifiers
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import network_weights

# The files of a run, and of a folder of `sssd early-exit`, that a card is made of. No others are read or copied.
RUN_NEEDED = (*(f"model/{name}" for name in NETWORK), "metrics.json", "config.yaml")
RUN_FILES = (*RUN_NEEDED, "pretrain/metrics.jsonl", "distill/metrics.jsonl", "figures/*.png")

CALIBRATED_FILES = (*NETWORK, *EARLY_EXIT)

CHECK_IMAGES = 1000  # of the bundled sample's test split, which no network was trained on

WEIGHTS_MARK = {"package": "sssd-zoo", "kind": "card"}  # in the metadata of their safetensors file

SHOWN = {  # the figures in the card's text, and their captions where the run has none
    "accuracy.png": "Accuracy against cost, exit by exit.",
    "early_exit.png": "Accuracy against the cost of an early exit.",
}

THRESHOLDS = "**Early exit**: thresholds for `forward_early` are in `config.json`; "
SCALED = (
    "temperatures are folded into the classifiers; `early_exit/report.md` has the results. The ensemble's accuracy in "
    "the table was measured before, and they change it slightly"
)
UNSCALED = "none of the fitted temperatures stayed; `early_exit/report.md` has the results"


class Recipe(TypedDict):
    """The fields of a run's config.yaml that are changed for the card."""

    data: str | list[str]
    out: str
    pretrain: dict[str, Any]


def check_weights_file(path: Path, out: Path, *, overwrite: bool) -> None:
    """Refuses a file for a card's weights that is something else, or belongs to another folder of this package.

    Args:
        path: the file to write.
        out: the card's folder, in which it may lie.
        overwrite: whether weights of an earlier card may be replaced.

    Raises:
        UserError: that says what is there.
    """
    for folder in path.resolve().parents:
        if folder != out.resolve() and (kind := kind_of(folder)) is not None:
            words = KINDS[kind].words if kind in KINDS else f"'{kind}' of another version"
            raise UserError(f"--weights {path} lies in {folder}, which holds {words}: give a file outside of it")

    def known(file: Path) -> bool:
        if is_card_weights(file):
            return True
        # Those of an earlier version bear no mark, but the card knows them by their sha256.
        record = out / "metrics.json"
        return record.is_file() and read_json(record, Metrics).get("weights", {}).get("sha256") == sha256(file)

    check_replaceable(path, overwrite, "weights of `sssd card`", known)


def is_card_weights(path: Path) -> bool:
    """Whether a file holds weights that `write_card` made."""
    try:
        with safe_open(path, framework="pt") as file:
            return WEIGHTS_MARK.items() <= (file.metadata() or {}).items()
    except SafetensorError:
        return False


@contextmanager
def copy_sources(run: Path, calibrated: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """Copies the files that a card is made of, refusing links, and yields the copies for `write_card`.

    Args:
        run: a finished run of `sssd fit`.
        calibrated: see `check_calibrated`.

    Raises:
        UserError: if one of the files is a link.
    """
    with TemporaryDirectory(prefix="sssd-card-") as scratch:
        copies = Path(scratch, "run"), None if calibrated is None else Path(scratch, "calibrated")
        copy_files(run, RUN_FILES, copies[0])
        if calibrated is not None and copies[1] is not None:
            copy_files(calibrated, CALIBRATED_FILES, copies[1])
        yield copies


def check_run(run: Path) -> None:
    """Refuses a folder that is not a finished run of `sssd fit`.

    Raises:
        UserError: that names what is missing, or the steps that an unfinished run made again.
    """
    missing = [name for name in RUN_NEEDED if not (run / name).is_file()]
    if missing:
        raise UserError(f"{run} is not a finished run of `sssd fit`: {', '.join(missing)} missing")
    read_results(run)
    read_yaml(run / "config.yaml")
    check_of_one_piece(run)


def check_calibrated(run: Path, calibrated: str | None) -> Path | None:
    """Refuses a folder that is not a finished run, or a calibrated network that was not made from that run.

    Calibration scales the classifiers and changes nothing else.

    Raises:
        UserError: that says what is wrong.
    """
    check_run(run)
    if calibrated is None:
        return None
    folder = Path(calibrated)
    if not (folder / "early_exit" / "report.md").is_file():
        raise UserError(f"{folder} was not written by `sssd early-exit`: early_exit/report.md missing")
    ours = load_network(str(run / "model"))
    heads = tuple(f"{name}." for name in classifier_names(ours))
    theirs = load_network(str(folder)).state_dict()
    trunk = {name: value for name, value in ours.state_dict().items() if not name.startswith(heads)}
    if any(name not in theirs or not torch.equal(value, theirs[name]) for name, value in trunk.items()):
        raise UserError(
            f"{folder} was not made from {run}: run `sssd early-exit {run} --data DATA --out {folder} --overwrite`"
        )
    return folder


def calibration_note(run: Path, calibrated: Path | None) -> list[str]:
    """What the card says of early exit, where the network is taken from a folder of `sssd early-exit`."""
    if calibrated is None:
        return []
    before, after = (load_network(str(folder)).state_dict() for folder in (run / "model", calibrated))
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    return [THRESHOLDS + (UNSCALED if same else SCALED)]


@dataclass(frozen=True)
class CardOptions:
    """What the user says about a network on its card, beside what the run recorded.

    Attributes:
        license_name: of the weights, as the Hub names it; None states none.
        name: see `model_card`.
        repo: see `model_card`.
        paper: see `paper_rows`.
        remarks: sentences to add to the card.
    """

    license_name: str | None
    name: str | None = None
    repo: str | None = None
    paper: str | None = None
    remarks: Sequence[str] = ()


def write_card(
    run: Path,
    folder: Path,
    options: CardOptions,
    *,
    out: str | Path,
    calibrated: Path | None = None,
    sample: dict[str, float] | None = None,
) -> bytes:
    """Writes everything about a run's network except its weights.

    Args:
        run: a finished run of `sssd fit`.
        folder: to write into.
        options: what the user says about the network.
        out: what to call the folder in errors.
        calibrated: folder of `sssd early-exit` to take the network from, see `check_calibrated`.
        sample: see `sample_accuracy`; None leaves it out.

    Returns:
        The weights in half precision, whose sha256 is in metrics.json.
    """
    source = calibrated or run / "model"
    network = load_network(str(source))
    weights = network_weights(network, torch.float16, metadata=WEIGHTS_MARK)
    digest = hashlib.sha256(weights).hexdigest()
    # transformers would compute in the precision of the file.
    config = {**read_json(source / "config.json"), "dtype": "float32", "sha256": {"model.safetensors": digest}}
    results = read_results(run)
    results["data"] = short_name(results["data"])
    recipe = public_recipe(run, results)
    figures = figure_files(run, results, calibrated)
    context: Results = {
        **results,
        "accuracy": [*results.get("accuracy", []), *paper_rows(options.paper)],
        "notes": [*training_notes(recipe, results), *calibration_note(run, calibrated), *options.remarks],
    }
    context = with_costs(context, network, config["pretrained_cfg"]["input_size"])
    metrics = measured_accuracies(results)
    captions = {Path(path).name: caption for path, caption in results.get("figures", {}).items()}
    text = model_card(
        config,
        network,
        metrics=metrics,
        context=context,
        name=options.name,
        repo=options.repo,
        license_name=options.license_name,
        figures={f"figures/{file}": captions.get(file, SHOWN[file]) for file in SHOWN if file in figures},
    )
    described = {"sha256": digest, "bytes": len(weights), **({} if sample is None else {"check": sample})}
    atomic_write_text(folder / "README.md", text)
    write_json(folder / "config.json", config)
    # What the verdict proposes names folders of this machine, and the records of the steps stay there.
    public: dict[str, Any] = {key: value for key, value in results.items() if key not in ("verdict", "steps")}
    if "figures" in results:
        public["figures"] = {path: text for path, text in results["figures"].items() if Path(path).name in figures}
    write_json(folder / "metrics.json", {**public, "weights": described})
    atomic_write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    for file, entry in eval_result_files(metrics, results).items():
        atomic_write_text(folder / file, entry)
    with disk_errors(Path(out)):
        copy_records(run, calibrated, figures, folder)
    return weights


def public_recipe(run: Path, results: Results) -> dict[str, Any]:
    """A run's recipe without its output folder, and with the names of folders instead of their paths.

    Args:
        run: the run's folder.
        results: of the run, which name its data.

    Raises:
        UserError: if its config.yaml cannot be read.
    """
    recipe: dict[str, Any] = read_yaml(run / "config.yaml")
    check_content(run / "config.yaml", recipe, Recipe)
    recipe["data"] = results["data"]
    if recipe.get("pretrain_data"):
        # What lies above a folder is nobody else's business, and whether a/b was one is known while it is trained on.
        recipe["pretrain_data"] = results.get("pretrain_data") or PurePath(short_name(recipe["pretrain_data"])).name
    for settings, key in ((recipe, "features"), (recipe, "init"), (recipe["pretrain"], "init")):
        if settings.get(key):
            settings[key] = network_source(settings[key])
    recipe.pop("out")
    return recipe


def measured_accuracies(results: Results) -> dict[str, float]:
    """The network's linear-probe accuracies in percent, by exit '1' to '4' and 'ensemble'; {} if not measured."""
    if "accuracy" not in results:
        return {}
    row = results["accuracy"][0]
    return dict(zip(EXITS, [*row["exits"], row["ensemble"]], strict=True))


def figure_files(run: Path, results: Results, calibrated: Path | None) -> dict[str, Path]:
    """The figures of a run's report and of its calibration, by file name, without those that show its images.

    Others in its folder are not its own.
    """
    figures = {path.name: path for path in sorted((run / "figures").glob("*.png")) if path.name != PICTURES}
    if "figures" in results:
        figures = {name: path for name, path in figures.items() if f"figures/{name}" in results["figures"]}
    if calibrated is not None:
        figures["early_exit.png"] = calibrated / "early_exit" / "figure.png"
    return figures


def copy_records(run: Path, calibrated: Path | None, figures: dict[str, Path], folder: Path) -> None:
    """Copies training logs, figures and the early-exit report into a card's folder."""
    for step in ("pretrain", "distill"):
        if (run / step).exists():  # nothing is pretrained with --features
            shutil.copyfile(run / step / "metrics.jsonl", folder / f"{step}.jsonl")
    (folder / "figures").mkdir()
    for file, path in figures.items():
        shutil.copyfile(path, folder / "figures" / file)
    if calibrated is not None:
        shutil.copytree(calibrated / "early_exit", folder / "early_exit")


def training_notes(recipe: dict[str, Any], results: Results) -> list[str]:
    """What was trained and for how long, as facts for the card."""
    start = "the pretext's weights" if recipe["warm_start"] else "scratch"
    if recipe.get("init"):
        start = f"the weights of {code(recipe['init'])}"
    times = results["times"]
    parts = ", ".join(f"{markdown(entry['step'])} {exact_duration(entry['seconds'])}" for entry in times)
    pretext = f"MoCo v2 for {markdown(recipe['pretrain']['epochs'])} epochs"
    if recipe.get("features"):
        pretext = f"pseudo labels from the features of {code(recipe['features'])}"
    elif recipe.get("pretrain_data"):
        pretext += f" on {code(recipe['pretrain_data'])}"
    if recipe["pretrain"].get("init") and not recipe.get("features"):
        pretext += f", started from the weights of {code(recipe['pretrain']['init'])}"
    more = recipe.get("more_epochs")
    epochs = " and ".join(map(markdown, [recipe["distill"]["epochs"], *(more if isinstance(more, list) else [])]))
    return [
        f"**Training**: {pretext}, then {distillation(recipe)} for {epochs} epochs, from {start}; "
        "`recipe.yaml` has all settings",
        f"**Time**: {exact_duration(sum(entry['seconds'] for entry in times))} in all: {parts}",
    ]


def distillation(recipe: dict[str, Any]) -> str:
    """The form of self distillation in a run's settings, and its weight, in words."""
    distill = recipe["distill"]
    if recipe.get("method") == "contrastive":
        return f"contrastive self distillation (weight {distill['contrast']:g})"
    if anchor := distill.get("anchor"):
        return f"anchored self distillation (weight {anchor:g}{', dense' if distill.get('dense') else ''})"
    return "self distillation"


def paper_rows(name: str | None) -> list[AccuracyRow]:
    """The row 'DATA: ROW' of the paper's tables 1, 3 and 6 as a row of our tables; no row for None.

    Raises:
        UserError: if there is no such row.
    """
    rows = named_rows()
    if name is None:
        return []
    if name not in rows:
        raise UserError(f"the paper's tables have no row '{name}'; the rows are {'; '.join(rows)}")
    *exits, ensemble = rows[name]
    return [{"name": f"paper, {name}", "exits": exits, "ensemble": ensemble}]


@torch.inference_mode()
def sample_accuracy(network: Any) -> dict[str, float]:
    """Measures a network on the first 1,000 test images of the bundled sample, in fp32; a test repeats it.

    Returns:
        In percent: the accuracies of the exits "1" to "4" and of the "ensemble" if the classes are the sample's;
        otherwise "knn", the weighted 20-nearest-neighbour accuracy of the last features among the first 2,000
        training images.
    """
    network = network.eval()
    splits = {
        name: load_images(DataConfig(data="cifar10-sample", split=name), progress=False) for name in ("test", "train")
    }
    labels = {name: torch.from_numpy(data.labels) for name, data in splits.items()}

    def features(split: str, count: int) -> torch.Tensor:
        batches = splits[split].batches(torch.arange(count).split(250))
        return stack_features(read_batches(network, batches, input_spec(network)), count)

    test, truth = features("test", CHECK_IMAGES), labels["test"][:CHECK_IMAGES]
    if list(network.pretrained_cfg.get("label_names") or []) != splits["test"].class_names:
        neighbours = features("train", 2000)[-1]
        accuracy = knn(
            neighbours,
            labels["train"][:2000],
            test[-1],
            truth,
            num_classes=10,
            neighbours=20,
            temperature=KNNConfig.temperature,
        )
        return {"knn": accuracy}
    outputs = torch.stack([head(each).softmax(1) for head, each in zip(classifiers(network), test, strict=True)])
    accuracies = [float((each.argmax(1) == truth).float().mean() * 100) for each in (*outputs, outputs.mean(0))]
    return dict(zip(EXITS, accuracies, strict=True))
