"""Mixing and averaged weights in the methods that learn labels."""

import copy
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

import sssd_zoo  # noqa: F401  registers the models with timm
from helpers.commands import one_line, sssd
from helpers.training import Tensors
from sssd_zoo.configs import AnchoredConfig, OptimConfig, RuntimeConfig, SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.labels.fixed import FixedLabels
from sssd_zoo.tasks import AnchoredSelfDistillation, ClusterFit, FrozenEncoder, SelfDistillation
from sssd_zoo.tasks.sssd import self_distillation_loss
from sssd_zoo.training.engine import Trainer

SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}
SPEC = InputSpec(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
IMAGES = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6) % 5


def test_self_distillation_learns_mixed_labels_on_mixed_images():
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5, **SMALL).eval()
    task = SelfDistillation(model, SelfDistillationConfig(mix="cutmix"), SPEC)
    clean = SelfDistillation(model, SelfDistillationConfig(), SPEC).views(IMAGES, BatchRandom(0, 0))["images"]
    batch = {**task.views(IMAGES, BatchRandom(0, 0)), "labels": LABELS}
    kept = (batch["images"] == clean).all(1).float().mean((1, 2))
    assert (kept >= batch["own"] - 1e-6).all(), "what is an image's own stays in its place"
    assert (batch["own"] < 1).any()
    soft = torch.zeros(6, 5)
    for image in range(6):
        soft[image, LABELS[image]] += batch["own"][image]
        soft[image, LABELS[5 - image]] += 1 - batch["own"][image]
    exits = model.forward_exits(batch["images"])
    by_hand = self_distillation_loss(exits.logits, exits.features, soft, alpha=0.3, lam=0.003, temperature=1.0)
    torch.testing.assert_close(task(batch)["loss"], by_hand["loss"])


def test_the_encoder_sees_clean_images_and_its_features_are_mixed():
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5, **SMALL).eval()
    network = timm.create_model("resnet18", num_classes=0, **SMALL)
    encoder = FrozenEncoder(network, SPEC, torch.rand(64), torch.rand(64) + 0.1)
    task = AnchoredSelfDistillation(model, encoder, AnchoredConfig(anchor=1.0, mix="mixup"), SPEC)
    clean = AnchoredSelfDistillation(model, encoder, AnchoredConfig(anchor=1.0), SPEC).views(IMAGES, BatchRandom(0, 0))
    batch = {**task.views(IMAGES, BatchRandom(0, 0)), "labels": LABELS}
    assert torch.equal(batch["encoder"], clean["encoder"])
    target = (network(batch["encoder"]) - task.anchor.feature_mean) / task.anchor.feature_std
    own = batch["own"][:, None]
    target = own * target + (1 - own) * target.flip(0)
    features = model.forward_exits(batch["images"]).features
    by_hand = sum(
        (1 - torch.cosine_similarity(predict(vectors), target)).mean()
        for predict, vectors in zip(task.anchor.predictors, features, strict=True)
    )
    torch.testing.assert_close(task(batch)["anchor"], by_hand.detach(), atol=1e-4, rtol=1e-4)


def test_averaged_weights_follow_by_the_decay_of_their_step():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, **SMALL)
    task = ClusterFit(model, SelfDistillationConfig(ema=0.3), SPEC).train()
    assert ClusterFit(model, SelfDistillationConfig(), SPEC).trained is model
    assert task.trained is task.averaged
    by_hand = {name: value.double() for name, value in copy.deepcopy(model.state_dict()).items()}
    optimizer = torch.optim.SGD(task.parameter_groups(), lr=0.5)
    for step in range(8):
        task.after_step()
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            kept = decay if value.is_floating_point() else 0.0
            by_hand[name] = kept * by_hand[name] + (1 - kept) * value.double()
        optimizer.zero_grad()
        task({**task.views(IMAGES, BatchRandom(0, step)), "labels": LABELS})["loss"].backward()
        optimizer.step()
    for name, value in task.averaged.state_dict().items():
        torch.testing.assert_close(value.double(), by_hand[name], atol=1e-5, rtol=1e-4)
    assert not any(value.requires_grad for value in task.averaged.parameters())


def test_averaged_weights_have_the_last_step(tmp_path):
    task = ClusterFit(timm.create_model("resnet18", num_classes=5, **SMALL), SelfDistillationConfig(ema=0.9), SPEC)
    before = copy.deepcopy(task.model.state_dict())
    trainer = Trainer(
        task,
        Tensors(batch_size=6, n=6),
        optim=OptimConfig(epochs=1, batch_size=6, lr=0.1),
        runtime=RuntimeConfig(device="cpu", precision="fp32"),
        out=tmp_path,
        identity={},
        labels=FixedLabels(LABELS.numpy()),
    )
    trainer.run()
    for name, value in task.averaged.state_dict().items():
        if value.is_floating_point():  # the decay of the first step is a tenth
            torch.testing.assert_close(value, 0.1 * before[name] + 0.9 * task.model.state_dict()[name])


TINY = ["--model", "sssd_resnet18", "--image_size", "32", "--labels", "random", "--k", "5", "--batch_size", "8"]
TINY += ["--lr", "0.01", "--device", "cpu", "--workers", "0", "--precision", "fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--ema", "0.9", "--mix", "mixup"), ("--method", "clusterfit", "--mix", "cutmix")])
def test_a_resumed_run_ends_as_an_unbroken_one(flags, folder_of_images, tmp_path):
    words = ["distill", "--data", folder_of_images, *TINY, *flags]
    assert sssd(*words, "--epochs", "2", "--keep_last", "2", "--out", tmp_path / "whole") == 0
    assert sssd(*words, "--epochs", "2", "--keep_last", "2", "--out", tmp_path / "part") == 0
    _, newest = sorted((tmp_path / "part" / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    (tmp_path / "part" / "model.safetensors").unlink()
    assert sssd(*words, "--epochs", "2", "--keep_last", "2", "--out", tmp_path / "part", "--resume") == 0
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_run_is_not_resumed_with_another_mix(folder_of_images, tmp_path, capsys):
    words = ["distill", "--data", folder_of_images, *TINY, "--epochs", "1", "--out", tmp_path / "run"]
    assert sssd(*words) == 0
    capsys.readouterr()
    assert sssd(*words, "--resume", "--mix", "mixup") == 2
    assert "mix" in one_line(capsys)
