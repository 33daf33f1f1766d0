"""The multi-exit ResNets as timm knows them: `sssd_resnet*`, with their default configurations and bundled weights."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck

from sssd_zoo.errors import UserError
from sssd_zoo.models.class_names import CIFAR10, TINY_IMAGENET
from sssd_zoo.models.multi_exit import checkpoint_filter_fn
from sssd_zoo.models.multi_exit_resnet import SSSDResNet

__all__ = ["SSSDResNet", "checkpoint_filter_fn"]  # register_model adds the entry points

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _weights(name: str) -> str:
    """The path of the bundled weights, in half precision, of a name and tag."""
    return str(Path(__file__).parent.parent / "weights" / f"{name}.safetensors")


def _create_sssd_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    # features_only is about the trunk: it needs no exits, and of a truncated network has the stages up to its exit.
    output = str(kwargs.get("output", "ensemble"))
    if kwargs.get("features_only") and output == "ensemble":
        kwargs["output"] = "final"
    stages = tuple(range(int(output) + 1 if output in ("1", "2", "3") else 5))
    feature_cfg = {"out_indices": stages, **kwargs.pop("feature_cfg", {})}  # a new one, as timm empties it
    try:
        return build_model_with_cfg(
            SSSDResNet,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg,
            **kwargs,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"the pretrained weights of {variant} are missing: reinstall sssd-zoo with its weights, "
            "or load a folder of your own by local-dir:FOLDER"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"the weights of {variant} are damaged ({error}): make or fetch them again; reinstall sssd-zoo if they are "
            "its own"
        ) from error


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": ("fc", "exit1.fc", "exit2.fc", "exit3.fc"),
        "license": "apache-2.0",
        **kwargs,
    }


def _cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    return _cfg(
        num_classes=10,
        input_size=(3, 32, 32),
        min_input_size=(3, 8, 8),
        pool_size=(4, 4),
        crop_pct=1.0,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "sssd_resnet18.dist_tiny_imagenet_32": _cfg(
            file=_weights("sssd_resnet18.dist_tiny_imagenet_32"),
            description="EfficientNet-Lite0 (ImageNet-1K with labels) distilled on Tiny ImageNet without labels, a "
            "linear probe per exit; its card is in hub_cards/",
            num_classes=200,
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            crop_pct=1.0,
            label_names=TINY_IMAGENET,
        ),
        "sssd_resnet34": _cfg(),
        "sssd_resnet50": _cfg(),
        "sssd_resnet101": _cfg(),
        "sssd_resnet18_cifar.dist_cifar10": _cifar_cfg(
            file=_weights("sssd_resnet18_cifar.dist_cifar10"),
            description="EfficientNet-Lite0 (ImageNet-1K with labels) distilled on CIFAR-10 without labels, a linear "
            "probe per exit; its card is in hub_cards/",
            label_names=CIFAR10,
        ),
        "sssd_resnet18_cifar.cifar10": _cifar_cfg(
            file=_weights("sssd_resnet18_cifar.cifar10"),
            description="SSSD on CIFAR-10 without labels, a linear probe per exit; its card is in hub_cards/",
            label_names=CIFAR10,
        ),
        "sssd_resnet50_cifar": _cifar_cfg(),
    }
)


@register_model
def sssd_resnet18(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-18 with four exits."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return _create_sssd_resnet("sssd_resnet18", pretrained, **(model_args | kwargs))


@register_model
def sssd_resnet34(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-34 with four exits."""
    model_args = {"block": BasicBlock, "layers": (3, 4, 6, 3)}
    return _create_sssd_resnet("sssd_resnet34", pretrained, **(model_args | kwargs))


@register_model
def sssd_resnet50(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-50 with four exits."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    return _create_sssd_resnet("sssd_resnet50", pretrained, **(model_args | kwargs))


@register_model
def sssd_resnet101(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-101 with four exits."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 23, 3)}
    return _create_sssd_resnet("sssd_resnet101", pretrained, **(model_args | kwargs))


@register_model
def sssd_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-18 with four exits and the stem for 32 px."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2), "cifar_stem": True}
    return _create_sssd_resnet("sssd_resnet18_cifar", pretrained, **(model_args | kwargs))


@register_model
def sssd_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> SSSDResNet:
    """ResNet-50 with four exits and the stem for 32 px."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3), "cifar_stem": True}
    return _create_sssd_resnet("sssd_resnet50_cifar", pretrained, **(model_args | kwargs))
