"""MoCo v2: instance discrimination with a momentum encoder and a queue of keys (He et al. 2020; Chen et al. 2020)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import MoCoConfig
from sssd_zoo.data.augment import BatchRandom, contrastive_view, normalise, put
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.distributed import gather, rank, world_size
from sssd_zoo.models.multi_exit import feature_width
from sssd_zoo.tasks.base import Task
from sssd_zoo.tasks.queue import enqueue, similarities
from sssd_zoo.tasks.split_batchnorm import split_batchnorm


def projector(width: int, dim: int) -> nn.Sequential:
    """MoCo v2's two-layer projector: features [B, width] to [B, dim]."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))


class Encoder(nn.Module):
    """A trunk and MoCo v2's two-layer projector; embeddings [B, dim] of unit length.

    Args:
        trunk: a timm model built with `num_classes=0`: [B, C, H, W] to [B, D].
        dim: length of an embedding.
    """

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.projector = projector(feature_width(trunk), dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds [B, C, H, W]; float32 [B, dim]."""
        return F.normalize(self.projector(self.trunk(images)).float(), dim=1)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE: cross-entropy of each query's own key against the queue (equation 1 of MoCo, arXiv:1911.05722).

    Args:
        query: float32 [B, dim], unit length.
        key: float32 [B, dim], unit length, the positives.
        queue: float32 [K, dim], unit length, the negatives.
        temperature: > 0.

    Returns:
        The mean loss, and the fraction of queries whose own key is the nearest, in 0..1; both scalars.
    """
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, similarities(query, queue)], dim=1) / temperature
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, target), (logits.argmax(1) == 0).float().mean()


@torch.no_grad()
def shuffled_keys(embed: Callable[[Tensor], Tensor], images: Tensor, shuffle: Tensor) -> Tensor:
    """Embeds the keys of the GLOBAL batch, shuffled over parts and processes, and puts them back in order.

    Args:
        embed: the momentum encoder, images to embeddings.
        images: float32 [B, C, size, size], this process's.
        shuffle: int64 [B * world], a permutation, the same in every process; on the images' device.

    Returns:
        Float32 [B * world, dim], in the order of the global batch.
    """
    mine = shuffle.chunk(world_size())[rank()]
    shuffled = gather(images)[mine].contiguous(memory_format=torch.channels_last)
    embeddings = gather(embed(shuffled))
    return embeddings[shuffle.argsort()]


@torch.no_grad()
def follow(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """Moves a momentum encoder: theta_k <- m theta_k + (1 - m) theta_q (equation 2 of MoCo)."""
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)


class MoCo(Task):
    """MoCo v2 on one or several processes.

    With `config.symmetric` both views are queries and keys in turn, and the two losses add up, as in MoCo's CIFAR
    notebook; else the first view is the query and the second the key. `config.splits` says into how many parts of equal
    size BatchNorm's statistics of a GLOBAL batch are split, as if on so many GPUs; it is a multiple of the number of
    processes. The keys are shuffled over the parts, so that a query and its key share no statistics: without that the
    network can tell the pair by them (section 3.3 of MoCo).

    Args:
        trunk: a timm model with `num_classes=0`.
        config: of the method.
        spec: see `Task`.
    """

    global_batchnorm = False  # parts of the batch keep statistics of their own, on purpose
    queue: Tensor
    pointer: Tensor

    def __init__(self, trunk: nn.Module, config: MoCoConfig, spec: InputSpec) -> None:
        super().__init__(spec)
        self.config = config
        self.query_encoder = Encoder(trunk, config.dim)
        split_batchnorm(self.query_encoder, config.splits // world_size())
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, config.dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """Two views, float32 [B, C, size, size], and the shuffles of the keys, int64 [global batch] each."""
        settings: dict[str, Any] = {
            "scale": self.config.crop_scale,
            "augment": self.resolve(self.config.augment, images, self.config.blur),
            "compiled": self.compiled,
        }
        views = [contrastive_view(images, random, self.size, **settings) for _ in range(2)]
        return {
            "views": [normalise(view, self.mean, self.std) for view in views],
            "shuffles": [put(random.permutation(len(images)), images) for _ in range(2)],
        }

    def before_step(self) -> None:
        """Moves the key encoder."""
        follow(self.key_encoder, self.query_encoder, self.config.key_momentum)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss; queues the batch's keys when it trains."""
        first, second = batch["views"]
        # The queue changes below, before the backward pass that needs it as it was.
        queue = self.queue.clone()
        pairs = [(first, second), (second, first)] if self.config.symmetric else [(first, second)]
        losses, hits, new = [], [], []
        for (query_view, key_view), shuffle in zip(pairs, batch["shuffles"], strict=False):
            keys = shuffled_keys(self.key_encoder, key_view, shuffle)
            query = self.query_encoder(query_view)
            positive = keys.chunk(world_size())[rank()]
            loss, hit = info_nce(query, positive, queue, self.config.temperature)
            losses.append(loss)
            hits.append(hit)
            new.append(keys)
        if self.training:
            enqueue(self.queue, self.pointer, torch.cat(new))
        return {"loss": torch.stack(losses).sum(), "contrast_top1": torch.stack(hits).mean()}
