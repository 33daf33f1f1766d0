"""Equations 1 to 4 of the paper against loops over images and classes."""

import math

import pytest
import timm
import torch
from torch import Tensor

import sssd_zoo  # noqa: F401
from sssd_zoo.configs import SelfDistillationConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks.sssd import SelfDistillation, self_distillation_loss

WEIGHTS = {"alpha": 0.3, "lam": 0.003, "temperature": 1.0}


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def slow_loss(
    logits: list[Tensor], features: list[Tensor], labels: Tensor, alpha: float, lam: float, temperature: float
) -> float:
    """Equation 4, image by image, exit by exit, class by class."""
    total = 0.0
    for image, label in enumerate(labels.tolist()):
        scores = [exit_logits[image].tolist() for exit_logits in logits]
        teacher = softmax(scores[-1], temperature)
        loss = -math.log(softmax(scores[-1])[label])
        for student in range(3):
            loss += (1 - alpha) * -math.log(softmax(scores[student])[label])
            answers = softmax(scores[student], temperature)
            kl = sum(p * math.log(p / q) for p, q in zip(teacher, answers, strict=True))
            loss += alpha * kl * temperature**2
            pairs = zip(features[student][image].tolist(), features[3][image].tolist(), strict=True)
            loss += lam * sum((ours - theirs) ** 2 for ours, theirs in pairs)
        total += loss
    return total / len(labels)


@pytest.fixture
def answers() -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(5, 7, generator=generator).requires_grad_() for _ in range(4)]
    features = [torch.randn(5, 6, generator=generator).requires_grad_() for _ in range(4)]
    return logits, features, torch.randint(7, (5,), generator=generator)


@pytest.mark.parametrize(("alpha", "lam", "temperature"), [(0.3, 0.003, 1.0), (0.5, 0.1, 3.0), (0.0, 0.0, 1.0)])
def test_equation_4(answers, alpha, lam, temperature):
    logits, features, labels = answers
    loss = self_distillation_loss(logits, features, labels, alpha=alpha, lam=lam, temperature=temperature)["loss"]
    assert loss.item() == pytest.approx(slow_loss(logits, features, labels, alpha, lam, temperature), rel=1e-5)


def test_soft_labels_weigh_the_losses_of_hard_ones(answers):
    """Cross-entropy is linear in the label; the other terms do not see it."""
    logits, features, _ = answers
    shares = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)).softmax(1)
    expected = sum(
        share
        * slow_loss([x[i : i + 1] for x in logits], [x[i : i + 1] for x in features], torch.tensor([k]), 0.3, 0.003, 1)
        for i in range(5)
        for k, share in enumerate(shares[i].tolist())
    )
    assert self_distillation_loss(logits, features, shares, **WEIGHTS)["loss"].item() == pytest.approx(
        expected / 5, rel=1e-5
    )
    hard = torch.tensor([3, 0, 6, 6, 2])
    one_hot = torch.nn.functional.one_hot(hard, 7).float()
    torch.testing.assert_close(
        self_distillation_loss(logits, features, one_hot, **WEIGHTS),
        self_distillation_loss(logits, features, hard, **WEIGHTS),
    )


def test_the_teacher_learns_from_the_labels_only(answers):
    logits, features, labels = answers
    self_distillation_loss(logits, features, labels, **WEIGHTS)["loss"].backward()
    teacher = logits[3].detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(teacher, labels).backward()
    torch.testing.assert_close(logits[3].grad, teacher.grad)
    assert features[3].grad is None
    assert all(student.grad.abs().sum() > 0 for student in [*logits[:3], *features[:3]])


def test_parts_add_up(answers):
    parts = self_distillation_loss(*answers, **WEIGHTS)
    total = parts["ce_teacher"] + 0.7 * parts["ce_students"] + 0.3 * parts["kl"] + 0.003 * parts["feature"]
    torch.testing.assert_close(parts["loss"], total)


def test_the_loss_does_not_depend_on_the_batch_size(answers):
    logits, features, labels = answers
    twice = self_distillation_loss(
        [torch.cat([x, x]) for x in logits],
        [torch.cat([x, x]) for x in features],
        torch.cat([labels, labels]),
        **WEIGHTS,
    )
    torch.testing.assert_close(twice["loss"], self_distillation_loss(logits, features, labels, **WEIGHTS)["loss"])


def test_task_gives_every_parameter_a_gradient():
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5)
    task = SelfDistillation(model, SelfDistillationConfig(), InputSpec(32, (0.5,) * 3, (0.25,) * 3))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = task.views(images, BatchRandom(0, 0))
    out = task({**batch, "labels": torch.tensor([0, 1, 2, 3])})
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())
    assert 0 <= out["label_top1"] <= 1
