"""The parts of a training one by one: the trainer's steps, its labels, the schedule, checkpoint records and the log."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from torch import Tensor, nn

from helpers.training import Regression, Tensors, run
from sssd_zoo.configs import OptimConfig, RuntimeConfig
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.training.checkpoints import Checkpoints, Progress, diverged, read_record, steps_done, write_record
from sssd_zoo.training.engine import Trainer, is_finite, uses_cuda_graphs
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.log import Log
from sssd_zoo.training.schedule import make_scheduler


class Classes(Regression):
    """Learns labels, of 5 classes, and keeps those that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Linear(4 * 36, 5)
        self.given: list[Tensor] = []

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.given.append(batch["labels"])
        return {"loss": nn.functional.cross_entropy(self.net(batch["images"]), batch["labels"])}


class EpochLabels:
    """Other random labels in every epoch, and the calls that asked for them."""

    num_classes, identity = 5, "random by epoch"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def attach(self, network: nn.Module, out: Path, spec: Any) -> None:
        raise AssertionError("the caller attaches labels, not the trainer")

    def of(self, epoch: int) -> Tensor:
        return torch.randint(0, 5, (32,), generator=torch.Generator().manual_seed(epoch))

    def for_epoch(self, epoch: int, step: int = 0) -> Tensor:
        self.calls.append((epoch, step))
        return self.of(epoch)


class SoftTargets:
    def __getitem__(self, positions: Tensor) -> Tensor:
        return torch.softmax(torch.arange(5.0) * positions[:, None], dim=1)


class SoftEpochLabels(EpochLabels):
    def for_epoch(self, epoch: int, step: int = 0) -> Any:
        return SoftTargets()


class Killed(Exception):
    pass


class KilledInAnEpoch(Tensors):
    """Ends the run before the last of the second epoch's four steps."""

    def epoch(self, epoch: int, start: int = 0):
        for batch in super().epoch(epoch, start):
            if (epoch, self.served[-1][1]) == (1, 3):
                raise Killed
            yield batch


OPTIM: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.05}


def trainer(task: Regression, out: Path, loader: Any = None, labels: Any = None, **optim: Any) -> Trainer:
    runtime = RuntimeConfig(log_every=100, checkpoint_every=3, precision="fp32", device="cpu")
    config = OptimConfig(**{**OPTIM, **optim})
    return Trainer(task, loader or Tensors(8), optim=config, runtime=runtime, out=out, identity={}, labels=labels)


class TestLabels:
    def test_every_epoch_asks_for_its_own(self, tmp_path):
        task, labels = Classes(), EpochLabels()
        trainer(task, tmp_path, labels=labels).run()
        assert labels.calls == [(0, 0), (1, 0), (2, 0)]
        assert torch.equal(torch.cat(task.given), torch.cat([labels.of(epoch) for epoch in range(3)]))

    def test_a_resumed_epoch_asks_from_its_step_on_and_ends_at_the_same_weights(self, tmp_path):
        whole, labels = Classes(), EpochLabels()
        trainer(whole, tmp_path / "whole", labels=labels).run()
        with pytest.raises(Killed):
            trainer(Classes(), tmp_path / "killed", KilledInAnEpoch(8), labels).run()
        labels, resumed = EpochLabels(), Classes()
        trainer(resumed, tmp_path / "killed", labels=labels).run()
        assert labels.calls == [(1, 2), (2, 0)]
        assert torch.equal(torch.cat(resumed.given), torch.cat([labels.of(1)[16:], labels.of(2)]))
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_soft_ones_are_made_for_each_accumulated_part(self, tmp_path):
        task = Classes()
        trainer(task, tmp_path, labels=SoftEpochLabels(), epochs=1, accumulate=2).run()
        assert [tuple(given.shape) for given in task.given] == [(4, 5)] * 8
        torch.testing.assert_close(torch.cat(task.given), SoftTargets()[torch.arange(32)])

    def test_a_task_without_any_is_given_none(self, tmp_path):
        class Plain(Regression):
            def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
                assert "labels" not in batch
                return super().forward(batch)

        trainer(Plain(), tmp_path, epochs=1).run()


class TestTrainer:
    def test_steps_are_logged_by_flush_and_kept_by_save(self, tmp_path):
        task = Regression()
        first = trainer(task, tmp_path)
        for positions, images in list(Tensors(8).epoch(0))[:2]:
            first.step(positions, images, None)
        assert read_metrics(tmp_path / "metrics.jsonl") == []
        losses = [float(values["loss"]) for values in first.unlogged]
        first.flush()
        first.flush()
        (line,) = read_metrics(tmp_path / "metrics.jsonl")
        assert line["step"] == 2
        assert line["loss"] == pytest.approx(sum(losses) / 2)
        first.save()
        record = read_record(tmp_path / "checkpoints" / "step-00000002")
        assert record is not None
        assert record["epoch_sum"] == pytest.approx(sum(losses))
        assert record["epoch_loss"] == pytest.approx(sum(losses) / 2)

        other = Regression()
        second = trainer(other, tmp_path)
        assert second.progress == first.progress == Progress.of(record)
        assert second.seconds >= record["seconds"]
        assert torch.equal(other.net[0].weight, task.net[0].weight)

    def test_train_tells_time_throughput_and_the_last_epochs_loss(self, tmp_path):
        config, runtime = OptimConfig(**OPTIM), RuntimeConfig(log_every=1)
        measured = Trainer(Regression(), Tensors(8), optim=config, runtime=runtime, out=tmp_path, identity={}).run()
        assert measured.keys() == {"seconds", "images_per_second", "loss"}
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert measured["loss"] == pytest.approx(sum(line["loss"] for line in lines[-4:]) / 4)
        assert measured["images_per_second"] > 0
        again = Trainer(Regression(), Tensors(8), optim=config, runtime=runtime, out=tmp_path, identity={}).run()
        assert again["loss"] == measured["loss"], "a run that is done has nothing left to do"
        before = Checkpoints(tmp_path / "checkpoints", {}).saved()[-1][1]["seconds"]
        assert again["seconds"] >= round(before, 1), "the time before the resume counts"


class TestIsFinite:
    @pytest.fixture
    def task(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    @pytest.fixture
    def optimizer(self, task) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
        task(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        return optimizer

    def test_of_a_healthy_training(self, task, optimizer):
        assert is_finite(task, optimizer)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_one_number_is_enough(self, task, optimizer, value):
        momentum = optimizer.state[task[0].weight]["momentum_buffer"]
        for tensor in (task[0].weight.data, task[1].running_var, momentum):
            before = tensor.clone()
            tensor.view(-1)[-1] = value
            assert not is_finite(task, optimizer)
            tensor.copy_(before)
        assert is_finite(task, optimizer)


class TestSchedule:
    @staticmethod
    def rates(steps: Any, **config: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make_scheduler(OptimConfig(**{"epochs": 4, "lr": 1.0, **config}), optimizer, steps_per_epoch=5)
        rates = []
        for step in steps:
            scheduler.step_update(step)
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    def test_milestones_count_from_the_beginning_with_warmup_too(self):
        rates = self.rates(range(20), schedule="step", milestones=[2, 3], gamma=0.1, warmup_epochs=1.0)
        assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 5 + [0.1] * 5 + [0.01] * 5)

    def test_warmup_of_a_part_of_an_epoch(self):
        assert self.rates(range(4), warmup_epochs=0.4) == pytest.approx([0.0, 0.5, 1.0, 0.992404], abs=1e-6)

    @pytest.mark.parametrize("schedule", ["cosine", "step"])
    @pytest.mark.parametrize("step", [3, 7, 19])
    def test_a_new_one_gives_the_rate_of_any_step(self, schedule, step):
        config: dict[str, Any] = {"schedule": schedule, "milestones": [1, 2], "warmup_epochs": 1.0}
        assert self.rates([step], **config)[0] == self.rates(range(20), **config)[step]


RECORD: dict[str, Any] = {"step": 4, "epoch_sum": 1.5, "epoch_count": 4, "seconds": 2.0, "identity": {}}


class TestRecords:
    def folder(self, out: Path, step: int, **changes: Any) -> Path:
        folder = out / f"step-{step:08d}"
        folder.mkdir()
        write_record(folder, {**RECORD, "step": step, **changes})
        return folder

    def test_one_that_was_written_is_read(self, tmp_path):
        assert read_record(self.folder(tmp_path, 4)) == RECORD

    def test_one_that_was_changed_is_not(self, tmp_path):
        file = self.folder(tmp_path, 4) / "checkpoint.json"
        file.write_text(file.read_text().replace("1.5", "1.4"))
        assert read_record(file.parent) is None

    @pytest.mark.parametrize("name", ["step", "epoch_sum", "epoch_count", "seconds", "identity"])
    def test_one_that_lacks_something_is_not(self, tmp_path, name):
        write_record(tmp_path, {key: value for key, value in RECORD.items() if key != name})
        assert read_record(tmp_path) is None

    def test_a_run_diverged_if_its_newest_one_says_so(self, tmp_path):
        assert not diverged(tmp_path)
        self.folder(tmp_path, 4, not_finite_at=6)
        assert diverged(tmp_path)
        self.folder(tmp_path, 8)
        assert not diverged(tmp_path)

    def test_what_has_a_similar_name_is_the_users(self, tmp_path):
        """It is not removed, and no run takes it for a checkpoint."""
        folder = tmp_path / "checkpoints"
        run(tmp_path, epochs=2)
        (folder / "step-00000008").rename(folder / "step-00000010-keep")
        shutil.rmtree(folder / "step-00000004")
        write_record(folder / "step-00000010-keep", {**RECORD, "step": 10, "not_finite_at": 11})
        (folder / "step-notes").mkdir()
        (folder / ".step-mine.partial").mkdir()
        (folder / "step-00000030.tar").write_text("packed")
        (folder / "step-00000030").write_text("a file")
        theirs = set(folder.iterdir())
        checkpoints = Checkpoints(folder, {})
        assert (checkpoints.saved(), checkpoints.newest(), diverged(folder), steps_done(folder)) == ([], None, False, 0)
        loader = Tensors(8)
        run(tmp_path, epochs=2, loader=loader, keep_last=1, keep_best=0)
        assert loader.served[0] == (0, 0), "there is nothing to resume from"
        assert set(folder.iterdir()) == theirs | {folder / "step-00000008"}


class TestDevice:
    """Accelerate keeps the first device of a process: here one is planted, as after a run on it."""

    @pytest.fixture
    def kept(self):
        def plant(device: torch.device) -> None:
            make_accelerator(RuntimeConfig(device="cpu"))
            PartialState._shared_state["device"] = device

        yield plant
        PartialState._reset_state()

    def test_a_run_on_the_cpu_after_one_on_a_gpu_is_on_the_cpu(self, kept, tmp_path):
        kept(torch.device("cuda", 0))
        assert trainer(Regression(), tmp_path).accelerator.device.type == "cpu"

    def test_a_run_on_a_gpu_after_one_on_the_cpu_is_not_on_the_cpu(self, kept, monkeypatch):
        kept(torch.device("cpu"))
        monkeypatch.setattr("sssd_zoo.training.hardware.compute_device", lambda device: torch.device("cuda"))
        monkeypatch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cuda", 0)))
        assert make_accelerator(RuntimeConfig(precision="bf16")).device == torch.device("cuda", 0)

    def test_one_of_the_same_type_stays(self, kept, monkeypatch):
        """Such as the second GPU, which the process was given."""
        monkeypatch.setattr("sssd_zoo.training.hardware.compute_device", lambda device: torch.device("cuda"))
        kept(torch.device("cuda", 1))
        assert make_accelerator(RuntimeConfig(precision="bf16")).device == torch.device("cuda", 1)


class TestLog:
    def test_a_resumed_one_drops_what_came_after_its_checkpoint(self, tmp_path):
        log = Log(tmp_path, RuntimeConfig(), 0, is_main=True, settings={})
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 0.5})
        log.close()
        log = Log(tmp_path, RuntimeConfig(), 2, is_main=True, settings={})
        log.write({"step": 3, "loss": 0.25})
        assert [(line["step"], line["loss"]) for line in read_metrics(log.path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]

    def test_only_the_main_process_writes(self, tmp_path):
        log = Log(tmp_path, RuntimeConfig(trackers=["tensorboard", "trackio"]), 0, is_main=False, settings={})
        log.write({"step": 1, "loss": 0.5})
        log.close()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "processes", "accumulate", "wanted", "uses"),
    [
        ("cuda", 1, 1, True, True),
        ("cuda", 1, 1, False, False),
        ("cuda", 1, 2, True, False),
        ("cuda", 2, 1, True, False),
        ("cpu", 1, 1, True, False),
    ],
)
def test_cuda_graphs_are_for_one_process_and_one_pass_on_a_gpu(device, processes, accumulate, wanted, uses):
    optim = OptimConfig(accumulate=accumulate)
    assert uses_cuda_graphs(RuntimeConfig(cuda_graphs=wanted), optim, torch.device(device), processes) == uses


def test_a_compiled_training_ends_at_the_weights_of_an_uncompiled_one(tmp_path, monkeypatch):
    modes = []

    def compile_eagerly(model: nn.Module, *, dynamic: bool, mode: str) -> Any:
        modes.append((dynamic, mode))
        return real(model, dynamic=dynamic, backend="eager")

    real = torch.compile
    monkeypatch.setattr("sssd_zoo.training.engine.torch.compile", compile_eagerly)
    monkeypatch.setattr("sssd_zoo.training.hardware.check_compiler", lambda device: None)
    plain, compiled = Regression(), Regression()
    compiled.load_state_dict(plain.state_dict())
    trainer(plain, tmp_path / "plain").run()
    runtime = RuntimeConfig(log_every=100, precision="fp32", device="cpu", compile=True)
    Trainer(compiled, Tensors(8), optim=OptimConfig(**OPTIM), runtime=runtime, out=tmp_path / "c", identity={}).run()
    assert modes == [(False, "default")]
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
