"""How and where a network is trained."""

from dataclasses import dataclass, field
from typing import Literal

from sssd_zoo.configs.evaluation import ForwardConfig
from sssd_zoo.configs.ranges import (
    Checked,
    Count,
    CountOrZero,
    Epochs,
    Fraction,
    FractionBelowOne,
    LearningRate,
    Milestones,
    Minutes,
    Pixels,
    Positive,
    Seed,
    SettingsError,
    Weight,
)

Tracker = Literal[  # those of Accelerate
    "tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]
USUAL_OPTIMIZERS = ("momentum", "sgd", "adamw", "lamb")  # known to timm, so it need not be imported to check


@dataclass(kw_only=True)
class OptimConfig(Checked):
    """How a network is trained.

    Args:
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes.
        accumulate: gradient accumulation: number of micro-batches that each process splits its part of the batch into,
            to save memory.
        optimizer: timm name of the optimiser; 'momentum' is plain SGD with momentum, 'sgd' is SGD with Nesterov
            momentum.
        lr: peak learning rate; it is not scaled by the batch size.
        momentum: momentum, for optimisers that have one, such as SGD.
        weight_decay: weight decay, applied to all parameters including biases and BatchNorm, as in the reference
            implementations.
        schedule: learning-rate schedule: 'cosine' decays to 0; 'step' multiplies the rate by `gamma` at each of
            `milestones`.
        warmup_epochs: epochs of linear warm-up from 0; may be fractional, and must be fewer than `epochs`.
        milestones: epochs at which the 'step' schedule lowers the learning rate.
        gamma: factor of the 'step' schedule.
        clip_grad: maximum norm of the gradient; by default gradients are not clipped.
        sizes: progressive resizing: sides of the views in pixels for successive equal parts of training, such as [16,
            24, 32]. Smaller views are cheaper. By default all views have the run's image size.
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
        """Raises `SettingsError` also for a warm-up without end and for an optimiser that timm cannot create."""
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise SettingsError(f"warmup_epochs is {self.warmup_epochs}; it must be fewer than epochs, {self.epochs}")
        if self.optimizer in USUAL_OPTIMIZERS and self.momentum > 0:  # Nesterov momentum of 0 is refused by torch
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
        except Exception as error:  # timm's optimisers raise errors of many types
            raise SettingsError(
                f"optimizer '{self.optimizer}': {error}; choose another, such as momentum, sgd, adamw or lamb"
            ) from error
        if getattr(trial, "is_second_order", False):
            raise SettingsError(
                f"optimizer '{self.optimizer}' needs second derivatives, which are not computed; choose another, such "
                "as sgd or adamw"
            )


@dataclass(kw_only=True)
class RuntimeConfig(Checked):
    """Where and how a run executes; apart from rounding, only `seed` and `precision` affect its results.

    Args:
        seed: random seed of initialisation, data order, augmentation, k-means and probes.
        precision: 'auto' uses bf16 where the hardware supports it, fp16 on older GPUs, and fp32 otherwise.
        compile: compile the network with torch.compile; worthwhile on GPUs, not on CPUs.
        cuda_graphs: with `compile` on one GPU, replay the kernels of a step as CUDA graphs, so that the GPU does not
            wait for the host to launch them; takes some more of its memory.
        device: 'auto' uses a CUDA GPU if there is one; 'cpu' never does.
        checkpoint_every: steps between checkpoints within an epoch, in addition to those at the ends of epochs; 0 for
            none.
        checkpoint_minutes: minutes since the last checkpoint after which one is written within an epoch, at the next
            line of the log; 0 for none.
        checkpoint_epochs: epochs between checkpoints; raise it if an epoch has few steps.
        keep_last: number of most recent checkpoints to keep; at least one is always kept.
        keep_best: number of checkpoints with the lowest training loss to keep as well.
        log_every: steps between lines in metrics.jsonl.
        trackers: experiment trackers to log to in addition to metrics.jsonl, one or several: tensorboard, trackio,
            wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab.
    """

    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    cuda_graphs: bool = True
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_every: CountOrZero = 0
    checkpoint_minutes: Minutes = 10.0
    checkpoint_epochs: CountOrZero = 1
    keep_last: CountOrZero = 2
    keep_best: CountOrZero = 1
    log_every: Count = 10
    trackers: list[Tracker] = field(default_factory=list)

    def forward(self) -> ForwardConfig:
        """How a network is run on images where and as precisely as this run trains."""
        return ForwardConfig(precision=self.precision, device=self.device)
