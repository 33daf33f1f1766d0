"""`sssd quality`: how good a network is for some images, without labels."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sssd_zoo.configs import DataConfig, FitArgs, ForwardConfig, QualityArgs
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.data.walk import walk
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.label_free import collapse_warning
from sssd_zoo.evaluation.meanings import AGREEMENT, MEANINGS, TOO_FEW
from sssd_zoo.evaluation.reports.markdown import Results, can_be_pasted, read_results
from sssd_zoo.evaluation.subset import Subset, figures_of, network_figures
from sssd_zoo.evaluation.verdict import Commands, Verdict, command, judge
from sssd_zoo.files import expand_home
from sssd_zoo.files.run_folder import kind_of
from sssd_zoo.models import MultiExit
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.bundled import bundled_name, bundled_weights
from sssd_zoo.models.networks import choose_model, config_for, load_network

ENCODER = "tf_efficientnet_lite0.in1k"  # a public encoder that a CPU can run


def run_figures(distilled: Any, clustered: Any, data: ImageData, forward: ForwardConfig, seed: int) -> dict[str, float]:
    """The figures of a run.

    Args:
        distilled: its network, with a class per cluster.
        clustered: the network whose features were clustered.
        data: the images.
        forward: how to run networks.
        seed: of the run.

    Returns:
        Those of the distilled network, see `network_figures`; those of the clustered one as `clustered_std`; and
        `images`, how many were looked at.
    """
    subset = Subset(data, forward, seed, progress=True)
    figures = {"images": float(len(subset)), **network_figures(distilled, subset)}
    of_clustered = figures_of([view[-1] for view in subset.features(clustered)], subset)
    for of_one, what in ((figures, "the distilled network"), (of_clustered, "the network that was clustered")):
        if warning := collapse_warning(of_one, what):
            print(warning)
    return figures | {f"clustered_{name}": value for name, value in of_clustered.items()}


def data_words(args: DataConfig, extra: tuple[str, ...] = ()) -> list[str]:
    """The options that name a command's images, and of `extra` those that are not at their defaults."""
    ours = {field.name for field in fields(DataConfig)} | set(extra)
    words = []
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in ours and (field.name == "data" or value != field.default):
            words += [f"--{field.name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def image_of(data: str | list[str]) -> str | None:
    """An image file of the data whose name can be pasted, where these are folders of them."""
    folder = Path(expand_home(data if isinstance(data, str) else data[0]))
    images = walk(folder).images if folder.is_dir() else []
    return next((name for image in images if can_be_pasted(name := str(folder / image))), None)


def use_commands(network: str, args: DataConfig) -> list[str]:
    """How a good network is put to use: it classifies images, and embeds them."""
    image = image_of(args.data)
    predict = [] if image is None else [command("sssd", "predict", network, image)]
    return [*predict, embed_command(network, args)]


def embed_command(network: str, args: DataConfig) -> str:
    """How a network's features of the images are stored; each is decoded once, so none are kept in memory."""
    words = data_words(replace(DataConfig.of(args), in_memory=None))
    return command("sssd", "embed", network, *words, "--out", "embeddings.parquet")


def from_scratch(args: FitArgs) -> bool:
    """Whether a run of `sssd fit` learns from its images alone, without weights or features of another network.

    Those of a run that learned from a few images alone are none that knew more.
    """
    others = [name for name in (args.features, args.init, args.pretrain.init) if name is not None]
    return args.pretrain_data is None and all(of_few_images(name) for name in others)


def of_few_images(network: str) -> bool:
    """Whether a network is of a run of `sssd fit` that learned from too few images alone."""
    results = results_of(network)
    return results.get("from_scratch", False) and results.get("images", TOO_FEW) < TOO_FEW


def run_verdict(args: FitArgs, arch: str, images: int, figures: dict[str, float]) -> Verdict:
    """The verdict on a run of `sssd fit`.

    Args:
        args: of the command, complete.
        arch: timm name of its network.
        images: that it was trained on.
        figures: of `run_figures`.
    """
    fit = [
        "sssd",
        "fit",
        *data_words(args, ("model", "image_size", "test_split")),
    ]
    bundled = bundled_for(arch)
    out = Path(args.out)
    again = ("sssd", "fit", "--config", str(out / "config.yaml"))
    options: list[tuple[str, ...]] = []
    # Weights that MoCo started from fit the student, too, if M_ssl has its architecture.
    pretrained = args.pretrain.init if args.pretrain_model in (None, args.model, arch) else None
    if pretrained is not None and not args.warm_start and args.init is None:
        options.append(("warm", *again, "--warm_start"))
    if args.features is None and args.channels in (None, 3):  # all weights that could be offered are of RGB networks
        start = [name for name in (args.init, pretrained, *bundled) if name is not None]
        init = ("--init", start[0]) if start else ()
        options.append(("encoder", *fit, "--features", ENCODER, *init))
        if args.pretrain.init is None:
            options += [("weights", *fit, "--features", name, "--init", name) for name in bundled]
    longest = "pretrain" if args.features is None else "distill"
    options.append(("longer", *again, f"--{longest}.epochs", str(2 * getattr(args, longest).epochs)))
    improve = [command(*words, "--out", f"{out}-{name}") for name, *words in options]
    if images < TOO_FEW and args.channels in (None, 3):
        # Of 300 images nothing that was trained beat other weights as they are (docs/own_images.md).
        improve = [embed_command(name, args) for name in bundled] + improve
    commands = Commands(improve=improve, use=use_commands(args.out, args))
    return judge(figures, images=images, from_scratch=from_scratch(args), commands=commands)


def bundled_for(arch: str) -> list[str]:
    """The bundled weights of an architecture, MODEL.TAG with the default tag; none where it has none."""
    return [bundled_name(arch)] if bundled_weights(arch) is not None else []


def quality(args: QualityArgs) -> None:
    """`sssd quality`."""
    tune_cpu()
    model = load_network(args.model)
    config = config_for(args.model, model, DataConfig.of(args))
    data = load_images(config, default_size=storage_default(input_spec(model).size))
    if len(data) < 2:
        raise UserError(f"{data.name} has {len(data)} image; quality without labels needs at least 2")
    subset = Subset(data, ForwardConfig.of(args), args.seed, args.images, progress=True)
    figures = {"images": float(len(subset)), **network_figures(model, subset)}
    args = replace(args, channels=config.channels, bits=config.bits)
    commands = quality_commands(args, model)
    # A network of any other images has not learned these by heart, however few they are.
    run = run_on(args.model, data)
    verdict = judge(figures, images=len(data), from_scratch=run.get("from_scratch", False), commands=commands)
    if args.format == "json":
        print(json.dumps({"label_free": figures, "verdict": verdict}, indent=2))
        return
    print(f"{plain(args.model)}: {verdict['level']}. {verdict['sentence']}")
    print(f"Of {len(subset):,} images of {data.name}, without labels:")
    print(describe_figures(figures))
    print("\n".join(["Next:", *(f"  {line}" for line in verdict["next"])]))


def quality_commands(args: QualityArgs, model: Any) -> Commands:
    """What is proposed for any network and images; `args` with the channels and bits that are read."""
    use = use_commands(args.model, args)
    fit = ["sssd", "fit", *data_words(args)]
    if args.channels not in (None, 3):  # all weights that could be offered are of RGB networks
        return Commands(improve=[command(*fit, "--out", "run")], use=use)
    size = input_spec(model).size
    arch = architecture_of(model) if isinstance(model, MultiExit) else choose_model(None, size)
    student = [*fit, "--model", arch, "--image_size", str(size)]
    init = [word for name in bundled_for(arch)[:1] for word in ("--init", name)]
    encoder = command(*student, "--features", ENCODER, *init, "--out", "run-encoder")
    if isinstance(model, MultiExit):
        return Commands(improve=[encoder], use=use)
    return Commands(
        improve=[encoder], use=[command(*student, "--features", args.model, *init, "--out", "run-distilled"), *use]
    )


def run_on(model: str, data: ImageData) -> Results:
    """The results of the run of `sssd fit` whose network was measured, if it was trained on these images; else {}."""
    results = results_of(model)
    return results if results.get("fingerprint") == data.fingerprint else {}


def results_of(network: str) -> Results:
    """The results of the run of `sssd fit` that a network is of; {} for any other."""
    path = Path(expand_home(network).removeprefix("local-dir:")).absolute()
    for folder in (path, *path.parents[:2]):  # the run itself, its model, probe/network
        if path.is_dir() and kind_of(folder) == "fit" and (folder / "metrics.json").is_file():
            return read_results(folder)
    return {}


def describe_figures(figures: dict[str, float]) -> str:
    """The figures as lines for a terminal: value, name, and what it means."""
    lines = []
    for key, meaning in {**MEANINGS, **AGREEMENT}.items():
        if key in figures:
            value = f"{figures[key]:.{meaning.digits}f}"
            lines.append(f"  {value:>8}  {meaning.title}: {meaning.words}; {meaning.better}")
    return "\n".join(lines)
