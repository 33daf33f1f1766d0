"""What an answer costs, in multiply-adds."""

import copy
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sssd_zoo.models.resnet import SSSDResNet


def multiply_adds(model: SSSDResNet, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-adds of the convolutions and linear layers for one image (FLOP are twice that).

    Args:
        model: a network of this package. It is copied without its data, so it is left as it was.
        input_size: channels, height and width of the image.

    Returns:
        Of a network with `output='ensemble'`: '1' to '3', the cost of the stages up to that exit and of the exit
        (what `output=1` to `output=3` run); '4', the cost of the trunk; 'ensemble', of everything. The exit heads'
        cost is therefore `cost['ensemble'] - cost['4']`. Of any other network: its one exit's number and its cost.
    """
    copied = copy.deepcopy(model).to("meta").eval()
    costs: Counter[str] = Counter()

    def count(name: str, module: Any, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            costs[name] += output.numel() * module.in_features
        else:
            costs[name] += output.numel() * module.weight[0].numel()

    for name, module in copied.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(partial(count, name.partition(".")[0]))
    image = torch.zeros(1, *input_size, device="meta", dtype=next(copied.parameters()).dtype)
    with torch.no_grad():
        if model.output != "ensemble":
            copied(image)
            return {"4" if model.output == "final" else model.output: costs.total()}
        copied.forward_exits(image)

    stage_costs = [costs[f"layer{i}"] for i in range(1, 5)]
    exit_costs = [costs[name] for name in ("exit1", "exit2", "exit3", "fc")]
    stem = costs.total() - sum(stage_costs) - sum(exit_costs)
    answers = {str(i): stem + sum(stage_costs[:i]) + exit_costs[i - 1] for i in range(1, 5)}
    return answers | {"ensemble": costs.total()}
