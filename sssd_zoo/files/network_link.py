"""A run's network under the run's own name: `timm.create_model("local-dir:RUN")` looks for its files in RUN itself."""

from pathlib import Path

from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json, recorded_sha256, sha256, temporary_name
from sssd_zoo.files.run_folder import NETWORK

CONFIG, WEIGHTS = NETWORK


def link_network(run: Path) -> None:
    """Makes RUN/config.json and RUN/model.safetensors symbolic links to those in RUN/model.

    Links take no space and never show another network than RUN/model. Where a run was copied with links followed, the
    copies of its network become links again: call this before that network changes, too, as copies of an earlier one
    are not told from files of the user's, which stay. On a file system without links there are none:
    `local-dir:RUN/model` is the network in any case.

    Args:
        run: folder of a run with its network in `model`.
    """
    for name in NETWORK:
        link = run / name
        if link.is_symlink():
            continue
        if link.exists() and not _is_copy(link, run / "model"):
            print(f"{link} is not the network of this run, so it is kept: timm loads that by local-dir:{run / 'model'}")
            continue
        temporary = temporary_name(link)
        try:
            temporary.symlink_to(Path("model") / name)
            temporary.replace(link)
        except OSError as error:
            print(f"{run} has no link to its network ({error.strerror}): timm loads it by local-dir:{run / 'model'}")
            return


def _is_copy(file: Path, network: Path) -> bool:
    """Whether a file is a copy of the network's file of that name; its names of classes may have changed since."""
    weights = _stated(network / CONFIG)
    if not weights or not file.is_file():
        return False
    return (_stated(file) if file.name == CONFIG else {WEIGHTS: sha256(file)}) == weights


def _stated(config: Path) -> dict[str, str]:
    """The sha256 that a network's config.json states for its weights; {} if there is none."""
    try:
        return recorded_sha256(read_json(config), [WEIGHTS])
    except UserError:
        return {}
