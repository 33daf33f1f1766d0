"""A run's network under the run's own name: `timm.create_model("local-dir:RUN")` looks for its files in RUN itself."""

from pathlib import Path

from sssd_zoo.files.run_folder import NETWORK


def link_network(run: Path) -> None:
    """Makes RUN/config.json and RUN/model.safetensors symbolic links to those in RUN/model.

    Links take no space and never show another network than RUN/model. Files of the user's by these names stay. On a
    file system without links there are none: `local-dir:RUN/model` is the network in any case.

    Args:
        run: folder of a run with its network in `model`.
    """
    for name in NETWORK:
        link = run / name
        if link.is_symlink() or link.exists():
            continue
        try:
            link.symlink_to(Path("model") / name)
        except OSError as error:
            print(f"{run} has no link to its network ({error.strerror}): timm loads it by local-dir:{run / 'model'}")
            return
