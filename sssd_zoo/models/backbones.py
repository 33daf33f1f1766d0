"""Names for timm networks with exits.

Each network of `TESTED` is registered as `sssd_NAME`, and with the stem for small images as `sssd_NAME_cifar`.
`named_backbone` registers others while the program runs. Where they are saved, config.json names `sssd_backbone`, which
timm knows after `import sssd_zoo`, and has the timm name as its argument.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from sssd_zoo.errors import UserError
from sssd_zoo.models.multi_exit import checkpoint_filter_fn
from sssd_zoo.models.resnet import CIFAR_MEAN, CIFAR_STD
from sssd_zoo.models.staged import TESTED, StagedMultiExit, multi_exit, structure_of_backbone

__all__: list[str] = []  # register_model adds the entry points

ANY, DEFAULT = "sssd_backbone", "resnet10t"
KEPT = (
    "num_classes",
    "input_size",
    "fixed_input_size",
    "pool_size",
    "mean",
    "std",
    "first_conv",
    "license",
)
# How networks of this package get their images, in timm's words: whole, by `data.augment.resize`.
RESIZED = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}


def _cfg(backbone: str, *, cifar_stem: bool) -> dict[str, Any]:
    """The default configuration of a network with exits: timm's, without its weights."""
    known = asdict(timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg())
    classifier = known["classifier"]
    own = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    cfg = {name: known[name] for name in KEPT if known[name] is not None}
    cfg |= {**RESIZED, "url": "", "classifier": (*own, "exit1.fc", "exit2.fc", "exit3.fc")}
    if cifar_stem:
        cfg |= {"num_classes": 10, "input_size": (3, 32, 32), "mean": CIFAR_MEAN, "std": CIFAR_STD}
    if not known["fixed_input_size"]:
        cfg["min_input_size"] = (3, 8, 8) if cifar_stem else (3, 32, 32)
    if cifar_stem and known["pool_size"]:
        cfg["pool_size"] = (4, 4)
    return cfg


def _create(variant: str, backbone: str, cifar_stem: bool, pretrained: bool, **kwargs: Any) -> StagedMultiExit:
    output = str(kwargs.get("output", "ensemble"))
    if kwargs.get("features_only"):  # it is about the trunk: it needs no exits
        kwargs["output"] = "final" if output == "ensemble" else output
        feature_cfg = {"feature_cls": "getter", **kwargs.pop("feature_cfg", {})}
        feature_cfg.setdefault("out_indices", tuple(range(_feature_count(backbone, cifar_stem, output))))
        kwargs["feature_cfg"] = feature_cfg

    def build(**arguments: Any) -> StagedMultiExit:
        return multi_exit(backbone, cifar_stem=cifar_stem, **arguments)

    return build_model_with_cfg(build, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _feature_count(backbone: str, cifar_stem: bool, output: str) -> int:
    structure, _ = structure_of_backbone(backbone, cifar_stem)
    return structure.features[int(output) - 1] + 1 if output in ("1", "2", "3") else structure.feature_count


def _register(name: str, backbone: str, *, cifar_stem: bool) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> StagedMultiExit:
        return _create(name, backbone, kwargs.pop("cifar_stem", cifar_stem), pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"timm's {backbone} with four exits{' and the stem for 32 px' if cifar_stem else ''}."
    setattr(sys.modules[__name__], name, entrypoint)
    register_model(entrypoint)


default_cfgs = generate_default_cfgs(
    {
        **{f"sssd_{backbone}": _cfg(backbone, cifar_stem=False) for backbone in TESTED},
        **{f"sssd_{backbone}_cifar": _cfg(backbone, cifar_stem=True) for backbone in TESTED},
        ANY: _cfg(DEFAULT, cifar_stem=False),
    }
)
for _backbone in TESTED:
    _register(f"sssd_{_backbone}", _backbone, cifar_stem=False)
    _register(f"sssd_{_backbone}_cifar", _backbone, cifar_stem=True)


@register_model
def sssd_backbone(pretrained: bool = False, backbone: str = DEFAULT, **kwargs: Any) -> StagedMultiExit:
    """Any timm network that can have exits.

    Args:
        pretrained: only for weights that a folder or the Hub has.
        backbone: its timm name.
        kwargs: see `multi_exit`.
    """
    cifar_stem = kwargs.pop("cifar_stem", False)
    named_backbone(backbone, cifar_stem=cifar_stem)  # the name that reports and cards give it
    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = _cfg(backbone, cifar_stem=cifar_stem)
    return _create(ANY, backbone, cifar_stem, pretrained, **kwargs)


def named_backbone(backbone: str, *, cifar_stem: bool) -> str:
    """The name of a timm network with exits, which is registered if it is not yet.

    Args:
        backbone: its timm name, or one that has exits already.
        cifar_stem: see `multi_exit`.

    Raises:
        UserError: if it cannot have exits, or has no stem for small images.
    """
    if backbone.startswith("sssd_"):
        return backbone
    if "." in backbone:
        raise UserError(
            f"'{backbone}' names weights, and what is asked for is an architecture: give {backbone.partition('.')[0]}; "
            "fit and distill take weights to start from by --pretrain.init or --init"
        )
    name = _name(backbone, cifar_stem)
    if not timm.is_model(name):
        structure_of_backbone(backbone, cifar_stem)
        default_cfgs.update(generate_default_cfgs({name: _cfg(backbone, cifar_stem=cifar_stem)}))
        _register(name, backbone, cifar_stem=cifar_stem)
    return name


def stored_as(architecture: str) -> tuple[str, dict[str, Any]]:
    """The name of a network with exits by which another process can build it, and the arguments that go with it.

    Args:
        architecture: its name in this process.
    """
    backbone, cifar_stem = _parts(architecture)
    if architecture in default_cfgs and backbone not in TESTED and architecture != ANY:
        return ANY, {"backbone": backbone, "cifar_stem": cifar_stem}
    return architecture, {}


def architecture_in(config: Mapping[str, Any]) -> str:
    """The name of the network in a config.json: for `sssd_backbone` that by which this process knows it."""
    name, arguments = str(config["architecture"]), config.get("model_args") or {}
    if name != ANY:
        return name
    return _name(str(arguments.get("backbone", DEFAULT)), bool(arguments.get("cifar_stem", False)))


def architecture_of(network: Any) -> str:
    """The name of a network that timm made; see `architecture_in`."""
    arguments = getattr(network, "_model_args", {})
    return architecture_in({"architecture": network.pretrained_cfg["architecture"], "model_args": arguments})


def has_network(name: str) -> bool:
    """Whether timm has a network of that name; 'sssd_NAME' of any network that can have exits is registered first.

    Raises:
        UserError: if it cannot have exits, or has no stem for small images.
    """
    if name.startswith("sssd_") and not timm.is_model(name):
        backbone, cifar_stem = _parts(name)
        if timm.is_model(backbone) and "." not in name:
            named_backbone(backbone, cifar_stem=cifar_stem)
    return bool(timm.is_model(name))


def _name(backbone: str, cifar_stem: bool) -> str:
    return f"sssd_{backbone}{'_cifar' if cifar_stem else ''}"


def _parts(name: str) -> tuple[str, bool]:
    return name.removeprefix("sssd_").removesuffix("_cifar"), name.endswith("_cifar")
