"""Features and logits of a frozen network's exits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sssd_zoo.configs import ForwardConfig
from sssd_zoo.data.augment import normalise, resize, to_float
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import DTYPES, compute_device, resolve_precision
from sssd_zoo.models.networks import statistics


def feature_batches(
    model: Any,
    data: ImageData,
    config: ForwardConfig,
    order: Sequence[Tensor],
    read: Callable[[Any, Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `pooled_batches` reads of a network, batch by batch; `order` has positions, int64 [B]."""
    mean, std, size = statistics(model)
    device = compute_device(config.device)
    data.move(device)
    return pooled_batches(
        model.to(device, memory_format=torch.channels_last),
        data.batches(order),
        count=sum(map(len, order)),
        mean=mean,
        std=std,
        device=device,
        size=size,
        autocast=DTYPES[resolve_precision(config.precision, config.device)],
        progress=rank() == 0,
        read=read,
    )


class Float32Classifier(nn.Module):
    """A classifier that computes in float32 under autocast, too: so it was trained and measured, as a probe.

    Args:
        linear: the classifier.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features [B, D] of any floating type to logits, float32 [B, num_classes]."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.linear(features.float())
        return logits


def float32_classifiers(model: Any) -> Any:
    """Makes a network's classifiers compute in float32 under autocast, too, and returns it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("fc"):
            model.set_submodule(name, Float32Classifier(module))
    return model


def network_features(
    model: Any, data: ImageData, config: ForwardConfig, *, read: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """Pooled features of every exit for all images in order, float32 [exits, N, D], without moving the network.

    Args:
        model: the network.
        data: the images.
        config: how to run it.
        read: what to read instead, see `pooled_batches`.
    """
    order = torch.arange(len(data)).split(config.batch_size)
    return stack_features(feature_batches(model, data, config, order, read), len(data))


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
