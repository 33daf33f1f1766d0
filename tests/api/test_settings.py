"""Keyword arguments: those of the commands, with the commands' defaults, ranges and errors."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest

import sssd_zoo
from helpers.commands import command
from sssd_zoo import api, configs
from sssd_zoo.api import functions
from sssd_zoo.api.running import run
from sssd_zoo.api.settings import settings_of
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.cli.commands import COMMANDS
from sssd_zoo.configs import AnchoredConfig, ContrastiveConfig, FitArgs, MoCoConfig, StudentConfig
from sssd_zoo.errors import UserError
from sssd_zoo.pipeline.fit import with_method

FUNCTIONS = [name for name, value in vars(api).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_names_arguments_of_its_command_without_defaults_of_its_own(name):
    function = getattr(sssd_zoo, name)
    config = getattr(configs, COMMANDS[name.replace("_", "-")].arguments)
    defaults = {field.name: field.default for field in fields(config)}
    assert len(inspect.signature(function).parameters) <= 8
    for parameter in inspect.signature(function).parameters.values():
        assert f"    {'**' * (parameter.kind is parameter.VAR_KEYWORD)}{parameter.name}: " in function.__doc__
        assert parameter.annotation is not parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD or (name, parameter.name) == ("fit", "epochs"):
            continue  # the epochs of both trainings
        assert parameter.name in defaults
        assert parameter.default in (None, False, parameter.empty)
        if parameter.default is False:  # which stands for the command's default
            assert defaults[parameter.name] is False
        if parameter.default is parameter.empty:
            assert defaults[parameter.name] is MISSING or parameter.name in ("data",)


def test_every_way_to_give_a_setting_is_what_the_command_reads():
    words = ["--data", "A", "--out", "B", "--pretrain.epochs", "5", "--pretrain.lr", "1", "--cluster.k", "7"]
    words += ["--pretrain.crop_scale", "[0.3, 0.9]", "--baseline", "false", "--augment.rotation", "90"]
    expected = read_arguments("fit", words, "sssd fit")
    common = {"data": Path("A"), "out": "B", "cluster": {"k": np.int64(7)}, "baseline": False}
    nested = {"pretrain": {"epochs": 5, "lr": 1, "crop_scale": [0.3, 0.9]}, "augment": {"rotation": 90}}
    dotted = {"pretrain.epochs": 5, "pretrain.lr": 1.0, "pretrain.crop_scale": (0.3, 0.9), "augment.rotation": 90}
    assert settings_of("fit", {**common, **nested}) == expected
    assert settings_of("fit", {**common, **dotted}) == expected
    args, given = settings_of("fit", {**common, "pretrain": MoCoConfig(epochs=5)})
    assert args.pretrain == MoCoConfig(epochs=5)
    assert {"pretrain.epochs", "pretrain.batch_size", "pretrain.augment.rotation"} <= given
    assert settings_of("fit", {"data": "A", "out": "B"}) == (FitArgs(data="A", out="B"), {"data", "out"})


@pytest.mark.parametrize(
    ("distill", "method"),
    [
        (ContrastiveConfig(epochs=3), "contrastive"),
        (StudentConfig(epochs=3), "sssd"),
        (AnchoredConfig(anchor=2.0), "anchored"),
        ({"epochs": 3}, "contrastive"),
    ],
)
def test_a_dataclass_of_the_distillation_has_its_method(distill, method, monkeypatch):
    class Seen(Exception):
        pass

    def seen(command, main, settings):
        raise Seen(settings_of(command, {**{name: value for name, value in main.items() if value}, **settings}))

    monkeypatch.setattr(functions, "run", seen)
    with pytest.raises(Seen) as found:
        sssd_zoo.fit("A", "B", distill=distill)
    args, given = found.value.args[0]
    args = with_method(args, given)
    assert (args.method, args.distill.epochs) == (method, getattr(distill, "epochs", 3))


def test_epochs_beside_a_whole_dataclass_are_refused():
    with pytest.raises(
        UserError, match="the MoCoConfig given as pretrain, both say how long to train: leave out epochs"
    ):
        sssd_zoo.fit("A", "B", epochs=20, pretrain=MoCoConfig(batch_size=64))


def test_home_is_expanded_and_lists_stay_lists():
    args, _ = settings_of("finetune", {"models": ("~/a", "scratch"), "data": ["~/b", "c"], "out": "~/d"})
    home = str(Path.home())
    assert (args.models, args.data, args.out) == ([f"{home}/a", "scratch"], [f"{home}/b", "c"], f"{home}/d")


def test_an_exit_may_be_given_by_its_number():
    for number in ("2", 2):
        assert settings_of("export", {"model": "m", "out": "o", "output": number})[0].output == "2"
        assert settings_of("embed", {"model": "m", "data": "d", "out": "o.npy", "exits": number})[0].exits == "2"
    for wrong in (5, True):
        with pytest.raises(UserError, match=f"output is {wrong}; it must be one of 1, 2, 3, 4, final"):
            settings_of("export", {"model": "m", "out": "o", "output": wrong})


WRONG = {
    "sssd_zoo.fit has no argument epocs; did you mean epochs?": {"epocs": 3},
    "sssd_zoo.fit has no argument pretrain.epoch; did you mean pretrain.epochs?": {"pretrain": {"epoch": 3}},
    "sssd_zoo.fit has no argument xyzzy; `sssd fit --help` lists them": {"xyzzy": 1},
    "sssd_zoo.fit: pretrain.epochs is given twice: give it once": {"pretrain.epochs": 1, "pretrain": {"epochs": 2}},
    "seed is -1; it must be a number from 0 to 9223372036854775807; pretrain.lr is -3.0; it must be a number from 0 to "
    "10000": {"seed": -1, "pretrain": {"lr": -3}},
    "pretrain: warmup_epochs is 9; it must be fewer than epochs, 5": {"epochs": 5, "pretrain": {"warmup_epochs": 9}},
    "soft is 'much'; it must be a number": {"soft": "much"},
    "seed is None; it must be a whole number": {"seed": None},
    "budget is 'soon'; it must be a time such as 90s, 30m, 2h or 1h30m": {"budget": "soon"},
    "bits are kept as they are only with channels: give --channels too, or remove --bits": {"bits": 8},
}


def test_what_a_command_needs_is_not_none(tmp_path):
    with pytest.raises(UserError, match=r"^sssd_zoo.fit needs data, which is None or was not given$"):
        sssd_zoo.fit(None, tmp_path / "run")


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_a_user_error_of_one_line(message, tmp_path):
    with pytest.raises(UserError) as error:
        sssd_zoo.fit(tmp_path, tmp_path / "run", **WRONG[message])
    assert str(error.value).replace("9.0", "9") == message
    assert isinstance(error.value, ValueError)
    assert not (tmp_path / "run").exists()


def test_epochs_are_those_of_both_trainings_unless_one_has_its_own(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("sssd_zoo.pipeline.fit.fit", lambda args, given: seen.append((args, given)))
    monkeypatch.setattr(api.Run, "read", lambda path: path)
    sssd_zoo.fit("A", tmp_path, epochs=3)
    sssd_zoo.fit("A", tmp_path, epochs=3, pretrain={"epochs": 9})
    sssd_zoo.fit("A", tmp_path, epochs=3, features="resnet18")
    sssd_zoo.fit("A", tmp_path, overwrite=True)
    epochs = [(args.pretrain.epochs, args.distill.epochs) for args, _ in seen]
    assert epochs == [(3, 3), (9, 3), (200, 3), (200, 200)]
    common, both = {"data", "out"}, {"data", "out", "pretrain.epochs", "distill.epochs"}
    assert [given for _, given in seen] == [both, both, common | {"features", "distill.epochs"}, common | {"overwrite"}]


def test_an_argument_that_has_a_name_is_not_given_again():
    with pytest.raises(UserError, match="seed is given twice"):
        run("fit", {"data": "A", "out": "B", "seed": 1}, {"seed": 2})


def test_naming_a_function_imports_neither_torch_nor_figures_and_openmp_is_set_before_torch():
    code = """
import os, sys
for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "KMP_LIBRARY"):  # of this process
    os.environ.pop(name, None)
import sssd_zoo
sssd_zoo.fit, sssd_zoo.predict
assert not {"torch", "timm", "numpy", "datasets", "matplotlib"} & sys.modules.keys(), sys.modules.keys()
assert {"fit", "embed"} <= set(dir(sssd_zoo)) and "GOMP_SPINCOUNT" not in os.environ
from importlib.abc import MetaPathFinder
class Look(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Look())
sssd_zoo.fit("no such folder", "RUN")
"""
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10000"]
