"""What the exits cost: MACs (multiply-accumulate operations), and activations (numbers that their layers put out)."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sssd_zoo.models.multi_exit import MultiExit
from sssd_zoo.models.stages import macs_of

ANSWERS = ("1", "2", "3", "4", "ensemble")  # of a network with all exits


class StageCosts(NamedTuple):
    """What the parts of a network cost, in MACs or in seconds.

    Attributes:
        stages: of the four stages in order; the stem counts towards the first.
        heads: of the exits 1 to 3, and of the final classifier.
    """

    stages: tuple[float, ...]
    heads: tuple[float, ...]

    def answer(self, name: str) -> float:
        """The cost of the answer of an exit '1' to '4' alone, or of the 'ensemble' of all."""
        if name == "ensemble":
            return sum(self.stages) + sum(self.heads)
        number = int(name)
        return sum(self.stages[:number]) + self.heads[number - 1]


def activations_of(_: Any, output: Tensor) -> int:
    """Activations of a convolution or linear layer that gave `output`."""
    return output.numel()


Count = Callable[[Any, Tensor], int]


def stage_costs(model: MultiExit, input_size: tuple[int, int, int], count: Count = macs_of) -> StageCosts:
    """MACs (whole numbers) of the stages and heads of a network with all exits, for one image.

    Args:
        model: see `multiply_adds`.
        input_size: see `multiply_adds`.
        count: what to count of a layer.
    """
    costs = _module_costs(model, input_size, count)
    heads = tuple(costs[name] for name in ("exit1", "exit2", "exit3", "head"))
    return StageCosts(tuple(costs[f"stage{number}"] for number in range(1, 5)), heads)


def multiply_adds(model: MultiExit, input_size: tuple[int, int, int]) -> dict[str, int]:
    """MACs of the convolutions and linear layers for one image (FLOPs are twice that).

    Args:
        model: a network of this package, on any device, 'meta' too. A copy without data is run, so it stays as it is.
        input_size: channels, height and width of the image.

    Returns:
        For a network with `output='ensemble'`: '1' to '3', the cost of the stages up to that exit and of the exit
        (what `output=1` to `output=3` run); '4', the cost of the trunk; 'ensemble', the cost of everything, so that
        the exit heads cost `costs['ensemble'] - costs['4']`. For any other network: its one exit's number and cost.
    """
    return _by_answer(model, input_size, macs_of)


def activations(model: MultiExit, input_size: tuple[int, int, int]) -> dict[str, int]:
    """The same for activations: the numbers that the convolutions and linear layers put out for one image.

    Memory traffic, and so time, often goes with these rather than with MACs (Dollar et al., "Fast and Accurate Model
    Scaling", CVPR 2021). timm's cards count them in the same way.

    Args:
        model: see `multiply_adds`.
        input_size: see `multiply_adds`.
    """
    return _by_answer(model, input_size, activations_of)


def _by_answer(model: MultiExit, input_size: tuple[int, int, int], count: Count) -> dict[str, int]:
    if model.output != "ensemble":
        return {"4" if model.output == "final" else model.output: _module_costs(model, input_size, count).total()}
    costs = stage_costs(model, input_size, count)
    return {name: int(costs.answer(name)) for name in ANSWERS}


def _module_costs(model: MultiExit, input_size: tuple[int, int, int], count: Count) -> Counter[str]:
    """Costs by part of the network, see `MultiExit.part_of`, of all exits where it has them all."""
    copied = copy.deepcopy(model).to("meta").eval()
    costs: Counter[str] = Counter()

    def add(name: str, module: Any, _: Any, output: Tensor) -> None:
        costs[name] += count(module, output)

    for name, module in copied.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(partial(add, model.part_of(name)))
    image = torch.zeros(1, *input_size, device="meta", dtype=next(copied.parameters()).dtype)
    with torch.no_grad():
        if model.output == "ensemble":
            copied.forward_exits(image)
        else:
            copied(image)
    return costs
