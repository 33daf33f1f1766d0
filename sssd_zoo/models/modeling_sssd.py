"""A network of sssd-zoo for transformers, where sssd-zoo is not installed.

`sssd export --format transformers` puts this file and those that it imports into a network's folder, where
`AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)` runs them. They need torch and timm,
open no files and make no connections: transformers itself reads config.json and model.safetensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TimmWrapperConfig, TimmWrapperPreTrainedModel
from transformers.utils import ModelOutput

from sssd_zoo.models.building import build
from sssd_zoo.models.exits import ensemble_logits


@dataclass
class MultiExitOutput(ModelOutput):  # type: ignore[misc]
    """What the network gives.

    Attributes:
        loss: cross-entropy of the ensemble, if labels were given.
        logits: of the ensemble: the log of the mean softmax of the four exits, [B, num_labels].
        exit_logits: of the exits 1 to 4, [B, num_labels] each.
        exit_features: the pooled vectors in front of their classifiers, [B, num_features] each.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    exit_features: tuple[Tensor, ...] | None = None


class SSSDForImageClassification(TimmWrapperPreTrainedModel):  # type: ignore[misc]
    """The whole network as `timm_model`, a `MultiExit` with all its methods: `model.timm_model.forward_early`.

    Args:
        config: of the folder's config.json.
    """

    def __init__(self, config: TimmWrapperConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.timm_model = build(config.structure, config.num_labels, config.model_args or {})
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **_: Any
    ) -> MultiExitOutput | tuple[Tensor, ...]:
        """Images, normalised as config.json says, to the outputs of the ensemble and of every exit.

        Args:
            pixel_values: [B, C, S, S].
            labels: int64 [B], of which the loss is computed.
            return_dict: False gives a tuple.
        """
        exits = self.timm_model.forward_exits(pixel_values.to(self.device, self.dtype))
        logits = ensemble_logits(exits.logits)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        output = MultiExitOutput(loss, logits, tuple(exits.logits), tuple(exits.features))
        return output.to_tuple() if return_dict is False else output
