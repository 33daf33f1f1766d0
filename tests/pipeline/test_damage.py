"""Damage: bits that flipped, files cut short or lost, full disks, folders that go, losses that are not finite."""

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from helpers.commands import command
from helpers.disk import DAMAGE, cut, flip, small_disk
from helpers.labels import blobs, pseudo_labels
from helpers.training import Regression, Tensors, run
from sssd_zoo.configs import DataConfig, DetectorConfig, OptimConfig, RuntimeConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.loading import load_images
from sssd_zoo.detection.detector import build_detector, load_detector, save_detector
from sssd_zoo.errors import UserError
from sssd_zoo.files.bundled import cards_folder
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.labels.kmeans import kmeans, normalise
from sssd_zoo.labels.online import OnlineLabels
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network
from sssd_zoo.training.checkpoints import Checkpoints
from sssd_zoo.training.engine import Trainer

FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "checkpoint.json"]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def weights_equal(one: Regression, other: Regression) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Regression]:
    """A run of three epochs of four steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, keep_last=3)


class TestCheckpoints:
    @pytest.fixture
    def out(self, whole, tmp_path) -> Path:
        return Path(shutil.copytree(whole[0], tmp_path / "run"))

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_one_is_named_and_the_one_before_it_is_taken(self, whole, out, file, damage, capsys):
        damage(checkpoint(out, 12) / file)
        loader = Tensors(8)
        assert weights_equal(run(out, loader=loader, keep_last=3), whole[1])
        assert loader.served[0] == (2, 0), "it goes on from step 8"
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert str(checkpoint(out, 12)) in line
        assert file in line
        assert [record["step"] for _, record in Checkpoints(out / "checkpoints", {}).saved()] == [4, 8, 12]

    def test_two_damaged_ones_and_a_record_of_another_shape(self, whole, out):
        (checkpoint(out, 12) / "checkpoint.json").write_text("[]")
        flip(checkpoint(out, 8) / "model.safetensors")
        assert weights_equal(run(out, keep_last=1, keep_best=0), whole[1])
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000012"]

    def test_one_that_is_all_there_is(self, out):
        for path in (out / "checkpoints").iterdir():
            cut(path / "optimizer.bin")
        with pytest.raises(UserError, match="remove that folder to train from the beginning") as error:
            run(out)
        assert "\n" not in str(error.value)
        shutil.rmtree(out / "checkpoints")
        run(out)

    def test_damaged_ones_do_not_push_out_good_ones(self, out):
        flip(checkpoint(out, 12) / "checkpoint.json")
        run(out, keep_last=2, keep_best=0)
        assert [record["step"] for _, record in Checkpoints(out / "checkpoints", {}).saved()] == [8, 12]

    def test_those_of_earlier_versions_load(self, whole, out):
        for path in (out / "checkpoints").iterdir():
            record = json.loads((path / "checkpoint.json").read_text())
            (path / "checkpoint.json").write_text(
                json.dumps({name: value for name, value in record.items() if name not in ("sha256", "seal")})
            )
        shutil.rmtree(checkpoint(out, 12))
        assert weights_equal(run(out), whole[1])
        for file in FILES[:2]:
            shutil.rmtree(checkpoint(out, 12))
            before = (checkpoint(out, 8) / file).read_bytes()
            cut(checkpoint(out, 8) / file)
            with pytest.raises(UserError, match=r"cannot read the checkpoint .*step-00000008 .*remove it"):
                run(out)
            (checkpoint(out, 8) / file).write_bytes(before)
            run(out)

    def test_what_killed_writers_left_goes(self, out):
        for step in (3, 16):
            shutil.copytree(checkpoint(out, 8), out / "checkpoints" / f".step-{step:08d}.partial")
        run(out)
        assert not list((out / "checkpoints").glob(".*"))

    def test_a_damaged_line_of_the_log_costs_that_line(self, out, capsys):
        lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
        lines[2] = lines[2].replace(b'"step"', b'"st\xffp"')
        lines[4] = lines[4][:-3]
        (out / "metrics.jsonl").write_bytes(b"\n".join(lines))
        run(out)
        assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 4, *range(6, 13)]
        assert "line 3 of" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"checkpoint_every": 1}, {"checkpoint_every": 0}])
def test_a_run_folder_that_goes_is_one_line(settings, tmp_path):
    class Goes(Tensors):
        def epoch(self, epoch: int, start: int = 0):
            for batch in super().epoch(epoch, start):
                yield batch
                shutil.rmtree(out, ignore_errors=True)

    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"its folder was removed while the command ran"):
        run(out, loader=Goes(8), **settings)
    assert not out.exists()


class Wide(Regression):
    """With 4 MB of weights, so that a disk can be full within each of a checkpoint's files."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(1000, 1000)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        out = super().forward(batch)
        return {**out, "loss": out["loss"] + 1e-6 * self.wide.weight.square().sum() + 1e-6 * self.wide.bias.sum()}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.long
def test_a_disk_that_is_full_at_any_byte_of_a_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=64) as disk:
        optim, out, filler = OptimConfig(epochs=1, batch_size=8, lr=0.05), disk / "run", disk / "filler"

        def train_wide() -> None:
            Trainer(Wide(), Tensors(8), optim=optim, runtime=RuntimeConfig(), out=out, identity={}).run()

        train_wide()
        needed = shutil.disk_usage(disk).used // 1024  # about 2 x 3900 for the weights and their momentum
        for free in (100, 2000, 3950, 6000, needed - 28, needed - 12, needed - 8):
            shutil.rmtree(out)
            gc.collect()  # the error of the round before has torch's half written file open
            filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - free * 1024))
            with pytest.raises(UserError, match=r"cannot write .*: the disk is full"):
                train_wide()
            assert not [path for path in out.rglob("*") if path.name.startswith((".", "step"))], free
            filler.unlink()


class Diverges(Regression):
    """Leaves the finite at the rate of 0.03, at the step that `at` says, as long as the rate is not lowered."""

    at = 9

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        out = super().forward(batch)
        return {**out, "loss": out["loss"] * (1 if self.rate < 0.03 or int(self.steps) <= self.at else float("nan"))}


class TestLossNotFinite:
    def train(self, out: Path, lr: float, task: Regression | None = None, **settings: Any) -> Any:
        task = task or Diverges()
        task.rate = lr  # type: ignore[assignment]
        optim = OptimConfig(epochs=4, batch_size=8, lr=lr, **settings)
        loader = Tensors(8)
        Trainer(task, loader, optim=optim, runtime=RuntimeConfig(log_every=1), out=out, identity={}).run()
        return loader.served

    def test_the_last_good_checkpoint_is_resumed_with_another_rate(self, tmp_path):
        with pytest.raises(UserError, match=r"at step 9 of 16 .*lower lr.*step-00000008"):
            self.train(tmp_path, 0.03)
        with pytest.raises(UserError, match="momentum"):
            self.train(tmp_path, 0.01, momentum=0.5)
        served = self.train(tmp_path, 0.01, clip_grad=1.0, warmup_epochs=1)
        assert served[0] == (2, 0)
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 17))
        assert max(line["lr"] for line in lines[:8]) == pytest.approx(0.03)
        assert max(line["lr"] for line in lines[8:]) < 0.01
        with pytest.raises(UserError, match=r"optim\.lr: 0\.01 there, 0\.005 now"):
            self.train(tmp_path, 0.005)

    def test_a_damaged_one_beside_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Diverges, "at", 16)
        self.train(tmp_path, 0.03)
        flip(checkpoint(tmp_path, 16) / "model.safetensors")
        monkeypatch.setattr(Diverges, "at", 13)
        with pytest.raises(UserError, match=r"at step 13 of 16 .*step-00000012"):
            self.train(tmp_path, 0.03)
        assert self.train(tmp_path, 0.01)[0] == (3, 0)

    def test_one_that_itself_leads_to_it_is_passed_over(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(Diverges, "at", 8)
        with pytest.raises(UserError, match=r"at step 8 of 16 .*step-00000004"):
            self.train(tmp_path, 0.03)
        assert Checkpoints(tmp_path / "checkpoints", {}).saved()[-1][1]["step"] == 8
        assert self.train(tmp_path, 0.01)[0] == (1, 0)
        assert "step-00000008 led to a loss that is not finite" in capsys.readouterr().err

    @pytest.mark.parametrize("lr", [1e30, 1e38])
    def test_without_a_good_one_it_starts_anew(self, lr, tmp_path):
        class OneStep(Tensors):
            def __init__(self) -> None:
                super().__init__(32)

        optim = OptimConfig(epochs=3, batch_size=32)
        optim.lr = lr  # what no command lets through
        runtime = RuntimeConfig(log_every=1, precision="fp32")
        with pytest.raises(UserError, match="starts from scratch"):
            Trainer(Regression(), OneStep(), optim=optim, runtime=runtime, out=tmp_path, identity={}).run()
        optim.lr, loader = 0.05, OneStep()
        Trainer(Regression(), loader, optim=optim, runtime=runtime, out=tmp_path, identity={}).run()
        assert loader.served[0] == (0, 0)

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path):
        class Bursts(Regression):
            """Its loss stays finite: what bursts takes no part in it."""

            def before_step(self) -> None:
                super().before_step()
                if self.steps == 7:
                    self.net[1].running_var.fill_(float("inf"))

        with pytest.raises(UserError, match="the weights became infinite or NaN before step 8 of 16"):
            self.train(tmp_path, 0.01, Bursts())
        assert [record["step"] for _, record in Checkpoints(tmp_path / "checkpoints", {}).saved()] == [4]
        self.train(tmp_path, 0.005)


@pytest.fixture
def labels(tmp_path) -> tuple[Path, PseudoLabels]:
    features = normalise(blobs(200)[0])
    made = pseudo_labels(kmeans(features, 4, seed=0), np.arange(200))
    made.save(tmp_path / "labels")
    return tmp_path / "labels", made


class TestLabels:
    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("file", ["labels.parquet", "centroids.safetensors", "pseudo_labels.json"])
    def test_damaged_ones_are_one_line(self, labels, file, damage):
        damage(labels[0] / file)
        with pytest.raises(UserError) as error:
            PseudoLabels.load(labels[0]).check("f", 1)
        assert "\n" not in str(error.value)

    def test_those_of_earlier_versions_load(self, labels):
        record = json.loads((labels[0] / "pseudo_labels.json").read_text())
        assert record.pop("sha256").keys() == {"labels.parquet", "centroids.safetensors"}
        (labels[0] / "pseudo_labels.json").write_text(json.dumps(record))
        assert PseudoLabels.load(labels[0]).meta == labels[1].meta

    def test_sizes_that_are_not_those_of_the_labels(self, labels):
        edit_json(labels[0] / "pseudo_labels.json", sizes=[50, 50, 50, 51])
        with pytest.raises(UserError, match="do not fit one another"):
            PseudoLabels.load(labels[0])

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_those_of_an_epoch_of_dacsd(self, damage, folder_of_images, tmp_path):
        data = load_images(DataConfig(data=str(folder_of_images)), progress=False)
        model = timm.create_model("sssd_resnet18", num_classes=4)
        labels = OnlineLabels(data, 4, seed=0)
        labels.attach(model, tmp_path, InputSpec(32, (0.5,) * 3, (0.25,) * 3), steps_per_epoch=3)
        labels.for_epoch(0)
        damage(tmp_path / "own_labels" / "epoch-0000.npy")
        with pytest.raises(UserError, match="in the middle of epoch 0"):
            labels.for_epoch(0, 1)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    save_network(folder, timm.create_model("sssd_resnet18", num_classes=3), "sssd_resnet18", input_size=32)
    return folder


class TestNetworks:
    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("prefix", ["", "local-dir:"])
    def test_damaged_weights_are_one_line(self, network, damage, prefix, tmp_path):
        shutil.copytree(network, tmp_path / "copy")
        assert load_network(f"{prefix}{tmp_path / 'copy'}").num_classes == 3
        damage(tmp_path / "copy" / "model.safetensors")
        with pytest.raises(UserError, match=r"model\.safetensors") as error:
            load_network(f"{prefix}{tmp_path / 'copy'}")
        assert "\n" not in str(error.value)

    def test_timm_loads_them_with_their_record_and_says_what_is_wrong_in_one_line(self, network, tmp_path):
        assert timm.create_model(f"local-dir:{network}", pretrained=True).num_classes == 3
        shutil.copytree(network, tmp_path / "copy")
        cut(tmp_path / "copy" / "model.safetensors")
        with pytest.raises(UserError, match="are damaged"):
            timm.create_model(f"local-dir:{tmp_path / 'copy'}", pretrained=True)

    def test_those_of_earlier_versions_load_unless_they_are_cut_short(self, network, tmp_path):
        shutil.copytree(network, tmp_path / "copy")
        edit_json(tmp_path / "copy" / "config.json", sha256={})
        assert load_network(str(tmp_path / "copy")).num_classes == 3
        cut(tmp_path / "copy" / "model.safetensors")
        with pytest.raises(UserError, match="damaged"):
            load_network(str(tmp_path / "copy"))

    @pytest.mark.parametrize("told", [None, [], "x", {"model.safetensors": 1, "/dev/zero": "x"}, {"/dev/zero": "x"}])
    def test_a_record_of_another_shape(self, network, told, tmp_path):
        shutil.copytree(network, tmp_path / "copy")
        edit_json(tmp_path / "copy" / "config.json", sha256=told)
        if isinstance(told, dict) and "model.safetensors" in told:
            with pytest.raises(UserError, match=r"damaged: model\.safetensors"):
                load_network(str(tmp_path / "copy"))
        else:
            assert load_network(str(tmp_path / "copy")).num_classes == 3

    def test_bundled_weights(self, tmp_path, monkeypatch):
        shutil.copytree(Path(timm.get_pretrained_cfg("sssd_resnet18_cifar").file).parent, tmp_path / "weights")
        (tmp_path / "hub_cards").symlink_to(cards_folder())
        monkeypatch.setattr("sssd_zoo.models.bundled.PACKAGE", tmp_path)
        file = tmp_path / "weights" / "sssd_resnet18_cifar.cifar10.safetensors"
        config = timm.get_pretrained_cfg("sssd_resnet18_cifar")
        config.file = str(file)
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
        assert load_network("sssd_resnet18_cifar").num_classes == 10
        flip(file)
        with pytest.raises(UserError, match=r"bundled weights in .* are damaged"):
            load_network("sssd_resnet18_cifar")

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_detectors(self, damage, tmp_path):
        body = timm.create_model("resnet18", features_only=True)
        config = DetectorConfig(model="resnet18", short_side=64, fpn_channels=16)
        save_detector(tmp_path, build_detector(body, 2, config), config, ["a", "b"])
        assert load_detector(tmp_path)[1] == ["a", "b"]
        damage(tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_detector(tmp_path)


FIT = [
    *("-m", "sssd_zoo.cli", "fit", "--model", "sssd_resnet18", "--image_size", "32", "--device", "cpu"),
    *("--precision", "fp32", "--pretrain.epochs", "2", "--pretrain.batch_size", "16", "--pretrain.splits", "2"),
    *("--pretrain.queue_size", "16", "--cluster.k", "4", "--distill.epochs", "1", "--distill.batch_size", "16"),
    *("--baseline", "false", "--probe.probe_weight_decay", "0.01", "--log_every", "1"),
]


@pytest.mark.slow
def test_sssd_fit_makes_damaged_results_again(folder_of_images, tmp_path):
    words = [*FIT, "--data", str(folder_of_images), "--out", str(tmp_path / "run")]
    assert command(*words).returncode == 0
    files = ["pretrain/model.safetensors", "labels/labels.parquet", "distill/model.safetensors"]
    files += ["probe/network/model.safetensors"]
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files}
    for name in files:
        flip(tmp_path / "run" / name)
    done = command(*words)
    assert done.returncode == 0, done.stderr
    for name, content in before.items():
        if name.endswith("safetensors"):
            ours, theirs = (safetensors.torch.load(data) for data in ((tmp_path / "run" / name).read_bytes(), content))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
        assert f"[{name.split('/')[0]}] repeated" in done.stdout
    assert "repeated" not in command(*words).stdout
    flip(tmp_path / "run" / "labels" / "labels.parquet")
    words = ["-m", "sssd_zoo.cli", "distill", "--data", str(folder_of_images), "--out", str(tmp_path / "other")]
    done = command(*words, "--labels", str(tmp_path / "run" / "labels"))
    assert done.returncode == 2
    assert "labels.parquet is not as it was written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sssd_fit_with_a_lower_rate_after_a_loss_that_is_not_finite(folder_of_images, tmp_path):
    words = [*FIT, "--data", str(folder_of_images), "--out", str(tmp_path / "run"), "--method", "sssd"]
    done = command(*words, "--distill.lr", "10000")
    assert done.returncode == 2, done.stderr
    assert "lower lr" in done.stderr
    assert command(*words, "--distill.lr", "0.01").returncode == 0
