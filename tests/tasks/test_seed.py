"""SEED against loops over images and queue, and its teacher and queue for what they are there for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import SEEDConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks import SEED
from sssd_zoo.tasks.seed import seed_loss


class Trunk(nn.Module):
    """A small network with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.conv, self.norm = nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).relu().mean((2, 3))


def make(queue_size: int = 16) -> SEED:
    torch.manual_seed(0)
    spec, teacher_spec = InputSpec(12, (0.5,) * 3, (0.25,) * 3), InputSpec(16, (0.4,) * 3, (0.2,) * 3)
    return SEED(Trunk(6), Trunk(10), SEEDConfig(queue_size=queue_size), spec, teacher_spec).train()


def batch_of(task: SEED, size: int = 8) -> dict:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return task.views(images, BatchRandom(0, 0))


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("teacher_temperature", [0.1, 0.01])
def test_loss_equals_loops(teacher_temperature):
    torch.manual_seed(1)
    student, teacher, queue = (F.normalize(torch.randn(n, 5), dim=1) for n in (4, 4, 7))
    total = 0.0
    for own, target in zip(student, teacher, strict=True):
        references = [*queue, target]
        p = softmax([float(target @ other) / teacher_temperature for other in references])
        q = softmax([float(own @ other) / 0.2 for other in references])
        total -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    loss = seed_loss(student, teacher, queue, temperature=0.2, teacher_temperature=teacher_temperature)
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = seed_loss(student, teacher, queue, temperature=0.2, teacher_temperature=teacher_temperature)
    assert torch.equal(rounded, loss), "cosines are not rounded"


def test_the_loss_is_least_where_the_student_is_its_teacher():
    torch.manual_seed(2)
    teacher, queue = F.normalize(torch.randn(4, 5), dim=1), F.normalize(torch.randn(9, 5), dim=1)
    same = seed_loss(teacher, teacher, queue, temperature=0.1, teacher_temperature=0.1)
    others = [F.normalize(teacher + 0.3 * torch.randn(4, 5), dim=1) for _ in range(20)]
    assert all(seed_loss(x, teacher, queue, temperature=0.1, teacher_temperature=0.1) > same for x in others)


def test_the_teacher_stays_as_it_is():
    task = make()
    before = {name: tensor.clone() for name, tensor in task.teacher.state_dict().items()}
    task(batch_of(task))["loss"].backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.student.parameters())
    assert task.student.training
    assert not task.teacher.training


def test_one_view_normalised_for_each():
    task = make()
    batch = batch_of(task)
    assert batch["student"].shape[-1] == 12
    assert batch["teacher"].shape[-1] == 16
    pixels = batch["student"] * 0.25 + 0.5
    larger = F.interpolate(pixels, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(batch["teacher"], (larger - 0.4) / 0.2, rtol=1e-4, atol=1e-5)


def test_the_queue_takes_the_teacher_s_embeddings_after_the_loss():
    task = make()
    queue, batch = task.queue.clone(), batch_of(task)
    teacher = F.normalize(task.teacher(batch["teacher"]), dim=1)
    student = task.student(batch["student"])
    expected = seed_loss(student, teacher, queue, temperature=0.2, teacher_temperature=0.01)
    torch.testing.assert_close(task(batch)["loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.queue[:8], teacher)
    assert torch.equal(task.queue[8:], queue[8:])
    assert task.pointer == 8
    task.eval()(batch)
    assert task.pointer == 8, "measuring queues nothing"
    assert {"queue", "pointer"} <= task.state_dict().keys()
