"""`sssd finetune`: the subsets, what is trained at which rate, that no label leaks, and the sweep."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import sssd_zoo  # noqa: F401
from helpers.commands import one_line, sssd
from helpers.runs import rows_of
from sssd_zoo.configs import FinetuneArgs, SelfDistillationConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import accuracies
from sssd_zoo.evaluation.reports.paper import TABLE_4
from sssd_zoo.files import RUN_MARK
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline import deploy as deploying
from sssd_zoo.pipeline.deploy import choose
from sssd_zoo.pipeline.finetune import labelled_subset, results_csv, starting_network, step_plan
from sssd_zoo.tasks import ClusterFit, SelfDistillation
from sssd_zoo.training import engine

TINY = [
    *(
        "--image_size",
        "16",
        "--epochs",
        "2",
        "--batch_size",
        "4",
        "--lr",
        "0.02",
        "--trunk_lr",
        "0.002",
        "--scratch_lr",
        "0.02",
    ),
    *("--device", "cpu", "--precision", "fp32", "--deploy", "false"),
]
SPEC = InputSpec(32, (0.5,) * 3, (0.25,) * 3)
PLAIN = SelfDistillationConfig()


class TestSubsets:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 50))

    @pytest.mark.parametrize(("how", "each"), [({"fraction": 0.1}, 5), ({"per_class": 7}, 7), ({"fraction": 0.001}, 1)])
    def test_balanced_and_seeded(self, how, each):
        subset = labelled_subset(self.labels, 3, **how)
        assert np.bincount(self.labels[subset]).tolist() == [each] * 4
        assert len(set(subset.tolist())) == 4 * each
        assert np.array_equal(subset, labelled_subset(self.labels, 3, **how))
        assert not np.array_equal(subset, labelled_subset(self.labels, 4, **how))

    def test_smaller_ones_are_parts_of_larger_ones(self):
        sizes = [set(labelled_subset(self.labels, 0, fraction=share).tolist()) for share in (0.02, 0.1, 0.5, 1)]
        assert all(small < large for small, large in pairwise(sizes))
        assert len(sizes[-1]) == len(self.labels)

    def test_shares_of_uneven_classes_stay_uneven(self):
        labels = np.repeat([0, 1], [100, 20])
        assert np.bincount(labels[labelled_subset(labels, 0, fraction=0.25)]).tolist() == [25, 5]
        with pytest.raises(UserError, match="class 1 has 20 labels"):
            labelled_subset(labels, 0, per_class=21)
        with pytest.raises(UserError, match="class 'dog' has 20 labels"):
            labelled_subset(labels, 0, per_class=21, names=["cat", "dog"])


class TestRates:
    @pytest.mark.parametrize("exits", [False, True])
    def test_every_parameter_has_the_rate_meant_for_it(self, exits):
        model = timm.create_model("sssd_resnet18_cifar", num_classes=3, output="ensemble" if exits else "final")
        task = (SelfDistillation if exits else ClusterFit)(model, PLAIN, SPEC, trunk_scale=0.1)
        optimizer = engine.create_optimizer_v2(task.parameter_groups(), opt="momentum", lr=0.5)
        scheduler = engine.make_scheduler(engine.OptimConfig(epochs=10), optimizer, 10)
        names = {id(value): name for name, value in model.named_parameters()}
        for step in (0, 50):
            scheduler.step_update(step)
            seen = set()
            for group in optimizer.param_groups:
                for value in group["params"]:
                    name = names[id(value)]
                    seen.add(name)
                    head = name.startswith(("fc.", "exit1.", "exit2.", "exit3."))
                    height = 0.5 if step == 0 else 0.25  # half way down the cosine
                    assert group["lr"] == pytest.approx(height * (1 if head else 0.1)), name
            assert seen == set(names.values())

    def test_a_plain_timm_network(self):
        task = ClusterFit(timm.create_model("test_resnet", num_classes=3), PLAIN, SPEC, trunk_scale=0.1)
        heads, trunk = task.parameter_groups()
        assert len(heads["params"]) == 2
        assert len(trunk["params"]) == len(list(task.parameters())) - 2

    def test_one_rate_is_one_group(self):
        model = timm.create_model("test_resnet", num_classes=3)
        assert len(ClusterFit(model, PLAIN, SPEC).parameter_groups()) == 1


class TestStart:
    @pytest.mark.parametrize("method", ["final", "exits"])
    def test_classifiers_that_saw_all_labels_are_dropped(self, method):
        shipped = timm.create_model("sssd_resnet18_cifar.cifar10", pretrained=True).state_dict()
        model, arch = starting_network("sssd_resnet18_cifar.cifar10", "", method, 10)
        assert arch == "sssd_resnet18_cifar"
        for name, value in model.state_dict().items():
            head = name.startswith("fc.") or ".fc." in name
            assert torch.equal(value, shipped[name]) != head, name
        assert hasattr(model, "exit1") == (method == "exits")

    def test_scratch_has_new_weights_of_the_same_network(self):
        model, arch = starting_network("scratch", "sssd_resnet18_cifar.cifar10", "final", 10)
        shipped = timm.create_model("sssd_resnet18_cifar", pretrained=True).state_dict()
        assert arch == "sssd_resnet18_cifar"
        assert not torch.equal(model.layer1[0].conv1.weight, shipped["layer1.0.conv1.weight"])

    def test_a_pretext_run_gets_exits(self, tmp_path):
        trunk = timm.create_model("sssd_resnet18_cifar", num_classes=0, output="final")
        save_network(tmp_path / "run", trunk, "sssd_resnet18_cifar", input_size=16)
        model, _ = starting_network(str(tmp_path / "run"), "", "exits", 3)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in trunk.state_dict().items())
        assert model.exit1.fc.out_features == 3
        with pytest.raises(UserError, match="no exits"):
            starting_network("scratch", "test_resnet", "exits", 3)


def test_steps_at_least_and_batches_that_fit():
    args = FinetuneArgs(data="data", out="out", models=["run"], epochs=3, min_steps=100, batch_size=32)
    plan = step_plan(args, "run", 70, 1)
    assert (plan.batch_size, plan.epochs, plan.lr) == (32, 50, args.lr)
    assert step_plan(args, "scratch", 10_000, 1).epochs == 3
    assert step_plan(args, "scratch", 10_000, 1).lr == args.scratch_lr
    assert step_plan(args, "run", 21, 4).batch_size == 20
    with pytest.raises(UserError, match="too few"):
        step_plan(args, "run", 3, 2)
    with pytest.raises(UserError, match="batch_size 1 leaves single images"):
        step_plan(replace(args, batch_size=1), "run", 70, 1)


def test_accuracies_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[0.0, 9.0], [0.0, 1.0], [0.0, 0.5]]])
    assert accuracies(logits, torch.tensor([0, 1, 0])) == ([100.0, pytest.approx(100 / 3)], pytest.approx(200 / 3))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "distilled"
    save_network(folder, timm.create_model("sssd_resnet18_cifar", num_classes=5), "sssd_resnet18_cifar", input_size=16)
    return folder


@pytest.mark.long
def test_the_sweep_reuses_what_is_there_and_draws(folder_of_images, distilled, tmp_path, capsys):
    words = ["finetune", "--data", folder_of_images, "--out", tmp_path / "out", *TINY]
    assert sssd(*words, "--models", "[test_resnet, scratch]", "--fractions", "[0.5]") == 2
    assert "test_resnet" in one_line(capsys), "it has no weights that can be had offline"
    assert sssd(*words, "--models", f"[{distilled}]", "--fractions", "[0.5]", "--seeds", "[0]") == 0
    capsys.readouterr()
    assert sssd(*words, "--models", f"[{distilled}, scratch]", "--fractions", "[0.2, 0.5]", "--seeds", "[0]") == 0
    assert capsys.readouterr().out.count("done before") == 1
    rows = rows_of(tmp_path / "out")
    cells = [(row["model"], row["amount"], row["seed"]) for row in rows]
    assert cells == [(name, amount, "0") for name in (str(distilled), "scratch") for amount in ("20.0", "50.0")]
    assert int(rows[0]["labels"]) < int(rows[1]["labels"])
    report = (tmp_path / "out/report.md").read_text()
    assert "distilled over scratch" in report
    assert str(tmp_path) not in report
    assert str(TABLE_4["ResNet-50"][1]) in report
    assert Image.open(tmp_path / "out/accuracy.png").size[0] > 900
    cell = tmp_path / "out/scratch/50%/seed-0"
    model = timm.create_model(f"local-dir:{cell}", pretrained=True)
    assert model.num_classes == 3
    assert not (cell / "checkpoints").exists()
    # Other weights under the same name: their cells are trained again, those from scratch are not.
    save_network(
        distilled, timm.create_model("sssd_resnet18_cifar", num_classes=5), "sssd_resnet18_cifar", input_size=16
    )
    words += ["--models", f"[{distilled}, scratch]", "--fractions", "[0.2, 0.5]", "--seeds", "[0]"]
    capsys.readouterr()
    assert sssd(*words) == 2
    assert "--overwrite" in one_line(capsys)
    assert sssd(*words, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2, (
        "a change of the first network is one of scratch's weights only by its name"
    )


def test_accuracies_of_exits_are_in_the_table_where_there_are_several():
    row = {"model": "a", "amount": 1.0, "labels": 9, "seed": 0, "accuracy": 75.0, "steps": 4, "seconds": 9.2}
    final, exits = {**row, "exits": [75.0]}, {**row, "exits": [50.0, 60.0]}
    assert results_csv([final]).splitlines() == [
        "model,amount,labels,seed,accuracy,steps,seconds",
        "a,1.0,9,0,75.0,4,9.2",
    ]
    head, first, second = results_csv([final, exits]).splitlines()
    assert head == "model,amount,labels,seed,accuracy,exit 1,exit 2,steps,seconds"
    assert (first, second) == ("a,1.0,9,0,75.0,,,4,9.2", "a,1.0,9,0,75.0,50.0,60.0,4,9.2")


@pytest.mark.long
def test_runs_from_scratch_are_those_of_an_architecture(folder_of_images, distilled, tmp_path, capsys):
    words = ["finetune", "--data", folder_of_images, "--out", tmp_path / "out", *TINY]
    words += ["--fractions", "[0.2]", "--seeds", "[0]", "--models"]
    assert sssd(*words, "[scratch]") == 0
    assert sssd(*words, f"[{distilled}, scratch]") == 0
    assert capsys.readouterr().out.count("done before") == 1, "it has the architecture that is the default at this size"
    name, other = "sssd_mobilenetv3_small_100_cifar", tmp_path / "other"
    save_network(other, timm.create_model(name, num_classes=3), name, input_size=16)
    assert sssd(*words, f"[{other}, scratch]") == 2
    assert "start: 'sssd_resnet18_cifar' there, 'sssd_mobilenetv3_small_" in one_line(capsys)
    assert not (tmp_path / "out/other").exists(), "it is told before the first network is trained"


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_to_equal_weights(folder_of_images, distilled, tmp_path, monkeypatch):
    words = ["finetune", "--data", folder_of_images, *TINY, "--seeds", "[0]", "--per_class", "[4]"]
    words += ["--models", f"[{distilled}]", "--method", "exits", "--checkpoint_every", "2"]
    assert sssd(*words, "--out", tmp_path / "whole") == 0
    writing, lines = engine.Log.write, 0

    def stop(self, values):
        nonlocal lines
        lines += 1
        if lines == 3:
            raise KeyboardInterrupt
        writing(self, values)

    words += ["--out", tmp_path / "stopped", "--log_every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(engine.Log, "write", stop)
        assert sssd(*words) == 130
    assert sssd(*words) == 0
    weights = [next((tmp_path / name).rglob("model.safetensors")) for name in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "exit1.fc.weight" in load_file(weights[0])
    steps = next((tmp_path / "whole").rglob("steps/seed-0.json"))
    assert len(json.loads(steps.read_text())["result"]["exits"]) == 4


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("--models", "[]"), "models is []"),
        (
            ("--models", "[scratch]", "--fractions", "[10]"),
            "fractions[0] is 10.0; it must be a number above 0 and up to 1",
        ),
        (("--models", "[scratch]", "--per_class", "[99]"), "fewer than 99"),
        (("--models", "[scratch]", "--exits", "attention"), "keeps the exits that the network has: remove --exits"),
        (("--models", "[scratch, scratch]"), "distinct"),
        (("--models", "[nothing]"), "no model of that name"),
        (("--models", "[..]"), "cannot name a folder"),
        (("--models", "[scratch]", "--lr", "0"), "lr is 0.0; it must be a number above 0"),
        (("--models", "[scratch]", "--fractions", "[0.01]", "--accumulate", "2"), "too few"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes(mistake, message, folder_of_images, tmp_path, capsys):
    assert sssd("finetune", "--data", folder_of_images, "--out", tmp_path / "out", *TINY, *mistake) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_deployed_is_the_best_start_at_the_most_labels_with_the_first_seed():
    rows = [
        {"model": name, "amount": amount, "seed": seed, "accuracy": accuracy}
        for name, amount, accuracies in (
            ("a", 10.0, (99, 99)),
            ("a", 50.0, (60, 70)),
            ("b", 50.0, (40, 92)),
            ("timm", 50.0, (95, 95)),
        )
        for seed, accuracy in zip((7, 3), accuracies, strict=True)
    ]
    assert choose(rows, ["a", "b"]) == ("b", 50.0, 7)
    assert choose(rows, ["a"]) == ("a", 50.0, 7)
    assert choose(rows, []) == ("timm", 50.0, 7)


@pytest.mark.slow
def test_one_network_is_left_to_deploy(folder_of_images, distilled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deploying, "FEWEST", 3)
    out = tmp_path / "out"
    words = ["finetune", "--data", folder_of_images, "--out", out, *TINY, "--models", f"[{distilled}]"]
    words += ["--fractions", "[0.3, 0.6]", "--seeds", "[1]", "--deploy", "true"]
    assert sssd(*words) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == (
        f"network: {out / 'model'}, for timm.create_model('local-dir:{out / 'model'}', pretrained=True)"
    )
    assert not list((out / "distilled").rglob("30%/seed-1-exits"))
    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    cell = next(out.rglob("60%/seed-1-exits"))
    trained = timm.create_model(f"local-dir:{cell}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    ours, theirs = model.state_dict(), trained.state_dict()
    heads = ("fc.", "exit1.fc.", "exit2.fc.", "exit3.fc.")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if not name.startswith(heads))
    for head in ("exit1.fc", "exit2.fc", "exit3.fc", "fc"):  # of which a temperature divides all numbers
        ratio = theirs[f"{head}.weight"] / ours[f"{head}.weight"]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert model.storage_size == 16
    card = (out / "model" / "README.md").read_text()
    labels = rows_of(out)[-1]["labels"]
    assert f"fine-tuned from `distilled` by self distillation of all exits on {labels} labelled images" in card
    assert "inear-probe" not in card.split("## Limits")[0].split("## Network")[1]
    assert "**Calibration**: the classifiers" in card
    report = (out / "report.md").read_text()
    assert "## The network to deploy" in report
    assert str(tmp_path) not in report + card
    assert sssd("predict", out, folder_of_images / "red" / "00.png", "--device", "cpu") == 0
    capsys.readouterr()
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert sssd(*words) == 0
    assert capsys.readouterr().out.count("done before") == 3
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    (out / "model" / "mine.txt").write_text("mine")
    assert sssd(*words[:-1], "false", "--overwrite") == 0
    assert [path.name for path in (out / "model").iterdir() if path.name != RUN_MARK] == ["mine.txt"]


def test_a_network_called_model_is_refused(folder_of_images, distilled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(distilled)
    words = ["finetune", "--data", folder_of_images, "--out", "out", *TINY, "--models", "[model]", "--seeds", "[0]"]
    words += ["--fractions", "[0.3]"]
    assert sssd(*words, "--deploy") == 2
    assert "--models model would share OUT/model with the network to deploy" in one_line(capsys)
    assert not (tmp_path / "out").exists()
