"""Measuring frozen networks: features of every exit, linear probes and nearest neighbours."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sssd_zoo.configs import DataConfig, ForwardConfig, KNNConfig, ProbeConfig
from sssd_zoo.data.columns import take_split
from sssd_zoo.data.layout import composed
from sssd_zoo.data.loading import ImageData, fits_on_gpu, load_images, other_split
from sssd_zoo.data.several import open_data
from sssd_zoo.data.sources import Splits
from sssd_zoo.data.streaming import StreamingImages
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import compute_device
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.evaluation.features import check_finite, network_features
from sssd_zoo.evaluation.knn import knn as knn_accuracy
from sssd_zoo.evaluation.probe import Probe, check_labels, linear_probe
from sssd_zoo.models import MultiExit, classifiers


@dataclass(frozen=True)
class Evaluation:
    """What probes are trained and measured on.

    Attributes:
        train: the labelled images of the probes.
        train_positions: int64, which of them.
        test: the images that are measured.
        test_positions: int64, which of them.
        words: where the test images come from, for people.

    Raises:
        UserError: if a class has no image to train on.
    """

    train: ImageData
    train_positions: Tensor
    test: ImageData
    test_positions: Tensor
    words: str

    def __post_init__(self) -> None:
        """Checks the labels here, before a day of training, which the probes would do after it."""
        names = self.train.class_names or []
        check_labels(self.train_labels, self.test_labels, len(names), names)

    @property
    def train_labels(self) -> Tensor:
        """Int64 [N], of the images that probes are trained on."""
        assert self.train.labels is not None
        return torch.from_numpy(self.train.labels)[self.train_positions]

    @property
    def test_labels(self) -> Tensor:
        """Int64 [M], of the images that are measured."""
        assert self.test.labels is not None
        return torch.from_numpy(self.test.labels)[self.test_positions]

    def describe(self) -> str:
        """How many test images, and where they come from."""
        return f"{len(self.test_positions)} images, {self.words}"

    def digest(self) -> str:
        """A short fingerprint of the true labels, the names of their classes, and which images are measured."""
        parts = (self.train_positions, self.train_labels, self.test_positions, self.test_labels)
        digest = hashlib.sha256(json.dumps(self.train.class_names).encode())
        for tensor in parts:
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def evaluation_data(
    data: ImageData,
    config: DataConfig,
    *,
    test_split: str | None,
    holdout: float,
    seed: int,
    advice: str = "add images, or give --unlabelled if these are no classes (but dates or cameras, say)",
) -> Evaluation:
    """The split to measure on: the one asked for, else 'test' or 'validation', else images held out by class.

    Args:
        data: the images to train on, with labels.
        config: how they were read; the others are read likewise.
        test_split: the split asked for.
        holdout: fraction of the images held out where there is no such split.
        seed: of the draw.
        advice: what to do where a class has too few images to hold some out, for the error.

    Raises:
        UserError: without labels, if the splits have different classes or share rows, or if a class has no image to
            train on.
    """
    assert data.labels is not None  # callers look
    splits = open_data(config, progress=rank() == 0)
    names = [name for name in splits if name != data.split.split("[")[0]]
    candidates = [test_split] if test_split else [name for name in ("test", "validation") if name in names]
    for name in candidates:
        refuse_shared_rows(splits, data, name)
        test = load_images(other_split(config, data, name), progress=rank() == 0)
        if test.labels is None:
            if test_split:
                raise UserError(f"split {name} of {data.name} has no labels to measure with: give another --test_split")
            continue
        if test.class_names != data.class_names:
            different = sorted(set(test.class_names or []) ^ set(data.class_names or []))
            raise UserError(
                f"the splits {data.split} and {name} of {data.name} have different classes ({listed(different)} in one "
                "of them only); give another --test_split"
            )
        return Evaluation(data, torch.arange(len(data)), test, torch.arange(len(test)), f"split {name}")
    kept, held_out = hold_out(data, holdout, seed, purpose="measure on", advice=advice)
    words = f"a part of split {data.split} held out from the probes only (the network may have been trained on it)"
    return Evaluation(data, kept, data, held_out, words)


def refuse_shared_rows(splits: Splits, data: ImageData, test_split: str) -> None:
    """Raises `UserError` if a split to measure on has images of `data`, which are trained or calibrated on."""
    if shared := shared_rows(splits, data.split, test_split, data.name):
        raise UserError(
            f"{shared} images of the split {test_split} of {data.name} are in {data.split} too, which is trained on: "
            "give a --test_split without them"
        )


def shared_rows(splits: Splits, one: str | None, other: str | None, name: str) -> int:
    """How many rows two of the data's splits share: 'train[:400]' and 'train[200:600]' share 200.

    Args:
        splits: all splits.
        one: a split or a slice of one, as for `take_split`.
        other: the same.
        name: name of the data, for messages.
    """
    from datasets import Dataset

    numbers = {split: Dataset.from_dict({"row": np.arange(len(rows))}) for split, rows in splits.items()}

    def of(selection: str | None) -> tuple[str, NDArray[np.int64]]:
        taken, split = take_split(numbers, selection, name)
        return split.split("[")[0], taken[split].with_format("numpy")[:]["row"]

    (split, rows), (other_split, others) = of(one), of(other)
    return len(np.intersect1d(rows, others)) if split == other_split else 0


def hold_out(data: ImageData, fraction: float, seed: int, *, purpose: str, advice: str) -> tuple[Tensor, Tensor]:
    """Draws a fraction of the images of every class, or of all images where there are no labels.

    Args:
        data: the images.
        fraction: of the images, in 0..1.
        seed: of the draw.
        purpose: what they are drawn for, for the error.
        advice: what to do where it is not possible, for the error.

    Returns:
        The positions that stay and those drawn, int64, each in order.

    Raises:
        UserError: if a class has too few images.
    """
    from sklearn.model_selection import train_test_split

    try:
        kept, drawn = train_test_split(
            np.arange(len(data)), test_size=fraction, stratify=data.labels, random_state=seed % 2**32
        )
    except ValueError as error:
        if data.labels is None:
            raise UserError(f"cannot hold images of {data.name} out to {purpose}: {error}; {advice}") from error
        counts = np.bincount(data.labels)
        single = [data.class_names[number] for number in np.flatnonzero(counts == 1)] if data.class_names else []
        reason = f"{len(single)} of them have one image only ({listed(single)})" if single else str(error)
        raise UserError(
            f"cannot hold images of each of the {len(counts)} classes of {data.name} out to {purpose}: {reason}; "
            f"{advice}"
        ) from error
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(drawn))


@dataclass(frozen=True)
class Features:
    """Features of an evaluation's images, and their labels.

    Attributes:
        train_x: float32 [exits, N, D].
        train_y: int64 [N].
        test_x: float32 [exits, M, D].
        test_y: int64 [M].
        classes: number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def evaluation_features(model: Any, evaluation: Evaluation, config: ForwardConfig) -> Features:
    """Runs a network over an evaluation's images; its features lie on the GPU where there is one and they fit.

    Raises:
        UserError: if a feature is not finite.
    """
    train, test = evaluation.train, evaluation.test
    assert train.class_names is not None
    train_x = network_features(model, train, config)
    test_x = train_x if test is train else network_features(model, test, config)
    train_x, test_x = train_x[:, evaluation.train_positions], test_x[:, evaluation.test_positions]
    for features in (train_x, test_x):
        check_finite(features)
    device = compute_device(config.device)
    if fits_on_gpu(train_x, device):
        train_x, test_x = train_x.to(device), test_x.to(device)
    return Features(
        train_x,
        evaluation.train_labels,
        test_x,
        evaluation.test_labels,
        len(train.class_names),
    )


def probe_features(features: Features, config: ProbeConfig, seed: int) -> Probe:
    """Linear probes on every exit's features."""
    return linear_probe(
        features.train_x,
        features.train_y,
        features.test_x,
        features.test_y,
        features.classes,
        config,
        seed=seed,
        progress=rank() == 0,
    )


def record_reading(network: Any, data: ImageData | StreamingImages) -> None:
    """Notes on a network with exits, which config.json keeps, the size and the bits that its images were stored at."""
    if isinstance(network, MultiExit):
        network.storage_size = data.size
        network.bits = None if data.pixels is None else data.pixels.bits


def put_heads(model: Any, probe: Probe, data: ImageData) -> None:
    """Makes the probes, measured on images that are read as these, the network's classifiers."""
    record_reading(model, data)
    classes = probe.weights.shape[1]
    model.reset_classifier(classes)
    with torch.no_grad():
        for head, weight, bias in zip(classifiers(model), probe.weights, probe.biases, strict=True):
            head.weight.copy_(weight)
            head.bias.copy_(bias)


def knn_features(features: Features, config: KNNConfig) -> list[float]:
    """Weighted kNN accuracy of every exit's features, percent."""
    return [
        knn_accuracy(
            train,
            features.train_y,
            test,
            features.test_y,
            num_classes=features.classes,
            neighbours=config.neighbours,
            temperature=config.temperature,
        )
        for train, test in zip(features.train_x, features.test_x, strict=True)
    ]


def check_classes(data: ImageData, model: Any, name: str) -> None:
    """Refuses labelled images of other classes than a network's.

    Raises:
        UserError: naming both.
    """
    assert data.class_names is not None  # callers look
    known = [composed(name) for name in model.pretrained_cfg.get("label_names") or data.class_names]
    if len(data.class_names) != model.num_classes or known != data.class_names:
        raise UserError(
            f"the {len(data.class_names)} classes of {data.name} ({data.split}) are not the {model.num_classes} of "
            f"'{name}': give the data that its classifiers were trained for, or --unlabelled to leave the labels aside"
        )
