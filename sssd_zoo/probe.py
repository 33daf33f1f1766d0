"""Evaluation of frozen features: a linear probe on every exit with their ensemble, and weighted kNN.

`extract_features` reads a network's pooled features without moving it, and `pooled_batches` does so batch by batch;
`linear_probe` trains one linear layer per exit, all exits at once; `knn` trains nothing. The paper's accuracies (tables
1 to 3) are those of linear probes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sssd_zoo.data.augment import normalise, resize, to_float
from sssd_zoo.errors import UserError

_BATCH = 512  # samples per step of the probe, and a chunk of everything else


def pooled_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    count: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    size: int | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
    read: Callable[[Any, Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs `model` over images, without augmentation, and gives its pooled features batch by batch.

    The model is put into eval mode for it and back into what it was, module by module; that no buffer (BatchNorm's
    statistics above all) moved is checked at the end.

    Args:
        model: on `device`. A full multi-exit network gives the features F_1..F_C of its E exits; any other timm network
            gives its pooled features, E = 1.
        batches: pairs of positions, int64 [B], and images, uint8 [B, 3, S, S].
        count: images in all batches, for the progress bar.
        mean: of the model's inputs per channel, for images in 0..1.
        std: their spread.
        device: where to compute.
        size: the side that images are resized to; None leaves them as they are.
        autocast: bfloat16 or float16 for mixed precision; None computes in the model's own.
        progress: show a progress bar.
        read: what to read of the model for images [B, 3, S, S], as [E, B, D]; by default its pooled features.

    Yields:
        The positions, int64 [B], and their features, float32 [E, B, D] on the CPU.

    Raises:
        RuntimeError: if the model moved its buffers.
    """
    device = torch.device(device)
    modes = [(module, module.training) for module in model.modules()]
    before = [buffer.clone() for buffer in model.buffers()]
    model.eval()
    try:
        with tqdm(total=count, desc="features", unit="img", disable=not progress) as bar:
            for index, stored in batches:
                # Only this part is in inference mode: a tensor allocated there could not take part in training later.
                with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    images = to_float(stored.to(device, non_blocking=True))
                    images = normalise(resize(images, size or images.shape[-1]), mean, std)
                    pooled = (read or _pooled)(model, images).float().cpu()
                yield index, pooled
                bar.update(len(index))
    finally:
        for module, training in modes:
            module.training = training
    if not all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True)):
        raise RuntimeError("the network changed its buffers while features were read: the features cannot be trusted")


def stack_features(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Puts the features of batches in their places.

    Args:
        batches: of `pooled_batches`, each position in 0..count-1 once.
        count: N, the number of images.

    Returns:
        float32 [E, N, D].

    Raises:
        ValueError: if a position is missing.
    """
    features: Tensor | None = None
    seen = torch.zeros(count, dtype=torch.bool)
    for index, pooled in batches:
        if features is None:
            features = torch.empty(pooled.shape[0], count, pooled.shape[2])
        features[:, index] = pooled
        seen[index] = True
    if features is None or not seen.all():
        raise ValueError(f"the batches hold {int(seen.sum())} of {count} images")
    return features


def extract_features(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, count: int, **settings: Any
) -> Tensor:
    """All features of `pooled_batches` in one tensor, float32 [E, N, D]; see there and `stack_features`."""
    return stack_features(pooled_batches(model, batches, count=count, **settings), count)


def _pooled(model: Any, images: Tensor) -> Tensor:
    """[E, B, D] of all exits where the network has all of them, else [1, B, D] of its own output."""
    if getattr(model, "output", None) == "ensemble":
        return torch.stack(model.forward_exits(images).features)
    pooled: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return pooled.unsqueeze(0)


def exit_logits(model: Any, images: Tensor) -> Tensor:
    """The logits [E, B, C] of all exits where the network has all of them, else [1, B, C] of its own output."""
    if getattr(model, "output", None) == "ensemble":
        return torch.stack(model.forward_exits(images).logits)
    logits: Tensor = model(images)
    return logits.unsqueeze(0)


def accuracies(logits: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Accuracy in percent of every exit, and of the mean of their softmax outputs.

    Args:
        logits: float32 [E, N, C].
        labels: int64 [N].
    """
    exits = (logits.argmax(2) == labels).double().mean(1) * 100
    ensemble = (logits.softmax(2).mean(0).argmax(1) == labels).double().mean() * 100
    return exits.tolist(), float(ensemble)


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
    *,
    epochs: int = 30,
    lr: float = 1e-2,
    weight_decay: float = 0.05,
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
        epochs: passes over the training split.
        lr: the first learning rate.
        weight_decay: AdamW's, on the weights of the standardised features, not on the biases.
        seed: for the order of samples.
        progress: show a progress bar.

    Raises:
        UserError: if a class has no training row or a label is outside of 0..C-1.
    """
    check_labels(train_y, test_y, num_classes)
    exits, n, dim = train_x.shape
    device = train_x.device
    train_y, test_x, test_y = train_y.to(device), test_x.to(device), test_y.to(device)
    std, mean = torch.std_mean(train_x, dim=1, keepdim=True, correction=0)
    # A ReLU's dead dimension has no spread: it is left at zero rather than divided by it.
    scale = torch.where(std > 1e-6, 1 / std, 0.0)

    weights = torch.zeros(exits, dim, num_classes, device=device, requires_grad=True)
    biases = torch.zeros(exits, 1, num_classes, device=device, requires_grad=True)
    groups = [{"params": [weights], "weight_decay": weight_decay}, {"params": [biases], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * math.ceil(n / _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc="probe", unit="epoch", disable=not progress):
        for index in torch.randperm(n, generator=generator).to(device).split(_BATCH):
            # Standardised batch by batch: a standardised copy of all features may not fit.
            batch = train_x.index_select(1, index).sub_(mean).mul_(scale)
            logits = torch.baddbmm(biases, batch, weights)
            targets = train_y[index].expand(exits, -1)
            # The sum over exits of each exit's mean, so that an exit's gradient does not depend on how many there are.
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * exits
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()

    with torch.no_grad():
        folded = weights * scale.mT
        probe_biases = (biases - torch.bmm(mean, folded)).squeeze(1)
        probe = Probe(folded.mT.contiguous(), probe_biases, [], 0.0)
        hits = torch.zeros(exits + 1, device=device)
        for start in range(0, len(test_y), _BATCH):
            logits = probe.logits(test_x[:, start : start + _BATCH])
            answers = torch.cat([logits.argmax(2), logits.softmax(2).mean(0, keepdim=True).argmax(2)])
            hits += (answers == test_y[start : start + _BATCH]).sum(1)
    *per_exit, ensemble = (100 * hits.double() / len(test_y)).tolist()
    return Probe(probe.weights, probe.biases, per_exit, ensemble)


def knn(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Accuracy in percent of the weighted k-nearest-neighbour classifier of Wu et al. (2018, equation 10 on).

    Each of the k training samples of greatest cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        train_x: float32 [N, D], not necessarily normalised; computes on its device.
        train_y: int64 [N] in 0..num_classes-1.
        test_x: float32 [M, D].
        test_y: int64 [M].
        num_classes: C.
        k: neighbours, 1..N.
        temperature: > 0.

    Raises:
        UserError: if k is not in 1..N, a class has no training row, or a label is outside of 0..C-1.
    """
    check_labels(train_y, test_y, num_classes)
    if not 1 <= k <= len(train_y):
        raise UserError(f"kNN with k = {k} needs 1 <= k <= the {len(train_y)} training images; give another k")
    device = train_x.device
    train_y, test_y = train_y.to(device), test_y.to(device)
    bank = F.normalize(train_x, dim=1)
    hits = 0
    for start in range(0, len(test_y), _BATCH):
        queries = F.normalize(test_x[start : start + _BATCH].to(device), dim=1)
        similarity, neighbours = (queries @ bank.T).topk(k, dim=1, sorted=False)
        # Cosines are at most 1: subtracting 1 first keeps exp within range at any temperature and changes no answer.
        votes = queries.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, train_y[neighbours], ((similarity - 1) / temperature).exp())
        hits += int((votes.argmax(1) == test_y[start : start + _BATCH]).sum())
    return 100 * hits / len(test_y)


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
