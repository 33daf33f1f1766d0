"""The `sssd` command and the scripts as a user meets them: help, recipes, mistakes, and the whole pipeline."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import sssd_zoo  # noqa: F401
from helpers.commands import ROOT, TINY, command, one_line, sssd
from helpers.disk import small_disk
from sssd_zoo import configs
from sssd_zoo.cli import COMMANDS, run
from sssd_zoo.cli.commands import COMPLETED
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.augment import normalise, resize, to_float
from sssd_zoo.data.loading import load_images
from sssd_zoo.evaluation.protocol import evaluation_data
from sssd_zoo.files import RUN_MARK

SCRIPTS = [
    "train/pretrain.py",
    "train/pseudo_label.py",
    "train/distill.py",
    "train/seed.py",
    "train/finetune.py",
    "train/detect.py",
    "eval/linear.py",
    "eval/knn.py",
    "eval/early_exit.py",
    "eval/embed.py",
]


def test_help_lists_the_commands(capsys):
    assert sssd("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "sssd fit --data FOLDER --out RUN" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_help(name, capsys):
    assert sssd(name, "--help") == 0
    out = capsys.readouterr().out
    assert "\\x" not in out
    summary = " ".join((getattr(configs, COMMANDS[name].arguments).__doc__ or "").split("\n\n")[0].split())
    assert " ".join(out.split()).count(summary.rstrip(".")) == 1
    assert ("default: derived)" in " ".join(out.split())) == (name in COMPLETED)
    for option in out.split("\n  --")[1:]:
        words = option.split("\n\n")[0].replace("\n", " ").split()
        text = [word for word in words[1:] if not word.isupper()]
        assert len(text) > 3, f"--{option[:40]} of {name} says nothing"


def test_help_of_settings_within_an_argument_is_in_words_too(capsys):
    assert sssd("fit", "--augment.help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The settings of --augment." in out
    assert "(type: float from 0 to 1, default: 0.5)" in out
    assert "Annotated" not in out
    assert "sssd_zoo.configs" not in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start(script):
    done = command(script, "--help")
    assert done.returncode == 0, done.stderr
    assert script in done.stdout
    assert "--data" in done.stdout


def test_wrong_command_and_arguments(capsys):
    assert sssd("fitt") == 2
    assert "'fitt' is not a command of sssd; did you mean fit?" in one_line(capsys)
    assert sssd("sing") == 2
    assert "its commands: fit, pretrain," in one_line(capsys)
    assert sssd("fit") == 2
    assert "required" in one_line(capsys)
    assert sssd("fit", "--data", "x", "--out", "y", "--epocs", "3") == 2
    assert "--epocs" in one_line(capsys)
    assert sssd("fit", "--dta", "x", "--out", "y") == 2
    assert "did you mean --data?" in one_line(capsys)
    assert sssd("fit", "--data", "x", "--out", "y", "--pretrain.epochs", "many") == 2
    assert "pretrain.epochs" in one_line(capsys)


def test_recipe_mistakes(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: x\npretrain:\n  epocs: 3\n")
    assert sssd("fit", "--config", recipe, "--out", tmp_path / "run") == 2
    assert "epocs" in one_line(capsys)
    recipe.write_text("data: [x\n")
    assert sssd("fit", "--config", recipe, "--out", tmp_path / "run") == 2
    one_line(capsys)
    assert sssd("fit", "--config", tmp_path / "none.yaml", "--out", tmp_path / "run") == 2
    assert "none.yaml" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_shipped_recipes_parse(monkeypatch):
    seen = []
    for name in ("fit", "compare", "finetune", "detect", "pretrain"):
        monkeypatch.setattr(f"sssd_zoo.pipeline.{name}.{name}", lambda args, given=None: seen.append(args))
    recipes = sorted((ROOT / "train" / "recipes").glob("*.yaml"))
    assert {recipe.stem for recipe in recipes} >= {"demo", "cifar10-r18-200ep"}
    left = {"detect-bccd-mini": ["--data", "[FOLDER]"]}  # to its command line, as its first lines say
    for recipe in recipes:
        command = re.search(rf"^# sssd (\S+) --config train/recipes/{recipe.name} ", recipe.read_text(), re.MULTILINE)[
            1
        ]
        words = ["--config", str(recipe), "--out", "somewhere", *left.get(recipe.stem, [])]
        run(command, words)
        for name, value in yaml.safe_load(recipe.read_text()).items():
            found = getattr(seen[-1], name)
            if isinstance(value, dict) and not isinstance(found, dict):
                found = {key: getattr(found, key) for key in value}
            assert json.loads(json.dumps(found)) == value, (recipe.name, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--cluster.k", "49"], "K = 49"),
        (["--cluster.k", "1"], "cluster.k is 1;"),
        (["--image_column", "picture"], "picture"),
        (["--label_column", "kind"], "kind"),
        (["--split", "holidays"], "holidays"),
        (["--split", "train[:32]"], "class 'red' has no training images"),
        (["--model", "resnet_of_dreams"], "resnet_of_dreams"),
        (["--pretrain.queue_size", "999"], "queue_size 999"),
        (["--pretrain.splits", "3"], "splits 3"),
        (["--distill.batch_size", "49"], "batch_size 49"),
        (["--pretrain.epochs", "0"], "epochs is 0"),
        (["--distill.sizes", "[16, 32]"], "views of 16 px"),
        (["--image_size", "24"], "views of 24 px"),
    ],
)
def test_bad_values_are_refused_before_anything_is_trained(change, words, folder_of_images, capsys, tmp_path):
    out = tmp_path / "run"
    assert sssd("fit", "--data", folder_of_images, "--out", out, *TINY, *change) == 2
    assert words in one_line(capsys)
    assert not list(out.rglob("*.safetensors"))


def test_empty_folder_and_one_image(capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    assert sssd("fit", "--data", data, "--out", tmp_path / "run", *TINY) == 2
    assert "empty" in one_line(capsys)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(data / "one.png")
    assert sssd("fit", "--data", data, "--out", tmp_path / "run", *TINY) == 2
    assert "has 1 image, and training needs at least 2" in (said := one_line(capsys))
    assert "mistakes" not in said, "K and the batch are not worth a word"


def test_corrupt_images_are_named(capsys, tmp_path, folder_of_images):
    data = tmp_path / "data"
    data.mkdir()
    for number, file in enumerate(sorted(folder_of_images.rglob("*.png"))[:20]):
        (data / f"{number:02}.png").write_bytes(file.read_bytes() if number != 7 else b"not an image")
    assert sssd("pretrain", "--data", data, "--out", tmp_path / "run", "--batch_size", "8") == 2
    line = one_line(capsys)
    assert "07.png" in line
    assert "max_corrupt" in line


def test_out_that_is_a_file_or_holds_a_run(capsys, tmp_path, folder_of_images):
    file = tmp_path / "file"
    file.write_text("mine")
    for name in ("fit", "pretrain"):
        assert sssd(name, "--data", folder_of_images, "--out", file) == 2
        assert "is a file" in one_line(capsys)
    assert file.read_text() == "mine"
    old = tmp_path / "old"
    (old / "checkpoints").mkdir(parents=True)
    assert sssd("pretrain", "--data", folder_of_images, "--out", old) == 2
    assert "--resume" in one_line(capsys)


def test_networks_and_labels_that_are_not_there(capsys, tmp_path, folder_of_images):
    data = ["--data", str(folder_of_images)]
    assert sssd("pseudo-label", *data, "--model", tmp_path / "none", "--out", tmp_path / "labels") == 2
    assert "none" in one_line(capsys)
    (tmp_path / "half").mkdir()
    assert sssd("knn", *data, "--model", tmp_path / "half") == 2
    assert "config.json" in one_line(capsys)
    assert sssd("distill", *data, "--labels", tmp_path / "half", "--out", tmp_path / "out") == 2
    assert "pseudo labels" in one_line(capsys)
    random = ("--labels", "random", "--k", "3", "--model", "levit_128s")
    assert sssd("distill", *data, *random, "--out", tmp_path / "out") == 2
    assert "cannot have exits" in one_line(capsys)


@pytest.fixture(scope="module")
def finished(folder_of_images, tmp_path_factory) -> Path:
    """A whole run of `sssd fit` on tiny data."""
    out = tmp_path_factory.mktemp("fit") / "run"
    assert sssd("fit", "--data", folder_of_images, "--out", out, *TINY) == 0
    return out


def test_fit_leaves_all_that_it_promises(finished):
    report = (finished / "report.md").read_text()
    assert "random labels" in report
    for name in ("curves", "cluster_sizes", "clusters", "accuracy"):
        assert f"figures/{name}.png" in report
        assert Image.open(finished / "figures" / f"{name}.png").size[0] > 300
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [row["name"] for row in metrics["accuracy"]] == ["contrastive SSSD", "random labels"]
    assert all(len(row["exits"]) == 4 for row in metrics["accuracy"])
    assert (finished / "model" / "README.md").read_text().startswith("---")
    assert not list(finished.rglob(".*.sssd-tmp-*"))


def test_timm_loads_the_result_and_one_exit_of_it(finished):
    model = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    assert (finished / "model.safetensors").is_symlink()  # of the network in model/
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    images = torch.randn(2, 3, 32, 32)
    logits = model.forward_exits(images).logits
    second = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True, output=2).eval()
    torch.testing.assert_close(second(images), logits[1])


def test_the_saved_heads_have_the_reported_accuracy(finished, folder_of_images):
    """The network in model/ answers as the report says, on the images that were held out."""
    data = load_images(DataConfig(data=str(folder_of_images)), progress=False)
    held = evaluation_data(data, DataConfig(data=str(folder_of_images)), test_split=None, holdout=0.2, seed=0)
    model = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    config = model.pretrained_cfg
    images = normalise(resize(to_float(data.gather(held.test_positions)), 32), config["mean"], config["std"])
    with torch.inference_mode():
        logits = model.forward_exits(images).logits
    truth = torch.from_numpy(data.labels)[held.test_positions]
    ours = [100 * (answer.argmax(1) == truth).float().mean().item() for answer in logits]
    reported = json.loads((finished / "metrics.json").read_text())["accuracy"][0]["exits"]
    assert ours == pytest.approx(reported, abs=0.01)


@pytest.mark.long
def test_a_second_call_does_nothing_and_a_change_runs_what_depends_on_it(finished, folder_of_images, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    words = ["fit", "--data", folder_of_images, "--out", run, *TINY]
    weights = [path for path in run.rglob("*.safetensors") if "model" not in path.resolve().parts]
    before = {path: path.stat().st_mtime_ns for path in weights}
    for path in list(run.rglob(RUN_MARK)):  # as a run of version 0.1
        path.unlink()
    capsys.readouterr()
    assert sssd(*words) == 0
    assert capsys.readouterr().out.count("done before") == 6
    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after
    assert sssd(*words, "--cluster.k", "5") == 2
    line = one_line(capsys)
    assert "was made with other settings or data (cluster.k: 4 there, 5 now)" in line
    assert "--overwrite" in line
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert sssd(*words, "--cluster.k", "5", "--overwrite") == 0
    out = capsys.readouterr().out
    assert "[pretrain] done before" in out
    assert "[labels] repeated, for other k" in out
    assert "[distill] repeated" in out


def test_the_report_names_the_machine_that_trained(finished, folder_of_images, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    record = json.loads((run / "steps" / "distill.json").read_text())
    assert record["result"]["machine"] == json.loads((run / "metrics.json").read_text())["machine"]
    record["result"]["machine"] = "a GPU elsewhere"
    (run / "steps" / "distill.json").write_text(json.dumps(record))
    assert sssd("fit", "--data", folder_of_images, "--out", run, *TINY) == 0
    assert "- **Machine**: a GPU elsewhere" in (run / "report.md").read_text()


@pytest.mark.long
def test_card_of_a_run(finished, tmp_path, capsys):
    out, weights = tmp_path / "card", tmp_path / "weights.safetensors"
    words = ["card", "--run", finished, "--out", out, "--weights", weights, "--name", "sssd_resnet18.toy"]
    assert sssd(*words, "--paper", "CIFAR-10: ResNet-18, 200 epochs") == 0
    text = (out / "README.md").read_text()
    assert 'timm.create_model("sssd_resnet18.toy", pretrained=True)' in text
    assert "paper, CIFAR-10: ResNet-18, 200 epochs (%)" in text
    assert "78.54" in text
    for name in ("config.json", "recipe.yaml", "pretrain.jsonl", "distill.jsonl", "figures/accuracy.png"):
        assert (out / name).is_file()
    assert str(finished.parent) not in "".join(file.read_text() for file in out.glob("*.*"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert metrics["weights"]["check"].keys() == {"knn"}, "its classes are not those of the shipped sample"
    half, full = load_file(weights), load_file(finished / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16, torch.int64}
    torch.testing.assert_close(half["conv1.weight"].float(), full["conv1.weight"], rtol=1e-3, atol=1e-6)
    assert sssd(*words) == 2
    assert "--overwrite" in one_line(capsys)
    assert sssd(*words, "--overwrite", "--paper", "MNIST") == 2
    assert "no row 'MNIST'" in one_line(capsys)
    assert (out / "README.md").read_text() == text
    assert sssd("card", "--run", tmp_path, "--out", tmp_path / "other") == 2
    assert "not a finished run" in one_line(capsys)
    assert sssd("publish", finished, "--repo", "org/name", "--dry-run") == 0
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {"README.md", "model.safetensors", "metrics.json", "figures/accuracy.png"} <= set(listed)
    assert not [name for name in listed if "checkpoint" in name or "state" in name]


@pytest.mark.long
def test_warm_start_begins_with_the_pretrained_trunk(folder_of_images, tmp_path):
    words = ["--warm_start", "--distill.lr", "0", "--distill.sizes", "[32, 48]", "--baseline", "false"]
    assert sssd("fit", "--data", folder_of_images, "--out", tmp_path, *TINY, *words) == 0
    pretrained, distilled = (load_file(tmp_path / name / "model.safetensors") for name in ("pretrain", "distill"))
    for name, tensor in pretrained.items():
        if name.endswith("weight"):
            assert torch.equal(tensor, distilled[name]), name
    assert not (tmp_path / "baseline").exists()


def test_the_steps_one_by_one(finished, folder_of_images, tmp_path, capsys):
    data = ["--data", str(folder_of_images)]
    labels = tmp_path / "labels"
    assert sssd("pseudo-label", *data, "--model", finished / "pretrain", "--k", "4", "--out", labels) == 0
    ours, theirs = ((folder / "labels.parquet").read_bytes() for folder in (labels, finished / "labels"))
    assert ours == theirs, "the step alone gives what fit gives"
    assert (
        sssd(
            "linear",
            *data,
            "--model",
            finished / "distill",
            "--out",
            tmp_path / "probe",
            "--probe_weight_decay",
            "0.01",
        )
        == 0
    )
    probe = json.loads((tmp_path / "probe" / "metrics.json").read_text())
    reported = json.loads((finished / "metrics.json").read_text())["accuracy"][0]
    assert probe["exits"] == pytest.approx(reported["exits"])
    assert probe["ensemble"] == pytest.approx(reported["ensemble"])
    assert timm.create_model(f"local-dir:{tmp_path / 'probe'}", pretrained=True).num_classes == 3
    capsys.readouterr()
    assert sssd("knn", *data, "--model", finished / "distill", "--neighbours", "5") == 0
    assert "exit 4" in capsys.readouterr().out
    assert sssd("knn", *data, "--model", finished / "distill") == 0
    assert re.search(r"weighted (\d\d)-nearest-neighbour accuracy", capsys.readouterr().out), "fewer than 200 images"
    assert sssd("knn", *data, "--model", finished / "distill", "--neighbours", "201") == 2
    assert "give --neighbours from 1" in one_line(capsys)
    assert sssd("models") == 0
    assert "sssd_resnet101" in capsys.readouterr().out


def test_clusterfit_trains_a_plain_network_on_the_same_labels(finished, folder_of_images, tmp_path, capsys):
    data = ["--data", str(folder_of_images)]
    words = [
        "--labels",
        finished / "labels",
        "--method",
        "clusterfit",
        "--model",
        "sssd_resnet18",
        "--image_size",
        "32",
    ]
    assert sssd("distill", *data, *words, "--epochs", "1", "--batch_size", "16", "--out", tmp_path / "run") == 0
    names = load_file(tmp_path / "run" / "model.safetensors").keys()
    assert names == timm.create_model("resnet18", num_classes=4).state_dict().keys(), "timm's own ResNet-18"
    capsys.readouterr()
    assert sssd("linear", *data, "--model", tmp_path / "run", "--probe_weight_decay", "0.01") == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "exit" not in out


@pytest.mark.long
def test_seed_teaches_a_student(finished, folder_of_images, tmp_path, capsys):
    words = ["--data", folder_of_images, "--model", "sssd_resnet18", "--image_size", "32", "--epochs", "1"]
    words += ["--batch_size", "16", "--out", tmp_path / "run"]
    teachers = (finished / "pretrain", finished / "distill", tmp_path / "none")
    assert [sssd("seed", *words, "--queue_size", "32", "--teacher", t, "--overwrite") for t in teachers] == [0, 0, 2]
    assert "no folder" in one_line(capsys)  # and the second run is still there
    names = load_file(tmp_path / "run" / "model.safetensors").keys()
    assert names == timm.create_model("resnet18", num_classes=0).state_dict().keys()
    assert sssd("seed", *words, "--teacher", finished / "pretrain", "--overwrite") == 2
    assert "queue_size 4096" in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("pretrain", ["--queue_size", "999"]),
        ("pretrain", ["--sizes", "[8]"]),
        ("distill", ["--labels", "none"]),
        ("distill", ["--init", "none"]),
        ("distill", ["--batch_size", "17", "--accumulate", "2"]),
        ("distill", ["--labels", "true", "--k", "7"]),
        ("distill", ["--method", "clusterfit", "--alpha", "0.9"]),
        ("distill", ["--method", "clusterfit", "--lam", "5"]),
    ],
)
def test_a_mistake_beside_overwrite_costs_nothing(command, mistake, finished, folder_of_images, tmp_path, capsys):
    old = shutil.copytree(finished / command, tmp_path / "old")
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    words = ["--data", folder_of_images, "--model", "sssd_resnet18", "--image_size", "32", "--out", old, "--overwrite"]
    words += ["--labels", "random", "--k", "4"] if command == "distill" and "--labels" not in mistake else []
    assert sssd(command, *words, *mistake) == 2
    one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before


def test_labels_of_other_data_are_refused(finished, folder_of_images, tmp_path, capsys):
    other = tmp_path / "other"
    for file in sorted(folder_of_images.rglob("*.png")):
        target = other / file.relative_to(folder_of_images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).rotate(90).save(target)
    words = ["--labels", finished / "labels", "--out", tmp_path / "out", "--batch_size", "16", "--epochs", "1"]
    assert sssd("distill", "--data", other, *words) == 2
    assert "other data" in one_line(capsys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_checkpoint_of_another_architecture_is_refused(finished, folder_of_images, tmp_path, capsys):
    words = ["--labels", "random", "--k", "4", "--image_size", "32", "--batch_size", "16", "--epochs", "1"]
    words += ["--data", folder_of_images, "--out", tmp_path / "run"]
    assert sssd("distill", *words, "--model", "sssd_resnet18") == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert sssd("distill", *words, "--model", "sssd_resnet34", "--resume") == 2
    line = one_line(capsys)
    assert "sssd_resnet18" in line
    assert "sssd_resnet34" in line
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert sssd("distill", *words, "--model", "sssd_resnet34", "--init", finished / "pretrain", "--overwrite") == 2
    assert "do not fit" in one_line(capsys)


@pytest.mark.long
def test_without_labels_there_is_a_report_without_accuracy(folder_of_images, tmp_path):
    data = tmp_path / "flat"
    data.mkdir()
    for number, file in enumerate(sorted(folder_of_images.rglob("*.png"))):
        (data / f"{number}.png").write_bytes(file.read_bytes())
    assert sssd("fit", "--data", data, "--out", tmp_path / "run", *TINY) == 0
    assert "Not measured: that needs true labels" in (tmp_path / "run" / "report.md").read_text()
    assert not (tmp_path / "run" / "baseline").exists()
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert model.num_classes == len(json.loads((tmp_path / "run" / "metrics.json").read_text())["sizes"])


def test_grey_rgba_and_cmyk_images_train(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        mode = ("L", "RGBA", "CMYK")[number % 3]
        pixels = random.integers(0, 256, (20, 20) if mode == "L" else (20, 20, 4), dtype=np.uint8)
        Image.fromarray(pixels, mode=mode).save(data / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    words = ["--model", "sssd_resnet18", "--image_size", "32", "--epochs", "1", "--batch_size", "8", "--splits", "2"]
    assert sssd("pretrain", "--data", data, "--out", tmp_path / "run", "--queue_size", "16", *words) == 0


def test_streaming_pretrains(folder_of_images, tmp_path):
    words = ["--model", "sssd_resnet18", "--image_size", "32", "--epochs", "1", "--batch_size", "8", "--splits", "2"]
    words += ["--queue_size", "16", "--streaming", "--steps_per_epoch", "3", "--data", folder_of_images]
    assert sssd("pretrain", "--out", tmp_path / "run", *words) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def full_disk(folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    words = ["train/distill.py", "--labels", "random", "--k", "4", "--model", "sssd_resnet18", "--image_size", "32"]
    return command(*words, "--epochs", "1", "--batch_size", "16", "--data", str(data), "--out", str(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.long
def test_a_full_disk_is_one_line_and_nothing_half_written(folder_of_images, tmp_path):
    with small_disk(tmp_path / "disk", megabytes=20) as disk:
        done = full_disk(disk / "run", folder_of_images)
        assert done.returncode == 2, done.stderr
        assert "disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        left = [path for path in disk.rglob("*") if path.is_file()]
        assert {path.name for path in left} <= {"config.yaml", "metrics.jsonl", ".sssd-zoo.json"}, left


@pytest.mark.long
def test_a_file_size_limit_is_one_line(folder_of_images, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    words = ["train/distill.py", "--labels", "random", "--k", "4", "--model", "sssd_resnet18", "--image_size", "32"]
    words += ["--epochs", "1", "--batch_size", "16", "--data", str(folder_of_images), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False, timeout=240
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.safetensors"))
