"""SimSiam (Chen and He, CVPR 2021) as a task of this package: `python docs/examples/add_method.py OUT` trains it."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import DataConfig, OptimConfig, RuntimeConfig
from sssd_zoo.data.augment import BatchRandom, contrastive_view, normalise
from sssd_zoo.data.inputs import InputSpec, input_spec
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import load_images
from sssd_zoo.models.networks import new_trunk
from sssd_zoo.tasks import Task
from sssd_zoo.training.runs import RunSpec, run_training


class SimSiam(Task):
    """Each view predicts the embedding of the other; without the `detach` all embeddings would become equal."""

    def __init__(self, trunk: nn.Module, spec: InputSpec, dim: int = 256) -> None:
        super().__init__(spec)
        self.trunk = trunk
        self.projector = nn.Sequential(nn.Linear(trunk.num_features, dim, bias=False), nn.BatchNorm1d(dim))
        self.predictor = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim))

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """Two views, float32 [B, 3, size, size] each."""
        views = [contrastive_view(images, random, self.size) for _ in range(2)]
        return {"views": [normalise(view, self.mean, self.std) for view in views]}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The negative cosine, and for the log the std of the embeddings, which is 0 once they are all equal."""
        first, second = (self.projector(self.trunk(view)).float() for view in batch["views"])
        pairs = [(first, second), (second, first)]
        cosines = [F.cosine_similarity(self.predictor(view), other.detach()).mean() for view, other in pairs]
        return {"loss": -torch.stack(cosines).mean(), "std": F.normalize(first.detach()).std(0).mean()}


def main(out: str) -> dict[str, float]:
    """A few steps on the bundled sample; OUT is a network for `local-dir:OUT`. Run again, it resumes."""
    data = load_images(DataConfig(data="cifar10-sample", split="train[:256]", unlabelled=True), progress=False)
    optim, runtime = OptimConfig(epochs=2, batch_size=64, lr=0.05), RuntimeConfig(log_every=1, device="cpu")
    run = RunSpec(arch="sssd_resnet18", size=data.size, out=Path(out), title="SimSiam")
    torch.manual_seed(runtime.seed)
    trunk = new_trunk(run.arch)
    task = SimSiam(trunk, input_spec(trunk, run.size))
    loader = EpochLoader(data, optim.batch_size, runtime.seed)
    return run_training(task, loader, trunk, run, optim=optim, runtime=runtime, settings={"method": "simsiam"})


if __name__ == "__main__":
    print(main(sys.argv[1]))
