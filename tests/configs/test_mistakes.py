"""Mistakes in what the user gives: one line that names it, status 2, and nothing read or written before."""

import json
import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers.commands import TINY, one_line, sssd
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.cli.commands import COMMANDS
from sssd_zoo.cli.guard import guarded
from sssd_zoo.configs import (
    ClusterConfig,
    DataConfig,
    FitArgs,
    MoCoConfig,
    OptimConfig,
    RuntimeConfig,
    SettingsError,
)
from sssd_zoo.configs import commands as config
from sssd_zoo.configs.ranges import Range, problems
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.reports.markdown import read_results
from sssd_zoo.files import read_json, write_json
from sssd_zoo.models.saving import save_network
from sssd_zoo.training.hardware import check_compiler, make_accelerator

NEVER = [-1, -1e30, 1e30, 2**63, 10**400, math.nan, math.inf, -math.inf]


def numbers(kind: Any, prefix: str = "") -> dict[str, tuple[type, list[Range]]]:
    """The numeric settings of a dataclass, of lists in it and of dataclasses in it: their type and their ranges."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            found |= numbers(hint, f"{prefix}{name}.")
        else:
            found |= {f"{prefix}{name}": leaf for leaf in leaves(hint)}
    return found


def leaves(hint: Any, ranges: tuple[Range, ...] = ()) -> list[tuple[type, list[Range]]]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return leaves(args[0], tuple(mark for mark in args[1:] if isinstance(mark, Range)))
    if origin in (Union, types.UnionType, list, tuple):
        return [leaf for arg in args for leaf in leaves(arg)]
    return [(hint, list(ranges))] if hint in (int, float) else []


def arguments(name: str) -> list[str]:
    """What a command needs at least."""
    needed, places = [], dict(COMMANDS[name].positional)
    for field in fields(getattr(config, COMMANDS[name].arguments)):
        if field.default is MISSING and field.default_factory is MISSING:
            value = "[x]" if "list" in str(field.type) else "x"
            needed += [value] if field.name in places else [f"--{field.name}={value}"]
    return needed


EVERY = {name: numbers(getattr(config, COMMANDS[name].arguments)) for name in COMMANDS}
WITH_NUMBERS = [name for name, found in EVERY.items() if found]


def test_every_number_has_a_range():
    without = {f"{name} --{flag}" for name, found in EVERY.items() for flag, (_, ranges) in found.items() if not ranges}
    assert not without
    assert len(WITH_NUMBERS) >= 15
    assert sum(map(len, EVERY.values())) > 200


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in WITH_NUMBERS for flag in EVERY[name]])
def test_every_flag_refuses_what_is_out_of_its_range(name, flag):
    """The library's dataclasses and the command ask the same function: here for each flag by itself."""
    kind = getattr(config, COMMANDS[name].arguments)
    (number, ranges), hint = EVERY[name][flag], str(hint_of(kind, flag))
    assert number in (int, float)
    for value in [*NEVER, 0]:
        setting: Any = [value] if "list" in hint or "tuple" in hint else value
        for part in reversed(flag.split(".")[1:]):
            setting = {part: setting}
        found = problems({flag.split(".")[0]: setting}, kind)
        meaningful = value == 0 and ranges[0].problem(0) is None
        assert bool(found) != meaningful or (meaningful and setting != value), (value, found)
        assert all(line.startswith(flag) for line in found), found
        assert not any("\n" in line or len(line) > 200 for line in found), found


def hint_of(kind: Any, flag: str) -> Any:
    outer, _, inner = flag.partition(".")
    hint = get_type_hints(kind, include_extras=True)[outer]
    return hint_of(hint, inner) if inner else hint


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_the_command_tells_all_problems_at_once(name):
    plain = [flag for flag in EVERY[name] if flag.split(".")[-1] not in LISTS]
    with pytest.raises(UserError) as caught:
        read_arguments(name, [*arguments(name), *(f"--{flag}=-1" for flag in plain)], f"sssd {name}")
    assert all(f"{flag} is -1" in str(caught.value) for flag in plain)


LISTS = {"crop_scale", "milestones", "sizes", "seeds", "fractions", "per_class", "thresholds"}


@pytest.mark.parametrize(
    "value", ["nan", ".nan", ".inf", "-.inf", "1e400", "1e30", str(2**63), str(10**400), "9" * 5000]
)
@pytest.mark.parametrize("flag", ["epochs", "lr", "seed", "clip_grad", "sizes", "crop_scale"])
def test_the_command_refuses_numbers_as_they_are_typed(flag, value, capsys, tmp_path):
    value = {"sizes": f"[{value}]", "crop_scale": f"[{value}, 1]"}.get(flag, value)
    assert sssd("pretrain", "--data", tmp_path, "--out", tmp_path / "run", f"--{flag}={value}") == 2
    line = one_line(capsys)
    assert flag in line or "number" in line or "int too large" in line
    assert len(line) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "mistake", "words"),
    [
        ("pretrain", "--optimizer=nonsense", "optimizer 'nonsense'"),
        ("pretrain", "--optimizer=adahessian", "second derivatives"),
        ("pretrain", "--schedule=sometimes", "schedule"),
        ("pretrain", "--crop_scale=[0.9, 0.2]", "crop_scale is (0.9, 0.2); it must be ascending"),
        ("pretrain", "--crop_scale=[0.9]", "crop_scale"),
        ("pretrain", "--milestones=[20, 10]", "milestones is [20, 10]; it must be ascending"),
        ("pretrain", "--sizes=[16, 0]", "sizes[1] is 0"),
        ("pretrain", "--warmup_epochs=200", "warmup_epochs"),
        ("pretrain", "--seed=18446744073709551616", "seed"),
        ("pretrain", "--momentum=1", "momentum is 1.0; it must be a number from 0 to below 1"),
        ("pretrain", "--data=", "data is empty"),
        ("fit", "--pretrain.optimizer=nonsense", "optimizer 'nonsense'"),
        ("fit", "--cluster.k=1", "cluster.k is 1"),
        ("fit", "--probe.holdout=1", "probe.holdout is 1.0"),
        ("compare", "--methods=[]", "methods is []"),
        ("compare", "--seeds=[]", "seeds is []"),
        ("compare", "--seeds=[1, 1]", "seeds is [1, 1]; it must have distinct items"),
        ("finetune", "--models=[]", "models is []"),
        ("finetune", "--fractions=[0.1, 2]", "fractions[1] is 2"),
        ("predict", "--thresholds=[0.5, 0.5]", "thresholds is [0.5, 0.5]; it must have 3 items"),
        ("export", "--thresholds=[0.5, 0.5, 1.5]", "thresholds[2] is 1.5"),
        ("detect", "--data=[]", "data is []"),
        ("detect", "--anchor_scale=0", "anchor_scale is 0.0; it must be a number above 0"),
        ("space", "--port=65536", "port is 65536"),
        ("early-exit", "--points_lost=101", "points_lost is 101"),
    ],
)
def test_other_values_that_cannot_be(command, mistake, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sssd(command, *arguments(command), mistake) == 2
    assert words in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_recipes_are_checked_too(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('data: "a\\0b"\nout: run\npretrain:\n  lr: .nan\n  queue_size: 0\ncluster: {k: 1.5}\n')
    assert sssd("fit", "--config", recipe) == 2
    assert "cluster.k" in one_line(capsys)
    recipe.write_text(recipe.read_text().replace("1.5", "2"))
    assert sssd("fit", "--config", recipe) == 2
    line = one_line(capsys)
    assert all(words in line for words in ("data contains a NUL", "pretrain.lr is nan", "pretrain.queue_size is 0"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(epochs=0), "epochs is 0; it must be a number of at least 1"),
        (lambda: OptimConfig(optimizer="sgd", momentum=0.0), "Nesterov"),
        (lambda: MoCoConfig(temperature=0), "temperature is 0"),
        (lambda: MoCoConfig(lr="fast"), "lr is 'fast'; it must be a number"),  # type: ignore[arg-type]
        (lambda: MoCoConfig(epochs=1.5), "epochs is 1.5; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: MoCoConfig(epochs=True), "epochs is True"),
        (lambda: ClusterConfig(k=1), "k is 1"),
        (lambda: RuntimeConfig(seed=-1), "seed is -1"),
        (lambda: RuntimeConfig(precision="half"), "precision is 'half'; it must be one of"),  # type: ignore[arg-type]
        (lambda: DataConfig(data="x", workers=10**6), "workers is 1000000"),
        (lambda: FitArgs(data="x", out="y", pretrain=3), "pretrain is 3"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_library_refuses_what_the_command_does(make, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        make()


def test_numbers_of_numpy_are_numbers():
    assert issubclass(UserError, ValueError)
    assert issubclass(SettingsError, ValueError)
    assert MoCoConfig(epochs=np.int64(3), lr=np.float32(0.5)).epochs == 3  # type: ignore[arg-type]


def test_a_setting_that_a_command_itself_makes_wrong_ends_it_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, guarded():
        RuntimeConfig(seed=-1)
    assert ended.value.code == 2
    assert one_line(capsys) == "error: seed is -1; it must be a number from 0 to 9223372036854775807"


@pytest.mark.slow
def test_seeds_of_up_to_63_bits_work(folder_of_images, tmp_path):
    words = ["--data", folder_of_images, "--out", tmp_path / "run", *TINY, "--seed", 2**63 - 1]
    assert sssd("fit", *words, "--baseline", "false", "--probe.probe_weight_decay", "0.01") == 0


@pytest.mark.parametrize("command", ["pretrain", "fit"])
def test_fp16_on_a_cpu_is_refused_not_renamed(command, capsys, tmp_path, folder_of_images):
    words = ["--data", folder_of_images, "--out", tmp_path / "run", "--device", "cpu", "--precision", "fp16"]
    assert sssd(command, *words) == 2
    assert "fp16 trains on GPUs only" in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compile_without_a_compiler_is_told_first():
    check_compiler.cache_clear()
    # Not by monkeypatch, which torch's configuration does not survive: its setting would be gone for other tests.
    without = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with without, pytest.raises(UserError, match=r"--compile does not work here.*compiler"):
        make_accelerator(RuntimeConfig(compile=True, device="cpu"))
    check_compiler.cache_clear()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a network of three classes."""
    folder = tmp_path_factory.mktemp("network") / "network"
    model = timm.create_model("sssd_resnet18", num_classes=3)
    save_network(folder, model, "sssd_resnet18", input_size=32, label_names=["a", "b", "c"])
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "sssd_resnet34"},
        {"architecture": "resnet_of_dreams"},
        {"architecture": 5},
        {"num_classes": 7},
        {"num_classes": "three"},
        {"model_args": {"exits": "attention"}},
        {"model_args": {"nonsense": 1}},
        {"model_args": [1]},
        {"model_args": {"thresholds": [2, 2, 2]}},
        {"pretrained_cfg": None},
        {"pretrained_cfg": {"mean": "grey"}},
        {"pretrained_cfg": {"input_size": [3]}},
        {"label_names": ["a", "b"]},
        {"label_names": [1, 2, 3]},
        [],
        None,
        3,
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights(change, network, tmp_path, capsys):
    folder = tmp_path / "network"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(network / "model.safetensors")
    content = json.loads((network / "config.json").read_text())
    if isinstance(change, dict):
        for name, value in change.items():
            both = isinstance(value, dict) and isinstance(content.get(name), dict)
            content[name] = {**content[name], **value} if both else value
            if name in ("label_names", "num_classes"):
                content["pretrained_cfg"][name] = value
    else:
        content = change
    (folder / "config.json").write_text(json.dumps(content))
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    assert sssd("predict", folder, image) == 2
    assert "network" in one_line(capsys)


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"data": 5}', "{}", '{"accuracy": {"exits": 1}, "data": "x"}', "[" * 9999]
)
def test_results_of_another_shape_are_told_with_their_file(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_results(tmp_path)


@pytest.mark.parametrize("record", ["[]", "{}", '{"inputs": [], "result": {}}', '{"inputs": {}, "result": 3}', "{", ""])
def test_records_of_steps_of_another_shape(record, folder_of_images, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "steps").mkdir(parents=True)
    (out / "pretrain").mkdir()
    (out / ".sssd-zoo.json").write_text('{"package": "sssd-zoo", "kind": "fit"}')
    (out / "pretrain" / ".sssd-zoo.json").write_text('{"package": "sssd-zoo", "kind": "training"}')
    (out / "steps" / "pretrain.json").write_text(record)
    assert sssd("fit", "--data", folder_of_images, "--out", out, *TINY) == 2
    assert "pretrain.json" in one_line(capsys)


def test_json_is_read_as_its_type_says(tmp_path):
    write_json(tmp_path / "a.json", {"sizes": [1, 2]})
    assert read_json(tmp_path / "a.json", dict[str, list[int]]) == {"sizes": [1, 2]}
    with pytest.raises(UserError, match=r"a\.json is not as this package writes it: .*sizes.*is \[1, 2\]"):
        read_json(tmp_path / "a.json", dict[str, str])


def test_images_all_alike_have_no_clusters(network, tmp_path, capsys, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(24):
        Image.new("RGB", (32, 32), (200, 10, 30)).save(data / f"{number}.png")
    words = ["pseudo-label", "--data", data, "--model", network, "--k", "8", "--device", "cpu", "--precision", "fp32"]
    assert sssd(*words, "--out", tmp_path / "labels") == 2
    assert "only 1 cluster of the 8 asked for" in one_line(capsys)
    assert not (tmp_path / "labels" / "labels.parquet").exists()
    for number in range(12):
        Image.new("RGB", (32, 32), (10, 10, 230)).save(data / f"{number}.png")
    assert sssd(*words, "--out", tmp_path / "labels") == 0
    assert "only 2 clusters of the 8 asked for" in caplog.text
