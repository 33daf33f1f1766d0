"""Contrastive self distillation, beyond the paper: the exits learn their labels, and go on with the pretext.

Labels hold no more than M_ssl knew when they were made. To equation 4 of the paper this adds
w sum_i InfoNCE(g_i(F_i), k), MoCo's task for every exit: g_i is a projector of its own, F_i are the exit's features of
the query's view, and k is the embedding of another view of the image by the momentum encoder: a moving average of the
network, whose last exit gives the embedding. The key's view is only cropped and flipped, as in ReSSL (Zheng et al.
2021, arXiv:2107.09282).
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sssd_zoo.configs import ContrastiveConfig
from sssd_zoo.data.augment import BatchRandom, contrastive_view, normalise, put
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.distributed import rank, world_size
from sssd_zoo.models.multi_exit import feature_width
from sssd_zoo.tasks.moco import follow, info_nce, projector, shuffled_keys
from sssd_zoo.tasks.queue import enqueue
from sssd_zoo.tasks.split_batchnorm import split_batchnorm
from sssd_zoo.tasks.sssd import SelfDistillation


class ContrastiveSelfDistillation(SelfDistillation):
    """Self distillation whose exits also recognise another view of their image, on one or several processes.

    BatchNorm and the shuffle of the keys are as in `MoCo`.

    Args:
        model: a network with four exits; by its weights also the momentum encoder starts.
        config: of the method.
        spec: see `Task`.
    """

    global_batchnorm = False  # parts of the batch keep statistics of their own, on purpose
    config: ContrastiveConfig
    queue: Tensor
    pointer: Tensor

    def __init__(self, model: nn.Module, config: ContrastiveConfig, spec: InputSpec) -> None:
        super().__init__(model, config, spec)
        split_batchnorm(self.model, config.splits // world_size())
        self.projectors = nn.ModuleList(projector(feature_width(model), config.dim) for _ in range(4))
        self.key_encoder = copy.deepcopy(self.model).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projectors[-1]).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, config.dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def views(self, images: Tensor, random: BatchRandom) -> dict[str, Any]:
        """The queries' views and the keys', float32 [B, C, size, size] each, and the shuffle, int64 [global batch]."""
        config = self.config
        augment = self.resolve(config.augment, images, config.blur)
        query = contrastive_view(
            images, random, self.size, scale=config.crop_scale, augment=augment, compiled=self.compiled
        )
        return {
            "images": normalise(query, self.mean, self.std),
            "keys": self.inputs(images, self.draw_views(images, random)),
            "shuffle": put(random.permutation(len(images)), images),
        }

    def before_step(self) -> None:
        """Moves the momentum encoder."""
        follow(self.key_encoder, self.model, self.config.key_momentum)
        follow(self.key_projector, self.projectors[-1], self.config.key_momentum)

    def embed(self, images: Tensor) -> Tensor:
        """The momentum encoder's embeddings of [B, C, size, size], float32 [B, dim] of unit length."""
        encoder: Any = self.key_encoder
        features = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
        return F.normalize(self.key_projector(features).float(), dim=1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Equation 4 with the contrast added; queues the batch's keys when it trains."""
        keys = shuffled_keys(self.embed, batch["keys"], batch["shuffle"])
        positives = keys.chunk(world_size())[rank()]
        queue = self.queue.clone()  # it changes below, before the backward pass that needs it as it was
        exits = self.model.forward_exits(batch["images"])  # type: ignore[operator]
        parts = self.distil(exits, batch["labels"])
        contrasts = []
        for project, features in zip(self.projectors, exits.features, strict=True):
            query = F.normalize(project(features).float(), dim=1)
            loss, hit = info_nce(query, positives, queue, self.config.contrast_temperature)
            contrasts.append(loss)
        contrast = torch.stack(contrasts).sum()
        if self.training:
            enqueue(self.queue, self.pointer, keys)
        added = {"contrast": contrast.detach(), "contrast_top1": hit}  # of the last exit
        return {**parts, "loss": parts["loss"] + self.config.contrast * contrast, **added}
