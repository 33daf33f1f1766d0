"""Features and logits of a frozen network's exits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sssd_zoo.configs import ForwardConfig
from sssd_zoo.configs.ranges import LARGEST_COUNT
from sssd_zoo.data.inputs import InputSpec, input_spec, network_input
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import autocast_dtype, compute_device
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.models import classifier_names
from sssd_zoo.models.maps import MapShape, features_and_map

T = TypeVar("T")


def pooled_features(model: Any, images: Tensor) -> Tensor:
    """Pooled features [E, B, D] of all exits where the network has all of them, else [1, B, D] of its own output."""
    if getattr(model, "output", None) == "ensemble":
        return torch.stack(model.forward_exits(images).features)
    pooled: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return pooled.unsqueeze(0)


def features_with_map(shape: MapShape | None) -> Callable[[Any, Tensor], Tensor]:
    """For `read_batches`: the pooled features [1, B, D], and with a `shape` the feature map behind them."""
    side = 0 if shape is None else shape.side
    return lambda model, images: features_and_map(model, images, side).unsqueeze(0)


def exit_logits(model: Any, images: Tensor) -> Tensor:
    """The logits [E, B, C] of all exits where the network has all of them, else [1, B, C] of its own output."""
    if getattr(model, "output", None) == "ensemble":
        return torch.stack(model.forward_exits(images).logits)
    logits: Tensor = model(images)
    return logits.unsqueeze(0)


def feature_batches(
    model: Any,
    data: ImageData,
    config: ForwardConfig,
    order: Sequence[Tensor],
    read: Callable[[Any, Tensor], Tensor] = pooled_features,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`run_network` on images of a data set, which are brought to the device where they are in memory.

    Args:
        model: the network.
        data: the images.
        config: how to run it.
        order: the positions of each batch, int64 [B].
        read: what to read, see `read_batches`.
    """
    data.move(compute_device(config.device))
    total = sum(map(len, order)) if rank() == 0 else None
    return run_network(model, data.batches(order), config, total=total, read=read)


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
    modules = dict(model.named_modules())
    for name in classifier_names(model):
        if isinstance(modules.get(name), nn.Linear):
            model.set_submodule(name, Float32Classifier(modules[name]))
    return model


def network_features(
    model: Any, data: ImageData, config: ForwardConfig, *, read: Callable[[Any, Tensor], Tensor] = pooled_features
) -> Tensor:
    """What `read` gives of every exit for all images in order, float32 [exits, N, D]; by default the pooled features.

    Args:
        model: the network.
        data: the images.
        config: how to run it.
        read: what to read, see `read_batches`.
    """
    order = torch.arange(len(data)).split(config.batch_size)
    return stack_features(feature_batches(model, data, config, order, read), len(data))


def run_network(
    network: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: ForwardConfig,
    *,
    spec: InputSpec | None = None,
    total: int | None = None,
    read: Callable[[Any, Tensor], Tensor] = pooled_features,
    ahead: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`read_batches` with the network brought to the device and run as `config` says.

    Args:
        network: any timm network, or one of this package.
        batches: see `read_batches`; `config.batch_size` has no part in them.
        config: the device and the precision.
        spec: of the network's inputs, where they are not its own.
        total: see `read_batches`.
        read: see `read_batches`.
        ahead: see `read_batches`.

    Returns:
        What `read_batches` yields.
    """
    return read_batches(
        network.to(compute_device(config.device), memory_format=torch.channels_last),
        batches,
        spec or input_spec(network),
        total=total,
        autocast=autocast_dtype(config.precision, config.device),
        read=read,
        ahead=ahead,
    )


def read_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    spec: InputSpec,
    *,
    total: int | None = None,
    autocast: torch.dtype | None = None,
    read: Callable[[Any, Tensor], Tensor] = pooled_features,
    ahead: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs a network where it lies over images, without augmentation, and gives what `read` reads of it.

    The network is put into eval mode for it and back into what it was, module by module; that no buffer (BatchNorm's
    statistics above all) changed is checked at the end. Batches that do not fit into a GPU's memory are run in parts.

    Args:
        model: any timm network, or one of this package.
        batches: pairs of positions, int64 [B], and images, uint8 or uint16 [B, C, S, S].
        spec: of the network's inputs.
        total: images in all batches, for a progress bar; None shows none.
        autocast: bfloat16 or float16 for mixed precision; None computes in the network's own.
        read: of the network and its inputs [B, C, size, size] makes [E, B, D], for E exits.
        ahead: read and prepare each batch in a thread while the network runs on the one before it.

    Yields:
        The positions, int64 [B], and what was read, float32 [E, B, D] on the CPU.

    Raises:
        RuntimeError: if the network changed its buffers.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    before = [buffer.clone() for buffer in model.buffers()]
    model.eval()
    most = LARGEST_COUNT
    try:
        inputs = network_inputs(batches, spec, device)
        with progress_bar(total, "features", "img", disable=total is None) as bar:
            for index, images in one_ahead(inputs) if ahead else inputs:
                # Only this part is in inference mode: a tensor allocated there could not take part in training later.
                with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    values, most = _in_parts(partial(read, model), images, most)
                yield index, values
                bar.update(len(index))
    finally:
        for module, training in modes:
            module.training = training
    if not all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True)):
        raise RuntimeError("the network changed its buffers while features were read: the features cannot be trusted")


def _in_parts(read: Callable[[Tensor], Tensor], images: Tensor, most: int) -> tuple[Tensor, int]:
    """What `read` gives, on the CPU, of parts of at most so many images; and how many of them fit into the memory."""
    while True:
        try:
            return torch.cat([read(part).float().cpu() for part in images.split(most)], dim=1), most
        except torch.OutOfMemoryError:
            most = min(most, len(images)) // 2
            if most == 0:
                raise
        torch.cuda.empty_cache()  # after the handler, whose traceback holds the tensors


def network_inputs(
    batches: Iterable[tuple[Tensor, Tensor]], spec: InputSpec, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions and stored images, uint8 or uint16 [B, C, S, S], to positions and the network's inputs on its device.

    Args:
        batches: positions, int64 [B], and images.
        spec: of the inputs.
        device: of the network.

    Yields:
        The positions, and inputs, float32 [B, C, size, size].
    """
    for index, stored in batches:
        with torch.inference_mode():
            images = network_input(stored.to(device, non_blocking=True), spec)
        yield index, images


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by a thread while the one before it is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming: Future[Any] = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


def stack_features(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Puts the features of batches in their places.

    Args:
        batches: positions and features, as `read_batches` gives them; each position in 0..count-1 once.
        count: N, the number of images.

    Returns:
        float32 [E, N, D].

    Raises:
        UserError: if a position is missing, as of an image that could be decoded and no longer can.
    """
    features: Tensor | None = None
    seen = torch.zeros(count, dtype=torch.bool)
    for index, pooled in batches:
        if features is None:
            features = torch.empty(pooled.shape[0], count, pooled.shape[2])
        features[:, index] = pooled
        seen[index] = True
    if features is None or not seen.all():
        raise UserError(
            f"{count - int(seen.sum())} of {count} images can no longer be decoded: do not move or change the files "
            "while the command runs; run it again"
        )
    return features


def feature_moments(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the last exit's features, float32 [D] each, without keeping the features.

    Batch by batch, as Chan, Golub and LeVeque (1979) update them: a dimension that never moves has exactly 0.

    Args:
        batches: positions and features, as `read_batches` gives them; two images or more.
    """
    count, mean, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for _, features in batches:
        values = features[-1].double()
        batch_mean, total = values.mean(0), count + len(values)
        shift = batch_mean - mean
        mean = mean + shift * len(values) / total
        squares = squares + (values - batch_mean).square().sum(0) + shift.square() * (count * len(values) / total)
        count = total
    return mean.float(), (squares / (count - 1)).sqrt().float()


class NotFiniteError(UserError):
    """What a network gives holds NaN or infinity."""


def check_finite(features: Tensor) -> None:
    """Raises `NotFiniteError` if features, or logits, of an image hold NaN or infinity; float32 [exits, N, D]."""
    bad = ~features.isfinite().all(2)
    if bad.any():
        number = int(bad.any(1).nonzero()[0]) + 1
        raise NotFiniteError(
            f"what exit {number} of the network gives for {int(bad.any(0).sum())} of {bad.shape[1]} images holds NaN "
            "or infinity: give --precision fp32; if that is no help, train the network again with a lower lr"
        )


def accuracies(logits: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Accuracy in percent of every exit, and of the mean of their softmax outputs.

    Args:
        logits: float32 [E, N, C].
        labels: int64 [N].

    Raises:
        UserError: if a logit is not finite.
    """
    check_finite(logits)
    exits = (logits.argmax(2) == labels).double().mean(1) * 100
    ensemble = (logits.softmax(2).mean(0).argmax(1) == labels).double().mean() * 100
    return exits.tolist(), float(ensemble)
