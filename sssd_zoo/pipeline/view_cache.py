"""Runs an encoder once over a few views of every image, for `sssd_zoo.data.views`."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sssd_zoo.configs import AnchoredConfig, AugmentConfig, ForwardConfig
from sssd_zoo.data.augment import BatchRandom, draw_views, supervised_view
from sssd_zoo.data.inputs import input_spec
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.views import FEATURES, RECORD, VIEWS
from sssd_zoo.distributed import barrier, on_main, print_main, rank
from sssd_zoo.distributed.hardware import compute_device, resolve_precision
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import features_with_map, run_network
from sssd_zoo.files import disk_errors, read_json, write_json
from sssd_zoo.labels.feature_file import shard, write_features
from sssd_zoo.models.maps import MapShape
from sssd_zoo.models.networks import weights_digest

BATCH = 64  # images per forward pass on a CPU: at 128 px, 1.5 times as fast as 256, whose activations leave its caches


def write_view_cache(
    folder: Path,
    network: Any,
    data: ImageData,
    config: AnchoredConfig,
    forward: ForwardConfig,
    seed: int,
    map_shape: MapShape | None = None,
) -> None:
    """Draws `config.cached_views` views of every image, and writes them and the network's features of them.

    Every process calls it and computes a part. What a killed run wrote of the same views is taken as it is.

    Args:
        folder: to write.
        network: the encoder, with `num_classes=0`.
        data: the images.
        config: how many views, and of what kind.
        forward: how to run the network.
        seed: of the views.
        map_shape: of the network's feature map that is kept with its features, if any.

    Raises:
        UserError: if the disk is full, or a feature is not finite or too large for float16.
    """
    spec = input_spec(network)
    record = cache_record(network, data, config, forward, seed, map_shape)
    path = folder / RECORD
    if on_main(lambda: path.exists() and read_json(path) == record):
        return
    on_main(lambda: path.unlink(missing_ok=True))  # what follows is of these views only once all of it is written
    kind: dict[str, Any] = {"crop": config.crop, "scale": config.crop_scale}
    kind["augment"] = config.augment.resolved(contrastive=False, channels=data.channels)
    views = torch.stack(
        [draw_views(BatchRandom(seed, number), len(data), data.size, **kind) for number in range(config.cached_views)]
    )
    print_main(f"computing the encoder's features of {config.cached_views} views of every image: {folder}")

    batch = min(forward.batch_size, BATCH) if compute_device(forward.device).type == "cpu" else forward.batch_size

    def view_batches() -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the file, and the views they are of, for this process."""
        for number in range(config.cached_views):
            order = shard(torch.arange(len(data)).split(batch))
            for positions, images in data.batches(order):
                seen = supervised_view(images, views[number, positions], spec.size, crop=config.crop)
                # In integers, as `read_batches` takes all images.
                deep = images.dtype == torch.uint16
                seen = (seen * 65535).round().to(torch.uint16) if deep else (seen * 255).round().byte()
                yield number * len(data) + positions, seen

    data.move(compute_device(forward.device))
    total = config.cached_views * len(data) if rank() == 0 else None
    read = run_network(network, view_batches(), forward, total=total, read=features_with_map(map_shape))
    features = ((positions, in_float16(values)) for positions, values in read)
    write_features(folder / FEATURES, config.cached_views * len(data), features, dtype=np.float16, unit=False)
    if rank() == 0:
        with disk_errors(folder):
            np.save(folder / VIEWS, views.numpy())
        write_json(path, record)
    barrier()


def cache_record(
    network: Any,
    data: ImageData,
    config: AnchoredConfig,
    forward: ForwardConfig,
    seed: int,
    map_shape: MapShape | None,
) -> dict[str, Any]:
    """What decides the views and their features, for views.json: a cache of another record is made again.

    See `write_view_cache` for the arguments.
    """
    record = {
        "encoder": weights_digest(network),
        "size": input_spec(network).size,
        "precision": resolve_precision(forward.precision, forward.device),
        "data": data.fingerprint,
        "images": len(data),
        "storage_size": data.size,
        "views": config.cached_views,
        "crop": config.crop,
        "crop_scale": list(config.crop_scale),
        "seed": seed,
    }
    if map_shape is not None:
        record["map_side"] = map_shape.side
    if config.augment != AugmentConfig():
        record["augment"] = asdict(config.augment)
    return record


def in_float16(features: Tensor) -> Tensor:
    """The features as they are stored, float16 of the same shape.

    Args:
        features: of an encoder, float32 of any shape.

    Raises:
        UserError: if one of them is not finite, or too large for float16.
    """
    stored = features.half()
    if not stored.isfinite().all():
        largest = features.abs().max().item()
        if not math.isfinite(largest):
            raise UserError("the encoder's features hold NaN or infinity: give --precision fp32, or check its weights")
        raise UserError(
            f"the encoder's features reach {largest:.3g}, and cached views hold at most 65504 (float16): give "
            "--distill.cached_views 0 (sssd distill: --cached_views 0)"
        )
    return stored
