"""Features in groups, and the pseudo labels of their clusters."""

from types import SimpleNamespace

import numpy as np

from sssd_zoo.configs import ClusterConfig
from sssd_zoo.labels.pseudo_labels import PseudoLabels


def blobs(n=600, d=16, groups=6, seed=0):
    """Well separated groups: features [n, d] and the group of each row."""
    random = np.random.default_rng(seed)
    group = random.integers(groups, size=n)
    centres = 10 * random.standard_normal((groups, d))
    return (centres[group] + random.standard_normal((n, d))).astype(np.float32), group


def pseudo_labels(clustering, rows, truth=None, near=None, *, model="resnet18", **of_data):
    """The pseudo labels of a clustering of these rows; `of_data` are other names than those of the photos."""
    of_data = {"name": "photos", "split": "train", "fingerprint": "abc", "paths": lambda: [None] * len(rows), **of_data}
    data = SimpleNamespace(rows=rows, labels=truth, **of_data)
    config = ClusterConfig(k=len(clustering.centroids), redos=3)
    return PseudoLabels.from_clustering(clustering, data, config, model=model, seed=0, near=near)
