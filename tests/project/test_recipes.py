"""The commands of train/recipes/tables/README.md: they parse, stand for every row of the paper's tables, and run."""

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import yaml

from helpers.commands import ROOT, sssd
from helpers.images import write_voc
from helpers.markdown import tables
from sssd_zoo.cli import run
from sssd_zoo.evaluation.reports.paper import TABLE_4, TABLES
from sssd_zoo.models.saving import save_network

README = (ROOT / "train" / "recipes" / "tables" / "README.md").read_text()
LINES = [shlex.split(line) for line in README.replace("\\\n", "").splitlines() if line.startswith("sssd ")]
COMMANDS = [words[2:] for words in LINES if words[1] == "compare"]
FINETUNE = [words[2:] for words in LINES if words[1] == "finetune"]
FULL = [words for words in COMMANDS if "mini.yaml" not in words[1]]
MINI = [words for words in COMMANDS if "mini.yaml" in words[1]]
DATA = {"uoft-cs/cifar10": "CIFAR-10", "uoft-cs/cifar100": "CIFAR-100", "ILSVRC/imagenet-1k": "ImageNet-1K"}
# One epoch of one step on 48 images of 16 px.
DRY = [
    *("--label_column", "null", "--seeds", "[0]", "--image_size", "32", "--storage_size", "16", "--workers", "0"),
    *("--pretrain.epochs", "1", "--pretrain.batch_size", "48", "--pretrain.splits", "2", "--pretrain.queue_size", "48"),
    *("--pretrain.warmup_epochs", "0", "--cluster.k", "4", "--distill.epochs", "1", "--distill.batch_size", "32"),
    *("--distill.warmup_epochs", "0", "--seed_method.epochs", "1", "--seed_method.batch_size", "48"),
    *("--seed_method.queue_size", "48", "--seed_method.warmup_epochs", "0", "--probe.probe_weight_decay", "0.01"),
    *("--contrastive.epochs", "1", "--contrastive.batch_size", "48", "--contrastive.queue_size", "48"),
    *("--contrastive.splits", "2", "--contrastive.warmup_epochs", "0", "--device", "cpu", "--also", "[]"),
]


def parsed(words, command="compare") -> Any:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"sssd_zoo.pipeline.{command}.{command}", lambda args, *_: seen.append(args))
        run(command, list(words))
    return seen[0]


def rows_of(args: Any) -> set[tuple]:
    """The rows of the paper's tables that a command makes: data, method, network, epochs and D_pre."""
    model = args.pretrain_model or args.model
    network = f"ResNet-{re.search(r'resnet([0-9]+)', model)[1]}"
    other = DATA.get(args.pretrain_data, args.pretrain_data)
    own = {"random": (None, None, None), "dacsd": (None, None, None)}
    return {
        (DATA[args.data], method, *own.get(method, (network, args.pretrain.epochs, other))) for method in args.methods
    }


def test_a_recipe_means_the_same_on_every_device():
    """On a CPU `sssd fit` chooses what is not given of these, so a recipe that gives one gives all."""
    names = {"optimizer", "lr", "weight_decay", "temperature", "symmetric", "queue_size"}
    paths = sorted((ROOT / "train" / "recipes").rglob("*.yaml"))
    given = {path.name: set(yaml.safe_load(path.read_text()).get("pretrain") or ()) & names for path in paths}
    assert {name: names - found for name, found in given.items() if found and found != names} == {}
    assert sum(map(bool, given.values())) >= 15


def test_every_row_of_the_papers_tables_has_a_command_and_there_are_no_others():
    made = set().union(*(rows_of(parsed(words)) for words in FULL))
    wanted = {row[:5] for number in (1, 2, 3, 6) for row in TABLES[number]}
    assert made == wanted


def test_every_row_has_a_mini_form_of_the_same_relations():
    scale = {12: 200, 48: 800}
    made = set()
    for words in MINI:
        args = parsed(words)
        assert args.data == "cifar10-sample"
        assert args.model == "sssd_resnet18"
        other = "ImageNet-1K" if args.pretrain_data else None
        moco = replace(args.pretrain, epochs=scale[args.pretrain.epochs])
        full = replace(args, data="ILSVRC/imagenet-1k", pretrain=moco, pretrain_data=other)
        made |= {row[1:] for row in rows_of(full)}
    assert {row[1:5] for number in (1, 2, 3, 6) for row in TABLES[number]} == made


def test_the_full_sizes_are_the_papers():
    for words in FULL:
        args = parsed(words)
        assert args.cluster.k == {"CIFAR-10": 1000, "CIFAR-100": 500, "ImageNet-1K": 5000}[DATA[args.data]]
        assert "resnet18" in args.model
        assert (args.distill.alpha, args.distill.lam, args.distill.temperature) == (0.3, 0.003, 1.0)
        stems = [name.endswith("_cifar") for name in (args.model, args.pretrain_model or args.model)]
        assert stems == [args.data != "ILSVRC/imagenet-1k"] * 2


@pytest.mark.parametrize("form", ["imagenet", "mini"])
def test_every_row_of_table_4_starts_from_the_network_of_a_command_above(form):
    made = {words[words.index("--out") + 1]: parsed(words) for words in COMMANDS}
    networks = set()
    for words in FINETUNE:
        args = parsed(words, "finetune")
        if form not in words[1]:
            continue
        folder, seed, method = args.models[0].rsplit("/", 2)
        pretext = made[folder]
        assert f"-{form}-" in args.out
        assert (seed, method in pretext.methods) == ("seed-0", True)
        assert args.data == pretext.data
        assert args.fractions == [share / 100 for share in TABLE_4["ResNet-50"]]
        assert (args.method, args.weight_decay) == ("final", 0)
        assert pretext.pretrain.epochs == {"imagenet": 200, "mini": 12}[form]
        networks.add(f"ResNet-{re.search(r'resnet([0-9]+)', pretext.pretrain_model)[1]}")
    assert networks == set(TABLE_4)


@pytest.mark.parametrize("words", FINETUNE, ids=lambda words: words[words.index("--out") + 1].rsplit("/", 1)[-1])
@pytest.mark.long
def test_a_dry_run_of_table_4(words, folder_of_images, tmp_path):
    torch.manual_seed(0)
    save_network(tmp_path / "net", timm.create_model("sssd_resnet18", num_classes=4), "sssd_resnet18", input_size=32)
    words = [*words[: words.index("--models")], "--models", f"[{tmp_path / 'net'}]", "--out", str(tmp_path / "out")]
    small = ["--image_size", "32", "--storage_size", "16", "--workers", "0", "--epochs", "1", "--min_steps", "0"]
    small += ["--seeds", "[0]", "--fractions", "[0.5]", "--warmup_epochs", "0", "--device", "cpu"]
    assert sssd("finetune", *words, "--data", folder_of_images, *small) == 0
    head, *rows = tables((tmp_path / "out" / "report.md").read_text())[0]
    assert (head[1:], [row[0] for row in rows]) == (["50 %"], ["net"])


def dry(words, data, out) -> int:
    other = ["--pretrain_data", str(data)] if "--pretrain_data" in words else []
    return sssd("compare", *words, "--data", data, *other, "--out", out, *DRY)


@pytest.mark.parametrize("name", ["mini-r18-200-other", "imagenet-r18-200"])
@pytest.mark.long
def test_a_dry_run_of_some(name, folder_of_images, tmp_path):
    words = next(words for words in COMMANDS if words[-1].endswith(f"/{name}"))
    assert dry(words, folder_of_images, tmp_path) == 0
    assert (tmp_path / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[words.index("--out") + 1].rsplit("/", 1)[-1])
def test_a_dry_run_of_each(words, folder_of_images, tmp_path):
    assert dry(words, folder_of_images, tmp_path) == 0
    assert (tmp_path / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_dry_run_of_each_recipe(recipe, folder_of_images, tmp_path):
    """By the command that its first lines name, for a step or a few."""
    command = re.search(rf"^# sssd (\S+) --config train/recipes/{recipe.name} ", recipe.read_text(), re.MULTILINE)[1]
    words = [command, "--config", recipe, "--out", tmp_path / "out"]
    if command == "detect":
        voc = write_voc(tmp_path / "VOC", {"trainval": range(6), "test": range(6, 9)})
        words += ["--data", f"[{voc}]", "--epochs", "1", "--short_side", "64", "--warmup_epochs", "0"]
    elif command == "finetune":
        words += [
            "--data",
            folder_of_images,
            "--models",
            "[sssd_resnet18, scratch]",
            "--epochs",
            "1",
            "--min_steps",
            "0",
        ]
        words += ["--fractions", "[0.5]", "--seeds", "[0]", "--warmup_epochs", "0", "--image_size", "32"]
    elif command == "pretrain":
        words += [
            "--data",
            folder_of_images,
            "--epochs",
            "1",
            "--batch_size",
            "16",
            "--splits",
            "2",
            "--compile",
            "false",
        ]
        words += ["--queue_size", "16", "--warmup_epochs", "0", "--device", "cpu"]
    else:
        left_out = ("--seeds", "--also", "--seed_method", "--contrastive") if command == "fit" else ()
        pairs = zip(DRY[::2], DRY[1::2], strict=True)
        words += [word for pair in pairs if not pair[0].startswith(left_out) for word in pair]
        words += ["--data", folder_of_images, "--split", "train"]
        words += ["--pretrain.sizes", "[]", "--distill.sizes", "[]"]
        words += ["--distill.queue_size", "48", "--distill.splits", "2"] if command == "fit" else []
        settings = yaml.safe_load(recipe.read_text())
        if "test_split" in settings:
            words += ["--test_split", "null"]
        if "features" in settings:  # a public encoder, which is on the Hub
            encoder = tmp_path / "encoder"
            encoder.mkdir()
            save_network(encoder, timm.create_model("test_resnet", num_classes=0), "test_resnet", input_size=160)
            words += ["--features", encoder, "--teacher_size", "32", "--compile", "false"]
    assert sssd(*words) == 0
    assert [*tmp_path.glob("out/report.md"), *tmp_path.glob("out/metrics.json*")]
