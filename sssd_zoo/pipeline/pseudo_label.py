"""`sssd pseudo-label`: k-means on the features of a trained network."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sssd_zoo.configs import ClusterConfig, DataConfig, ForwardConfig, PseudoLabelArgs, RuntimeConfig
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loading import ImageData, fits_in_memory, load_images
from sssd_zoo.distributed import barrier, rank, world_size
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.evaluation.features import feature_batches, network_features
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.labels.chunked_kmeans import CHUNK, kmeans_from_file
from sssd_zoo.labels.feature_file import FeatureFile, remove_features, shard, write_features
from sssd_zoo.labels.kmeans import Clustering, check_clusters, kmeans, normalise
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.labels.soft import Near, nearest_centroids
from sssd_zoo.models import feature_width
from sssd_zoo.models.networks import config_for, load_encoder
from sssd_zoo.training.hardware import make_accelerator


def cluster_images(
    network: Any, data: ImageData, config: ClusterConfig, forward: ForwardConfig, *, model: str, seed: int, out: Path
) -> PseudoLabels | None:
    """k-means on the L2-normalised features of a network's last exit; writes the pseudo labels to `out`.

    Every process calls it. Several share the images and write their features into one file beside `out`, from which the
    main process clusters; it is removed at the end. One process does so where the features do not fit in memory. All
    ways give the same labels.

    Args:
        network: with `num_classes=0`.
        data: the images.
        config: of k-means.
        forward: of the network.
        model: name of the network, for the record.
        seed: of k-means.
        out: folder to write.

    Returns:
        The labels in the main process, None in the others.
    """
    on_disk = wants_disk(network, data) if config.on_disk is None else config.on_disk
    if world_size() == 1 and not on_disk:
        features = normalise(network_features(network, data, forward)[-1].numpy())
        clustering = kmeans(features, config.k, **kmeans_settings(config, seed))
        near = nearest_centroids([features], clustering.centroids, config.nearest) if config.nearest > 1 else None
    else:
        file = out.with_name(f".{out.name}.sssd-features.npy")
        with feature_file(file, network, data, forward):
            if rank() != 0:
                return None
            clustering, near = cluster_file(file, config, seed, on_disk=on_disk)
    labels = PseudoLabels.from_clustering(clustering, data, config, model=model, seed=seed, near=near)
    labels.save(out)
    return labels


def wants_disk(network: Any, data: ImageData) -> bool:
    """Whether the features of all exits that a network answers with would take more than half of the free memory."""
    exits = 4 if getattr(network, "output", "") == "ensemble" else 1
    return not fits_in_memory(4 * len(data) * feature_width(network) * exits)


def kmeans_settings(config: ClusterConfig, seed: int) -> dict[str, Any]:
    """The keyword arguments of `kmeans` and `kmeans_from_file`."""
    return {"seed": seed, "iterations": config.iterations, "redos": config.redos, "progress": True}


@contextmanager
def feature_file(file: Path, network: Any, data: ImageData, forward: ForwardConfig) -> Iterator[None]:
    """Features in a file while the block runs, written by all processes."""
    if rank() == 0:
        remove_features(file)  # of a run killed while it clustered
    try:
        order = shard(torch.arange(len(data)).split(forward.batch_size))
        write_features(file, len(data), feature_batches(network, data, forward, order))
        yield
    finally:
        if rank() == 0:
            remove_features(file)


def cluster_file(file: Path, config: ClusterConfig, seed: int, *, on_disk: bool) -> tuple[Clustering, Near | None]:
    """Clusters the features of a file, there or in memory."""
    cluster = partial(kmeans_from_file, file) if on_disk else partial(kmeans, np.load(file))
    clustering = cluster(config.k, **kmeans_settings(config, seed))
    if config.nearest == 1:
        return clustering, None
    parts = (rows for _, rows in FeatureFile(file).chunks(CHUNK))
    return clustering, nearest_centroids(parts, clustering.centroids, config.nearest)


def pseudo_label(args: PseudoLabelArgs) -> None:
    """`sssd pseudo-label`."""
    tune_cpu()
    make_accelerator(RuntimeConfig(device=args.device))
    out = open_out(args, "labels")
    model = load_encoder(args.model, args.teacher_size)
    data = load_images(
        config_for(args.model, model, DataConfig.of(args)), default_size=storage_default(input_spec(model).size)
    )
    check_clusters(args.k, len(data))
    config, forward = ClusterConfig.of(args), ForwardConfig.of(args)
    labels = cluster_images(model, data, config, forward, model=args.model, seed=args.seed, out=out)
    if labels is not None:
        print(describe_labels(labels, out))
    barrier()


def describe_labels(labels: PseudoLabels, out: Path) -> str:
    """One line about pseudo labels for a person."""
    sizes, quality = labels.meta["sizes"], labels.meta["quality"]
    line = f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} images (K = {labels.meta['k_asked']} asked)"
    if quality:
        line += f", NMI {quality['nmi']:.3f}, purity {quality['purity']:.3f} against the true labels"
    return f"{line}; in {out}"
