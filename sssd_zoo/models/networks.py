"""Choosing, loading and checking networks by name or folder."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import timm
import torch
from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sssd_zoo.configs import DataConfig
from sssd_zoo.configs.ranges import Count, Pixels, problems
from sssd_zoo.data.inputs import input_channels, input_spec, pixels_of
from sssd_zoo.data.loading import ImageData, OpenedImages
from sssd_zoo.data.sources import HUB_TIMEOUT
from sssd_zoo.data.streaming import StreamingImages
from sssd_zoo.errors import UserError
from sssd_zoo.files import (
    damage,
    recorded_sha256,
)
from sssd_zoo.files.hub_client import limited_waiting
from sssd_zoo.files.run_folder import NETWORK, kind_of
from sssd_zoo.models.backbones import has_network, named_backbone
from sssd_zoo.models.bundled import bundled_weights, check_bundled
from sssd_zoo.models.checks import check_network, read_config
from sssd_zoo.models.multi_exit import classifier_names

MOST_CHANNELS = 16  # of images, see `--channels`
SMALL_IMAGES = 40  # pixels: the largest views for which the stem for small images is the default


def choose_size(data: ImageData | OpenedImages | StreamingImages, image_size: int | None) -> int:
    """The side of the views: as asked, else the images' own where they are small, else 224 px."""
    return image_size or (data.size if data.size <= SMALL_IMAGES else 224)


def choose_model(name: str | None, size: int, *, exits: bool = False) -> str:
    """The network's name: as asked, else the one of this package whose stem is made for the size.

    Args:
        name: as asked.
        size: side of the views in pixels.
        exits: whether it must have exits. Then a network of timm's gets them, and the stem that is made for the size.

    Raises:
        UserError: if timm has no network of that name, or it cannot have exits.
    """
    name = name or ("sssd_resnet18_cifar" if size <= SMALL_IMAGES else "sssd_resnet18")
    if not has_network(name):
        ours = ", ".join(timm.list_models("sssd_*"))
        raise UserError(f"timm has no model '{name}'; this package's are {ours}")
    return named_backbone(name, cifar_stem=size <= SMALL_IMAGES) if exits else name


def check_sizes(arch: str, sizes: list[int]) -> None:
    """Refuses views that are too small for a network of this package, or of a size that a network does not take.

    Below its smallest input a stage would stride over a map of one pixel, where oneDNN's bf16 convolutions (seen in
    torch 2.15) give weight gradients of uninitialised memory.

    Raises:
        UserError: naming the size.
    """
    config = timm.get_pretrained_cfg(arch)
    smallest = config.min_input_size[-1] if config and config.min_input_size else 1
    if min(sizes) < smallest:
        raise UserError(
            f"views of {min(sizes)} px are too small for {arch}, which needs at least {smallest}: give larger sizes or "
            "a network with the stem for small images (one that ends in _cifar)"
        )
    if config is None or not config.fixed_input_size:
        return
    own = config.input_size[-1]
    for size in sizes:
        if size != own and not _runs_at(arch, size):
            raise UserError(f"'{arch}' does not take images of {size} px: give --image_size {own}, or another network")


def _runs_at(arch: str, size: int) -> bool:
    """Whether a network runs on images of this size: Swin's windows do not, vision transformers interpolate."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        network = new_network(arch, None).eval()
        try:
            network(torch.zeros(1, input_channels(network), size, size))
        except (AssertionError, RuntimeError, ValueError):  # every architecture fails in its own way
            return False
    return True


def load_network(name: str, **kwargs: Any) -> Any:
    """A network with its weights: a folder that this package or timm wrote, else a timm name with pretrained weights.

    For a run folder of `sssd fit` this is the network in its `model`.

    Args:
        name: the folder or the name.
        kwargs: of `timm.create_model`; `pretrained=False` gives the network with new weights.

    Raises:
        UserError: if there is neither, the weights do not fit, or its images have more channels than can be read.
    """
    source = find_network(name)
    kwargs = {"pretrained": True, **kwargs}
    repo = hub_repository(source, pretrained=kwargs["pretrained"])
    if kwargs["pretrained"] and ":" not in source and (weights := bundled_weights(source)) is not None:
        check_bundled(weights)
    try:
        with cache_if_unreachable(repo):
            if source.startswith("hf-hub:"):
                check_published(source.removeprefix("hf-hub:"), kwargs.get("cache_dir"))
            model: Any = timm.create_model(source, **kwargs)
    except UserError as error:
        raise UserError(f"cannot load the network '{name}': {error}") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"cannot load the network '{name}': the Hugging Face Hub cannot be reached, nor are its weights in the "
            f"cache {constants.HF_HUB_CACHE}: connect, copy that folder from a machine that has them, or give a folder "
            "or bundled weights, which `sssd models` lists"
        ) from error
    except Exception as error:  # a config.json can ask for anything, of timm's code and of this
        raise UserError(f"cannot load the network '{name}': {type(error).__name__}: {str(error)[:300]}") from error
    check_facts(name, model, classes=None if kwargs.keys() & {"num_classes", "features_only"} else model.num_classes)
    if input_channels(model) > MOST_CHANNELS:
        raise UserError(
            f"'{name}' takes images with {input_channels(model)} channels, and images have at most {MOST_CHANNELS}: "
            "give another network"
        )
    return model


def with_current_prefix(name: str) -> str:
    """A network's name with 'hf-hub:' in place of timm's older 'hf_hub:', which means the same."""
    return f"hf-hub:{name[7:]}" if name.startswith("hf_hub:") else name


def find_network(name: str) -> str:
    """What timm calls a network: 'local-dir:FOLDER' for a folder, whose files are checked first, else the name itself.

    Raises:
        UserError: if there is no such network, or the folder's files are incomplete, damaged or ask for too much.
    """
    name = with_current_prefix(name)
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        inner = folder / "model"
        # A run's own files are links to those in `model`, or old copies where it was copied with links followed.
        if (inner / "config.json").is_file() and (not (folder / "config.json").is_file() or kind_of(folder) == "fit"):
            folder = inner
        check_folder(folder, name)
        return f"local-dir:{folder}"
    if name.startswith("local-dir:"):
        raise UserError(f"there is no folder '{folder}'")
    if not name.startswith("hf-hub:") and not has_network(name):
        raise UserError(f"there is no folder '{name}', and timm has no model of that name")
    return name


def check_folder(folder: Path, name: str) -> None:
    """Refuses a folder that does not hold a whole network.

    Args:
        folder: with config.json and model.safetensors.
        name: what the user called it, for errors.

    Raises:
        UserError: if a file is missing, damaged, or asks for more than its weights.
    """
    missing = [file for file in NETWORK if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder} holds no network: {' and '.join(missing)} missing; did its run finish?")
    config = read_config(folder / "config.json")
    check_weights(folder, config)
    check_network(config, folder / "model.safetensors", name)


def hub_repository(source: str, *, pretrained: bool) -> str | None:
    """The Hub repository that timm would fetch a network from, if any."""
    if source.startswith("hf-hub:"):
        return source.removeprefix("hf-hub:").split("@")[0]
    config = timm.get_pretrained_cfg(source) if pretrained and ":" not in source else None
    return None if config is None else config.hf_hub_id


def check_weights(folder: Path, record: Any) -> None:
    """Refuses a folder whose weights differ from the sha256 in its record (config.json or the like).

    Raises:
        UserError: if they differ, are cut short or missing.
    """
    if problem := damage(folder, recorded_sha256(record, ["model.safetensors"])):
        raise UserError(f"the network in {folder} is damaged: {problem}; make or fetch it again")


def check_published(name: str, cache_dir: str | Path | None) -> None:
    """Checks a network of the Hub, ORG/NAME or ORG/NAME@REVISION, which then lies in the cache; see `check_network`."""
    repo, _, revision = name.partition("@")
    config, weights = (
        Path(hf_hub_download(repo, file, revision=revision or None, cache_dir=cache_dir)) for file in NETWORK
    )
    check_network(read_config(config), weights, f"hf-hub:{name}")


def load_encoder(name: str, size: int | None = None, **kwargs: Any) -> Any:
    """A network whose features are read: `load_network` without classifier, for images of another size where asked.

    Args:
        name: the folder or the name.
        size: side in pixels that images are resized to for it; by default what it was trained with.
        kwargs: of `timm.create_model`.

    Raises:
        UserError: if it cannot be loaded, or cannot take images of that size.
    """
    network = load_network(name, num_classes=0, **kwargs)
    if size is None or size == input_spec(network).size:
        return network
    try:
        if hasattr(network, "set_input_size"):  # a transformer's position embeddings are interpolated
            network.set_input_size(img_size=(size, size))
        with torch.inference_mode():
            network.eval()(torch.zeros(1, input_channels(network), size, size))
    except Exception as error:  # every architecture refuses in its own way
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"'{name}' cannot take images of {size} px: {reason}; give another size") from error
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (input_channels(network), size, size)}
    return network


class Facts(TypedDict):
    """What a network's `pretrained_cfg` must say to be used."""

    architecture: str
    mean: list[float]
    std: list[float]
    input_size: tuple[Count, Pixels, Pixels]
    label_names: NotRequired[list[str] | None]


def check_facts(name: str, model: Any, classes: int | None) -> None:
    """Refuses a network whose config.json lacks something that is needed, or contradicts its weights.

    Args:
        name: what the user called it.
        model: the network.
        classes: how many label names there must be, if there are any.

    Raises:
        UserError: that says what is wrong.
    """
    facts = dict(vars(model.pretrained_cfg) if is_dataclass(model.pretrained_cfg) else model.pretrained_cfg)
    mistakes = problems(facts, Facts)
    labels = facts.get("label_names")
    if not mistakes and labels and classes and len(labels) != classes:
        mistakes = [f"label_names has {len(labels)} names for {classes} classes"]
    if mistakes:
        raise UserError(f"cannot use the network '{name}', because of its configuration: {mistakes[0]}")


def no_classifier(name: str) -> UserError:
    """What to raise for a network, which the user called `name`, that is none of this package or has no classes."""
    return UserError(f"'{name}' is not a network of this package with classes: train its heads first (sssd linear)")


def no_thresholds(name: str) -> UserError:
    """What to raise for early exit of a network, which the user called `name`, without thresholds."""
    return UserError(f"'{name}' has no thresholds: calibrate it by `sssd early-exit`, or give --thresholds")


def load_trunk_of(name: str) -> Any:
    """The trunk of a network, without exits and classifiers; see `load_network`."""
    network = load_network(name, num_classes=0)
    if hasattr(network, "forward_exits"):
        network = load_network(name, num_classes=0, output="final")
    return network


def load_trunk(model: nn.Module, source: nn.Module) -> None:
    """Copies a trunk's weights into a network with or without exits.

    Args:
        model: the network to fill.
        source: a trunk of the same architecture.

    Raises:
        UserError: unless every weight of the source has a place and the whole trunk is filled: a weight that is left
            out silently gives wrong results.
    """
    weights, ours = source.state_dict(), model.state_dict()
    heads = tuple(f"{name}." for name in classifier_names(model))
    trunk = {name for name in ours if not name.startswith(("exit", *heads))}
    misfits = [name for name, value in weights.items() if name not in ours or ours[name].shape != value.shape]
    misfits += sorted(trunk - weights.keys())
    if misfits:
        first = misfits[0]
        there, here = (list(state[first].shape) if first in state else "missing" for state in (weights, ours))
        theirs, name = (getattr(each, "pretrained_cfg", {}).get("architecture", "") for each in (source, model))
        origin, place = f", which are of {theirs}," if theirs else "", f" of {name}" if name else ""
        other = f"--model {theirs}, or " if theirs and theirs != name else ""
        raise UserError(
            f"the weights to start from{origin} do not fit the trunk{place} ({first} is {there} there, {here} here): "
            f"give {other}weights of a network of the same architecture and channels"
        )
    model.load_state_dict(weights, strict=False)


def new_trunk(arch: str, num_classes: int = 0, data: ImageData | OpenedImages | StreamingImages | None = None) -> Any:
    """A network without exits, with new weights, for the images of `data`."""
    without_exits: dict[str, Any] = {"output": "final"} if arch.startswith("sssd_") else {}
    return new_network(arch, data, num_classes=num_classes, **without_exits)


def new_network(arch: str, data: ImageData | OpenedImages | StreamingImages | None, **kwargs: Any) -> Any:
    """A network with new weights for the images of `data`: their channels, bits, mean and std, which config.json keeps.

    Args:
        arch: timm name.
        data: the images; of RGB of 8 bits, or without any, the network is timm's, with the mean and std that it has.
        kwargs: of `timm.create_model`.

    Raises:
        UserError: if it cannot take images of so many channels.
    """
    if takes_one_size(arch):
        kwargs["dynamic_img_size"] = True  # the views' size need not be timm's, and can grow while it trains
    if data is None or data.pixels is None:
        return timm.create_model(arch, **kwargs)
    mean, std = data.statistics or ((), ())
    try:
        network: Any = timm.create_model(arch, in_chans=data.channels, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:  # every architecture refuses in its own way
        raise UserError(f"'{arch}' cannot take images of {data.channels} channels: {error}") from error
    size = (data.channels, *network.pretrained_cfg["input_size"][1:])
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": size, "mean": mean, "std": std}
    if hasattr(network, "bits"):
        network.bits = data.pixels.bits
    return network


def takes_one_size(arch: str) -> bool:
    """Whether a network is a vision transformer that takes images of one size unless it is told otherwise."""
    config = timm.get_pretrained_cfg(arch)
    if config is None or not config.fixed_input_size:
        return False
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return isinstance(timm.create_model(arch), VisionTransformer)


def fits_channels(network: Any, images: int) -> bool:
    """Whether a network takes images of so many channels; one for grey images also takes RGB, which become grey."""
    return input_channels(network) == images or (input_channels(network) == 1 and images == 3)


def check_channels(name: str, network: Any, data: ImageData | OpenedImages) -> None:
    """Raises `UserError` unless a network, which the user called `name`, takes images of this data's channels."""
    if not fits_channels(network, data.channels):
        raise UserError(
            f"'{name}' takes images with {input_channels(network)} channels, and those of {data.name} are read with "
            f"{data.channels}: give another network, or other --channels"
        )


def config_for(name: str, network: Any, config: DataConfig) -> DataConfig:
    """How to read images for a network: with the channels and bits that it was trained on.

    Args:
        name: what the user called the network.
        network: it.
        config: what the user asked for.

    Raises:
        UserError: if that is another number of channels.
    """
    pixels = pixels_of(network)
    if config.channels is None:
        return config if pixels is None else replace(config, channels=pixels.channels, bits=cast(Any, pixels.bits))
    if not fits_channels(network, config.channels):
        raise UserError(
            f"'{name}' takes images with {input_channels(network)} channels, not {config.channels}: remove --channels, "
            "or give another network"
        )
    return config if pixels is None else replace(config, bits=config.bits or cast(Any, pixels.bits))


def weights_digest(network: torch.nn.Module) -> str:
    """A short fingerprint of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@contextmanager
def cache_if_unreachable(repo: str | None) -> Iterator[None]:
    """Within the block, huggingface_hub reads its cache at once if the Hub does not answer, instead of retrying.

    Args:
        repo: repository of the network that the block loads; None for one that is not on the Hub.
    """
    before = constants.HF_HUB_OFFLINE
    if repo is not None and not before:
        try:
            HfApi().model_info(repo, timeout=HUB_TIMEOUT)
        except HfHubHTTPError:
            pass  # the Hub answers: what is wrong the download will say
        except Exception:  # its HTTP client's errors, which differ between versions
            constants.HF_HUB_OFFLINE = True
    try:
        with limited_waiting():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
