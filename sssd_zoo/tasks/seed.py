"""SEED: a student learns a frozen self-supervised teacher's similarities to a queue (Fang et al., arXiv:2101.04731)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.data.augment import BatchRandom, contrastive_view, normalise, resize
from sssd_zoo.distributed import gather
from sssd_zoo.tasks.base import Task
from sssd_zoo.tasks.moco import Encoder
from sssd_zoo.tasks.queue import enqueue


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, temperature: float = 0.2, teacher_temperature: float = 0.01
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
        own = (embeddings * teacher).sum(1, keepdim=True)
        return torch.cat([embeddings @ queue.T, own], dim=1)

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
        size: side of the student's views in pixels.
        mean: of the channels, for the student.
        std: of the channels.
        teacher_size: side that the view is resized to for the teacher.
        teacher_mean: of the channels, for the teacher.
        teacher_std: of the channels.
        queue_size: embeddings in the queue (paper: 65536).
        temperature: of the student's softmax.
        teacher_temperature: of the teacher's.
        scale: share of the area that a crop keeps.
        blur: probability of a Gaussian blur.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        teacher: nn.Module,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        teacher_size: int,
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        queue_size: int = 4096,
        temperature: float = 0.2,
        teacher_temperature: float = 0.01,
        scale: tuple[float, float] = (0.2, 1.0),
        blur: float = 0.0,
    ) -> None:
        super().__init__(size, mean, std)
        self.teacher_size, self.teacher_mean, self.teacher_std = teacher_size, tuple(teacher_mean), tuple(teacher_std)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.scale, self.blur = scale, blur
        dim = int(teacher.num_features)  # type: ignore[arg-type]
        self.student = Encoder(trunk, dim)
        self.teacher = teacher.eval().requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> "SEED":
        """As a module's; the teacher stays in eval mode, or its BatchNorm would move."""
        super().train(mode)
        self.teacher.eval()
        return self

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """The view as the student and as the teacher wants it, float32 [B, 3, side, side] each."""
        settings: dict[str, Any] = {"scale": self.scale, "blur": self.blur, "compiled": self.compiled}
        view = contrastive_view(images, random, self.size, **settings)
        larger = normalise(resize(view, self.teacher_size), self.teacher_mean, self.teacher_std)
        return {"student": normalise(view, self.mean, self.std), "teacher": larger}

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
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )
        if self.training:
            enqueue(self.queue, self.pointer, gather(teacher))
        return {"loss": loss, "cosine": (student * teacher).sum(1).mean().detach()}
