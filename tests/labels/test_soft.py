"""Soft pseudo labels: shares by distance against a slow version, the artefact that keeps them, and the command."""

import json
import math

import numpy as np
import pytest
import torch

from helpers.commands import TINY, one_line, sssd
from helpers.labels import blobs, pseudo_labels
from sssd_zoo.errors import UserError
from sssd_zoo.labels.kmeans import kmeans
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.labels.soft import SoftLabels, nearest_centroids


def labels_of(features, k=6, near=4):
    clustering = kmeans(features, k, seed=0)
    nearest = nearest_centroids([features[:33], features[33:]], clustering.centroids, near) if near else None
    return pseudo_labels(clustering, np.arange(len(features)) * 2, near=nearest)  # every other image was corrupt


def test_shares_against_a_slow_version(tmp_path):
    features, _ = blobs(n=100)
    features /= 20  # the clusters overlap
    labels_of(features).save(tmp_path / "labels")
    labels = PseudoLabels.load(tmp_path / "labels")
    soft = SoftLabels(labels, labels.rows[::-1].copy(), 0.7)
    positions = torch.tensor([0, 99, 42])
    found = soft[positions]
    scale = np.mean([np.sum((x - labels.centroids[k]) ** 2) for x, k in zip(features, labels.labels, strict=True)])
    for row, position in zip(found, positions.tolist(), strict=True):
        image = features[99 - position]
        distances = [float(np.sum((image - centroid) ** 2)) for centroid in labels.centroids]
        nearest = sorted(range(6), key=distances.__getitem__)[:4]
        weights = {k: math.exp(-distances[k] / (0.7 * scale)) for k in nearest}
        expected = [weights.get(k, 0) / sum(weights.values()) for k in range(6)]
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-4)
        assert row.argmax() == labels.labels[99 - position]


def test_toward_no_temperature_they_are_hard():
    features, _ = blobs(n=100)
    labels = labels_of(features)
    everything = SoftLabels(labels, labels.rows, 1e-5)[torch.arange(100)]
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels.labels), 6).float()
    torch.testing.assert_close(everything, one_hot)


def test_more_nearest_than_clusters():
    features, _ = blobs(n=100)
    labels = labels_of(features, near=50)
    assert labels.near.shape == labels.near_distances.shape == (100, 6)
    np.testing.assert_array_equal(labels.near[:, 0], labels.labels)


def test_mistakes():
    features, _ = blobs(n=100)
    with pytest.raises(UserError, match="hard only"):
        SoftLabels(labels_of(features, near=0), np.array([0]), 1.0)
    with pytest.raises(UserError, match="must be over 0"):
        SoftLabels(labels_of(features), np.array([0]), 0.0)


@pytest.mark.long
def test_the_commands(folder_of_images, tmp_path, capsys):
    """`fit`, and the same by `pseudo-label` and `distill`: in memory and from disk, hard and soft."""
    out = tmp_path / "run"
    words = ["fit", "--data", folder_of_images, "--out", out, *TINY, "--baseline", "false"]
    assert sssd(*words, "--cluster.nearest", "3", "--soft", "0.2") == 0
    assert "soft, temperature 0.2" in (out / "report.md").read_text()
    ours = PseudoLabels.load(out / "labels")
    assert ours.near.shape == (48, 3)
    labels = ["pseudo-label", "--data", folder_of_images, "--model", out / "pretrain", "--k", "4", "--device", "cpu"]
    assert sssd(*labels, "--nearest", "3", "--on_disk", "true", "--out", tmp_path / "labels") == 0
    theirs = PseudoLabels.load(tmp_path / "labels")
    np.testing.assert_array_equal(ours.near, theirs.near)
    np.testing.assert_allclose(ours.near_distances, theirs.near_distances, atol=1e-5)

    distill = ["distill", "--data", folder_of_images, "--labels", tmp_path / "labels", "--model", "sssd_resnet18"]
    distill += ["--image_size", "32", "--epochs", "1", "--batch_size", "16", "--device", "cpu"]
    losses = {}
    for name, more in (("soft", ["--soft", "0.2"]), ("hard", [])):
        assert sssd(*distill, *more, "--out", tmp_path / name) == 0
        losses[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert losses["soft"]["ce_teacher"] != losses["hard"]["ce_teacher"]
    capsys.readouterr()
    assert sssd(*distill, "--soft", "0.3", "--out", tmp_path / "soft", "--resume") == 2
    assert "labels" in one_line(capsys), "a resume with other labels"
    assert sssd(*distill[:3], "--labels", "true", *distill[5:], "--soft", "0.2", "--out", tmp_path / "x") == 2
    assert "--soft applies to pseudo labels" in one_line(capsys)
