"""Quality without labels during pretraining: in the log, without touching the training, and for keep_best."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from helpers.commands import command, one_line, sssd
from helpers.training import Regression, Tensors
from sssd_zoo.configs import DataConfig, OptimConfig, QualityConfig, RuntimeConfig
from sssd_zoo.data.inputs import input_spec
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.training.checkpoints import Checkpoints
from sssd_zoo.training.engine import Trainer
from sssd_zoo.training.quality import QualityMonitor

WORDS = [
    *("--model", "sssd_resnet18", "--image_size", "32", "--batch_size", "16", "--queue_size", "32", "--splits", "2"),
    *("--device", "cpu", "--log_every", "1", "--workers", "0"),
]
FIGURES = {"two_view_consistency", "rank_me", "std", "uniformity", "alignment", "cluster_stability"}


class Watch:
    """A monitor of a training of one figure, which it takes from a list; the last is the best."""

    def __init__(self, figures: list[float], best_by: str = "figure") -> None:
        self.figures, self.best_by = figures, best_by

    def due(self, epoch: int, epochs: int) -> bool:
        return epoch < len(self.figures)

    def measure(self) -> dict[str, float]:
        self.measured = getattr(self, "measured", 0) + 1
        return {"figure": self.figures[self.measured - 1]}


def train(out: Path, monitor: Watch | None, loader: Tensors | None = None, **runtime: int) -> Regression:
    task = Regression()
    task.monitor = monitor
    config = RuntimeConfig(log_every=3, device="cpu", precision="fp32", **{"keep_last": 1, "keep_best": 1, **runtime})
    optim = OptimConfig(epochs=4, batch_size=8, lr=0.05)
    Trainer(task, loader or Tensors(8), optim=optim, runtime=config, out=out, identity={}).run()
    return task


class TestTrainer:
    def test_figures_join_the_line_of_their_epochs_last_step(self, tmp_path):
        train(tmp_path, Watch([0.5, 0.9, 0.1]))
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert {line["step"]: line["figure"] for line in lines if "figure" in line} == {4: 0.5, 8: 0.9, 12: 0.1}
        assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 15, 16]

    def test_the_lines_are_those_of_a_training_without(self, tmp_path):
        train(tmp_path / "with", Watch([0.5]))
        train(tmp_path / "without", None)
        with_, without = (
            [{**line, "images_per_second": 0} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
            for name in ("with", "without")
        )
        del with_[1]["figure"]
        assert with_ == without

    @pytest.mark.parametrize(("best_by", "best"), [("figure", 8), ("loss", None)])
    def test_the_best_checkpoint_is_that_of_the_highest_figure(self, tmp_path, best_by, best):
        train(tmp_path, Watch([0.5, 0.9, 0.1], best_by))
        records = [record for _, record in Checkpoints(tmp_path / "checkpoints", {}).saved()]
        if best is None:
            assert min(records, key=lambda record: record["epoch_loss"])["step"] in (4, 8, 12, 16)
        else:
            assert [record["step"] for record in records] == [best, 16]
            assert records[0]["figures"] == {"figure": 0.9}
            assert "figures" not in records[1]

    def test_a_resumed_run_measures_what_is_left_and_keeps_the_best(self, tmp_path):
        class Stop(Exception):
            pass

        class Breaks(Tensors):
            def epoch(self, epoch: int, start: int = 0):
                for batch in super().epoch(epoch, start):
                    if epoch == 2 and self.served[-1][1] == 2:
                        raise Stop
                    yield batch

        whole = train(tmp_path / "whole", Watch([0.5, 0.9, 0.1]))
        with pytest.raises(Stop):
            train(tmp_path / "killed", Watch([0.5, 0.9]), Breaks(8))
        resumed = train(tmp_path / "killed", Watch([0.1, 0, 0, 0]))
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        lines = read_metrics(tmp_path / "killed" / "metrics.jsonl")
        assert {line["step"]: line["figure"] for line in lines if "figure" in line}[12] == 0.1
        steps = [record["step"] for _, record in Checkpoints(tmp_path / "killed" / "checkpoints", {}).saved()]
        assert steps == [8, 16]


@pytest.mark.long
def test_the_trunk_is_bit_equal_with_and_without(folder_of_images, tmp_path):
    words = ["pretrain", *WORDS, "--data", folder_of_images, "--epochs", "2"]
    looked = ("--quality_every", "1", "--best_by", "knn", "--label_column", "label", "--trackers", "[tensorboard]")
    assert sssd(*words, "--out", tmp_path / "with", *looked) == 0
    assert sssd(*words, "--out", tmp_path / "without", "--quality_every", "0") == 0
    with_, without = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")
    )
    for name, value in without.items():
        assert torch.equal(value, with_[name]), name
    first, second = (line for line in read_metrics(tmp_path / "with" / "metrics.jsonl") if "std" in line)
    assert (first["epoch"], second["epoch"]) == (1.0, 2.0)
    assert FIGURES | {"knn", "loss"} <= first.keys() == second.keys()
    assert not any("std" in line for line in read_metrics(tmp_path / "without" / "metrics.jsonl"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "with" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("rank_me")] == [3, 6]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--best_by", "rank_me", "--quality_every", "0"], "--best_by rank_me needs that figure"),
        (["--best_by", "knn"], "--best_by knn needs labels"),
    ],
)
def test_mistakes(folder_of_images, tmp_path, capsys, words, said):
    assert sssd("pretrain", *WORDS, "--data", folder_of_images, "--out", tmp_path, *words) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_processes_measure_once(folder_of_images, tmp_path):
    words = ["train/pretrain.py", *WORDS, "--data", str(folder_of_images), "--epochs", "2", "--quality_every", "1"]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", *words]
    results = [command(*launch, "--out", str(tmp_path / name), *more) for name, more in RUNS.items()]
    assert [done.returncode for done in results] == [0, 0], results[0].stderr
    lines = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert [line["step"] for line in lines if line.keys() >= FIGURES] == [3, 6]
    record = json.loads((tmp_path / "with" / "checkpoints" / "step-00000006" / "checkpoint.json").read_text())
    assert record["figures"].keys() >= FIGURES
    with_, without = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in RUNS)
    for name, value in without.items():
        assert torch.equal(value, with_[name]), name


RUNS: dict[str, list[str]] = {"with": [], "without": ["--quality_every", "0"]}


def test_features_that_are_not_finite_are_told_and_the_training_goes_on(folder_of_images, capsys):
    data = load_images(DataConfig(data=str(folder_of_images), workers=0), progress=False)
    trunk = timm.create_model("sssd_resnet18", num_classes=0)
    with torch.no_grad():
        trunk.layer4[1].bn2.weight.fill_(float("inf"))
    runtime = RuntimeConfig(device="cpu", precision="fp32")
    monitor = QualityMonitor(trunk, data, QualityConfig(quality_every=1), runtime, input_spec(trunk, 32))
    assert monitor.measure() == {}
    assert (
        "quality not measured: what exit 4 of the network gives for 48 of 48 images holds NaN"
        in capsys.readouterr().err
    )


def test_more_corrupt_images_than_are_allowed_end_the_training(folder_of_images, tmp_path):
    shutil.copytree(folder_of_images, tmp_path / "images")
    for file in sorted((tmp_path / "images").rglob("*.png"))[:2]:
        file.write_bytes(b"nonsense")
    config = DataConfig(data=str(tmp_path / "images"), workers=0, in_memory=False, max_corrupt=1)
    data = load_images(config, progress=False, verify=False)
    trunk = timm.create_model("sssd_resnet18", num_classes=0)
    runtime = RuntimeConfig(device="cpu", precision="fp32")
    monitor = QualityMonitor(trunk, data, QualityConfig(quality_every=1), runtime, input_spec(trunk, 32))
    with pytest.raises(UserError, match=r"^2 images of images \(train\) cannot be decoded, more than max_corrupt 1"):
        monitor.measure()
