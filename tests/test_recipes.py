"""The commands of train/recipes/tables/README.md: they parse, stand for every row of the paper's tables, and run."""

import re
import shlex
from dataclasses import replace

import pytest
from conftest import ROOT
from test_cli import sssd

from sssd_zoo.cli import run
from sssd_zoo.config import CompareArgs
from sssd_zoo.paper import TABLES

README = (ROOT / "train" / "recipes" / "tables" / "README.md").read_text()
COMMANDS = [
    shlex.split(line)[2:] for line in README.replace("\\\n", "").splitlines() if line.startswith("sssd compare ")
]
FULL = [words for words in COMMANDS if "mini.yaml" not in words[1]]
MINI = [words for words in COMMANDS if "mini.yaml" in words[1]]
DATA = {"uoft-cs/cifar10": "CIFAR-10", "uoft-cs/cifar100": "CIFAR-100", "ILSVRC/imagenet-1k": "ImageNet-1K"}
# One epoch of one step on 48 images of 16 px.
DRY = [
    *("--label_column", "null", "--seeds", "[0]", "--image_size", "32", "--storage_size", "16", "--workers", "0"),
    *("--pretrain.epochs", "1", "--pretrain.batch_size", "48", "--pretrain.splits", "2", "--pretrain.queue_size", "48"),
    *("--pretrain.warmup_epochs", "0", "--cluster.k", "4", "--distill.epochs", "1", "--distill.batch_size", "48"),
    *("--distill.warmup_epochs", "0", "--seed_method.epochs", "1", "--seed_method.batch_size", "48"),
    *("--seed_method.queue_size", "48", "--seed_method.warmup_epochs", "0", "--probe.probe_epochs", "1"),
    *("--device", "cpu", "--also", "[]"),
]


def parsed(words) -> CompareArgs:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sssd_zoo.compare.compare", seen.append)
        run("compare", list(words))
    return seen[0]


def rows_of(args: CompareArgs) -> set[tuple]:
    """The rows of the paper's tables that a command makes: data, method, network, epochs and D_pre."""
    model = args.pretrain_model or args.model
    network = f"ResNet-{re.search(r'resnet([0-9]+)', model)[1]}"
    other = DATA.get(args.pretrain_data, args.pretrain_data)
    own = {"random": (None, None, None), "dacsd": (None, None, None)}
    return {
        (DATA[args.data], method, *own.get(method, (network, args.pretrain.epochs, other))) for method in args.methods
    }


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


def dry(words, data, out) -> int:
    other = ["--pretrain_data", str(data)] if "--pretrain_data" in words else []
    return sssd("compare", *words, "--data", data, *other, "--out", out, *DRY)


@pytest.mark.parametrize("name", ["mini-r18-200-other", "imagenet-r18-200"])
def test_a_dry_run_of_some(name, folder_of_images, tmp_path):
    words = next(words for words in COMMANDS if words[-1].endswith(f"/{name}"))
    assert dry(words, folder_of_images, tmp_path) == 0
    assert (tmp_path / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[words.index("--out") + 1].rsplit("/", 1)[-1])
def test_a_dry_run_of_each(words, folder_of_images, tmp_path):
    assert dry(words, folder_of_images, tmp_path) == 0
    assert (tmp_path / "report.md").is_file()
