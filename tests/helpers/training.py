"""A task and a loader so small that a whole run of the engine takes a part of a second."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sssd_zoo.configs import OptimConfig, RuntimeConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks import Task
from sssd_zoo.training.engine import Trainer


class Regression(Task):
    """Fits a line to the mean brightness: small, with BatchNorm, and with noise in its views."""

    def __init__(self) -> None:
        super().__init__(InputSpec(8, (0.0,) * 3, (1.0,) * 3))
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def views(self, images: Tensor, random: Any) -> dict[str, Any]:
        noise = random.uniform(len(images), 3, 1, 1)
        return {"images": images.float() / 255 + 0.1 * noise, "target": images.float().mean((1, 2, 3)) / 255}

    def before_step(self) -> None:
        self.steps += 1

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        error = (self.net(batch["images"]).squeeze(1) - batch["target"]).square().mean()
        return {"loss": error, "root": error.detach().sqrt()}


class Tensors:
    """A loader over a tensor, in order."""

    def __init__(self, batch_size: int, n: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.batch_size, self.steps_per_epoch = batch_size, n // batch_size
        self.served: list[tuple[int, int]] = []

    def epoch(self, epoch: int, start: int = 0):
        for step in range(start, self.steps_per_epoch):
            self.served.append((epoch, step))
            positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
            yield positions, self.images[positions]


def run(
    out: Path, *, epochs: int = 3, identity: dict[str, Any] | None = None, loader: Any = None, **kwargs: Any
) -> Regression:
    task = Regression()
    names = RuntimeConfig.__dataclass_fields__.keys()
    runtime = RuntimeConfig(**{"log_every": 1, **{name: kwargs.pop(name) for name in list(kwargs) if name in names}})
    optim = OptimConfig(epochs=epochs, batch_size=8, lr=0.05, **kwargs)
    Trainer(
        task, loader or Tensors(8), optim=optim, runtime=runtime, out=out, identity=identity or {"arch": "line"}
    ).run()
    return task
