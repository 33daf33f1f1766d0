"""How and where a network is trained."""

from dataclasses import dataclass, field
from typing import Literal

from sssd_zoo.configs.ranges import (
    Checked,
    Count,
    CountOrZero,
    Epochs,
    Fraction,
    FractionBelowOne,
    LearningRate,
    Milestones,
    Pixels,
    Positive,
    Seed,
    Weight,
)

USUAL_OPTIMIZERS = ("momentum", "sgd", "adamw", "lamb")  # timm has them: it need not be imported to be asked


@dataclass(kw_only=True)
class OptimConfig(Checked):
    """How one network is trained.

    Args:
        epochs: passes over the data.
        batch_size: images per optimiser step, over all processes.
        accumulate: parts that a process cuts its share of the batch into, to save memory.
        optimizer: timm's name of it; 'momentum' is plain SGD with momentum, 'sgd' that of Nesterov.
        lr: learning rate at its height.
        momentum: of the optimiser.
        weight_decay: of all parameters, BatchNorm's and biases too, as the reference codes do.
        schedule: 'cosine' falls to 0, 'step' is multiplied by `gamma` at each of `milestones`.
        warmup_epochs: of linear growth from 0.
        milestones: epochs, for 'step'.
        gamma: factor, for 'step'.
        clip_grad: largest norm of the gradient; none by default.
        sizes: sides of the views in pixels over equal parts of the training, such as [16, 24, 32]: small views first
            cost less; by default all are of the run's image size.
    """

    epochs: Count = 200
    batch_size: Count = 512
    accumulate: Count = 1
    optimizer: str = "momentum"
    lr: LearningRate = 0.06
    momentum: FractionBelowOne = 0.9
    weight_decay: Weight = 5e-4
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: Epochs = 0.0
    milestones: Milestones = field(default_factory=lambda: [120, 160])
    gamma: Fraction = 0.1
    clip_grad: Positive | None = None
    sizes: list[Pixels] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises `ValueError` for values that no data could be trained with, and an optimizer that timm cannot make."""
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}")
        if self.optimizer in USUAL_OPTIMIZERS:
            return
        import torch
        from timm.optim import create_optimizer_v2

        try:
            trial = create_optimizer_v2(
                [{"params": [torch.nn.Parameter(torch.zeros(1))]}],
                opt=self.optimizer,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
            )
        except Exception as error:  # each of timm's hundred optimizers has its own
            raise ValueError(
                f"optimizer '{self.optimizer}': {error}; choose another, such as momentum, sgd, adamw or lamb"
            ) from error
        if getattr(trial, "is_second_order", False):
            raise ValueError(f"optimizer '{self.optimizer}' needs second derivatives, which are not computed here")


@dataclass(kw_only=True)
class RuntimeConfig(Checked):
    """Where and how a run executes; nothing here but `seed` and `precision` changes its numbers.

    Args:
        seed: of weights, order, views, clusters and probes.
        precision: 'auto' takes bf16 where the hardware has it, else fp32.
        compile: torch.compile the network: pays on GPUs, not on CPUs.
        device: 'auto' takes the GPU if there is one; 'cpu' does not.
        checkpoint_every: steps between checkpoints, beside those at the ends of epochs; 0: none.
        checkpoint_epochs: epochs between checkpoints, for epochs of few steps.
        keep_last: checkpoints kept, the newest.
        keep_best: checkpoints kept, those of the lowest training loss.
        log_every: steps between lines of metrics.jsonl.
        trackers: any of 'tensorboard' and 'trackio', beside metrics.jsonl.
    """

    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_every: CountOrZero = 0
    checkpoint_epochs: CountOrZero = 1
    keep_last: CountOrZero = 2
    keep_best: CountOrZero = 1
    log_every: Count = 10
    trackers: list[Literal["tensorboard", "trackio"]] = field(default_factory=list)
