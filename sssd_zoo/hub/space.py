"""`sssd space`: fills a folder with a network's page, and shows it on this machine or publishes it as a Space.

The folder is the Space: `sssd_zoo.hub.page` describes and shows it, in either place. Beside that lie app.py,
requirements.txt and README.md of hub_cards/space/, and the few modules of this package that the page imports, so that a
Space needs no release of it.
"""

import glob
import io
import shutil
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, SpaceCard, get_token
from PIL import Image

from sssd_zoo.configs import DataConfig
from sssd_zoo.data import columns, sources
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import EncodedImages, decode, natural_size, spaced
from sssd_zoo.data.loading import open_encoded
from sssd_zoo.data.several import open_data
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.reports.markdown import config_of, read_results
from sssd_zoo.files import atomic_write_bytes, atomic_write_text, disk_errors, write_json
from sssd_zoo.files.bundled import PACKAGE, cards_folder
from sssd_zoo.files.run_folder import NETWORK, kind_of
from sssd_zoo.files.untrusted import read_inside
from sssd_zoo.hub.publish import announce, check_name, hub_errors
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.checks import check_network, read_config
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network

EXAMPLES = 10

EXAMPLE_SIDE = 320  # pixels, of images that are larger

NEAREST = 8  # images shown of a cluster

THUMBNAIL_SIDE = 72

# What the page imports of this package, by pattern: a test runs the page with nothing else.
PAGE_CODE = (
    "__init__.py",
    "configs/*.py",
    "data/__init__.py",
    "data/augment.py",
    "data/containers.py",
    "data/formats.py",
    "data/images.py",
    "data/inputs.py",
    "data/opening.py",
    "data/pixels.py",
    "distributed/__init__.py",
    "distributed/progress.py",
    "errors/*.py",
    "hub/__init__.py",
    "hub/page.py",
    "models/__init__.py",
    "models/backbones.py",
    "models/class_names.py",
    "models/cost.py",
    "models/exits.py",
    "models/merged.py",
    "models/multi_exit.py",
    "models/multi_exit_resnet.py",
    "models/resnet.py",
    "models/staged.py",
    "models/stages.py",
)


def check_push(name: str, *, dry_run: bool) -> None:
    """Refuses a push that cannot work, before anything is done.

    Raises:
        UserError: that says what.
    """
    check_name(name)
    if not dry_run and get_token() is None:
        raise UserError("--push needs a Hub login: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool, dry_run: bool) -> None:
    """Lists the files of a Space and, unless `dry_run`, uploads them in one commit.

    Raises:
        UserError: if the Hub cannot be reached or refuses, or the Space is to be private and is public.
    """
    files = announce(name, folder)
    if dry_run:
        print("dry run: nothing was uploaded")
        return
    api = HfApi()
    with disk_errors(folder), hub_errors(name, "nothing was published; run the command again"):
        url = api.create_repo(name, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        if private and not api.repo_info(name, repo_type="space").private:
            raise UserError(f"the Space {name} is public: make it private on the Hub, or give another name")
        api.upload_folder(
            repo_id=name,
            repo_type="space",
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in files],
            commit_message="sssd space",
            # Nothing of a previous network stays.
            delete_patterns=["model/*", "examples/*", "clusters/*", "sssd_zoo/*"],
        )
    print(f"published: {url}")


def assemble(run: str, folder: Path, *, run_images: bool = True) -> list[str]:
    """Fills an empty folder with a network's Space.

    Args:
        run: run folder of `sssd fit` or `sssd finetune`, a folder with a network, or a timm name with weights.
        folder: to fill.
        run_images: show images of the run's data; otherwise only bundled ones.

    Returns:
        Lines that say what the page shows, and what is missing and why.

    Raises:
        UserError: if there is no network, or it lacks exits or classifiers.
    """
    in_run = (Path(run) / "model/config.json").is_file()
    fitted = in_run and kind_of(Path(run)) != "finetune"
    source = str(Path(run) / "model") if in_run else run
    network = load_network(source)
    if getattr(network, "output", None) != "ensemble" or not network.num_classes:
        raise UserError(f"'{run}' is not a network with four exits and classifiers, which the page needs")
    architecture = architecture_of(network)
    names = network.pretrained_cfg.get("label_names")
    if Path(source).is_dir():
        copy_network(Path(run), "model" if in_run else ".", folder / "model")
    else:
        save_network(folder / "model", network, architecture, label_names=names)
    title = architecture if Path(run).is_dir() else run.rpartition(":")[2]
    examples, notes = None, []
    if fitted:
        title = f"{architecture} on {read_results(run)['data']}"
        if run_images:
            try:
                shown = copy_clusters(Path(run), folder / "clusters")  # first, as it refuses images of other data
                examples = run_examples(Path(run))
                notes.append(shown)
            except UserError as error:
                shutil.rmtree(folder / "clusters", ignore_errors=True)
                notes.append(f"without the run's images and clusters: {error}")
    if examples is None:
        sample = DataConfig(data=sources.SAMPLE_NAME)
        examples = pick_examples(sources.open_splits(sources.SAMPLE_NAME), "test", sample)
    for number, image in enumerate(examples):
        atomic_write_bytes(folder / f"examples/{number:02}.png", encode(image, "PNG"))
    clusters = names == [f"cluster {number}" for number in range(network.num_classes)]
    write_json(folder / "page.json", {"title": title, "answers_are_clusters": clusters})
    copy_app(folder, title)
    size = network.pretrained_cfg["input_size"][-1]
    return [f"{title}: {network.num_classes} {'clusters' if clusters else 'classes'} at {size} px", *notes]


def copy_network(root: Path, source: str, folder: Path) -> None:
    """Copies the network in `source`, a folder in `root` or '.', as it is; not through links."""
    for name in NETWORK:
        atomic_write_bytes(folder / name, read_inside(root, f"{source}/{name}"))


def copy_app(folder: Path, title: str) -> None:
    """Writes app.py, requirements.txt and README.md of hub_cards/space/, and the page's code."""
    template = cards_folder() / "space"
    card = SpaceCard.load(template / "README.md")
    card.data.title = title
    atomic_write_text(folder / "README.md", str(card))
    code = [path for pattern in PAGE_CODE for path in sorted(PACKAGE.glob(pattern))]
    pairs = [(path, folder / "sssd_zoo" / path.relative_to(PACKAGE)) for path in code]
    pairs += [(template / name, folder / name) for name in ("app.py", "requirements.txt")]
    for path, copy in pairs:
        atomic_write_bytes(copy, path.read_bytes())


def rgb_config(run: Path) -> tuple[dict[str, Any], DataConfig]:
    """A run's arguments, and those of its data among them, where the page can show its images.

    Raises:
        UserError: if they cannot be read, or the images are not read as RGB of 8 bits.
    """
    recipe, config = config_of(run)
    if config.channels is not None:
        raise UserError(f"{run} was trained with --channels {config.channels}, and the page shows RGB images only")
    return recipe, config


def run_examples(run: Path) -> list[Any]:
    """Images of the split that a run was measured on, or of its training split."""
    recipe, config = rgb_config(run)
    splits = open_data(config, progress=True)
    split = next((name for name in (recipe["test_split"], "test", "validation") if name in splits), config.split)
    return pick_examples(*columns.take_split(splits, split, sources.short_name(config.data)), config)


def pick_examples(splits: sources.Splits, split: str, config: DataConfig) -> list[Any]:
    """A few images of a split, of different classes if it has labels: uint8 [3, S, S] each.

    Raises:
        UserError: if none can be decoded.
    """
    name = sources.short_name(config.data)
    encoded = open_encoded(splits[split], config.image_column, name, config.max_pixels)
    labels = columns.read_labels(splits, split, config.label_column, name, required=False)
    rows: Iterator[int] = iter(spaced(len(encoded), EXAMPLES).tolist())
    if labels is not None:
        shown = spaced(len(labels.names), EXAMPLES)
        members = [np.flatnonzero(labels.values == label).tolist() for label in shown]
        rows = (row for row in chain.from_iterable(zip_longest(*members)) if row is not None)
    images = list(islice(decodable(encoded, rows, EXAMPLE_SIDE, config.max_pixels), EXAMPLES))
    if not images:
        raise UserError(f"no image of {name} ({split}) can be decoded")
    return images


def decodable(encoded: EncodedImages, rows: Iterator[int], largest: int, max_pixels: int) -> Iterator[Any]:
    """The images of these rows that can be decoded, as squares of at most `largest` pixels a side."""
    side = min(natural_size(encoded.read(spaced(len(encoded), EXAMPLES))) or largest, largest)
    for row in rows:
        try:
            yield decode(encoded.read([row])[0], side, max_pixels)
        except CorruptImageError:
            continue  # the run skipped it too


def copy_clusters(run: Path, folder: Path) -> str:
    """Writes a run's pretext network, its centroids, and thumbnails of the images nearest to each; tells how many.

    Without a pretext network of the run's own, nothing is written.

    Raises:
        UserError: if its pseudo labels, pretext network or images cannot be read, or the images do not fit the labels.
    """
    pseudo = PseudoLabels.load(run / "labels")
    recipe, config = rgb_config(run)
    encoded = pseudo.open_images(config)
    if recipe.get("features") is not None:
        return "without clusters: the page finds the cluster of an image by a network that the run pretrained"
    absent = [name for name in NETWORK if not (run / "pretrain" / name).is_file()]
    if absent:
        raise UserError(f"{run / 'pretrain'} holds no network: {' and '.join(absent)} missing")
    order = np.lexsort((pseudo.distances, pseudo.labels))
    starts = np.searchsorted(pseudo.labels[order], np.arange(len(pseudo.centroids)))
    sizes = np.bincount(pseudo.labels)
    shown = np.concatenate(
        [order[start : start + min(size, NEAREST)] for start, size in zip(starts, sizes, strict=True)]
    )
    side = min(natural_size(encoded.read(spaced(len(encoded), EXAMPLES))) or THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    images = []
    with progress_bar(len(shown), "thumbnails", "img", leave=False) as bar:
        for row in pseudo.rows[shown].tolist():
            images.append(encode(decode(encoded.read([row])[0], side, config.max_pixels), "WEBP"))
            bar.update()
    copy_network(run, "pretrain", folder)
    check_network(read_config(folder / "config.json"), folder / "model.safetensors", str(run / "pretrain"))
    atomic_write_bytes(folder / "centroids.safetensors", read_inside(run, "labels/centroids.safetensors"))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"cluster": pseudo.labels[shown], "image": pa.array(images, pa.binary())}), buffer)
    atomic_write_bytes(folder / "nearest.parquet", buffer.getvalue().to_pybytes())
    return f"{len(sizes)} clusters of {sources.short_name(config.data)}, {len(images)} thumbnails of its images"


def encode(image: Any, kind: str) -> bytes:
    """Uint8 [3, S, S] as a file of this kind."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, kind, quality=90)
    return buffer.getvalue()
