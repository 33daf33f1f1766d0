"""ClusterFit: a plain network trained from scratch on pseudo labels (Yan et al., CVPR 2020, arXiv:1912.03330)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.tasks.base import LabelTask, top1


class ClusterFit(LabelTask):
    """Cross-entropy of one classifier on the clusters of another network's features.

    The protocol of ClusterFit's section 3: features of a pretrained network are clustered by k-means, and a new network
    learns the cluster of each image from scratch; the pretrained one takes no part in it. In table 2 of the SSSD paper
    that new network is a ResNet-18: what is left of SSSD without exits.
    """

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `fit`."""
        logits = self.model(batch["images"])
        return self.fit(logits, self.labels_of(batch, logits.shape[1]))

    def fit(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy, and the fraction of images whose label is the first answer."""
        return {"loss": F.cross_entropy(logits.float(), labels), "label_top1": top1(logits, labels)}
