"""Self distillation (BYOT) on pseudo, random or true labels: equations 1 to 4 of the SSSD paper."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.models.exits import Exits
from sssd_zoo.tasks.base import LabelTask, top1


def self_distillation_loss(
    logits: Sequence[Tensor],
    features: Sequence[Tensor],
    labels: Tensor,
    *,
    alpha: float,
    lam: float,
    temperature: float,
) -> dict[str, Tensor]:
    """Equation 4: CE(q_C, y) + (1 - a) sum_i CE(q_i, y) + a sum_i KL(q_C || q_i) + l sum_i ||F_i - F_C||^2.

    The paper leaves open what follows: the KL's target is the teacher q_C, the deepest exit; teacher logits and
    features are detached there and in the feature term, so that only the students follow; the squared norm is a sum
    over channels. All terms are means over the batch, so none depends on its size.

    Args:
        logits: of the exits in order, the deepest last, [B, K] each.
        features: the pooled vectors that enter the exits' classifiers, [B, D] each.
        labels: int64 [B] in 0..K-1, or soft ones, float32 [B, K].
        alpha: weight a of the KL term.
        lam: weight l of the feature term.
        temperature: T of the softmaxes in the KL term, which is then scaled by T^2 (Hinton et al. 2015).

    Returns:
        Scalars: `loss` and its unweighted parts `ce_teacher`, `ce_students`, `kl`, `feature`.
    """
    *student_logits, teacher_logits = [exit_logits.float() for exit_logits in logits]
    *student_features, teacher_features = [vectors.float() for vectors in features]
    target = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    anchor = teacher_features.detach()

    ce_teacher = F.cross_entropy(teacher_logits, labels)
    ce_students = torch.stack([F.cross_entropy(student, labels) for student in student_logits]).sum()
    divergences = [
        F.kl_div(F.log_softmax(student / temperature, dim=1), target, reduction="batchmean", log_target=True)
        for student in student_logits
    ]
    kl = torch.stack(divergences).sum() * temperature**2
    feature = torch.stack([(student - anchor).square().sum(1).mean() for student in student_features]).sum()
    loss = ce_teacher + (1 - alpha) * ce_students + alpha * kl + lam * feature
    return {
        "loss": loss,
        "ce_teacher": ce_teacher.detach(),
        "ce_students": ce_students.detach(),
        "kl": kl.detach(),
        "feature": feature.detach(),
    }


class SelfDistillation(LabelTask):
    """A multi-exit network that teaches its shallow exits by its deepest; `model` has `output='ensemble'`."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Equation 4 on a batch; see `distil`."""
        exits = self.model.forward_exits(batch["images"])  # type: ignore[operator]
        return self.distil(exits, self.labels_of(batch, exits.logits[-1].shape[1]))

    def distil(self, exits: Exits, labels: Tensor) -> dict[str, Tensor]:
        """Equation 4, and the fraction of images whose label each of the deepest exit's answers is."""
        config = self.config
        parts = self_distillation_loss(
            exits.logits, exits.features, labels, alpha=config.alpha, lam=config.lam, temperature=config.temperature
        )
        parts["label_top1"] = top1(exits.logits[-1], labels)
        return parts
