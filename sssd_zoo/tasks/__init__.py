"""One file per method: a module from a batch to its loss. Tasks know no files, no optimisers and no data sets."""

from sssd_zoo.tasks.base import Task
from sssd_zoo.tasks.moco import MoCo
from sssd_zoo.tasks.sssd import SelfDistillation

__all__ = ["MoCo", "SelfDistillation", "Task"]
