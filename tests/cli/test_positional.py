"""The network of a command by its position, as `sssd linear RUN`, or by its flag, as recipes and scripts give it."""

import pytest

from helpers.commands import one_line, sssd
from sssd_zoo.cli.arguments import name_network, read_arguments
from sssd_zoo.cli.commands import COMMANDS

OTHERS = {"card": ["--out", "folder"], "detect-eval": ["--data", "[voc]"]}
EITHER = {name: made.network for name, made in COMMANDS.items() if made.network}


def parsed(name, *words):
    return getattr(
        read_arguments(name, [*words, *OTHERS.get(name, ["--data", "photos"])], f"sssd {name}")[0], EITHER[name]
    )


def test_the_commands_of_one_network():
    assert EITHER == {"linear": "model", "knn": "model", "card": "run", "detect-eval": "model"}


@pytest.mark.parametrize("name", EITHER)
def test_by_position_or_by_flag(name):
    flag = f"--{EITHER[name]}"
    assert parsed(name, "RUN") == parsed(name, flag, "RUN") == parsed(name, f"{flag}=RUN") == "RUN"
    assert parsed(name, "RUN", flag, "RUN") == "RUN"


@pytest.mark.parametrize("name", EITHER)
def test_none_and_two_are_refused(name, capsys):
    others = OTHERS.get(name, ["--data", "photos"])
    assert sssd(name, *others) == 2
    assert f"required: {EITHER[name]}" in one_line(capsys)
    assert sssd(name, "RUN", *others, f"--{EITHER[name]}", "OTHER") == 2
    assert f"RUN and --{EITHER[name]} OTHER are two networks: give one, as in sssd {name} RUN" in one_line(capsys)
    assert sssd(name, "RUN", "OTHER", *others) == 2
    assert "unrecognized arguments: OTHER" in one_line(capsys)


def test_a_recipe_may_name_it_and_the_command_line_another(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: theirs\ndata: photos\n")
    assert parsed("knn", "--config", str(recipe)) == "theirs"
    assert parsed("knn", "mine", "--config", str(recipe)) == "mine"


@pytest.mark.parametrize(
    ("words", "rewritten"),
    [
        ("--data x", "--data x"),
        ("RUN --data x", "--data x --model=RUN"),
        ("--data x --overwrite true RUN", "--data x --overwrite true --model=RUN"),
        ("--data=x RUN --seed 3", "--data=x --seed 3 --model=RUN"),
        ("--probe_weight_decay -1 RUN", "--probe_weight_decay -1 --model=RUN"),
        ("RUN --help", "--help --model=RUN"),
    ],
)
def test_only_a_word_that_is_no_value_is_the_network(words, rewritten):
    assert name_network(words.split(), "model", "sssd linear") == rewritten.split()
