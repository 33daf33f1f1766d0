"""`sssd fit` on a GPU of little memory: batches that do not fit are computed in parts, and a resumed run keeps that."""

import pytest
import torch
import yaml

from helpers.commands import one_line, sssd
from sssd_zoo.pipeline import gpu_memory
from sssd_zoo.tasks import MoCo, SelfDistillation

SETTINGS = [
    *("--model", "sssd_resnet18", "--image_size", "32", "--pretrain.epochs", "1", "--pretrain.batch_size", "32"),
    *("--pretrain.queue_size", "32", "--cluster.k", "4", "--distill.epochs", "1", "--distill.batch_size", "32"),
    *("--unlabelled", "--workers", "0", "--device", "cpu", "--method", "sssd"),
]


@pytest.fixture
def gpu(monkeypatch):
    """Lets the CPU pass for a GPU with memory for 16 images of MoCo and 32 of self distillation; gives the limits."""
    limits = {MoCo: 16, SelfDistillation: 32}
    tried = {MoCo: [], SelfDistillation: []}

    def limit(task):
        forward = task.forward

        def limited(self, batch):
            images = batch["views"][0] if task is MoCo else batch["images"]
            tried[task].append(len(images))
            if len(images) > limits[task]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 8.00 GiB")
            return forward(self, batch)

        monkeypatch.setattr(task, "forward", limited)

    limit(MoCo)
    limit(SelfDistillation)
    monkeypatch.setattr(gpu_memory, "compute_device", lambda device: torch.device("cuda"))
    return limits, tried


def fit(data, out, *words):
    return sssd("fit", "--data", data, "--out", out, *SETTINGS, *words)


@pytest.mark.long
def test_a_batch_is_halved_until_it_fits(gpu, folder_of_images, tmp_path, capsys):
    _, tried = gpu
    assert fit(folder_of_images, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "  --pretrain.accumulate 2\n" in said
    assert "distill.accumulate" not in said, "32 images fit"
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (used["pretrain"]["accumulate"], used["pretrain"]["splits"], used["distill"]["accumulate"]) == (2, 1, 1)
    assert tried[MoCo][:2] == [32, 16]
    assert not list((tmp_path / "run").glob(".trial*"))
    assert not list((tmp_path / "run").glob("trial*"))

    # The network is the one of a run in which nothing was tried.
    given = ["--pretrain.accumulate", "2", "--pretrain.splits", "1", "--distill.accumulate", "1"]
    assert fit(folder_of_images, tmp_path / "given", *given) == 0
    one, other = ((tmp_path / name / "distill" / "model.safetensors").read_bytes() for name in ("run", "given"))
    assert one == other


@pytest.mark.long
def test_a_run_that_is_resumed_keeps_what_it_began_with(gpu, folder_of_images, tmp_path, capsys):
    limits, tried = gpu
    assert fit(folder_of_images, tmp_path / "run") == 0
    limits[MoCo] = 32  # now there is more
    tried[MoCo].clear()
    assert fit(folder_of_images, tmp_path / "run") == 0
    assert "[pretrain] done before" in capsys.readouterr().out
    assert not tried[MoCo]
    assert fit(folder_of_images, tmp_path / "run", "--pretrain.accumulate", "1") == 2
    assert "pretrain.accumulate: 2 there, 1 now" in one_line(capsys)
    assert fit(folder_of_images, tmp_path / "run", "--overwrite") == 0
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (used["pretrain"]["accumulate"], used["pretrain"]["splits"]) == (1, 2)


@pytest.mark.long
def test_what_is_given_is_taken_and_what_does_not_fit_is_one_line(gpu, folder_of_images, tmp_path, capsys):
    limits, _ = gpu
    given = ["--pretrain.accumulate", "1"]
    assert fit(folder_of_images, tmp_path / "run", *given) == 2
    line = one_line(capsys)
    assert "does not have enough memory for 32 images of 32 px at a time (batch_size 32, accumulate 1)" in line
    assert "double accumulate" in line
    assert line.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert fit(folder_of_images, tmp_path / "run", "--pretrain.accumulate", "2") == 0, "nothing had been trained"

    limits[MoCo] = 8
    assert fit(folder_of_images, tmp_path / "small") == 2
    assert "does not have enough memory for 16 images" in one_line(capsys)

    limits[MoCo] = 16
    assert fit(folder_of_images, tmp_path / "small", "--pretrain.splits", "32") == 2
    assert "splits 32 must be" in one_line(capsys)


@pytest.mark.long
def test_the_largest_of_the_views_decides(monkeypatch, folder_of_images, tmp_path, capsys):
    sides, forward = [], SelfDistillation.forward

    def limited(self, batch):
        images = batch["images"]
        sides.append((images.shape[-1], len(images)))
        if images.shape[-1] > 32 and len(images) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 8.00 GiB")
        return forward(self, batch)

    monkeypatch.setattr(SelfDistillation, "forward", limited)
    monkeypatch.setattr(gpu_memory, "compute_device", lambda device: torch.device("cuda"))
    more = ["--distill.sizes", "[32, 64]", "--distill.epochs", "2"]
    assert fit(folder_of_images, tmp_path / "run", *more) == 0
    assert "  --distill.accumulate 2\n" in capsys.readouterr().out
    assert sides[0] == (64, 32)
    assert {(32, 16), (64, 16)} < set(sides)
