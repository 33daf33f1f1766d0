"""SEED: a student learns a frozen self-supervised teacher's similarities to a queue (Fang et al., arXiv:2101.04731)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import SEEDConfig
from sssd_zoo.data.augment import BatchRandom, contrastive_view, normalise, resize
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.distributed import gather
from sssd_zoo.models.multi_exit import feature_width
from sssd_zoo.tasks.base import Task
from sssd_zoo.tasks.moco import Encoder
from sssd_zoo.tasks.queue import enqueue, similarities


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """Soft cross-entropy of the similarities to the queue and to the image's own teacher embedding.

    The loss of SEED: with D+ the queue and, after it, the teacher's embedding z_T of the same image,
    p_T = softmax(z_T D+ / t_T), p_S = softmax(z_S D+ / t_S), and the loss is -sum p_T log p_S, the mean over the batch.

    Args:
        student: float32 [B, dim], unit length.
        teacher: float32 [B, dim], unit length.
        queue: float32 [K, dim], unit length: older embeddings of the teacher.
        temperature: t_S of the student, > 0.
        teacher_temperature: t_T, > 0; 0.01 in the paper's text, 1e-4 by default in its code.
    """

    def scores(embeddings: Tensor) -> Tensor:
        same_image = (embeddings * teacher).sum(1, keepdim=True)
        return torch.cat([similarities(embeddings, queue), same_image], dim=1)

    target = F.softmax(scores(teacher) / teacher_temperature, dim=1)
    return -(target * F.log_softmax(scores(student) / temperature, dim=1)).sum(1).mean()


class SEED(Task):
    """Distils a frozen teacher, which may be wider, into a student's trunk, without labels.

    Teacher and student see the same view, of MoCo v2's augmentation. The student's embedding is its projector's, of the
    teacher's length. The teacher's is its pooled feature: the paper takes its projector's where it has one, but neither
    this package's runs nor timm's networks keep theirs.

    Args:
        trunk: the student, a timm model with `num_classes=0`.
        teacher: a timm model with `num_classes=0`; it stays as it is, in eval mode.
        config: of the method.
        spec: of the student's views.
        teacher_spec: of the teacher's; the student's views are resized to its size.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self, trunk: nn.Module, teacher: nn.Module, config: SEEDConfig, spec: InputSpec, teacher_spec: InputSpec
    ) -> None:
        super().__init__(spec)
        self.config, self.teacher_spec = config, teacher_spec
        dim = feature_width(teacher)
        self.student = Encoder(trunk, dim)
        self.teacher = teacher.eval().requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> "SEED":
        """As a module's; the teacher stays in eval mode, or its BatchNorm would move."""
        super().train(mode)
        self.teacher.eval()
        return self

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """The view as the student and as the teacher wants it, float32 [B, C, side, side] each."""
        settings: dict[str, Any] = {
            "scale": self.config.crop_scale,
            "augment": self.resolve(self.config.augment, images, self.config.blur),
            "compiled": self.compiled,
        }
        view = contrastive_view(images, random, self.size, **settings)
        size, mean, std = self.teacher_spec
        return {"student": normalise(view, self.mean, self.std), "teacher": normalise(resize(view, size), mean, std)}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss and the mean `cosine` to the teacher's embeddings, which are queued when it trains."""
        with torch.no_grad():
            teacher = F.normalize(self.teacher(batch["teacher"]).float(), dim=1)
        student = self.student(batch["student"])
        # The queue changes below, before the backward pass that needs it as it was.
        loss = seed_loss(
            student,
            teacher,
            self.queue.clone(),
            temperature=self.config.temperature,
            teacher_temperature=self.config.teacher_temperature,
        )
        if self.training:
            enqueue(self.queue, self.pointer, gather(teacher))
        return {"loss": loss, "cosine": (student * teacher).sum(1).mean().detach()}
