"""Networks as folders that timm loads: weights, config.json and a model card.

A folder FOLDER is loaded by `import sssd_zoo; timm.create_model("local-dir:FOLDER", pretrained=True)`, truncated by
`output=2` and the like. Weights are safetensors in float32; nothing is pickled.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from torch import nn

from sssd_zoo.data.sources import short_name
from sssd_zoo.errors.text import code, markdown, plain
from sssd_zoo.evaluation.reports.markdown import Results, describe, table
from sssd_zoo.files import atomic_write_text, read_json
from sssd_zoo.files.bundled import cards_folder
from sssd_zoo.files.run_folder import atomic_dir
from sssd_zoo.models import MultiExit, activations, feature_width, multiply_adds
from sssd_zoo.models.backbones import architecture_in
from sssd_zoo.models.saving import save_network
from sssd_zoo.models.staged import StagedMultiExit

PAPER = (
    "https://openaccess.thecvf.com/content/WACV2023/html/"
    "Chen_SSSD_Self-Supervised_Self_Distillation_WACV_2023_paper.html"
)
TAGS = ["timm", "sssd", "self-supervised-learning", "self-distillation", "early-exit"]

EXITS = ("1", "2", "3", "4", "ensemble")


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
        metrics: linear-probe accuracies of this network in percent, or its own where it was fine-tuned, of the exits
            '1' to '4' and the 'ensemble'; missing ones are left out of the card.
        card_context: what else was measured; `accuracy` rows after the first are shown beside the network's own.

    Raises:
        UserError: if the disk is full or not writable.
    """
    with atomic_dir(folder, "network") as temporary:
        save_network(temporary, model, arch, input_size=input_size, label_names=label_names)
        config = read_json(temporary / "config.json")
        context = with_costs(card_context or {}, model, config["pretrained_cfg"]["input_size"])
        card = model_card(config, model, metrics=metrics or {}, context=context)
        atomic_write_text(temporary / "README.md", card)


def with_costs(context: Results, model: nn.Module, input_size: Sequence[int]) -> Results:
    """What was measured, with the MACs and activations of a network of this package for an image of [C, H, W]."""
    if not isinstance(model, MultiExit):
        return context
    channels, height, width = input_size
    size = (channels, height, width)
    return {"macs": multiply_adds(model, size), "activations": activations(model, size), **context}


def model_card(
    config: Mapping[str, Any],
    network: nn.Module,
    *,
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
        network: it.
        metrics: see `save_model_folder`.
        context: see `save_model_folder`.
        name: timm name and tag of the weights if they are bundled; by default they lie beside the card.
        repo: the Hub repository that the card is for.
        license_name: of the weights, as the Hub names it.
        figures: captions, by the paths of PNG files beside the card.
    """
    context = context.copy()
    if "data" in context:
        context["data"] = plain(short_name(context["data"]))  # a path means nothing on another machine
    arch, classes = architecture_in(config), config["num_classes"]
    # transformers loads what is on the Hub or in a folder; of bundled weights `sssd pull` makes a folder.
    transformers_source = (repo or "FOLDER") if classes else None
    title = plain(name or repo or (f"{arch} on {context['data']}" if "data" in context else arch))
    data = ModelCardData(
        license=license_name,
        library_name="timm",
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        datasets=[dataset_of(context)[0]] if on_the_hub(context) else None,
        tags=[*TAGS, *(["transformers"] if transformers_source else [])],
        model_name=title,
        eval_results=_eval_results(metrics, context),
    )
    card = ModelCard.from_template(
        data,
        template_str=(cards_folder() / "model_card.md.jinja").read_text(encoding="utf-8"),
        title=markdown(title),
        source=f"hf-hub:{repo}" if repo else name or "local-dir:FOLDER",
        transformers_source=transformers_source,
        name=name,
        paper=PAPER,
        features=feature_width(network),
        trunk=f"timm's {code(network.backbone)}" if isinstance(network, StagedMultiExit) else "a ResNet",
        arch=code(arch),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        input_size=config["pretrained_cfg"]["input_size"],
        num_classes=classes,
        label_names=config.get("label_names"),
        thresholds=config["model_args"].get("thresholds"),
        finetuned=context.get("finetuned"),
        encoder=code(context["encoder"]) if context.get("encoder") else None,
        exits_table=_exits_table(metrics, context),
        probed=bool(metrics),
        figures={path: markdown(caption) for path, caption in (figures or {}).items()},
        facts=describe(context),
        limits=_limits(context),
    )
    return str(card).rstrip() + "\n"


def on_the_hub(context: Results) -> bool:
    """Whether the data set is on the Hub: its name is then `owner/name`, while a folder is named by its last part."""
    return "/" in context.get("data", "")


def dataset_of(context: Results) -> tuple[str, str | None]:
    """The data set's id and its configuration, which `data` has as `owner/name:configuration`; most have none."""
    dataset, _, configuration = context["data"].partition(":")
    return dataset, configuration or None


def eval_result_files(metrics: Mapping[str, float], context: Results) -> dict[str, str]:
    """The accuracies as `.eval_results/*.yaml`, one file each: the Hub collects them on a data set's page.

    See https://huggingface.co/docs/hub/eval-results. There are no files for data sets that are not on the Hub.

    Args:
        metrics: see `save_model_folder`.
        context: see `save_model_folder`.

    Returns:
        The files' texts by their paths.
    """
    if not on_the_hub(context):
        return {}
    dataset, configuration = dataset_of(context)
    entries = {
        name: EvalResultEntry(
            dataset_id=dataset,
            task_id="default",
            value=round(value, 2),
            notes=f"top-1 accuracy in percent of a linear probe, {_exit_name(name)}"
            + (f", configuration {plain(configuration)}" if configuration else "")
            + (f", {plain(context['test'])}" if "test" in context else ""),
        )
        for name, value in metrics.items()
    }
    return {
        f".eval_results/{_exit_name(name).replace(' ', '_')}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False
        )
        for name, entry in entries.items()
    }


def _limits(context: Results) -> list[str]:
    """Known limits of the network, as far as the run shows them."""
    if "finetuned" in context:
        return [
            "It knows the classes that it was trained on, and answers with one of them for any image",
            "Exits can be confidently wrong, on images unlike those that it was trained on above all",
        ]
    learnt = "features" if context.get("encoder") else "clusters of its own features"
    limits = [
        f"It learnt {learnt}, not classes: background, colour and framing can weigh as much as the objects shown, and "
        "biases of the training images remain",
        "Exits can be confidently wrong; choose early-exit thresholds on images like yours",
    ]
    if context.get("data") == "cifar10-sample":
        limits.append(
            "It was trained and measured on a JPEG copy of CIFAR-10: accuracies on the original differ slightly"
        )
    return limits


def _eval_results(metrics: Mapping[str, float], context: Results) -> list[EvalResult] | None:
    """The card's model-index, for which the Hub requires a data set's name."""
    if not metrics or "data" not in context:
        return None
    test = plain(context.get("test", ""))
    dataset, configuration = dataset_of(context)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=configuration,
            dataset_split=test.removeprefix("split ") if test.startswith("split ") else None,
            metric_type="accuracy",
            metric_name=f"{'' if 'finetuned' in context else 'linear-probe '}accuracy, {_exit_name(name)} (%)",
            metric_value=round(value, 2),
        )
        for name, value in metrics.items()
    ]


def _exits_table(metrics: Mapping[str, float], context: Results) -> str:
    """A Markdown table of the exits' accuracies and costs; '' if neither was measured."""
    macs, numbers = context.get("macs", {}), context.get("activations", {})
    names = [name for name in EXITS if name in metrics or name in macs]
    columns: dict[str, list[str]] = {"output": [_exit_name(name) for name in names]}
    if metrics:
        columns["accuracy (%)"] = [f"{metrics[name]:.2f}" if name in metrics else "" for name in names]
        for row in context.get("accuracy", [])[1:]:
            theirs = dict(zip(EXITS, [*row["exits"], row["ensemble"]], strict=True))
            columns[f"{markdown(row['name'])} (%)"] = [f"{theirs[name]:.2f}" for name in names]
    if macs:
        columns["MACs per image"] = [f"{macs[name] / 1e6:,.1f} M" if name in macs else "" for name in names]
    if numbers:
        columns["activations"] = [f"{numbers[name] / 1e6:,.2f} M" if name in numbers else "" for name in names]
    return "\n".join(table(list(columns), list(zip(*columns.values(), strict=True)))) if names else ""


def _exit_name(name: str) -> str:
    return name if name == "ensemble" else f"exit {name}"
