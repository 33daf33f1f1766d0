"""Words of the command line as they are handed to jsonargparse."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers.commands import one_line, sssd
from sssd_zoo.cli.arguments import read_arguments, spell_out, switches


@dataclass
class Inner:
    """Settings of a stage.

    Args:
        warm_start: a switch.
        epochs: a number.
    """

    warm_start: bool = False
    epochs: int = 1


@dataclass
class Settings:
    """Settings of a command.

    Args:
        data: text.
        dry_run: a switch.
        symmetric: a switch that is on.
        maybe: a switch that may be left open.
        train: of a stage.
    """

    data: str = ""
    dry_run: bool = False
    symmetric: bool = True
    maybe: bool | None = None
    train: Inner = field(default_factory=Inner)


def test_switches_are_found_in_stages_too():
    assert switches(Settings) == {"--dry_run", "--symmetric", "--maybe", "--train.warm_start"}


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        ("--dry_run", "--dry_run true"),
        ("--dry-run", "--dry_run true"),
        ("--dry-run --data x", "--dry_run true --data x"),
        ("--data x --dry_run", "--data x --dry_run true"),
        ("--dry_run --symmetric", "--dry_run true --symmetric true"),
        ("--dry_run true", "--dry_run true"),
        ("--symmetric False", "--symmetric False"),
        ("--symmetric no --dry_run yes", "--symmetric no --dry_run yes"),
        ("--maybe null", "--maybe null"),
        ("--maybe", "--maybe true"),
        ("--symmetric=false", "--symmetric=false"),
        ("--dry-run=true", "--dry_run=true"),
        ("--train.warm-start", "--train.warm_start true"),
        ("--train.warm_start --train.epochs 3", "--train.warm_start true --train.epochs 3"),
        ("--dry_run folder", "--dry_run true folder"),
        ("--data my-folder", "--data my-folder"),
        ("--data=my-folder --dry-run", "--data=my-folder --dry_run true"),
        ("--train.epochs -1", "--train.epochs -1"),
        ("", ""),
    ],
)
def test_switches_and_hyphens_are_spelled_out(words, spelled):
    assert spell_out(words.split(), Settings) == spelled.split()


def test_a_folder_with_brackets_is_no_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--out", "run"]

    def data(*given: str) -> object:
        return read_arguments("pretrain", [*words, *given], "sssd pretrain")[0].data

    assert data("--data", "[private]") == data("--data=[private]") == ["private"]
    for name in ("[private]", "[a, b]"):
        (tmp_path / name).mkdir()
        assert data("--data", name) == data(f"--data={name}") == f"./{name}"
        detect = ["--model", "sssd_resnet18", *words, "--data", name, "--test_data", name]
        args = read_arguments("detect", detect, "sssd detect")[0]
        assert args.data == args.test_data == [name]
    assert data("--data", "[public]") == ["public"], "a list all the same"
    assert data("--data", '["[private]", "public"]') == ["[private]", "public"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "fit --pretrain.lr abc --cluster.k x --pretrain.epochs 0",
            "pretrain.lr is 'abc'; it must be a number; cluster.k is 'x'; it must be a whole number; pretrain.epochs",
        ),
        ("fit --pretrain.sizes [a]", "pretrain.sizes[0] is 'a'; it must be a whole number"),
        ("embed RUN --exits 7", "exits is 7; it must be one of 1, 2, 3, 4, final, all"),
        ("fit --config recipe.yaml --seed 1", "pretrain.lr is 'fast'; it must be a number"),
        ("fit --epochs 3", "did you mean --pretrain.epochs or --distill.epochs?"),
        ("fit --dat x --pretrain.epoch 3", "did you mean --data, --pretrain.epochs?"),
    ],
)
def test_values_and_flags_that_are_none_are_told_all_at_once(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("pretrain: {lr: fast}")
    assert sssd(*words.split(), "--data", "x", "--out", "y") == 2
    line = one_line(capsys)
    assert message in line
    assert "class" not in line


def test_a_recipe_that_is_not_there(tmp_path, capsys):
    assert sssd("fit", "--config", tmp_path / "none.yaml", "--data", "photos", "--out", "run") == 2
    assert one_line(capsys).endswith("none.yaml: there is no such file; give a recipe, a YAML file of arguments")


def test_words_without_a_flag_are_told_which_there_are(capsys):
    assert sssd("fit", "photos", "run") == 2
    line = one_line(capsys)
    assert "unrecognized arguments: photos run; images and results are given by --data and --out" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("detect", "--data", "photos", "--model", "resnet18", "--out", "X"), "data is 'photos'; it must be a list"),
        (("finetune", "--data", "photos", "--models", "RUN", "--out", "X"), "models is 'RUN'; it must be a list"),
        (("finetune", "--data", "photos", "--out", "X"), "the following arguments are required: models"),
    ],
)
def test_an_argument_of_another_type_is_not_called_missing(words, message, capsys):
    assert sssd(*words) == 2
    assert message in one_line(capsys)
