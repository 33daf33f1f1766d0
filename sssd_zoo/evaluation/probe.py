"""Linear probes on the frozen features of every exit, and their ensemble.

`linear_probe` trains one linear layer per exit, all exits at once; the paper's accuracies (tables 1 to 3) are those of
linear probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from sssd_zoo.configs import ProbeConfig
from sssd_zoo.errors import UserError

BATCH = 512  # samples per step, and per forward pass over the test split


@dataclass(frozen=True)
class Probe:
    """A linear classifier per exit and its accuracy on the test split.

    Attributes:
        weights: float32 [E, C, D], for features as they are (the standardisation is folded in).
        biases: float32 [E, C].
        exits: accuracy of each exit, percent.
        ensemble: accuracy of the mean of the exits' softmax outputs, percent.
    """

    weights: Tensor
    biases: Tensor
    exits: list[float]
    ensemble: float

    def logits(self, features: Tensor) -> Tensor:
        """Features [E, B, D] to logits [E, B, C]."""
        return torch.baddbmm(self.biases.unsqueeze(1), features, self.weights.mT)


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    num_classes: int,
    config: ProbeConfig,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Probe:
    """Trains a linear layer on the frozen features of every exit, and reports the accuracy after the last epoch.

    AdamW, batches of 512, cosine schedule to zero, weights from zero; features are standardised per dimension by the
    training split. The exits share the order of samples and nothing else: each ends as if trained alone. Nothing is
    chosen on the test split.

    Args:
        train_x: float32 [E, N, D]; computes on its device.
        train_y: int64 [N] in 0..num_classes-1.
        test_x: float32 [E, M, D].
        test_y: int64 [M].
        num_classes: C.
        config: epochs, learning rate, and AdamW's weight decay, which is on the weights of the standardised features,
            not on the biases.
        seed: for the order of samples.
        progress: show a progress bar.

    Raises:
        UserError: if a class has no training row or a label is outside of 0..C-1.
    """
    check_labels(train_y, test_y, num_classes)
    device = train_x.device
    weights, biases = _train(train_x, train_y.to(device), num_classes, config, seed=seed, progress=progress)
    exits, ensemble = _accuracies(Probe(weights, biases, [], 0.0), test_x.to(device), test_y.to(device))
    return Probe(weights, biases, exits, ensemble)


def _train(
    x: Tensor, labels: Tensor, num_classes: int, config: ProbeConfig, *, seed: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """The weights and biases of a `Probe`, from features [E, N, D] and labels [N]."""
    exits, n, dim = x.shape
    std, mean = torch.std_mean(x, dim=1, keepdim=True, correction=0)
    # A dimension that a ReLU keeps at zero has a std of 0: it is left at zero rather than divided by that.
    scale = torch.where(std > 1e-6, 1 / std, 0.0)

    weights = torch.zeros(exits, dim, num_classes, device=x.device, requires_grad=True)
    biases = torch.zeros(exits, 1, num_classes, device=x.device, requires_grad=True)
    decayed = {"params": [weights], "weight_decay": config.probe_weight_decay}
    optimiser = torch.optim.AdamW([decayed, {"params": [biases], "weight_decay": 0.0}], lr=config.probe_lr)
    steps = config.probe_epochs * math.ceil(n / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(config.probe_epochs), desc="probe", unit="epoch", disable=not progress):
        for index in torch.randperm(n, generator=generator).to(x.device).split(BATCH):
            # Standardised batch by batch: a standardised copy of all features may not fit.
            batch = x.index_select(1, index).sub_(mean).mul_(scale)
            logits = torch.baddbmm(biases, batch, weights)
            targets = labels[index].expand(exits, -1)
            # The sum over exits of each exit's mean, so that an exit's gradient does not depend on how many there are.
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * exits
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        folded = weights * scale.mT
        return folded.mT.contiguous(), (biases - torch.bmm(mean, folded)).squeeze(1)


def _accuracies(probe: Probe, x: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Accuracy in percent of every exit and of the ensemble on features [E, M, D], batch by batch."""
    hits = torch.zeros(len(x) + 1, device=x.device)
    for start in range(0, len(labels), BATCH):
        logits = probe.logits(x[:, start : start + BATCH])
        answers = torch.cat([logits.argmax(2), logits.softmax(2).mean(0, keepdim=True).argmax(2)])
        hits += (answers == labels[start : start + BATCH]).sum(1)
    *exits, ensemble = (100 * hits.double() / len(labels)).tolist()
    return exits, ensemble


def check_labels(train_y: Tensor, test_y: Tensor, num_classes: int, names: Sequence[str] | None = None) -> None:
    """Raises `UserError` unless a probe of these labels, int64 [N] and [M], can be trained and measured.

    The error says which class has no images, by its name where `names` are given.
    """
    for name, labels in (("training", train_y), ("test", test_y)):
        if not len(labels):
            raise UserError(f"the {name} split has no images")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise UserError(f"the {name} labels run from {low} to {high}, but there are {num_classes} classes")
    empty = (torch.bincount(train_y, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        class_name = empty[0] if names is None else f"'{names[empty[0]]}'"
        raise UserError(
            f"class {class_name} has no training images ({len(empty)} of {num_classes} classes have none); use more "
            "images or labels, or give --unlabelled where a command can do without"
        )
