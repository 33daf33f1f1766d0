"""One file per method: a module from a batch to its loss. Tasks know no files, no optimisers and no data sets."""

from sssd_zoo.tasks.anchored import AnchoredClusterFit, AnchoredSelfDistillation, FrozenEncoder
from sssd_zoo.tasks.base import LabelTask, Task
from sssd_zoo.tasks.clusterfit import ClusterFit
from sssd_zoo.tasks.contrastive import ContrastiveSelfDistillation
from sssd_zoo.tasks.moco import MoCo
from sssd_zoo.tasks.seed import SEED
from sssd_zoo.tasks.sssd import SelfDistillation

__all__ = [
    "SEED",
    "AnchoredClusterFit",
    "AnchoredSelfDistillation",
    "ClusterFit",
    "ContrastiveSelfDistillation",
    "FrozenEncoder",
    "LabelTask",
    "MoCo",
    "SelfDistillation",
    "Task",
]
