"""The engine: schedules, checkpoints, resume against an unbroken run, several processes against one, bad losses."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from typing import Any, ClassVar

import pytest
import safetensors.torch
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from helpers.commands import ROOT, command
from helpers.training import Regression, Tensors, run
from sssd_zoo.configs import OptimConfig, RuntimeConfig, SettingsError
from sssd_zoo.distributed.hardware import compute_device, resolve_precision
from sssd_zoo.errors import UserError
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.models.saving import save_network
from sssd_zoo.training.checkpoints import Checkpoints
from sssd_zoo.training.engine import OutOfMemory, Trainer, check_schedule, check_trainable, step_in_one_pass
from sssd_zoo.training.schedule import make_scheduler


def test_it_learns_and_logs_every_step(tmp_path):
    task = run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss", "root", "lr", "epoch", "images_per_second"} <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert task.steps == 12


def test_sizes_of_the_views_take_equal_parts_of_the_run(tmp_path):
    class Sizes(Regression):
        seen: ClassVar[list[int]] = []

        def views(self, images: Tensor, random: Any) -> dict[str, Any]:
            self.seen.append(self.size)
            return super().views(images, random)

    optim = OptimConfig(epochs=3, batch_size=8, lr=0.05, sizes=[8, 12, 16])
    Trainer(Sizes(), Tensors(8), optim=optim, runtime=RuntimeConfig(), out=tmp_path, identity={}).run()
    assert Sizes.seen == [8] * 4 + [12] * 4 + [16] * 4


class TestMemory:
    def test_a_batch_that_does_not_fit_is_told_with_what_to_do(self, tmp_path):
        class Large(Regression):
            def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
                torch.empty(2**50)
                return super().forward(batch)

        optim = OptimConfig(epochs=1, batch_size=8, accumulate=2)
        trainer = Trainer(Large(), Tensors(8), optim=optim, runtime=RuntimeConfig(), out=tmp_path, identity={})
        said = r"not have enough memory for 4 images of 8 px .*double accumulate.*allocate"
        with pytest.raises(OutOfMemory, match=said):
            trainer.run()

    def test_a_worker_without_shared_memory_is_told_in_the_middle_of_a_step(self, tmp_path):
        """Where torch's handler of SIGCHLD finds the process."""

        class Interrupted(Regression):
            def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
                raise RuntimeError(
                    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                    "workers are out of shared memory. Please try to raise your shared memory limit."
                )

        trainer = Trainer(
            Interrupted(), Tensors(8), optim=OptimConfig(), runtime=RuntimeConfig(), out=tmp_path, identity={}
        )
        with pytest.raises(UserError, match=r"not have enough shared memory .*give --workers 0, or .*--shm-size"):
            trainer.run()

    def test_other_errors_stay_what_they_are(self, tmp_path):
        class Broken(Regression):
            def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        trainer = Trainer(
            Broken(), Tensors(8), optim=OptimConfig(batch_size=8), runtime=RuntimeConfig(), out=tmp_path, identity={}
        )
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            trainer.run()


def test_trainings_use_the_gpus_that_evaluation_uses(monkeypatch, tmp_path):
    """Accelerate would take Apple's and Intel's, which `compute_device` does not."""
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *args, **kwargs: True)
    trainer = Trainer(
        Regression(), Tensors(8), optim=OptimConfig(batch_size=8), runtime=RuntimeConfig(), out=tmp_path, identity={}
    )
    assert trainer.accelerator.device == compute_device("auto")


def test_cosine_with_warmup_and_steps():
    parameter = nn.Parameter(torch.zeros(1))

    def rates(**kwargs: Any) -> list[float]:
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        config = OptimConfig(epochs=4, lr=1.0, **kwargs)
        scheduler = make_scheduler(config, optimizer, steps_per_epoch=5)
        values = []
        for step in range(20):
            scheduler.step_update(step)
            values.append(optimizer.param_groups[0]["lr"])
        return values

    cosine = rates(warmup_epochs=1.0)
    assert cosine[:5] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    expected = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 15)).item()) for step in range(15)]
    assert cosine[5:] == pytest.approx(expected, abs=1e-6)
    stepped = rates(schedule="step", milestones=[2, 3], gamma=0.1)
    assert stepped == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)


def test_accumulation_is_one_step_of_the_whole_batch(tmp_path):
    class Plain(Regression):
        """Without BatchNorm, whose statistics are each part's own, parts add up exactly."""

        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Identity()

        def views(self, images: Tensor, random: Any) -> dict[str, Any]:
            return {**super().views(images, random), "images": images.float() / 255}

    tasks = []
    for accumulate in (1, 4):
        task = Plain()
        optim = OptimConfig(epochs=2, batch_size=8, lr=0.05, accumulate=accumulate)
        out = tmp_path / str(accumulate)
        Trainer(task, Tensors(8), optim=optim, runtime=RuntimeConfig(precision="fp32"), out=out, identity={}).run()
        tasks.append(task)
    assert tasks[0].steps == tasks[1].steps == 8
    for one, four in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True):
        torch.testing.assert_close(one, four)


def test_checkpoints_keep_the_last_and_the_best(tmp_path):
    run(tmp_path, epochs=5, keep_last=2, keep_best=1)
    saved = Checkpoints(tmp_path / "checkpoints", {}).saved()
    steps = [record["step"] for _, record in saved]
    assert steps[-2:] == [16, 20]
    assert len(steps) <= 3
    assert not list((tmp_path / "checkpoints").glob(".*"))
    for path, _ in saved:
        assert {"model.safetensors", "optimizer.bin", "checkpoint.json"} <= {file.name for file in path.iterdir()}


def test_checkpoints_of_some_epochs_and_of_the_last(tmp_path):
    run(tmp_path, epochs=5, checkpoint_epochs=2, keep_last=9)
    steps = [record["step"] for _, record in Checkpoints(tmp_path / "checkpoints", {}).saved()]
    assert steps == [8, 16, 20]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"log_every": 3, "checkpoint_minutes": 1e-9}, [3, 4, 6, 8]),  # at the lines of the log
        ({"log_every": 1, "checkpoint_minutes": 0}, [4, 8]),
        ({"log_every": 1}, [4, 8]),  # the run takes less than the minutes by default
    ],
)
def test_checkpoints_within_an_epoch_that_takes_long(settings, expected, tmp_path):
    run(tmp_path, epochs=2, keep_last=9, **settings)
    assert [record["step"] for _, record in Checkpoints(tmp_path / "checkpoints", {}).saved()] == expected


@pytest.mark.parametrize("every", [{"checkpoint_every": 3}, {"checkpoint_minutes": 1e-9, "log_every": 3}])
def test_resume_in_the_middle_of_an_epoch_goes_on_from_the_step(every, tmp_path):
    class Stop(Exception):
        pass

    class Breaks(Tensors):
        def epoch(self, epoch: int, start: int = 0):
            for batch in super().epoch(epoch, start):
                if epoch == 1 and self.served[-1][1] == 3:
                    raise Stop
                yield batch

    whole = run(tmp_path / "whole", **every)
    with pytest.raises(Stop):
        run(tmp_path / "broken", **every, loader=Breaks(8))
    loader = Tensors(8)
    resumed = run(tmp_path / "broken", **every, loader=loader)
    assert loader.served[0] == (1, 2), "6 steps are done: the next is the third of the second epoch"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    ours, theirs = (
        [{**line, "images_per_second": 0} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("broken", "whole")
    )
    assert ours == theirs


def test_a_half_line_and_a_half_checkpoint_of_a_kill_are_forgotten(tmp_path):
    whole = run(tmp_path, epochs=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (tmp_path / "checkpoints" / ".step-00000012.partial").mkdir()
    again = run(tmp_path, epochs=2)
    assert torch.equal(again.net[0].weight, whole.net[0].weight)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 8
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_resume_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match=r"arch: 'line' there, 'curve' now"):
        run(tmp_path, identity={"arch": "curve"})
    with pytest.raises(UserError, match=r"optim\.epochs: 3 there, 9 now"):
        run(tmp_path, epochs=9)


def test_a_run_of_an_earlier_version_that_did_not_tell_streams_apart_is_resumed(tmp_path):
    stream = {"arch": "line", "split": "train", "revision": None, "steps_per_epoch": 4}
    run(tmp_path, identity={"arch": "line"})
    run(tmp_path, identity=stream)
    run(tmp_path / "new", identity=stream)
    with pytest.raises(UserError, match=r"revision: None there, 'v2' now; .*epoch: 4 there, 5 now"):
        run(tmp_path / "new", identity={**stream, "revision": "v2", "steps_per_epoch": 5})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, value):
    class Bad(Tensors):
        def epoch(self, epoch: int, start: int = 0):
            for positions, images in super().epoch(epoch, start):
                task.poison = epoch == 2
                yield positions, images

    class Poisoned(Regression):
        poison = False

        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            out = super().forward(batch)
            return {**out, "loss": out["loss"] * value} if self.poison else out

    task = Poisoned()
    optim = OptimConfig(epochs=4, batch_size=8, lr=0.05)
    with pytest.raises(UserError, match=r"at step 8 of 16 \(lr 0\.0\d+\).*lower lr"):
        Trainer(task, Bad(8), optim=optim, runtime=RuntimeConfig(log_every=1), out=tmp_path, identity={}).run()
    path, record = Checkpoints(tmp_path / "checkpoints", {}).saved()[-1]
    assert record["step"] == 8
    assert all(value.isfinite().all() for value in safetensors.torch.load_file(path / "model.safetensors").values())


@pytest.mark.parametrize(
    ("settings", "images", "words"),
    [
        ({"batch_size": 65}, 64, "larger than the data set of 64"),
        ({"batch_size": 9, "accumulate": 2}, 64, "not divisible"),
        ({"batch_size": 4, "accumulate": 4}, 64, "single images"),
    ],
)
def test_settings_that_cannot_train(settings, images, words):
    with pytest.raises(UserError, match=words):
        check_trainable(OptimConfig(**{"batch_size": 8, **settings}), 1, images)


def test_a_schedule_that_never_lowers_the_learning_rate():
    check_schedule(OptimConfig(schedule="step", epochs=30, milestones=[29]))
    check_schedule(OptimConfig(schedule="step", epochs=30, milestones=[]))
    with pytest.raises(UserError, match="at epochs 120, 160, and there are 30: give earlier milestones"):
        check_schedule(OptimConfig(schedule="step", epochs=30))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"epochs": 0}, "epochs is 0"), ({"warmup_epochs": 300}, "warmup_epochs is 300; it must be fewer")],
)
def test_settings_that_cannot_train_on_any_data(settings, words):
    with pytest.raises(SettingsError, match=words):
        OptimConfig(batch_size=8, **settings)


def test_auto_precision_is_what_the_hardware_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_precision("auto") == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert resolve_precision("auto") == "fp32"
    assert resolve_precision("bf16") == "bf16"


def test_bf16_trains(tmp_path):
    run(tmp_path, precision="bf16")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_tensorboard_gets_every_line(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, trackers=["tensorboard"], epochs=1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in lines]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


@pytest.mark.slow
def test_trackio_gets_every_line(tmp_path, folder_of_images):
    pytest.importorskip("trackio")
    words = [*SCRIPTS["distill"], "--data", str(folder_of_images), "--out", str(tmp_path), "--trackers", "[trackio]"]
    done = command(*words)  # it chooses its folder when it is imported, once per process
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        steps = [step for (step,) in connection.execute("SELECT step FROM metrics ORDER BY step")]
    assert steps[0] == 0, "a picture of the views"
    assert steps[1:] == [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]


SMALL = ["--epochs", "2", "--batch_size", "16", "--log_every", "1", "--checkpoint_every", "2", "--device", "cpu"]
SCRIPTS = {
    "pretrain": [
        "train/pretrain.py",
        "--model",
        "sssd_resnet18",
        "--image_size",
        "32",
        "--queue_size",
        "32",
        "--splits",
        "2",
        *SMALL,
    ],
    "distill": [
        "train/distill.py",
        "--model",
        "sssd_resnet18",
        "--image_size",
        "32",
        "--labels",
        "random",
        "--k",
        "4",
        *SMALL,
    ],
    "seed": ["train/seed.py", "--model", "sssd_resnet18", "--image_size", "32", "--queue_size", "32", *SMALL],
}
SCRIPTS["dacsd"] = ["own" if word == "random" else word for word in SCRIPTS["distill"]]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> list[str]:
    """A network for SEED to learn from, as its option."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_network(folder, timm.create_model("sssd_resnet18", num_classes=0), "sssd_resnet18", input_size=32)
    return ["--teacher", str(folder)]


@pytest.mark.parametrize(
    "script",
    [name if name == "pretrain" else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
)
def test_killed_and_resumed_equals_unbroken(script, folder_of_images, teacher, tmp_path):
    words = [*SCRIPTS[script], "--data", str(folder_of_images), *(teacher if script == "seed" else [])]
    whole = command(*words, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    steps = len(read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    assert steps == 6
    stop_at = 2 + int.from_bytes(os.urandom(1), "big") % (steps - 2)
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *words, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < stop_at:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    resumed = command(*words, "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), f"{name} differs after a kill at step {stop_at}"
    last = [sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (out, tmp_path / "whole")]
    ours, theirs = (safetensors.torch.load_file(folder / "model.safetensors") for folder in last)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), f"{name} of the checkpoint differs"


# Not DACSD: its k-means makes a leap of a rounding error, where an image lies between two clusters.
@pytest.mark.parametrize(
    ("script", "rate"),
    [
        ("pretrain", "0.01"),
        pytest.param("distill", "0.0001", marks=pytest.mark.slow),
        pytest.param("seed", "0.01", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_losses_of_one(script, rate, folder_of_images, teacher, tmp_path):
    # A small rate: rounding, which differs with the order of sums, now and then turns a ReLU that is near 0, and so the
    # gradient. Distillation in one process differs from itself, on two threads instead of one, by 2e-3 at the third
    # loss at a rate of 0.01, by 6e-6 at 0.0001, where a gradient that is a tenth too large still shows by 6e-5. In
    # bf16, the default where the hardware has it, rounding is as large as what is compared.
    words = [*SCRIPTS[script], "--lr", rate, "--precision", "fp32", "--data", str(folder_of_images)]
    words += teacher if script == "seed" else []
    one = command(*words, "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        *words,
        "--out",
        str(tmp_path / "two"),
    ]
    two = command(*launch)
    assert two.returncode == 0, two.stderr
    checkpoint = sorted((tmp_path / "two" / "checkpoints").glob("step-*"))[-1]
    assert json.loads((checkpoint / "checkpoint.json").read_text())["identity"]["processes"] == 2
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, value in theirs.items():
        if "running" in name:
            torch.testing.assert_close(ours[name], value, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd", "lookahead_adamw", "lamb"])
def test_a_step_in_one_pass_is_the_optimiser_s(name):
    def trained(*, fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
        optimizer = create_optimizer_v2(network, opt=name, lr=0.05, weight_decay=0.01, momentum=0.9)
        if fused:
            step_in_one_pass(optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            network(torch.randn(6, 5)).square().mean().backward()
            optimizer.step()
        assert any(group.get("fused") for group in optimizer.param_groups) is (fused and name != "lamb")
        return list(network.parameters())

    for one, other in zip(trained(fused=True), trained(fused=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
