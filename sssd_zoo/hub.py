"""Networks as folders that timm loads: weights, config.json and a model card.

A folder FOLDER is loaded by `import sssd_zoo; timm.create_model("local-dir:FOLDER", pretrained=True)`, truncated by
`output=2` and the like. Weights are safetensors in float32; nothing is pickled.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf  # its public `save_for_hf` writes the weights too
from torch import nn

from sssd_zoo.data.sources import HUB_TIMEOUT, short_name
from sssd_zoo.files import atomic_write_bytes, atomic_write_text, disk_errors, read_json, sha256_of, write_json
from sssd_zoo.hub_client import limited_waiting
from sssd_zoo.report import Results, describe, table
from sssd_zoo.run_folder import atomic_dir
from sssd_zoo.text import code, markdown, plain

TAGS = ["timm", "sssd", "self-supervised-learning", "self-distillation", "early-exit"]
ANSWERS = ("1", "2", "3", "4", "ensemble")


def hub_cards() -> Path:
    """The folder of the card's template and the cards of weights that ship: in the wheel, else in the checkout."""
    installed = Path(__file__).parent / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "hub_cards"


@contextmanager
def cache_if_unreachable(repo: str | None) -> Iterator[None]:
    """Sends huggingface_hub straight to its cache in the block where the Hub does not answer, instead of trying again.

    Args:
        repo: of the network that the block loads; nothing is asked for None.
    """
    before = constants.HF_HUB_OFFLINE
    if repo is not None and not before:
        try:
            HfApi().model_info(repo, timeout=HUB_TIMEOUT)
        except HfHubHTTPError:
            pass  # the Hub answers: what is wrong the download will say
        except Exception:  # its HTTP client's errors, which differ between versions
            constants.HF_HUB_OFFLINE = True
    try:
        with limited_waiting():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before


def save_network(
    folder: str | Path,
    model: nn.Module,
    arch: str,
    *,
    input_size: int | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Writes model.safetensors and config.json into a folder that may hold other things; then timm loads it.

    config.json also tells the weights' sha256, which `load_network` compares and timm passes over.

    Args:
        folder: made if it is not there. An older network in it is replaced.
        model: made by `timm.create_model`, which noted its arguments; not wrapped or compiled.
        arch: its timm name.
        input_size: side of the images that it was trained on, in pixels; by default that of its `pretrained_cfg`, whose
            mean and standard deviation are written too.
        label_names: of the classes, in their order, where they have names.

    Raises:
        UserError: if the disk is full or not writable.
    """
    folder = Path(folder)
    config = network_config(model, arch, input_size=input_size, label_names=label_names)
    # config.json is what makes the folder a network: it goes first and comes last, so that it never describes others.
    with disk_errors(folder):
        (folder / "config.json").unlink(missing_ok=True)
    weights = folder / "model.safetensors"
    atomic_write_bytes(weights, network_weights(model))
    write_json(folder / "config.json", {**config, "sha256": sha256_of(folder, [weights])})


def save_model_folder(
    folder: str | Path,
    model: nn.Module,
    *,
    arch: str,
    input_size: int | None = None,
    label_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    card_context: Results | None = None,
) -> None:
    """Writes a network with its card: model.safetensors, config.json and README.md, all of them or nothing.

    Args:
        folder: replaced if it is there.
        model: see `save_network`.
        arch: see `save_network`.
        input_size: see `save_network`.
        label_names: see `save_network`.
        metrics: linear-probe accuracies of this network in percent, of the exits '1' to '4' and the 'ensemble'; those
            missing are left out of the card.
        card_context: what else was measured; `accuracy` rows after the first are shown beside the network's own.

    Raises:
        UserError: if the disk is full or not writable.
    """
    with atomic_dir(folder, "network") as temporary:
        save_network(temporary, model, arch, input_size=input_size, label_names=label_names)
        config = read_json(temporary / "config.json")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(config, parameters=parameters, metrics=metrics or {}, context=card_context or {})
        atomic_write_text(temporary / "README.md", card)


def network_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> bytes:
    """A network's state as safetensors, floating-point tensors in `dtype`."""
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    return save(tensors, metadata={"format": "pt"})


def network_config(
    model: nn.Module, arch: str, *, input_size: int | None = None, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What config.json says: timm's architecture, arguments and preprocessing; see `save_network`."""
    extra: dict[str, Any] = {"pretrained_cfg": {"architecture": arch}}
    if label_names is not None:
        extra["label_names"] = list(label_names)
        extra["label_descriptions"] = class_descriptions(label_names)
    # The probes see whole images, resized, so timm's transform is to crop nothing off.
    data_config: dict[str, Any] = {"crop_pct": 1.0}
    if input_size is not None:
        data_config["img_size"] = input_size
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.json"
        save_config_for_hf(model, str(path), model_config=extra, data_config=data_config)
        config: dict[str, Any] = read_json(path)
    # timm reads it from the top; transformers, which does too, stumbles over a second one.
    config["model_args"].pop("num_classes", None)
    # The network's own, not those it was created with: calibrated since, or dropped with its classifiers.
    config["model_args"].pop("thresholds", None)
    if getattr(model, "thresholds", None) is not None:
        config["model_args"]["thresholds"] = model.thresholds
    if getattr(model, "storage_size", None) is not None:
        config["model_args"]["storage_size"] = model.storage_size
    # These tell of the weights that the network's default configuration is about, not of the ones saved.
    for name in ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"):
        config["pretrained_cfg"].pop(name, None)
    if label_names is None:
        config.pop("label_names", None)
        config["pretrained_cfg"].pop("label_names", None)
    return config


def class_descriptions(label_names: Sequence[str]) -> dict[str, str]:
    """Words for classes that are named by WordNet ids, as ImageNet's are; {} for any others."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in label_names):
        return {}
    known = ImageNetInfo("imagenet-22k")
    try:
        return {name: known.label_name_to_description(name) for name in label_names}
    except KeyError:  # ids of no synset
        return {}


def model_card(
    config: Mapping[str, Any],
    *,
    parameters: int,
    metrics: Mapping[str, float],
    context: Results,
    name: str | None = None,
    repo: str | None = None,
    license_name: str | None = None,
    figures: Mapping[str, str] | None = None,
) -> str:
    """The text of a model card, made offline.

    Args:
        config: as `network_config` gives it.
        parameters: of the network.
        metrics: see `save_model_folder`.
        context: see `save_model_folder`.
        name: timm name and tag of the weights where they ship with the package; by default they lie beside the card.
        repo: the Hub repository that the card is for.
        license_name: of the weights, as the Hub names it.
        figures: captions, by the paths of PNG files beside the card.
    """
    context = context.copy()
    if "data" in context:
        context["data"] = plain(short_name(context["data"]))  # a folder's path means nothing elsewhere
    arch, classes = config["architecture"], config["num_classes"]
    title = plain(name or repo or (f"{arch} on {context['data']}" if "data" in context else arch))
    data = ModelCardData(
        license=license_name,
        library_name="timm",
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        datasets=[context["data"]] if on_the_hub(context) else None,
        tags=TAGS,
        model_name=title,
        eval_results=_eval_results(metrics, context),
    )
    card = ModelCard.from_template(
        data,
        template_str=(hub_cards() / "model_card.md.jinja").read_text(encoding="utf-8"),
        title=markdown(title),
        source=f"hf-hub:{repo}" if repo else name or "local-dir:FOLDER",
        transformers_source=repo or (None if name else "FOLDER"),
        arch=code(arch),
        parameters=parameters,
        input_size=config["pretrained_cfg"]["input_size"],
        num_classes=classes,
        label_names=config.get("label_names"),
        thresholds=config["model_args"].get("thresholds"),
        answers=_answers(metrics, context),
        probed=bool(metrics),
        figures={path: markdown(caption) for path, caption in (figures or {}).items()},
        facts=describe(context),
        limits=_limits(context),
    )
    return str(card).rstrip() + "\n"


def on_the_hub(context: Results) -> bool:
    """Whether the data set is one of the Hub: its name is then `owner/name`, while a folder's is its last part."""
    return "/" in context.get("data", "")


def eval_result_files(metrics: Mapping[str, float], context: Results) -> dict[str, str]:
    """The accuracies as `.eval_results/*.yaml`, a file each: how the Hub collects them on a data set's page.

    See https://huggingface.co/docs/hub/eval-results. It wants a data set of the Hub; for others there is no file.

    Args:
        metrics: see `save_model_folder`.
        context: see `save_model_folder`.

    Returns:
        The files' texts by their paths.
    """
    if not on_the_hub(context):
        return {}
    entries = {
        name: EvalResultEntry(
            dataset_id=context["data"],
            task_id="default",
            value=round(value, 2),
            notes=f"top-1 accuracy in percent of a linear probe, {_answer(name)}"
            + (f", {plain(context['test'])}" if "test" in context else ""),
        )
        for name, value in metrics.items()
    }
    return {
        f".eval_results/{_answer(name).replace(' ', '_')}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml([own]), sort_keys=False
        )
        for name, own in entries.items()
    }


def _limits(context: Results) -> list[str]:
    """What the network is not good for, as far as the run tells."""
    limits = [
        "It learnt clusters of its own features, not classes: what the images share (background, colour, framing) can "
        "weigh as much as what they show, and imbalances of the training images are kept",
        "Exits can be wrong with confidence; the thresholds of an early exit are to be chosen on images like yours",
    ]
    if context.get("data") == "cifar10-sample":
        limits.append("Its images are a JPEG copy of CIFAR-10: on the original, accuracies differ a little")
    return limits


def _eval_results(metrics: Mapping[str, float], context: Results) -> list[EvalResult] | None:
    """The card's model-index, for which the Hub wants a data set's name."""
    if not metrics or "data" not in context:
        return None
    test = plain(context.get("test", ""))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=context["data"],
            dataset_name=context["data"],
            dataset_split=test.removeprefix("split ") if test.startswith("split ") else None,
            metric_type="accuracy",
            metric_name=f"linear-probe accuracy, {_answer(name)} (%)",
            metric_value=round(value, 2),
        )
        for name, value in metrics.items()
    ]


def _answers(metrics: Mapping[str, float], context: Results) -> str:
    """A Markdown table of the exits' accuracies and costs, '' if neither was measured."""
    macs = context.get("macs", {})
    names = [name for name in ANSWERS if name in metrics or name in macs]
    columns: dict[str, list[str]] = {"answer of": [_answer(name) for name in names]}
    if metrics:
        columns["accuracy (%)"] = [f"{metrics[name]:.2f}" if name in metrics else "" for name in names]
        for row in context.get("accuracy", [])[1:]:
            theirs = dict(zip(ANSWERS, [*row["exits"], row["ensemble"]], strict=True))
            columns[f"{markdown(row['name'])} (%)"] = [f"{theirs[name]:.2f}" for name in names]
    if macs:
        columns["multiply-adds for one image"] = [
            f"{macs[name] / 1e6:,.1f} M" if name in macs else "" for name in names
        ]
    return "\n".join(table(list(columns), list(zip(*columns.values(), strict=True)))) if names else ""


def _answer(name: str) -> str:
    return name if name == "ensemble" else f"exit {name}"
