"""Contrastive self distillation against slow versions of its parts."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from sssd_zoo.configs import ContrastiveConfig, SettingsError
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks import ContrastiveSelfDistillation
from sssd_zoo.tasks.sssd import self_distillation_loss

SPEC = InputSpec(32, (0.5,) * 3, (0.25,) * 3)


def make(**settings) -> ContrastiveSelfDistillation:
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5, channels=(8, 16, 32, 64), layers=(1, 1, 1, 1))
    usual = {"queue_size": 16, "dim": 6, "splits": 2}
    return ContrastiveSelfDistillation(model, ContrastiveConfig(**{**usual, **settings}), SPEC).train()


def batch_of(task: ContrastiveSelfDistillation, step: int = 0) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {**task.views(images, BatchRandom(0, step)), "labels": torch.arange(8) % 5}


def test_the_loss_is_equation_4_and_info_nce_of_every_exit():
    task = make(contrast=0.7, contrast_temperature=0.3)
    whole = make(splits=1)  # the same weights, without parts
    batch, queue = batch_of(task), task.queue.clone()
    out = task(batch)

    exits = [whole.model.forward_exits(part) for part in batch["images"].chunk(2)]
    logits = [torch.cat(parts) for parts in zip(*(part.logits for part in exits), strict=True)]
    features = [torch.cat(parts) for parts in zip(*(part.features for part in exits), strict=True)]
    config = task.config
    expected = self_distillation_loss(
        logits, features, batch["labels"], alpha=config.alpha, lam=config.lam, temperature=config.temperature
    )["loss"]
    keys = torch.empty(8, 6)
    for part in batch["shuffle"].chunk(2):  # each key with the statistics of its shuffled part
        pooled = whole.key_encoder.forward_exits(batch["keys"][part]).features[-1]
        keys[part] = F.normalize(whole.key_projector(pooled), dim=1).detach()
    for project, vectors in zip(whole.projectors, features, strict=True):
        for query, key in zip(project(vectors), keys, strict=True):
            against = torch.stack([key, *queue]) @ query / query.norm() / 0.3
            expected = expected - 0.7 / 8 * against.log_softmax(0)[0]
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(task.queue[:8], keys)
    assert torch.equal(task.queue[8:], queue[8:])


def test_all_but_the_momentum_encoder_learns_and_that_follows():
    task = make(key_momentum=0.9)
    task(batch_of(task))["loss"].backward()
    learning = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in task.named_parameters() if name.startswith(("model.", "projectors."))}
    before = copy.deepcopy(task.state_dict())
    with torch.no_grad():
        for parameter in [*task.model.parameters(), *task.projectors.parameters()]:
            parameter.add_(1.0)
    task.before_step()
    for key, source in (("key_encoder", "model"), ("key_projector", "projectors.3")):
        for name, _ in task.get_submodule(key).named_parameters():
            old, query = before[f"{key}.{name}"], before[f"{source}.{name}"] + 1
            torch.testing.assert_close(task.state_dict()[f"{key}.{name}"], 0.9 * old + 0.1 * query)


def test_the_key_keeps_its_colours_and_the_query_does_not():
    task, grey = make(), torch.full((8, 3, 32, 32), 100, dtype=torch.uint8)
    batch = task.views(grey, BatchRandom(0, 0))
    value = (100 / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch["keys"], torch.full((8, 3, 32, 32), value))
    assert (batch["images"].mean((1, 2, 3)) - value).abs().max() > 0.1
    assert batch["shuffle"].sort().values.tolist() == list(range(8))


def test_eval_mode_leaves_the_queue_and_steps_lower_the_loss():
    task = make()
    task.eval()(batch_of(task))
    assert task.pointer == 0
    optimizer = torch.optim.AdamW(task.train().parameters(), lr=0.01)
    losses = []
    for step in range(12):
        task.before_step()
        loss = task(batch_of(task, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_mixed_images_have_no_other_view():
    with pytest.raises(SettingsError, match="no other view of mixed images"):
        ContrastiveConfig(mix="cutmix")
