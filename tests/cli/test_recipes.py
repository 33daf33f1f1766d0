"""A run's config.yaml as a recipe: what the run derived from other arguments is derived anew."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from helpers.commands import one_line, sssd
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.configs import FitArgs
from sssd_zoo.pipeline.defaults import BY_METHOD, DERIVED, Scale, derive
from sssd_zoo.pipeline.fit import with_method
from sssd_zoo.training.runs import save_config

CPU = Scale(images=5_000, pretrain_images=5_000, macs=40_000_000, device="cpu", processes=1)


def resolved(*words: str) -> tuple[FitArgs, dict]:
    """The arguments of `sssd fit` as the run has them, and what was chosen."""
    args, given = read_arguments("fit", ["--data", "photos", "--out", "out", *words], "sssd fit")
    return derive(with_method(args, given), given, CPU)


def settings_in(recipe: str) -> dict:
    return yaml.safe_load(Path(recipe).read_text())


@pytest.fixture(params=[(), ("--features", "ENCODER"), ("--method", "sssd", "--distill.lr", "0.3")])
def recipe(request, tmp_path):
    save_config(tmp_path, replace(resolved(*request.param)[0], budget=None))
    return str(tmp_path / "config.yaml")


def test_unchanged_it_gives_the_same_run(recipe):
    again, chosen = resolved("--config", recipe)
    assert not chosen
    assert json.loads(json.dumps(asdict(again))) == {**settings_in(recipe), "overwrite": False}


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "sssd"),
        ("--method", "contrastive"),
        ("--method", "anchored"),
        ("--features", "OTHER"),
        ("--init", "NETWORK"),
        ("--features", "OTHER", "--init", "NETWORK"),
    ],
)
def test_what_depends_on_the_method_is_derived_anew(words, recipe):
    before = settings_in(recipe)
    recipe_words = ["--config", recipe, *words]
    if before["features"] is not None and words[0] == "--method" and words[1] == "contrastive":
        recipe_words += ["--features", "null"]
    now, _ = resolved(*recipe_words)
    fresh = [*words] if before["features"] is None or "null" in recipe_words else ["--features", "ENCODER", *words]
    if before["method"] == "sssd" and words == ("--method", "sssd"):
        fresh += ["--distill.lr", "0.3"]  # nothing has changed, so that of the recipe stays
    assert asdict(now) == asdict(resolved(*fresh)[0])


def test_what_is_on_the_command_line_stays(recipe):
    now, _ = resolved("--config", recipe, "--features", "OTHER", "--distill.lr", "0.4", "--distill.anchor", "2")
    assert (now.method, now.distill.lr, now.distill.anchor) == ("anchored", 0.4, 2)


def test_what_a_later_recipe_gives_stays(recipe, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("distill:\n  lr: 0.4\n  weight_decay: 0.3\n")
    now, _ = resolved("--config", recipe, "--config", str(mine), "--features", "OTHER", "--init", "NETWORK")
    assert (now.method, now.distill.lr, now.distill.weight_decay) == ("anchored", 0.4, 0.3)
    now, _ = resolved("--config", recipe, "--features", "OTHER", "--init", "NETWORK", "--distill", "{lr: 0.4}")
    assert now.distill.lr == 0.4


def test_a_recipe_in_the_home_folder_and_as_text(recipe, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(recipe).parent))
    words = ("--features", "OTHER", "--init", "NETWORK")
    assert resolved("--config=~/config.yaml", *words) == resolved("--config", recipe, *words)
    text = yaml.safe_dump({**settings_in(recipe), "image_column": "x" * 300}, default_flow_style=True)
    assert resolved("--config", text)[0].image_column == "x" * 300


def test_a_recipe_of_less_than_a_run_is_taken_as_it_is(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: contrastive\ndistill:\n  lr: 0.3\n  optimizer: adamw\n")
    now, chosen = resolved("--config", str(path), "--method", "sssd")
    assert (now.method, now.distill.lr, now.distill.optimizer) == ("sssd", 0.3, "adamw")
    assert "distill.lr" not in chosen


@pytest.mark.parametrize("whole", [True, False])
def test_a_budget_takes_the_place_of_its_epochs(whole, tmp_path):
    path = tmp_path / "config.yaml"
    if whole:
        save_config(tmp_path, resolved("--pretrain.epochs", "7", "--distill.epochs", "7")[0])
    else:
        path.write_text("pretrain:\n  epochs: 7\ndistill:\n  epochs: 7\n  lr: 0.3\n")
    words = ["--data", "photos", "--out", "out", "--config", str(path), "--budget", "30m"]
    _, given = read_arguments("fit", words, "sssd fit")
    assert not given & {"pretrain.epochs", "distill.epochs"}
    assert "distill.lr" in given
    _, given = read_arguments("fit", [*words, "--distill.epochs", "3"], "sssd fit")
    assert "distill.epochs" in given, "which is refused beside a budget"
    _, given = read_arguments("fit", [*words, "--distill", "{epochs: 3}"], "sssd fit")
    assert "distill.epochs" in given
    _, given = read_arguments("fit", [*words[:-1], "null"], "sssd fit")
    assert {"pretrain.epochs", "distill.epochs"} <= given


def test_an_argument_that_a_recipe_would_override_is_refused(tmp_path, capsys):
    save_config(tmp_path, resolved("--pretrain.epochs", "7")[0])
    config = ["--config", str(tmp_path / "config.yaml")]
    for before, name in (
        (["--out", "new"], "out"),
        (["--out=new"], "out"),
        (["--pretrain", "{epochs: 8}"], "pretrain.epochs"),
        (["--pretrain.epochs", "8"], "pretrain.epochs"),
        (["--unlabelled"], "unlabelled"),
    ):
        assert sssd("fit", *before, *config) == 2
        assert f"error: --{name} stands before --config {config[1]}, which gives another {name}" in one_line(capsys)
        after, _ = read_arguments("fit", [*config, *before], "sssd fit")
        assert after != read_arguments("fit", config, "sssd fit")[0]
    same, _ = read_arguments("fit", ["--pretrain.epochs", "7", *config], "sssd fit")
    assert same == read_arguments("fit", config, "sssd fit")[0]


def test_a_run_has_all_that_tells_its_recipe(tmp_path):
    save_config(tmp_path, resolved()[0])
    _, given = read_arguments("fit", ["--config", str(tmp_path / "config.yaml")], "sssd fit")
    assert given >= {*DERIVED, *BY_METHOD}
