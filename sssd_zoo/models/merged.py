"""Classes of one name are one answer: `sssd rename` gives clusters that belong together the same name."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Answers:
    """The distinct names of a network's classes, and how probable each is.

    Early exit is not concerned: an exit's threshold is compared with its most probable class, as it was calibrated.

    Args:
        names: of the network's C classes, in order.

    Attributes:
        names: the distinct ones, in the order of their first classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(dict.fromkeys(names))
        place = {name: number for number, name in enumerate(self.names)}
        self._places = torch.tensor([place[name] for name in names])

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each name, the sum of its classes': logits [..., C] to float32 [..., names]."""
        single = logits.float().softmax(-1)
        if len(self.names) == len(self._places):
            return single
        merged = single.new_zeros(*single.shape[:-1], len(self.names))
        return merged.index_add_(-1, self._places.to(single.device), single)
