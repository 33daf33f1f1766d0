"""Networks by their names or folders: choosing, loading, checking and listing them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import timm
import torch
from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError
from timm.models._input import get_model_args
from torch import nn

from sssd_zoo.configs.ranges import Count, Pixels, problems
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.sources import HUB_TIMEOUT
from sssd_zoo.data.streaming import StreamingImages
from sssd_zoo.errors import UserError
from sssd_zoo.files import (
    damage,
    read_json,
    recorded_sha256,
)
from sssd_zoo.files.hub_client import limited_waiting
from sssd_zoo.models.checks import check_network, read_config


def choose_size(data: ImageData | StreamingImages, image_size: int | None) -> int:
    """The side of the views: as asked, else the images' own where they are small, else 224 px."""
    return image_size or (data.size if data.size <= 40 else 224)


def choose_model(name: str | None, size: int) -> str:
    """The network's name: as asked, else the one of this package whose stem is made for the size.

    Raises:
        UserError: if timm has no network of that name.
    """
    name = name or ("sssd_resnet18_cifar" if size <= 40 else "sssd_resnet18")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models("sssd_*"))
        raise UserError(f"timm has no model '{name}'; this package's are {close}")
    return name


def check_sizes(arch: str, sizes: list[int]) -> None:
    """Refuses views that are too small for a network of this package.

    Below its smallest input a stage would stride over a map of one pixel, where oneDNN's bf16 convolutions (seen in
    torch 2.15) give weight gradients of uninitialised memory.

    Raises:
        UserError: naming the size.
    """
    config = timm.get_pretrained_cfg(arch)
    smallest = config.min_input_size[-1] if config and config.min_input_size else 1
    if min(sizes) < smallest:
        raise UserError(
            f"views of {min(sizes)} px are too small for {arch}, which wants at least {smallest}: give other sizes, or "
            "a network with the stem for small images (sssd_resnet18_cifar)"
        )


def load_network(name: str, **kwargs: Any) -> Any:
    """A network with its weights: a folder that this package or timm wrote, else a timm name with pretrained weights.

    Of a run folder of `sssd fit` it is the network in its `model`.

    Args:
        name: the folder or the name.
        kwargs: of `timm.create_model`; `pretrained=False` gives the network with new weights.

    Raises:
        UserError: if there is neither, the weights do not fit, or its images are neither RGB nor grey.
    """
    folder = Path(name.removeprefix("local-dir:"))
    source = name
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        missing = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder} holds no network: {' and '.join(missing)} missing; did its run end?")
        check_weights(folder, read_json(folder / "config.json"))
        source = f"local-dir:{folder}"
        check_network(read_config(folder / "config.json"), folder / "model.safetensors", name)
    elif name.startswith("local-dir:"):
        if not Path(name.removeprefix("local-dir:")).is_dir():
            raise UserError(f"there is no folder '{name.removeprefix('local-dir:')}'")
        return load_network(name.removeprefix("local-dir:"), **kwargs)
    elif not name.startswith("hf-hub:") and not timm.is_model(name):
        raise UserError(f"there is no folder '{name}', and timm has no model of that name")
    options = {"pretrained": True, **kwargs}
    config = timm.get_pretrained_cfg(source) if ":" not in source else None
    repo = source.removeprefix("hf-hub:").split("@")[0] if source.startswith("hf-hub:") else None
    if config is not None and options["pretrained"]:
        repo = config.hf_hub_id
        if (bundled := Path(config.file or "")).parent == Path(__file__).parents[1] / "weights":
            check_bundled(bundled)
    try:
        with cache_if_unreachable(repo):
            if source.startswith("hf-hub:"):
                check_published(source.removeprefix("hf-hub:"), kwargs.get("cache_dir"))
            model: Any = timm.create_model(source, **options)
    except UserError as error:
        raise UserError(f"cannot load the network '{name}': {error}") from error
    except Exception as error:  # a config.json can ask for anything, of timm's code and of this
        raise UserError(f"cannot load the network '{name}': {type(error).__name__}: {str(error)[:300]}") from error
    check_facts(name, model, classes=None if kwargs.keys() & {"num_classes", "features_only"} else model.num_classes)
    if channels(model) not in (1, 3):
        raise UserError(
            f"'{name}' takes images of {channels(model)} channels, but images are read as RGB, for 3 channels, "
            "or made grey, for 1: give a network of 3 or 1"
        )
    return model


def check_weights(folder: Path, record: Any) -> None:
    """Refuses a folder whose weights are not those that its record, config.json or the like, tells the sha256 of.

    Raises:
        UserError: if they are others, cut short or missing.
    """
    if wrong := damage(folder, recorded_sha256(record, ["model.safetensors"])):
        raise UserError(f"the network in {folder} is damaged: {wrong}; run again, or fetch, what made it")


def check_bundled(weights: Path) -> None:
    """Refuses weights of this package that are not those that their card tells the sha256 of.

    Raises:
        UserError: if they are others, cut short or missing.
    """
    card = read_json(hub_cards() / weights.stem / "metrics.json")
    if wrong := damage(weights.parent, {weights.name: card["weights"]["sha256"]}):
        raise UserError(f"the bundled weights in {weights.parent} are damaged: {wrong}; reinstall sssd-zoo")


def check_published(name: str, cache_dir: str | Path | None) -> None:
    """Checks a network of the Hub, ORG/NAME or ORG/NAME@REVISION, which then lies in the cache; see `check_network`."""
    repo, _, revision = name.partition("@")
    config, weights = (
        Path(hf_hub_download(repo, file, revision=revision or None, cache_dir=cache_dir))
        for file in ("config.json", "model.safetensors")
    )
    check_network(read_config(config), weights, f"hf-hub:{name}")


class Facts(TypedDict):
    """What a network's `pretrained_cfg` must say to be used."""

    architecture: str
    mean: list[float]
    std: list[float]
    input_size: tuple[Count, Pixels, Pixels]
    label_names: NotRequired[list[str] | None]


def check_facts(name: str, model: Any, classes: int | None) -> None:
    """Refuses a network whose config.json says less of it than is needed, or something else than its weights.

    Args:
        name: what the user called it.
        model: it.
        classes: number of classes that names are to be of, if any.

    Raises:
        UserError: that says what.
    """
    facts = dict(vars(model.pretrained_cfg) if is_dataclass(model.pretrained_cfg) else model.pretrained_cfg)
    wrong = problems(facts, Facts)
    labels = facts.get("label_names")
    if not wrong and labels and classes and len(labels) != classes:
        wrong = [f"label_names has {len(labels)} names for {classes} classes"]
    if wrong:
        raise UserError(f"cannot use the network '{name}', for the configuration that describes it: {wrong[0]}")


def load_trunk_of(name: str) -> Any:
    """The trunk of a network, without exits and classifiers; see `load_network`."""
    network = load_network(name, num_classes=0)
    if hasattr(network, "forward_exits"):
        network = load_network(name, num_classes=0, output="final")
    return network


def load_trunk(model: nn.Module, source: nn.Module) -> None:
    """Copies a trunk's weights into a network with exits.

    Raises:
        UserError: unless every weight of the source finds its place and the whole trunk is filled: one that silently
            stays behind is a wrong result.
    """
    weights, ours = source.state_dict(), model.state_dict()
    trunk = {name for name in ours if not name.startswith(("exit", "fc."))}
    wrong = [name for name, value in weights.items() if name not in ours or ours[name].shape != value.shape]
    wrong += sorted(trunk - weights.keys())
    if wrong:
        there, here = (list(own[wrong[0]].shape) if wrong[0] in own else "missing" for own in (weights, ours))
        raise UserError(
            f"the weights to start from do not fit the trunk ({wrong[0]} is {there} there, {here} here); give a "
            "network of the same architecture and channels"
        )
    model.load_state_dict(weights, strict=False)


def new_trunk(arch: str, num_classes: int = 0) -> Any:
    """A network without exits, with new weights."""
    own: dict[str, Any] = {"output": "final"} if arch.startswith("sssd_") else {}
    return timm.create_model(arch, num_classes=num_classes, **own)


def channels(model: Any) -> int:
    """How many channels the images of a timm network have."""
    return int(get_model_args(model).get("in_chans", 3))


def statistics(model: Any) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and std of the channels and the side of the images that a timm network was trained with.

    Of a network for grey images they are of one channel, from which `normalise` knows to make images grey.
    """
    config = model.pretrained_cfg
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if channels(model) == 1:  # its configuration may still be that of the RGB network it was made from
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return mean, std, int(config["input_size"][-1])


def input_spec(model: Any, size: int | None = None) -> InputSpec:
    """What a timm network wants of its images; `size`, in pixels, takes the place of its own."""
    mean, std, own_size = statistics(model)
    return InputSpec(size or own_size, mean, std)


def weights_digest(network: torch.nn.Module) -> str:
    """A short fingerprint of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hub_cards() -> Path:
    """The folder of the card's template and the cards of weights that ship: in the wheel, else in the checkout."""
    installed = Path(__file__).parents[1] / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "hub_cards"


@contextmanager
def cache_if_unreachable(repo: str | None) -> Iterator[None]:
    """Sends huggingface_hub straight to its cache in the block where the Hub does not answer, instead of trying again.

    Args:
        repo: of the network that the block loads; nothing is asked for None.
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
