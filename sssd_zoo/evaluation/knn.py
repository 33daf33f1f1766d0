"""The weighted nearest-neighbour vote."""

import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.probe import check_labels

BATCH = 512  # queries at once


def knn(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    neighbours: int,
    temperature: float,
) -> float:
    """Accuracy in percent of the weighted k-nearest-neighbour classifier of Wu et al. (2018, equation 10 on).

    Each of the k training samples of greatest cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        train_x: float32 [N, D], not necessarily normalised; computes on its device.
        train_y: int64 [N] in 0..num_classes-1.
        test_x: float32 [M, D].
        test_y: int64 [M].
        num_classes: C.
        neighbours: k, 1..N.
        temperature: > 0.

    Raises:
        UserError: if k is not in 1..N, a class has no training row, or a label is outside of 0..C-1.
    """
    check_labels(train_y, test_y, num_classes)
    if not 1 <= neighbours <= len(train_y):
        raise UserError(
            f"{neighbours} neighbours of {len(train_y)} training images; give --neighbours from 1 to that number"
        )
    device = train_x.device
    train_y, test_y = train_y.to(device), test_y.to(device)
    bank = F.normalize(train_x, dim=1)
    hits = 0
    for start in range(0, len(test_y), BATCH):
        queries = F.normalize(test_x[start : start + BATCH].to(device), dim=1)
        similarity, nearest = (queries @ bank.T).topk(neighbours, dim=1, sorted=False)
        # Less the greatest, exp neither overflows nor becomes 0 for all neighbours, and no answer changes.
        weights = ((similarity - similarity.amax(1, keepdim=True)) / temperature).exp()
        votes = queries.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, train_y[nearest], weights)
        hits += int((votes.argmax(1) == test_y[start : start + BATCH]).sum())
    return 100 * hits / len(test_y)
