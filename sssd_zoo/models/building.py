"""What a network is made of, so that it can be built where its registered name is unknown.

`sssd export --format transformers` puts this file into folders that load without this package, as it does with those
that it imports.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from timm.models.resnet import BasicBlock, Bottleneck

from sssd_zoo.models.multi_exit import MultiExit
from sssd_zoo.models.multi_exit_resnet import SSSDResNet
from sssd_zoo.models.staged import StagedMultiExit, multi_exit

BLOCKS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}


class ResNetStructure(TypedDict):
    """What the name of an `SSSDResNet` stands for.

    Attributes:
        block: 'BasicBlock' or 'Bottleneck'.
        layers: number of blocks in each of the four stages.
        cifar_stem: see `SSSDResNet`.
    """

    block: str
    layers: list[int]
    cifar_stem: bool


class BackboneStructure(TypedDict):
    """What the name of any other network stands for.

    Attributes:
        backbone: timm name of the network that has the exits.
        cifar_stem: see `multi_exit`.
    """

    backbone: str
    cifar_stem: bool


def structure_of(model: MultiExit) -> ResNetStructure | BackboneStructure:
    """The structure of a network with all stages."""
    if isinstance(model, StagedMultiExit):
        return {"backbone": model.backbone, "cifar_stem": model.cifar_stem}
    assert isinstance(model, SSSDResNet)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    return {
        "block": type(model.layer1[0]).__name__,
        "layers": [len(stage) for stage in stages],
        "cifar_stem": model.cifar_stem,
    }


def build(structure: Mapping[str, Any], num_classes: int, model_args: Mapping[str, Any]) -> MultiExit:
    """A network with new weights.

    Args:
        structure: see `structure_of`.
        num_classes: of every classifier.
        model_args: other arguments of the network, as config.json holds them.
    """
    arguments = {**model_args, "cifar_stem": structure["cifar_stem"]}
    if "backbone" in structure:
        return multi_exit(**{**arguments, "backbone": structure["backbone"]}, num_classes=num_classes)
    arguments["layers"] = tuple(structure["layers"])
    return SSSDResNet(BLOCKS[structure["block"]], num_classes=num_classes, **arguments)
